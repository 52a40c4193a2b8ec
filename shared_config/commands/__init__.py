"""The commands, one module each: HELP, EXAMPLES, add_arguments(parser) and run(options, overrides) -> exit status."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    "eval",
    "show",
    "trace",
    "compare",
    "convert",
    "compile",
    "launch",
    "bench",
    "report",
    "completion",
)


class Command(Protocol):
    """What a module of this package provides."""

    @property
    def HELP(self) -> str:
        """One line, for the list of commands."""
        ...

    @property
    def EXAMPLES(self) -> tuple[str, ...]:
        """Command lines, for the command's own help."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's own options."""
        ...

    def run(self, options: argparse.Namespace, overrides: Sequence[str]) -> int:
        """Do it, under the overrides of the config. Returns the exit status."""
        ...


def command(name: str) -> Command:
    """The module of a command, which takes a while to import."""
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module


@functools.cache
def helps() -> dict[str, str]:
    """HELP of each command, read from its file, which is not imported."""
    found = {}
    for name in NAMES:
        source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        text = re.search(r"^HELP = (\(.*?^\)|[^\n]+)\n", source, re.MULTILINE | re.DOTALL)
        assert text is not None, name
        found[name] = ast.literal_eval(text[1])
    return found


def __getattr__(name: str) -> Any:
    """``COMMANDS``, name -> module: imported when it is asked for, as that takes a while."""
    if name != "COMMANDS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return {name: importlib.import_module(f"{__name__}.{name}") for name in NAMES}
