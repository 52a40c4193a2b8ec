"""What may stand on the line of ``kempnerforge convert``."""

from __future__ import annotations

import argparse

HELP = "turn a Hugging Face folder into native weights, or native weights or a checkpoint into either"
EXAMPLES = (
    "kempnerforge convert runs/first --output hf/ --model.family llama",
    "kempnerforge convert hf/ --output native/",
)
FORMATS = ("native", "huggingface")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a Hugging Face folder, native weights (file or folder), or a training run"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--to", choices=FORMATS, help="format to write (default: the one that SOURCE isn't)")
    parser.add_argument("--config", metavar="CONFIG", help="preset or .toml of native weights without a config.toml")
