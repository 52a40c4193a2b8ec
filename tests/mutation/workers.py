"""Processes that do pieces of work beside each other, each in a copy of the tree of its own."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.mutation.runs import prepare

Task = TypeVar("Task")
Answer = TypeVar("Answer")


def each(work: Callable[[Path, Task], Answer], tasks: Iterable[Task], tree: Path, count: int) -> Iterator[Answer]:
    """``work(copy of the tree, task)`` of every task by ``count`` processes, as each is done."""
    context = multiprocessing.get_context("fork")
    with context.Pool(count, _begin, (work, tree, context.Value("i"))) as pool:
        yield from pool.imap_unordered(_do, tasks)


_OWN: dict[str, Any] = {}
"""What a process works with."""


def _begin(work: Callable[[Path, Any], Any], tree: Path, started: Any) -> None:
    with started.get_lock():
        started.value += 1
        own = tree.with_name(f"{tree.name}-{started.value}")
    shutil.copytree(tree, own, symlinks=True)
    prepare(own)
    _OWN.update(work=work, tree=own)


def _do(task: Any) -> Any:
    return _OWN["work"](_OWN["tree"], task)
