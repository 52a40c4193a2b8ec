"""A function in several processes: what it gives, the first error of any of them, and that none is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from kempnerforge_torch.distributed.spawn import together
from shared_config.errors import ConfigError, UserError

NIGHTLY = settings.get_current_profile_name() == "nightly"
ROOT = Path(__file__).parents[2]
PARENT = """
import sys
from kempnerforge_torch.distributed.spawn import together
from tests.distributed.test_spawn import wait_for_ever
if __name__ == "__main__":
    together(wait_for_ever, 2, sys.argv[1])
"""


def summed(number: int) -> int:
    total = torch.tensor(number + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def failing_on_one(how: str) -> None:
    """The others wait for it in a collective."""
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ConfigError(["one", "two"]) if how == "refused" else KeyError("the reason\nand more")
    dist.barrier()


def wait_for_ever(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(1000)


def test_the_first_process_says_what_all_found() -> None:
    assert together(summed, 2, 3) == 3 + 4
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("refused", UserError, "one\ntwo"),
        ("broken", RuntimeError, r"process 1 of 2: KeyError: 'the reason\nand more'"),
        ("killed", RuntimeError, "process 1 of 2 was killed by signal 9"),
    ],
)
def test_the_first_error_ends_all(how: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as raised:
        together(failing_on_one, 2, how)
    assert str(raised.value) == said
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT] if NIGHTLY else [signal.SIGKILL])
def test_none_is_left_where_the_parent_is_gone(tmp_path: Path, number: signal.Signals) -> None:
    """Killed, or under HYPOTHESIS_PROFILE=nightly interrupted as well."""
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    ranks = [Path("/proc", file.name) for file in tmp_path.iterdir()]
    parent.send_signal(number)
    parent.wait(timeout=60)
    wait_until(lambda: not any(rank.exists() for rank in ranks))


def wait_until(reached: Callable[[], bool]) -> None:
    for _ in range(600):
        if reached():
            return
        time.sleep(0.1)
    pytest.fail("not reached within a minute")
