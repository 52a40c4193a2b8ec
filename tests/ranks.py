"""Processes of a run, as threads of this one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from shared_config.interchange.together import Processes

T = TypeVar("T")
SECONDS = 60.0


def together(count: int, work: Callable[[Processes], T]) -> list[T | Exception]:
    """What each of so many ranks gives, or the error that it ends with."""
    barrier = threading.Barrier(count, timeout=SECONDS)
    given: list[Sequence[int]] = [()] * count
    found: dict[int, T | Exception] = {}

    def largest_of(rank: int, numbers: Sequence[int]) -> list[int]:
        given[rank] = numbers
        barrier.wait()
        result = [max(several) for several in zip(*given, strict=True)]
        barrier.wait()
        return result

    def run(rank: int) -> None:
        try:
            found[rank] = work(Processes(rank, count, lambda numbers: largest_of(rank, numbers)))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(count)]
