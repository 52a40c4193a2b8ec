"""What may stand on the line of ``kempnerforge trace``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_backend, add_config, add_shrink, not_negative

HELP = "write every activation, gradient and loss of one step to a file"
EXAMPLES = (
    "kempnerforge trace debug --backend torch --output torch.safetensors",
    "kempnerforge trace llama_1b --backend jax --output jax.safetensors --layers 0,3-5 --summary 1000000",
)
DTYPES = ("float64", "float32", "bfloat16", "fp8")
SCENARIOS = ("documents", "padding", "accumulation", "generate", "ring", "captures")
SCENARIOS += ("resume-0", "resume-1", "resume-2", "layout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser, "transformers")
    parser.add_argument("--output", required=True, metavar="FILE", help="the trace, a .safetensors file")
    parser.add_argument("--dtype", default="float64", choices=DTYPES, help="of the arithmetic (default: float64)")
    parser.add_argument("--seed", type=not_negative, default=0, help="of weights and tokens (default: 0)")
    parser.add_argument(
        "--weights",
        metavar="WHICH",
        help="validation (drawn so that every part counts), init (the seeded initial weights), or native weights, a "
        "training run or checkpoint, or a Hugging Face folder (default: those of CONFIG where it is a folder and not "
        "shrunk, else validation)",
    )
    parser.add_argument("--tokens", metavar="IDS", help="a .npy file of shape (batch, sequence), or ids as in 1,2,3")
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")
    parser.add_argument("--layers", metavar="N,N-M", help="keep the tensors of these layers only, as in 0,3-5")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERNS",
        help="keep only tensors whose names match a glob pattern, as in 'layers.*.attention,gradient/*'; repeatable",
    )
    parser.add_argument(
        "--refeed",
        metavar="OTHER",
        help="a trace of the same run: give each layer what it recorded, so that a wrong layer differs alone",
    )
    parser.add_argument(
        "--routes",
        metavar="OTHER",
        help="a trace of the same run, say in float64: experts that choose tokens (moma) take those of that trace",
    )
    parser.add_argument("--summary", type=not_negative, metavar="BYTES", help="keep of larger tensors a summary only")
    parser.add_argument(
        "--deltas",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure in float64 how far rounding moves each tensor, for comparisons without a float64 trace",
    )
    parser.add_argument(
        "--scenario",
        choices=SCENARIOS,
        help="in place of one step, do and keep what validate --full compares under this name; layout: training steps "
        "in the parallel layout of --distributed.*",
    )
    parser.add_argument("--runs", metavar="DIR", help="folder of the checkpoints of the scenarios resume-N")
    add_shrink(parser)
