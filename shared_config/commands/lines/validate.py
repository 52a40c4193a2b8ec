"""What may stand on the line of ``kempnerforge validate``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_config, add_shrink, not_negative

HELP = "prove that both backends compute the same; exit status 0 only if they do"
EXAMPLES = (
    "kempnerforge validate debug",
    "kempnerforge validate llama3_8b --shrink --report out.html",
    "kempnerforge validate debug --distributed.dp_shard 2 --distributed.tp 2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    parser.add_argument("--report", metavar="FILE", help="also write an HTML page")
    known = "comma-separated, of float64,float32,bfloat16,fp8 (default: all that the config has)"
    parser.add_argument("--dtypes", help=known)
    parser.add_argument("--steps", type=not_negative, default=30, help="of the training run; 0: none (default: 30)")
    parser.add_argument("--seed", type=not_negative, default=0, help="of weights and tokens (default: 0)")
    parser.add_argument("--device", default="cpu", help="for both backends (default: cpu)")
    parser.add_argument(
        "--full",
        action="store_true",
        help="beside a step, 601 positions and a training run, also compare generation with static caches "
        "and rings, documents, padding, accumulation, mixed precision, evaluation, a run resumed in the other backend, "
        "and every captured activation; and training steps in a few parallel layouts, which agree to 1e-10",
    )
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a Hugging Face folder, also compare both backends with the model of transformers",
    )
    parser.add_argument("--keep", metavar="DIR", help="folder that keeps the traces and the training runs")
    add_shrink(parser)
