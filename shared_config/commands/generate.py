"""``kempnerforge generate``: a model continues a prompt, after an image if it sees any, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared_config.commands.backends import require_backend
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
from shared_config.contract.image_token import without_image_token
from shared_config.data.image_sources import Shapes, read_pictures
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
        prompt = conversation_ids(template_of(tokenizer), [{"role": "user", "content": options.prompt}])
    else:
        prompt = encode_prompt(tokenizer, options.prompt, config.model.vocab_size)
    prompt, places = placed_image(prompt, config)
    manner = manner_of(options, config, tokenizer)
    pixels = read_images(options, config)
    require_backend(options.backend)
    times: list[float] = []
    with precision(options, config):
        model = load_speaker(options, config, overrides)
        pieces = spoken(
            model, prompt, manner, tokenizer, options,
            length=options.max_new_tokens, seed=options.seed, times=times, pixels=pixels, image_positions=places,
        )  # fmt: skip
        sys.stdout.write("" if options.chat else options.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    print(speed(times), file=sys.stderr)
    return 0


def encode_prompt(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """The ids of a prompt, without a start-of-text id if the model has none.

    Raises:
        UserError: nothing to begin with.
    """
    prompt = tokenizer.encode_prompt(text)
    if tokenizer.bos is not None and tokenizer.bos >= vocab_size:
        prompt = [token for token in prompt if token != tokenizer.bos]
    if not prompt:
        raise UserError(f"--prompt = {text!r}: must not be empty, as the vocabulary has no token that begins a text")
    return prompt


def placed_image(prompt: Sequence[int], config: JobConfig) -> tuple[list[int], list[int] | None]:
    """The prompt without the id of the image, and how many of its ids stand before that; None: where none says so.

    Raises:
        UserError: several of them, or nothing after it.
    """
    ids = np.asarray(prompt)
    text, place = without_image_token("--prompt", ids, None if config.vlm is None else config.vlm.image_token)
    if len(text) == len(ids):
        return list(prompt), None
    if place == len(text):
        raise UserError(f"--prompt ends with the id of the image, {ids[-1]}: must go on with text")
    return text.tolist(), [place]


def read_images(options: argparse.Namespace, config: JobConfig) -> np.ndarray | None:
    """What the model looks at: float32 (1, 3, s, s), or (1, F, 3, s, s) with a [video] section; None for a text model.

    Raises:
        UserError: a file that can't be read, or an image for a model that sees none.
    """
    if config.vlm is None or config.vision_encoder is None:
        if options.image:
            raise UserError(
                f"--image = {options.image[0]}: the config has no [vlm] section, so its model sees no image"
            )
        return None
    pixels = picture_format(config.vision_encoder, config.video)
    if options.image:
        frames = read_pictures([Path(file) for file in options.image], pixels, config.video)
    else:
        example = Shapes(pixels.side, config.video).example(options.seed or 0, "heldout")
        frames = example.frames
        print(f"no --image is given: the model sees {example.text}, drawn by code", file=sys.stderr)
    numbers = pixels.numbers(frames)
    return numbers if config.video is None else numbers[None]


def speed(times: Sequence[float]) -> str:
    """What the times say: the start, then when each token came."""
    count = len(times) - 1
    if count < 2:
        return f"{count} tokens in {times[-1] - times[0]:.2f} s"
    rate = (count - 1) / max(times[-1] - times[1], 1e-9)
    return f"{count} tokens: the first after {times[1] - times[0]:.2f} s, then {rate:.1f} tokens/s"
