"""Checkpoints on a disk that is full: what `keep` gives up makes room, the newest whole one stays."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_config.errors import UserError
from shared_config.interchange import checkpoint, run_layout, saving
from shared_config.interchange.checkpoint import TrainingState


def state(step: int) -> TrainingState:
    return TrainingState(step, {"w": np.full(4, step, np.float32)}, {"m.w": np.zeros(4, np.float32)})


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that holds as many checkpoints as the list's number says, a part of one included."""
    holds = [2]
    write = saving.write_tensors

    def limited(path: Path, *arguments: Any) -> None:
        folder = path.parent.parent
        if len([entry for entry in folder.iterdir() if "step_" in entry.name]) > holds[0]:
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(saving, "write_tensors", limited)
    return holds


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_gets_room_from_what_keep_gives_up(tmp_path: Path, small_disk: list[int]) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert checkpoint.load(tmp_path).state.weights["w"][0] == 4


@pytest.mark.parametrize("keep", [1, None])
def test_a_full_disk_never_costs_the_only_checkpoint(tmp_path: Path, small_disk: list[int], keep: int | None) -> None:
    small_disk[0] = 1
    checkpoint.save(tmp_path, state(1), keep=keep)
    with pytest.raises(UserError, match=r"No space left on device.*kept: step_00000001"):
        checkpoint.save(tmp_path, state(2), keep=keep)
    assert names(tmp_path) == ["step_00000001"]
    assert checkpoint.load(tmp_path).state.weights["w"][0] == 1


def test_a_full_disk_keeps_the_newest_whole_checkpoint(tmp_path: Path, small_disk: list[int]) -> None:
    small_disk[0] = 9
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    (tmp_path / "step_00000003" / run_layout.WEIGHTS).write_bytes(b"")
    small_disk[0] = 1
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(tmp_path, state(4), keep=1)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_nothing_is_removed_for_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "write_tensors", broken)
    with pytest.raises(UserError, match="Input/output error"):
        checkpoint.save(tmp_path, state(3), keep=1)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_neither_written_nor_makes_others_go(tmp_path: Path, kind: str, bad: float) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    broken = state(3)
    for array in getattr(broken, kind).values():
        array[2] = bad
    with pytest.raises(checkpoint.NonFiniteError) as refusal:
        checkpoint.save(tmp_path, broken, keep=1)
    assert refusal.value.name == {"weights": "w", "optimizer": "m.w"}[kind]
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
