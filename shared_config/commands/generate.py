"""``kempnerforge generate``: a model continues a prompt, after an image if it sees any, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from shared_config.commands.backends import require_backend
from shared_config.commands.pictures import (
    Prompt,
    image_token_of,
    prompt_with,
    read_frames,
    takes_several,
    user_message,
)
from shared_config.commands.speaking import (
    conversation_ids,
    load_speaker,
    manner_of,
    precision,
    spoken,
    template_of,
    tokenizer_name,
)
from shared_config.contract.decoding import check_architecture
from shared_config.data.image_sources import Shapes
from shared_config.data.tokenizer import Tokenizer, build_tokenizer
from shared_config.errors import UserError
from shared_config.interchange.vision import picture_format
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    config = load_config(options.config, overrides)
    config.validate(world_size=1)
    check_architecture(config.vlm)
    tokenizer = build_tokenizer(tokenizer_name(options, config, overrides), config.data.eos_id)
    if options.chat:
        shown = len(options.image) if takes_several(config) else min(1, len(options.image))
        message = user_message(options.prompt, shown, config)
        prompt = conversation_ids(template_of(tokenizer, image_token_of(config)), [message])
    else:
        prompt = encode_prompt(tokenizer, options.prompt, config)
    seen = asked(prompt, options, config)
    manner = manner_of(options, config, tokenizer)
    require_backend(options.backend)
    times: list[float] = []
    with precision(options, config):
        model = load_speaker(options, config, overrides)
        pieces = spoken(
            model, seen, manner, tokenizer, options, length=options.max_new_tokens, seed=options.seed, times=times,
        )  # fmt: skip
        sys.stdout.write("" if options.chat else options.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    print(speed(times), file=sys.stderr)
    return 0


def encode_prompt(tokenizer: Tokenizer, text: str, config: JobConfig) -> list[int]:
    """The ids of a prompt, without a start-of-text id if the model has none.

    Raises:
        UserError: nothing to begin with.
    """
    has_prefix = config.vlm is not None and config.vlm.has_prefix
    prompt = tokenizer.encode_prefix(text) if has_prefix else tokenizer.encode_prompt(text)
    if tokenizer.begin is not None and tokenizer.begin >= config.model.vocab_size:
        prompt = [token for token in prompt if token != tokenizer.begin]
    if not prompt:
        raise UserError(f"--prompt = {text!r}: must not be empty, as the vocabulary has no token that begins a text")
    return prompt


def asked(prompt: Sequence[int], options: argparse.Namespace, config: JobConfig) -> Prompt:
    """The prompt with the pictures of ``--image``, or as many drawn by code as it has ids for them, one at least.

    Raises:
        UserError: a file that can't be read, an image for a model that sees none, or not an id for each image.
    """
    if config.vlm is None or config.vision_encoder is None:
        if options.image:
            raise UserError(
                f"--image = {options.image[0]}: the config has no [vlm] section, so its model sees no image"
            )
        return prompt_with("--prompt", prompt, None, config)
    if options.image:
        return prompt_with("--prompt", prompt, read_frames(options.image, config), config)
    count = prompt.count(image_token_of(config)) if takes_several(config) else 1
    side = picture_format(config.vision_encoder, config.video).side
    drawn = [
        Shapes(side, config.video).example((options.seed or 0) + index, "heldout") for index in range(max(count, 1))
    ]
    found = prompt_with("--prompt", prompt, np.concatenate([example.frames for example in drawn]), config)
    seen = ", ".join(example.text for example in drawn)
    print(f"no --image is given: the model sees {seen}, drawn by code", file=sys.stderr)
    return found


def speed(times: Sequence[float]) -> str:
    """What the times say: the start, then when each token came."""
    count = len(times) - 1
    if count < 2:
        return f"{count} tokens in {times[-1] - times[0]:.2f} s"
    rate = (count - 1) / max(times[-1] - times[1], 1e-9)
    return f"{count} tokens: the first after {times[1] - times[0]:.2f} s, then {rate:.1f} tokens/s"
