"""Processes that do one piece of work together, all of which see the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from shared_config.errors import UserError


@dataclass(frozen=True)
class Processes:
    """All processes of a run; by default this is the only one.

    Attributes:
        rank: the number of this one, from 0. The first writes what only one may write.
        largest_of: of several numbers that all give, the largest of each, on all of them (a max all-reduce).
    """

    rank: int = 0
    count: int = 1
    largest_of: Callable[[Sequence[int]], Sequence[int]] = tuple

    @property
    def is_main(self) -> bool:
        """Whether this is the first."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of the numbers that all give, on each of them."""
        return self.largest_of([number])[0]

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
