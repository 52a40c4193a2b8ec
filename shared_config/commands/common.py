"""What several commands share: the CONFIG argument, the console, checks of output paths."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shared_config.commands.backends import BACKENDS
from shared_config.contract.shrink import shrink
from shared_config.errors import UserError
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig

WIDTH_OF_FILES = 140


def add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The CONFIG argument."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if optional else None,
        help="name of a preset or path of a .toml file; fields are overridden by --section.field value",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """The --backend option."""
    parser.add_argument("--backend", required=True, choices=tuple(BACKENDS), help="framework that does the work")


def add_shrink(parser: argparse.ArgumentParser) -> None:
    """The --shrink option."""
    parser.add_argument("--shrink", action="store_true", help="keep the architecture, cut every size to a few layers")


def load_job(options: argparse.Namespace, overrides: Sequence[str]) -> JobConfig:
    """The config of a command that runs a model, shrunk if asked for.

    Raises:
        UserError: it can't be loaded.
    """
    config = load_config(options.config, overrides)
    return shrink(config) if options.shrink else config


def not_negative(text: str) -> int:
    """Type of options that are counts."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 0")
    return number


def console() -> Console:
    """The terminal; tables that go to a file or a pipe are not squeezed into 80 columns."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH_OF_FILES)


def writable_folder(path: str | Path) -> Path:
    """The folder, created if need be, once it is certain that files can be written to it.

    Raises:
        UserError: if they can't.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be created as an output folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: the output folder is not writable")
    return folder


def writable_file(path: str | Path) -> Path:
    """The path of a file to be written, in a folder that can be written to.

    Raises:
        UserError: if it can't, or if the path is a folder.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{file}: is a folder; the name of a file to write is needed")
    writable_folder(file.parent)
    return file
