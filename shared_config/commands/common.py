"""What several commands share: the CONFIG argument, the console, checks of output paths."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from shared_config.contract.vision import job_table
from shared_config.interchange.files import regular_target
from shared_config.interchange.huggingface import is_huggingface
from shared_config.interchange.outputs import writable_folder
from shared_config.interchange.parts import HostArray
from shared_config.interchange.source import read_model, to_stderr
from shared_config.interchange.vision import tower_of
from shared_config.interchange.weights import check_tensors
from shared_config.interchange.with_images import is_image_folder
from shared_config.loader import load_config, parse_overrides, preset_names
from shared_config.parity.shrink import shrink
from shared_config.schema.job import JobConfig

WIDTH_OF_FILES = 140


def load_job(options: argparse.Namespace, overrides: Sequence[str], *, several_devices: bool = False) -> JobConfig:
    """The config of a command that runs a model, shrunk if asked for.

    Args:
        several_devices: whether the command knows parallel layouts.

    Raises:
        UserError: it can't be loaded, or asks for several devices.
    """
    config = load_config(options.config, overrides)
    config = shrink(config) if options.shrink else config
    config.validate(config.distributed.fewest_devices if several_devices else 1)
    return config


def folder_of(config: str) -> Path | None:
    """The folder that CONFIG is, whose weights are meant too; None for a preset or a .toml file."""
    return Path(config) if config not in preset_names() and Path(config).is_dir() else None


def in_transformers(folder: Path) -> bool:
    """Whether a folder holds a model that transformers runs too: of text, or with images."""
    return is_huggingface(folder) or is_image_folder(folder)


def overridden_fields(overrides: Sequence[str]) -> frozenset[str]:
    """The dotted fields that a command line sets."""
    return frozenset(name for name, _ in parse_overrides(overrides))


def fitting_weights(path: str | Path, config: JobConfig, overrides: Sequence[str]) -> Mapping[str, HostArray]:
    """The weights at a path, of any kind, for a config; nothing of them is read before it is asked for.

    Raises:
        UserError: nothing there, settings beside them that differ, or tensors that don't fit.
    """
    notes: list[str] = []
    weights = read_model(path, config, overridden=overridden_fields(overrides), say=notes.append).weights
    table = job_table(config, tower_of(config))
    check_tensors(weights, table, str(path))
    for note in notes:
        to_stderr(note)
    return {name: weights[name] for name in table}


class PipedConsole(Console):
    """A console whose closed pipe is a BrokenPipeError, as with print, and not the end of the process."""

    def on_broken_pipe(self) -> None:
        """Let whoever runs the command deal with a reader that is gone."""
        raise


def console() -> Console:
    """The terminal; tables that go to a file or a pipe are not squeezed into 80 columns."""
    terminal = PipedConsole(highlight=False)
    return terminal if terminal.is_terminal else PipedConsole(highlight=False, width=WIDTH_OF_FILES)


def writable_file(path: str | Path) -> Path:
    """The path of a file to be written, in a folder that can be written to.

    Raises:
        UserError: if it can't, or if something other than a regular file is there.
    """
    file = regular_target(path)
    writable_folder(file.parent)
    return Path(path)
