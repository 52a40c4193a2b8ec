"""Tasks for several processes, which tell of their progress and end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from shared_config.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Note = Callable[[int, int, int], None]
"""What a task calls to tell of its progress."""
THREADS = "RAYON_NUM_THREADS"
"""Threads of the tokenizers library in a process."""


def available_cores() -> int:
    """Of the machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task, Note], Result],
    tasks: Sequence[Task],
    workers: int,
    *,
    note: Note,
    done: Callable[[Task, Result], None],
) -> None:
    """Do tasks, begun in their order, in at most ``workers`` processes; a single one is this process.

    Args:
        function: of a module; it and its tasks and results can be pickled.
        note: is called, here, with what a task tells of its progress.
        done: is called, here, with each task that has ended.

    Raises:
        UserError: that of a task, or a process has been killed.
    """
    processes = min(workers, len(tasks))
    if processes <= 1:
        for task in tasks:
            done(task, function(task, note))
        return
    threads = max(1, available_cores() // processes)
    started = [_start(function, threads) for _ in range(processes)]
    try:
        _deal({connection: process for process, connection in started}, tasks, note, done)
    finally:
        for process, connection in started:
            connection.close()
            process.terminate()
            process.join()


def _start(function: Callable[..., object], threads: int) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of threads
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function, threads), daemon=True)
    process.start()
    there.close()
    return process, here


def _deal(
    processes: dict[Connection, Any], tasks: Sequence[Task], note: Note, done: Callable[[Task, Any], None]
) -> None:
    waiting = list(reversed(tasks))
    busy: dict[Connection, Task] = {}

    def give(connection: Connection) -> None:
        if waiting:
            busy[connection] = waiting.pop()
            connection.send(busy[connection])

    try:
        for connection in processes:
            give(connection)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                kind, said = connection.recv()
                if kind == "note":
                    note(*said)
                elif kind == "error":
                    raise UserError(said)
                else:
                    done(busy.pop(connection), said)
                    give(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError("a worker process has ended early, as by a lack of memory; run the command again") from None


def _serve(connection: Connection, function: Callable[..., object], threads: int) -> None:
    """Do tasks until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault(THREADS, str(threads))
    try:
        while True:
            task = connection.recv()
            try:
                said = "done", function(task, lambda *told: connection.send(("note", told)))
            except UserError as error:
                said = "error", str(error)
            connection.send(said)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
