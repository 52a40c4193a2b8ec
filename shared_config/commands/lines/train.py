"""What may stand on the line of ``kempnerforge train``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_backend, add_config

HELP = "train with one backend; a run started again in the same folder resumes"
EXAMPLES = (
    "kempnerforge train debug --backend torch --output runs/first --train.max_steps 200",
    "kempnerforge train runs/first --backend jax",
    "torchrun --nproc-per-node 8 -m shared_config.cli train llama_1b --backend torch --optimizer.name muon",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser)
    parser.add_argument("--output", metavar="DIR", help="folder of the run, the same as --checkpoint.dir")
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
