"""What may stand on the line of ``kempnerforge compare``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import positive
from shared_config.commands.lines.record import MODEL, add_model_dtype

HELP = "compare two traces and name the first tensor that diverges; exit status 0 only if none does"
EXAMPLES = (
    "kempnerforge compare torch.safetensors jax.safetensors --report out.html",
    "kempnerforge compare theirs.py:theirs ours.py:ours --map names.toml --common --refeed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument("a", metavar="A", help=f"a trace, a folder of traces, or a model: {MODEL}")
    parser.add_argument("b", metavar="B", help="another of the same function; a folder with the same names")
    parser.add_argument("--truth", metavar="FILE", help="a float64 trace that both are measured against")
    parser.add_argument("--map", metavar="FILE", help="names and layouts of A as those of B, a .toml file")
    parser.add_argument("--common", action="store_true", help="list what only one of the two has, and do not count it")
    parser.add_argument(
        "--refeed",
        action="store_true",
        help="also compare with modules of B (of A, where B is a trace) given what the other side recorded as their "
        "inputs, so that a wrong module differs alone; each model runs in a process of its own",
    )
    add_model_dtype(parser)
    parser.add_argument(
        "--derive-tolerance",
        type=positive,
        metavar="N",
        help="two folders: take their first N pairs for correct ones, and print how many deltas they are apart",
    )
    parser.add_argument("--report", metavar="FILE", help="also write an HTML page")
    parser.add_argument("--json", metavar="FILE", help="also write every number as JSON")
