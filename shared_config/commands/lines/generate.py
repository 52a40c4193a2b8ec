"""What may stand on the line of ``kempnerforge generate``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_backend, add_config, add_speaking

HELP = "continue a prompt, streamed to the terminal; the speed is shown at the end"
EXAMPLES = (
    'kempnerforge generate runs/first --backend torch --prompt "def main"',
    "kempnerforge generate FOLDER --backend jax --prompt Hello --temperature 0 --max-new-tokens 32",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument(
        "--chat", action="store_true", help="answer the prompt, as the chat template of the tokenizer's folder has it"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="what a [vlm] config looks at: a picture; with a [video] section also a clip, or several pictures as its "
        "frames, in order; with vlm.image_token_id a picture for each of these in the prompt, with vlm.prefix_lm any "
        "number (default: drawn by code)",
    )
    add_speaking(parser)
