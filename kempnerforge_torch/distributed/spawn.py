"""A function in several processes of this machine, which are started for it and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from shared_config.errors import UserError

Result = TypeVar("Result")
TIMEOUT = timedelta(minutes=5)
"""How long a process waits for the others in a collective before it gives up with an error."""
ORPHANED = 143


class _Said(NamedTuple):
    """What a process says last; ``moment`` orders what several say."""

    moment: float
    error: Exception | None
    result: Any = None


def together(function: Callable[..., Result], count: int, *arguments: object) -> Result:
    """``function(*arguments)`` in ``count`` new processes on the CPU, joined on gloo; what the first of them gives.

    The first error ends all of them, as does the end of this process.

    Raises:
        UserError: what the first process to fail raised.
        RuntimeError: any other error, or a process was killed; naming the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    processes, ends = [], []
    with tempfile.TemporaryDirectory(prefix="kempnerforge-") as folder:
        try:
            for rank in range(count):
                own, other = context.Pipe(duplex=False)
                arguments_of_rank = (rank, count, str(Path(folder, "meeting")), other, function, arguments)
                process = context.Process(target=_run, args=arguments_of_rank, daemon=True)
                process.start()
                other.close()
                processes.append(process)
                ends.append(own)
            return _first_result(processes, ends)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _first_result(processes: list[Any], ends: list[Any]) -> Any:
    """What the first process gives, once all are done."""
    said: dict[int, _Said] = {}
    while len(said) < len(ends):
        for end in wait([end for rank, end in enumerate(ends) if rank not in said]):
            rank = ends.index(end)
            try:
                said[rank] = ends[rank].recv()
            except EOFError:
                raise RuntimeError(f"process {rank} of {len(ends)} {_how_it_ended(processes[rank])}") from None
        failed = [one for one in said.values() if one.error is not None]
        if failed:
            raise min(failed, key=lambda one: one.moment).error or AssertionError
    return said[0].result


def _how_it_ended(process: Any) -> str:
    process.join()
    code = process.exitcode
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"


def _run(
    rank: int, count: int, meeting: str, end: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Do it and say so; then stay until it is killed, so that no other process finds it gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (2 * count)))
    try:
        if count > 1:
            dist.init_process_group("gloo", f"file://{meeting}", TIMEOUT, rank=rank, world_size=count)
        result = function(*arguments)
        said = _Said(time.monotonic(), None, result if rank == 0 else None)
    except UserError as error:
        said = _Said(time.monotonic(), UserError(str(error)))
    except Exception as error:
        moment, (reason, *_) = time.monotonic(), [*str(error).strip().splitlines(), ""]
        traceback.print_exc()
        said = _Said(moment, RuntimeError(f"process {rank} of {count}: {type(error).__name__}: {reason}"))
    end.send(said)
    threading.Event().wait()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(ORPHANED)
