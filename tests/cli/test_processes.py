"""Commands that write are one process on one device."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_config.cli import main
from shared_config.commands.processes import SIZES, require_one_process
from shared_config.errors import UserError


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("command", ["train", "trace", "validate"])
def test_one_of_several_processes_is_refused(
    tmp_path: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "2")
    output = [] if command == "validate" else ["--backend=torch", "--output", str(tmp_path / "out")]
    assert main([command, "debug", *output]) == 2
    assert f"{name} = 2: must be 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", "1", "0", "01", "no number"])
def test_one_process_is_let_through(value: str) -> None:
    require_one_process(dict.fromkeys(SIZES, value))
    with pytest.raises(UserError):
        require_one_process({"WORLD_SIZE": "16"})


@pytest.mark.parametrize("command", ["train", "trace", "validate"])
def test_layouts_over_devices_are_refused(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = [] if command == "validate" else ["--backend=torch", "--output", str(tmp_path / "out")]
    assert main([command, "debug", *output, "--distributed.tp=2"]) == 2
    assert "distributed." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
