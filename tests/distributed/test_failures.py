"""Where one process of a run of torch fails, all end within seconds, whatever the others wait for, and its error alone
is shown. By day a stage of a pipeline fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from torch.distributed.distributed_c10d import Store

from kempnerforge_torch.distributed import failures, processes
from kempnerforge_torch.distributed.failures import FIRST, STATUS, Failures
from shared_config.errors import UserError
from shared_config.interchange.toml import config_to_toml
from shared_config.training.launch import Launch
from tests.distributed.test_killed_runs import environments_of
from tests.jobs import text_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
PROGRAM = """
import os, signal, sys
from kempnerforge_torch.distributed import pipeline, processes
from kempnerforge_torch.training.train import Trainer
from shared_config.cli import main
def broken(*_, **__):
    raise OSError(5, "broken", "a file")
is_unlucky = os.environ["RANK"] == sys.argv.pop(1)
{event}
sys.exit(main())
"""
EVENTS = {
    "a stage": "if is_unlucky: pipeline._Stage.forward = broken",
    "whom the other does not hear": "Trainer.step = broken if is_unlucky else lambda *_: signal.pause()",
    "before it joins": "if is_unlucky: processes._own_device = broken",
}
BROKEN = "a file: broken"
BOUND = 30.0
"""Seconds from the end of the one that fails to the end of the other; 6 of them where the machine is idle."""


class Table(Store):
    """A store of one process, which may be gone."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, str] = {}
        self.is_gone = False

    def clone(self) -> Table:
        return self

    def check(self, keys: list[str]) -> bool:
        self._ask()
        return all(key in self.values for key in keys)

    def get(self, key: str) -> Any:
        self._ask()
        return self.values[key].encode()

    def compare_set(self, key: str, expected: str, value: str) -> Any:
        self._ask()
        assert expected == ""
        return self.values.setdefault(key, value).encode()

    def set_timeout(self, timeout: timedelta) -> None:
        assert timeout > timedelta()

    def _ask(self) -> None:
        if self.is_gone:
            raise RuntimeError("connection reset")


def shown_elsewhere() -> UserError:
    error = UserError("another process says it")
    error.shown_elsewhere = True
    return error


def joined_alone(store: Table, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[object]:
    """What `joined` is to process 1 of a run, the others of which are a store alone."""
    monkeypatch.setattr(processes, "launch_of", lambda: Launch(1, 4, 1, "localhost", 1, "torchrun"))
    monkeypatch.setattr(processes, "rendezvous", lambda *_, **__: iter([(store, 1, 4)]))
    monkeypatch.setattr(processes, "_init_group", lambda *_: None)
    return processes.joined("cpu")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """With which status, and when, a process would have been ended."""
    found: list[tuple[int, float]] = []
    monkeypatch.setattr(os, "_exit", lambda status: found.append((status, time.monotonic())))
    monkeypatch.setattr(failures, "LOOKING", 0.05)
    monkeypatch.setattr(failures, "ENDING", 0.2)
    return found


def test_all_learn_who_failed_first(ended: list[tuple[int, float]]) -> None:
    store = Table()
    ranks = [Failures(store, rank) for rank in range(3)]
    assert [ranks[rank].tell() for rank in (1, 0, 2)] == [1, 1, 1]
    time.sleep(0.4)
    assert ended == []


def test_one_that_does_not_end_by_itself_is_ended(ended: list[tuple[int, float]]) -> None:
    store, began = Table(), time.monotonic()
    stays, leaves, fails = (Failures(store, rank) for rank in range(3))
    assert fails.tell() == 2
    time.sleep(0.1)
    leaves.leave()
    stays._looks.join(5)
    (status, moment), *others = ended
    assert (status, others) == (STATUS, [])
    assert moment - began >= 0.2


def test_where_the_store_is_gone_each_says_what_it_found(ended: list[tuple[int, float]]) -> None:
    store = Table()
    knows, store.values[FIRST] = Failures(store, 3), "1"
    time.sleep(0.15)
    store.is_gone = True
    assert (knows.tell(), Failures(store, 4).tell()) == (1, 4)
    assert ended == []


@pytest.mark.parametrize(
    ("error", "raised", "first"),
    [
        (ValueError("own"), ValueError, "1"),
        (KeyboardInterrupt(), KeyboardInterrupt, "1"),
        (shown_elsewhere(), UserError, None),
    ],
)
def test_a_failure_is_told_by_the_one_that_shows_it(
    error: BaseException, raised: type[BaseException], first: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(raised) as caught, joined_alone(store := Table(), monkeypatch):
        raise error
    assert caught.value is error
    assert store.values.get(FIRST) == first


def test_what_follows_from_a_failure_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    (store := Table()).values[FIRST] = "2"
    with pytest.raises(UserError, match="process 2 of the run has failed") as caught, joined_alone(store, monkeypatch):
        raise RuntimeError("connection closed by peer")
    assert caught.value.shown_elsewhere
    assert str(caught.value.__cause__) == "connection closed by peer"
    with pytest.raises(KeyboardInterrupt), joined_alone(store, monkeypatch):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("event", "unlucky"), [(event, rank) for event in EVENTS for rank in (0, 1)] if NIGHTLY else [("a stage", 1)]
)
def test_all_end_and_one_error_is_shown(event: str, unlucky: int, tmp_path: Path) -> None:
    assert ended_by(event, unlucky, tmp_path, "cpu") == ([2, 2], ["kempnerforge: " + "rank 1: " * unlucky + BROKEN])


def ended_by(event: str, unlucky: int, folder: Path, device: str) -> tuple[list[int], list[str]]:
    """With which status two processes end, the unlucky one first, and the errors that they show."""
    job = text_job(folder, train={"max_steps": 4, "grad_accum_steps": 2}, distributed={"pp": 2})
    (folder / "job.toml").write_text(config_to_toml(job))
    program = PROGRAM.format(event=EVENTS[event])
    command = [sys.executable, "-c", program, str(unlucky), "train", "job.toml", "--backend=torch"]
    started = [
        subprocess.Popen(
            [*command, f"--device={device}"],
            env=each, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for each in environments_of("torch", 2)
    ]  # fmt: skip
    both = [started[unlucky], started[1 - unlucky]]
    try:
        said = [process.communicate(timeout=seconds)[0] for process, seconds in zip(both, (600, BOUND), strict=True)]
    finally:
        for process in started:
            process.kill()
    lines = [line for text in said for line in text.splitlines() if line.startswith("kempnerforge: ")]
    return [process.returncode for process in both], lines
