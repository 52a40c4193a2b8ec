"""Processes of a run, as threads of this one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from shared_config.interchange.together import Processes

T = TypeVar("T")
SECONDS = 60.0


def together(count: int, work: Callable[[Processes], T]) -> list[T | Exception]:
    """What each of so many ranks gives, or the error that it ends with."""
    barrier = threading.Barrier(count, timeout=SECONDS)
    given = [0] * count
    found: dict[int, T | Exception] = {}

    def largest(rank: int, number: int) -> int:
        given[rank] = number
        barrier.wait()
        result = max(given)
        barrier.wait()
        return result

    def run(rank: int) -> None:
        try:
            found[rank] = work(Processes(rank, count, lambda number: largest(rank, number)))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(count)]
