"""The commands, one module each: HELP, add_arguments(parser) and run(options, overrides) -> exit status."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Protocol

from shared_config.commands import compare, convert, generate, show, trace, train, validate


class Command(Protocol):
    """What a module of this package provides."""

    @property
    def HELP(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace, overrides: Sequence[str]) -> int: ...


COMMANDS: Mapping[str, Command] = {
    "validate": validate,
    "train": train,
    "generate": generate,
    "show": show,
    "trace": trace,
    "compare": compare,
    "convert": convert,
}
