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

    def worst(self, status: int) -> tuple[int, int]:
        """The largest of the numbers that all give, 0 or more, and the first process that gives it; the same on all."""
        found, behind = divmod(self.largest(status * self.count + self.count - 1 - self.rank), self.count)
        return found, self.count - 1 - behind

    def error_of(self, failed: int, own: Exception | None) -> Exception:
        """What this process is to raise where another one, or this, has ``failed``: the user sees one error of all."""
        if own is not None and failed == self.rank:
            return own
        error = UserError(f"process {failed} of the run has failed, and says why")
        error.__cause__, error.shown_elsewhere = own, True
        return error

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A part of the work that one process may fail in: all leave it together, or all continue.

        Raises:
            UserError: another has failed, this one or not.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        status, failed = self.worst(int(failure is not None))
        if status:
            raise self.error_of(failed, failure)


ALONE = Processes()
