"""README: its example runs in a process of its own, its commands exist, CI runs its test command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from shared_config.commands import NAMES
from shared_config.data.image_sources import open_folder
from shared_config.interchange.preprocessor import PixelRange
from shared_config.loader import load_config
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
    assert re.findall(r"^\| `(\w+) [A-Z]", README, re.MULTILINE) == list(NAMES)


def test_commands_of_training_mean_something() -> None:
    """Options that only the command knows are left out."""
    commands = re.findall(r"^    kempnerforge train (.*)$", README, re.MULTILINE)
    assert len(commands) == 2
    mentioned = re.findall(r"`(--(?:vlm|video)\.[^`]*)`", README)
    for options in (*commands, *(f"debug_vlm_mot {option}" for option in mentioned)):
        preset, *overrides = shlex.split(re.sub(r"--(backend|output) \w+", "", options))
        assert load_config(preset, overrides).vlm is not None
    assert len(mentioned) == 3


def test_lines_of_a_folder_are_read(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "metadata.jsonl").write_text(lines)
    assert len(open_folder(tmp_path, PixelRange(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), None, 1e-12).rows["train"]) == 3


def test_the_map_names_every_room() -> None:
    rows = README.partition("## What is where")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/.]+)`", rows))
    rooms = {
        path.name for path in (ROOT / "shared_config").iterdir() if any(path.rglob("*.py")) or path.suffix == ".py"
    }
    rooms |= {path.name for path in (ROOT / "tests").iterdir() if any(path.rglob("*.py"))}
    assert rooms - {"__init__.py"} <= {path.rstrip("/").rpartition("/")[2] for path in named}
    assert not [path for path in named if "/" in path.rstrip("/") and not (ROOT / path).exists()]


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
