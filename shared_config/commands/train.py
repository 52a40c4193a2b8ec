"""``kempnerforge train``: a training run of one backend."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from shared_config.commands.backends import backend_module, require_backend
from shared_config.commands.common import add_backend, add_config, console
from shared_config.loader import load_config

HELP = "train with one backend; a run started again in the same folder resumes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_backend(parser)
    parser.add_argument("--output", metavar="DIR", help="folder of the run, the same as --checkpoint.dir")
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    folder = [] if options.output is None else [f"--checkpoint.dir={options.output}"]
    config = load_config(options.config, [*overrides, *folder])
    config.validate(world_size=1)
    require_backend(options.backend)
    trainer = backend_module(options.backend, "training.train")
    screen = None if options.quiet else console()
    return trainer.train(config, device=options.device, console=screen).exit_status
