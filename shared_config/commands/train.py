"""``kempnerforge train``: a training run of one backend, in one process or, under torchrun or srun, in several."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from shared_config.commands.backends import backend_module, require_backend
from shared_config.commands.common import console, folder_of, overridden_fields
from shared_config.commands.processes import world_size
from shared_config.interchange import run_layout
from shared_config.loader import load_config
from shared_config.schema.checkpoint import CheckpointConfig


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config, with the other processes that a launcher started. Returns the exit
    status.
    """
    processes = world_size(options.backend)
    given = [*overrides, *([] if options.output is None else [f"--checkpoint.dir={options.output}"])]
    overridden = overridden_fields(given)
    folder = folder_of(options.config)
    config = load_config(options.config, [*given, *([] if folder is None else places(folder, overridden))])
    if options.backend != "jax":  # whose trainer counts the devices that one process has
        config.validate(processes)
    require_backend(options.backend)
    trainer = backend_module(options.backend, "training.train")
    screen = None if options.quiet else console()
    return trainer.train(config, device=options.device, console=screen, overridden=overridden).exit_status


def places(folder: Path, overridden: Collection[str]) -> list[str]:
    """Overrides for a CONFIG that is a folder: a run continues there, unless it is to write elsewhere; weights are what
    a run begins with.
    """
    if "checkpoint.dir" not in overridden and is_run(folder):
        return [f"--checkpoint.dir={folder}"]
    start = [] if "checkpoint.load_path" in overridden else [f"--checkpoint.load_path={folder}"]
    place = [] if "checkpoint.dir" in overridden else [f"--checkpoint.dir={CheckpointConfig().dir}"]
    return [*start, *place]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, with or without a checkpoint, and not a single checkpoint."""
    return run_layout.latest(folder) is not None or (folder / ".lock").exists()
