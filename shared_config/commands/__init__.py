"""The commands, one module each: HELP, add_arguments(parser) and run(options, overrides) -> exit status."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import argparse

    COMMANDS: Mapping[str, Command]

NAMES = (
    "validate",
    "train",
    "prepare",
    "generate",
    "chat",
    "show",
    "trace",
    "compare",
    "convert",
    "compile",
    "launch",
    "bench",
)


class Command(Protocol):
    """What a module of this package provides."""

    @property
    def HELP(self) -> str:
        """One line, for the list of commands."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's own options."""
        ...

    def run(self, options: argparse.Namespace, overrides: Sequence[str]) -> int:
        """Do it, under the overrides of the config. Returns the exit status."""
        ...


def __getattr__(name: str) -> Any:
    """``COMMANDS``, name -> module: imported when it is asked for, as that takes a while."""
    if name != "COMMANDS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return {name: importlib.import_module(f"{__name__}.{name}") for name in NAMES}
