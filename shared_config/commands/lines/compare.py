"""What may stand on the line of ``kempnerforge compare``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import positive

HELP = "compare two traces and name the first tensor that diverges; exit status 0 only if none does"
EXAMPLES = ("kempnerforge compare torch.safetensors jax.safetensors --report out.html",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument("a", metavar="A", help="a trace, or a folder of traces")
    parser.add_argument("b", metavar="B", help="a trace of the same function, or a folder with the same names of files")
    parser.add_argument("--truth", metavar="FILE", help="a float64 trace that both are measured against")
    parser.add_argument("--map", metavar="FILE", help="names and layouts of A as those of B, a .toml file")
    parser.add_argument("--common", action="store_true", help="list what only one of the two has, and do not count it")
    parser.add_argument(
        "--derive-tolerance",
        type=positive,
        metavar="N",
        help="two folders: take their first N pairs for correct ones, and print how many deltas they are apart",
    )
    parser.add_argument("--report", metavar="FILE", help="also write an HTML page")
    parser.add_argument("--json", metavar="FILE", help="also write every number as JSON")
