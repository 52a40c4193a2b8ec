"""README: its example runs in a process of its own, its commands exist, CI runs its test command."""

from __future__ import annotations

import re

from shared_config.commands import COMMANDS
from tests.cli.processes import ROOT, run_python

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        result = run_python("-c", example)
        assert result.returncode == 0, result.stderr
        error, size = re.findall(r"[\d.e-]+(?=,|$)", result.stdout.strip())
        assert float(error) < 1e-5 < 0.1 < float(size)


def test_every_command_is_described() -> None:
    assert re.findall(r"^\| `(\w+) [A-Z]", README, re.MULTILINE) == list(COMMANDS)


def test_there_are_two_commands_to_start_with() -> None:
    commands = re.findall(r"^    (python3 .*)$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/kempnerforge validate debug")
    assert commands[1].endswith(".venv/bin/python -m pytest")


def test_ci_finds_the_test_command() -> None:
    """The first line that ends in ``-m pytest``, as ``.ci/run`` looks for it."""
    lines = [line for line in README.splitlines() if "-m pytest" in line]
    assert lines[0].strip().startswith("python3 -m venv .venv && ")
    assert "grep -m 1 -- '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
