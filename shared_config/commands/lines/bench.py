"""What may stand on the line of ``kempnerforge bench``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_backend, add_config, add_shrink, positive

HELP = "measure training steps, decoding and memory, as shares of what the machine can do"
EXAMPLES = ("kempnerforge bench llama_125m --backend torch --what train,decode --report bench.html",)
WORKS = (
    "train: training steps; packed: training steps, several documents in each row; window: training steps, a sliding "
    "window over the sequence; moe: a layer of experts by itself, forward and backward; decode: new tokens after one "
    "prompt; memory: bytes at the peak of a training step, by part"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser)
    parser.add_argument("--what", metavar="WORKS", help=f"comma-separated (default: all that the config has). {WORKS}")
    parser.add_argument(
        "--against",
        choices=("hf",),
        help="also measure the model of transformers that has the same family and shapes, in torch",
    )
    parser.add_argument("--profile", action="store_true", help="also print the time by kind of kernel")
    parser.add_argument(
        "--repeats", type=positive, help="of each measurement (default: 10, fewer where they take long)"
    )
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")
    parser.add_argument("--json", metavar="FILE", help="also write every number as JSON")
    parser.add_argument("--report", metavar="FILE", help="also write an HTML page")
    add_shrink(parser)
