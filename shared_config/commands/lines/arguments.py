"""Arguments that several commands have, and their types."""

from __future__ import annotations

import argparse

from shared_config.commands.backends import BACKENDS


def add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The CONFIG argument."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if optional else None,
        help="name of a preset, path of a .toml file, or a folder that knows its config (a training run, native "
        "weights, a Hugging Face folder); fields are overridden by --section.field value",
    )


def add_backend(parser: argparse.ArgumentParser, *others: str) -> None:
    """The --backend option, which a command may let be others too."""
    choices = (*BACKENDS, *others)
    parser.add_argument("--backend", required=True, choices=choices, help="framework that does the work")


def add_dtype(parser: argparse.ArgumentParser, default: str | None = "float32", by_default: str = "float32") -> None:
    """The --dtype option, and what is done where it is not given."""
    parser.add_argument(
        "--dtype",
        default=default,
        choices=("float32", "bfloat16", "float64"),
        help="what weights are held and products are computed in; routes, norms and rotations are in at least float32 "
        f"(default: {by_default})",
    )


def add_shrink(parser: argparse.ArgumentParser) -> None:
    """The --shrink option."""
    parser.add_argument("--shrink", action="store_true", help="keep the architecture, cut every size to a few layers")


def add_speaking(parser: argparse.ArgumentParser) -> None:
    """The options of a model that speaks."""
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="native weights, a training run or checkpoint, or a Hugging Face folder (default: those of CONFIG where "
        "it is a folder, else initial weights)",
    )
    parser.add_argument("--max-new-tokens", type=not_negative, default=128, metavar="N", help="default: 128")
    own = "what generation_config.json beside the weights says, else"
    parser.add_argument("--temperature", type=float, help=f"0: the most probable token (default: {own} 1)")
    parser.add_argument(
        "--top-k", type=not_negative, metavar="K", help=f"keep the K most probable (default: {own} 0, all)"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help=f"keep this probability (default: {own} 1, all)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends what is said, and is left out; may be repeated",
    )
    add_dtype(parser)
    parser.add_argument("--seed", type=not_negative, help="of the draws, and of initial weights (default: another)")
    parser.add_argument(
        "--weights-dtype",
        default="float32",
        choices=("float32", "int8"),
        help="int8: hold the weights of layers in a quarter of the memory, each within half a step of what it was, of "
        "which the largest of its output has 127 (default: float32)",
    )
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch: compile what gives a token, and replay it as a CUDA graph on a GPU; jax always compiles",
    )


def not_negative(text: str) -> int:
    """Type of options that are counts."""
    return _number(text, 0)


def positive(text: str) -> int:
    """Type of options that are counts of at least one."""
    return _number(text, 1)


def _number(text: str, least: int) -> int:
    from shared_config.schema.base import LARGEST, shown

    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be an integer of at least {least} and below 2^63")
    return number
