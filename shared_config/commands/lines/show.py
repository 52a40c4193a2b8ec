"""What may stand on the line of ``kempnerforge show``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_config, positive

HELP = "list the presets, or print the resolved config, its parameters, FLOPs, and memory by device"
EXAMPLES = (
    "kempnerforge show",
    "kempnerforge show llama3_8b --world-size 64",
    "kempnerforge show debug --optimizer.name muon",
    "kempnerforge show --schema",
)
STEP_TOKENS = 2**24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser, optional=True)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of config files instead")
    parser.add_argument(
        "--world-size",
        type=positive,
        default=None,
        metavar="N",
        help="devices (default: as few as the layout needs; with --scale, 1,024 to 16,384)",
    )
    parser.add_argument(
        "--scale", action="store_true", help="print instead what the fastest layouts cost on many devices, on paper"
    )
    parser.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME,FIELD=VALUE",
        help="for costs on paper: h100, h200, b200, or settings as h100,memory=96e9 (fields: "
        "flops, share, memory, node, near, far, near_latency, far_latency)",
    )
    parser.add_argument(
        "--step-tokens",
        type=positive,
        default=STEP_TOKENS,
        metavar="N",
        help=f"with --scale, tokens of a step on all devices (default: {STEP_TOKENS:,})",
    )
