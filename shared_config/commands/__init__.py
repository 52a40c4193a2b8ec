"""The commands, two modules each: what may stand on its line (`lines`), and run(options, overrides) -> exit status."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import argparse

NAMES = (
    "validate",
    "train",
    "prepare",
    "generate",
    "chat",
    "eval",
    "show",
    "trace",
    "record",
    "compare",
    "convert",
    "compile",
    "launch",
    "bench",
    "report",
    "completion",
)


class Line(Protocol):
    """What a module of `lines` provides."""

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


def line_of(name: str) -> Line:
    """What may stand on the line of a command."""
    module: Any = importlib.import_module(f"{__name__}.lines.{name}")
    return module


def run_of(name: str) -> Callable[[argparse.Namespace, Sequence[str]], int]:
    """What does a command, under the overrides of the config, and gives the exit status; takes a while to import."""
    return importlib.import_module(f"{__name__}.{name}").run


@functools.cache
def helps() -> dict[str, str]:
    """HELP of each command, read from its file, which is not imported."""
    found = {}
    for name in NAMES:
        source = (Path(__file__).parent / "lines" / f"{name}.py").read_text(encoding="utf-8")
        text = re.search(r"^HELP = (\(.*?^\)|[^\n]+)\n", source, re.MULTILINE | re.DOTALL)
        assert text is not None, name
        found[name] = ast.literal_eval(text[1])
    return found


@functools.cache
def sections() -> list[str]:
    """The sections of a config, read from their file, which is not imported."""
    tree = ast.parse((Path(__file__).parents[1] / "schema" / "job.py").read_text(encoding="utf-8"))
    (job,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "JobConfig")
    fields = (node.target for node in job.body if isinstance(node, ast.AnnAssign))
    return [field.id for field in fields if isinstance(field, ast.Name)]
