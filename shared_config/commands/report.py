"""``kempnerforge report``: curves of training runs, of either backend, on one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared_config.commands.common import console, writable_file
from shared_config.curves import read_run, write_page
from shared_config.errors import UserError


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
