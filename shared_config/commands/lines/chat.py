"""What may stand on the line of ``kempnerforge chat``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_backend, add_config, add_speaking

HELP = (
    "talk with a model: a line is a question, and /image FILE shows a picture with the next one; Ctrl-C ends an "
    "answer, Ctrl-D the conversation"
)
EXAMPLES = (
    "kempnerforge chat FOLDER --backend torch --system 'Answer in one sentence.'",
    "kempnerforge chat LLAVA_FOLDER --backend torch --image cat.jpg",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture that is shown with the first question, of a model that sees them",
    )
    add_speaking(parser)
