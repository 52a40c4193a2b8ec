"""A function in several processes: what it gives, the first error of any of them, and that none is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kempnerforge_torch.distributed.spawn import together
from shared_config.errors import ConfigError, UserError


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


def test_none_is_left_where_the_parent_is_gone(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("forkserver").Process(
        target=together, args=(wait_for_ever, 2, str(tmp_path)), daemon=False
    )
    parent.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    ranks = [Path("/proc", file.name) for file in tmp_path.iterdir()]
    parent.kill()
    parent.join()
    wait_until(lambda: not any(rank.exists() for rank in ranks))


def wait_until(reached: Callable[[], bool]) -> None:
    for _ in range(600):
        if reached():
            return
        time.sleep(0.1)
    pytest.fail("not reached within a minute")
