"""What may stand on the line of ``kempnerforge record``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import not_negative

HELP = "write what a model of one's own computes to a file, alone or with another recording's values as inputs"
EXAMPLES = (
    "kempnerforge record ours.py:ours --output ours.safetensors",
    "kempnerforge record ours.py:ours --refeed theirs.safetensors --map names.toml --output fed.safetensors",
)
DTYPES = ("float64", "float32", "float16", "bfloat16")
MODEL = (
    "FILE.py:NAME or PACKAGE.MODULE:NAME of a callable that passes its options on, "
    "as def NAME(**options): return record(model, inputs, **options)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--output", required=True, metavar="FILE", help="the trace, a .safetensors file")
    add_model_dtype(parser)
    parser.add_argument("--seed", type=not_negative, help="of drawn values (default: 0)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERNS",
        help="keep only tensors whose names match a glob pattern, as in 'layers.*.attention,gradient/*'; repeatable",
    )
    parser.add_argument("--summary", type=not_negative, metavar="BYTES", help="keep of larger tensors statistics only")
    parser.add_argument(
        "--deltas",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure in float64 how far rounding moves each tensor; one of the two sides is enough",
    )
    parser.add_argument(
        "--refeed",
        metavar="OTHER",
        help="a trace of another implementation: what follows each activation goes on from the value there, so that a "
        "wrong module differs alone (forward only)",
    )
    parser.add_argument(
        "--map",
        metavar="FILE",
        help="names and layouts of OTHER, or of what this is to be compared with, as those here, a .toml file; the "
        "trace keeps its own, and outputs that have others here are drawn towards the same values",
    )
    parser.add_argument("--inverse", action="store_true", help="the map says those here as those of the other side")


def add_model_dtype(parser: argparse.ArgumentParser) -> None:
    """The --dtype option of whatever calls models of one's own."""
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and floating-point inputs (default: their own)")
