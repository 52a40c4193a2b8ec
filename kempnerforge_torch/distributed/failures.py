"""Where one process of a run fails, it tells the others through the store in which they met, and they end. What they
wait for would not come: a message between stages, a kernel of NCCL, or that it joins them. Few of these waits notice.
"""

from __future__ import annotations

import contextlib
import os
import threading

from torch.distributed.distributed_c10d import Store

LOOKING = 1.0
"""Seconds between the looks that a process takes for word of a failure."""
ENDING = 5.0
"""Seconds that it then has to end by itself, before it is ended."""
STATUS = 2
"""Exit status of one that is ended: that of the command for what could not run."""
FIRST = "kempnerforge/failed"
"""What the store calls the rank of the process that failed first."""


class Failures:
    """Which process of a run failed first. Where another one did, this one ends within `LOOKING` and `ENDING` seconds,
    unless it leaves before.

    Args:
        store: in which the processes met, those of this run alone.
        rank: of this process.
    """

    def __init__(self, store: Store, rank: int):
        self._store, watched = (store.clone() for _ in range(2))  # pyright: ignore[reportAttributeAccessIssue]
        self._rank = rank
        self._first: int | None = None
        self._left = threading.Event()
        self._looks = threading.Thread(target=self._look, args=(watched,), daemon=True)
        self._looks.start()

    def tell(self) -> int:
        """Tell the others that this process fails, and leave. Returns the rank that failed first; that of this process,
        if there is no store any more.
        """
        self.leave()
        with contextlib.suppress(RuntimeError):
            self._first = int(self._store.compare_set(FIRST, "", str(self._rank)))
        return self._rank if self._first is None else self._first

    def leave(self) -> None:
        """From here on no failure ends this process."""
        self._left.set()
        self._looks.join(LOOKING)

    def _look(self, store: Store) -> None:
        with contextlib.suppress(RuntimeError):  # without the store there is no word
            while not store.check([FIRST]):
                if self._left.wait(LOOKING):
                    return
            self._first = int(store.get(FIRST))
            if not self._left.wait(ENDING):
                os._exit(STATUS)
