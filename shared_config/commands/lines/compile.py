"""What may stand on the line of ``kempnerforge compile``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_config

HELP = "compile the JAX training step for a slice of TPUs, without one: FLOPs, bytes of each chip, collectives"
EXAMPLES = ("kempnerforge compile llama3_8b --topology v5e:4x4 --distributed.dp_shard 16",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:GRID",
        help="the slice, as v5e:4x4, v5p:2x2x4, v6e:8x8",
    )
    parser.add_argument("--json", metavar="FILE", help="also write every number as JSON")
