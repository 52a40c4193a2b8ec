"""A plugin of pytest: keeps what failed as traces and a page, and measures how far correct pairs are apart.

pytest -p shared_config.parity.plugin --parity-keep failures
pytest -p shared_config.parity.plugin --derive-tolerance 100
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared_config.parity.foreign import same
from shared_config.parity.foreign.derive import derive_tolerance, tolerance_lines
from shared_config.parity.foreign.same import DifferentError
from shared_config.parity.report import write_report
from shared_config.parity.result import Comparison
from shared_config.parity.traces import write_trace

LONGEST_NAME = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("parity")
    group.addoption(
        "--parity-keep",
        metavar="DIR",
        help="write the two traces, the map and a page of each failing assert_same_function to a folder of its test",
    )
    group.addoption(
        "--derive-tolerance",
        type=int,
        metavar="N",
        help="say how many deltas the pairs of the first N calls of assert_same_function are apart",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Take part where an option asks for it."""
    most = config.getoption("--derive-tolerance")
    if most is not None:
        config.pluginmanager.register(_Deriving(most), "parity-deriving")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Keep a failing pair: of a Hypothesis test, the smallest that was found."""
    report = yield
    folder, error = item.config.getoption("--parity-keep"), None if call.excinfo is None else call.excinfo.value
    if folder and isinstance(error, DifferentError):
        kept = keep(Path(folder) / folder_name(item.nodeid), error)
        report.sections.append(("parity", f"kept in {kept}: kempnerforge compare a.safetensors b.safetensors --common"))
    return report


def folder_name(test: str) -> str:
    """The name of a folder for a test."""
    return re.sub(r"[^\w.-]+", "-", test).strip("-")[-LONGEST_NAME:]


def keep(folder: Path, error: DifferentError) -> Path:
    """Write a failing pair: the traces, the map if there is one, and a page.

    Raises:
        UserError: the folder can't be written to.
    """
    write_trace(folder / "a.safetensors", error.a)
    write_trace(folder / "b.safetensors", error.b)
    if error.names is not None:
        error.names.write(folder / "map.toml")
    write_report(folder / "page.html", {error.comparison.dtype: error.comparison}, title=folder.name)
    return folder


class _Deriving:
    """Collects comparisons, and prints what they say."""

    def __init__(self, most: int):
        self._most = most
        self._found: list[Comparison] = []

    def pytest_sessionstart(self) -> None:
        same.OBSERVERS.append(self._take)

    def pytest_sessionfinish(self) -> None:
        same.OBSERVERS.remove(self._take)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"{len(self._found)} pairs")
        for line in tolerance_lines(derive_tolerance(self._found)):
            terminalreporter.write_line(line)

    def _take(self, comparison: Comparison) -> None:
        if len(self._found) < self._most:
            self._found.append(comparison)
