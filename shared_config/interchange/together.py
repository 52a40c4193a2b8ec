"""Processes that do one piece of work together, all of which see the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared_config.errors import UserError


def _own(number: int) -> int:
    return number


@dataclass(frozen=True)
class Processes:
    """All processes of a run; by default this is the only one.

    Attributes:
        rank: the number of this one, from 0. The first writes what only one may write.
        largest: the largest of the numbers that all give, on each of them (a max all-reduce).
    """

    rank: int = 0
    count: int = 1
    largest: Callable[[int], int] = _own

    @property
    def is_main(self) -> bool:
        """Whether this is the first."""
        return self.rank == 0

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A part of the work that one process may fail in: all leave it together, or all continue.

        Raises:
            UserError: another has failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.largest(int(failure is not None)):
            raise failure or UserError("another process of the run has failed")


ALONE = Processes()
