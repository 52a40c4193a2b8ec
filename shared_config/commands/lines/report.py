"""What may stand on the line of ``kempnerforge report``."""

from __future__ import annotations

import argparse

HELP = "draw the curves of training runs, of either backend, on one HTML page"
EXAMPLES = (
    "kempnerforge report runs/latest",
    "kempnerforge report runs/torch runs/jax --output both.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a training run")
    parser.add_argument("--output", metavar="FILE", default="report.html", help="default: report.html")
