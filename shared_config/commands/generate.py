"""``kempnerforge generate``: a model continues a prompt, after an image if it sees any, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from shared_config.commands.backends import backend_module, require_backend
from shared_config.commands.common import add_backend, add_config, fitting_weights, folder_of, not_negative
from shared_config.contract.decoding import check_architecture
from shared_config.contract.int8 import WEIGHTS_DTYPES
from shared_config.contract.warm_start import without_warm_start
from shared_config.data.image_sources import Shapes, read_pictures
from shared_config.data.tokenizer import Tokenizer, build_tokenizer
from shared_config.errors import UserError
from shared_config.interchange.tokens import beside, has_tokenizer, stop_ids
from shared_config.interchange.vision import picture_format
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig

HELP = "continue a prompt, streamed to the terminal; the speed is shown at the end"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="native weights, a training run or checkpoint, or a Hugging Face folder (default: those of CONFIG where "
        "it is a folder, else initial weights)",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="what a [vlm] config looks at: a picture; with a [video] section also a clip, or several pictures as its "
        "frames, in order (default: one drawn by code)",
    )
    parser.add_argument("--max-new-tokens", type=not_negative, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most probable token (default: 1)")
    parser.add_argument(
        "--top-k", type=not_negative, default=0, metavar="K", help="keep the K most probable (default: 0, all)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep this probability (default: 1, all)")
    parser.add_argument("--seed", type=not_negative, help="of the draws, and of initial weights (default: another)")
    parser.add_argument(
        "--weights-dtype",
        default=WEIGHTS_DTYPES[0],
        choices=WEIGHTS_DTYPES,
        help="int8: hold the weights of layers in a quarter of the memory, each within half a step of what it was, of "
        "which the largest of its output has 127 (default: float32)",
    )
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch: compile what gives a token, and replay it as a CUDA graph on a GPU; jax always compiles",
    )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    config = load_config(options.config, overrides)
    config.validate(world_size=1)
    check_architecture(config.vlm)
    tokenizer = build_tokenizer(tokenizer_name(options, config, overrides), config.data.eos_id)
    prompt = encode_prompt(tokenizer, options.prompt, config.model.vocab_size)
    path = weights_of(options)
    known = None if path is None else beside(path)
    stops = {*tokenizer.stops, *(() if known is None else stop_ids(known))}
    pixels = read_images(options, config)
    require_backend(options.backend)
    backend = backend_module(options.backend, "model.generate")
    weights = read_weights(options, config, overrides)
    built = config if weights is None else without_warm_start(config)
    model = backend_module(options.backend, "model.build").load_model(
        built, weights, options.device, seed=options.seed or 0, weights_dtype=options.weights_dtype
    )
    own = {"compile": options.compile} if options.backend == "torch" else {}
    with backend_module(options.backend, "training.mixed_precision").matmul_precision(config.train.matmul_precision):
        tokens = backend.stream(
            model,
            [prompt],
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_token_id=sorted(token for token in stops if token < config.model.vocab_size),
            seed=options.seed,
            pixel_values=pixels,
            **own,
        )
        times = [time.perf_counter()]
        sys.stdout.write(options.prompt)
        for piece in tokenizer.decode_stream(timed(tokens, times), after=prompt):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    print(speed(times), file=sys.stderr)
    return 0


def weights_of(options: argparse.Namespace) -> Path | None:
    """Where the weights lie: ``--weights``, or the folder that CONFIG is."""
    return folder_of(options.config) if options.weights is None else Path(options.weights)


def tokenizer_name(options: argparse.Namespace, config: JobConfig, overrides: Sequence[str]) -> str:
    """``data.tokenizer``; where nobody has set it, the tokenizer next to the weights."""
    path = weights_of(options)
    known = None if path is None else beside(path)
    chosen = config.data.tokenizer != "bytes" or any(flag.startswith("--data.tokenizer") for flag in overrides)
    return config.data.tokenizer if chosen or known is None or not has_tokenizer(known) else str(known)


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


def read_weights(
    options: argparse.Namespace, config: JobConfig, overrides: Sequence[str]
) -> Mapping[str, np.ndarray] | None:
    """The weights of ``--weights``, or of the folder that CONFIG is; None if there are none.

    Raises:
        UserError: nothing there, settings beside them that differ, or tensors that don't fit the config.
    """
    path = weights_of(options)
    if path is None:
        print("no --weights are given: the model is untrained", file=sys.stderr)
        return None
    return fitting_weights(path, config, overrides)


def timed(tokens: Iterable[np.ndarray], times: list[float]) -> Iterator[int]:
    """The ids of the one row, each noting when it came."""
    for token_B in tokens:
        times.append(time.perf_counter())
        yield int(token_B[0])


def speed(times: Sequence[float]) -> str:
    """What the times say: the start, then when each token came."""
    count = len(times) - 1
    if count < 2:
        return f"{count} tokens in {times[-1] - times[0]:.2f} s"
    rate = (count - 1) / max(times[-1] - times[1], 1e-9)
    return f"{count} tokens: the first after {times[1] - times[0]:.2f} s, then {rate:.1f} tokens/s"
