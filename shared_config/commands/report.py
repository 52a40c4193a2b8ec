"""``kempnerforge report``: curves of training runs, of either backend, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared_config.commands.common import console, writable_file
from shared_config.curves import read_run, write_page
from shared_config.errors import UserError

HELP = "draw the curves of training runs, of either backend, on one HTML page"
EXAMPLES = (
    "kempnerforge report runs/latest",
    "kempnerforge report runs/torch runs/jax --output both.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a training run")
    parser.add_argument("--output", metavar="FILE", default="report.html", help="default: report.html")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it. Returns the exit status."""
    if overrides:
        raise UserError(f"{overrides[0]}: report takes no config; the runs hold theirs")
    output = writable_file(options.output)
    runs = [read_run(folder) for folder in dict.fromkeys(options.runs)]
    names = [Path(run.name).name for run in runs]
    write_page(output, runs, " and ".join(names) if len(names) < 3 else f"{len(names)} runs")
    console().print(f"wrote {output}: {len(runs)} runs", markup=False)
    return 0
