"""``kempnerforge prepare``: text to token files, once, for any number of runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shared_config.commands.common import console
from shared_config.data.prepare import Encoding, prepare
from shared_config.data.prepare import Progress as Done
from shared_config.data.workers import available_cores
from shared_config.errors import UserError
from shared_config.interchange.token_index import INDEX

MEBIBYTE = 2**20
SECONDS_BETWEEN_LINES = 10.0


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it. Returns the exit status."""
    if overrides:
        raise UserError(f"{overrides[0]}: prepare has no config to override; see kempnerforge prepare --help")
    encoding = Encoding(options.tokenizer, options.eos_id, options.text_field, options.separator)
    output = Path(options.output)
    with Bar(console()) as bar:
        index = prepare(
            [Path(source) for source in options.sources],
            output,
            encoding,
            workers=options.workers or available_cores(),
            shard_bytes=options.shard_mib * MEBIBYTE,
            follow_symlinks=options.follow_symlinks,
            show=bar.show,
        )
    shards = f"{len(index.shards)} file{'s' * (len(index.shards) > 1)} of {index.dtype}"
    print(f"{output / INDEX}: {index.documents:,} documents, {index.tokens:,} tokens in {shards}")
    return 0


class Bar:
    """How much of the input is done, what it has become and how long the rest takes: a bar on a terminal, a line every
    now and then elsewhere. Use as a context manager.
    """

    def __init__(self, console: Console):
        counts = "{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"
        columns = (BarColumn(), DownloadColumn(binary_units=True), TextColumn(counts), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task("", total=None, documents=0, tokens=0) if self._bar else TaskID(0)
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: Done) -> None:
        """Show how far it is."""
        if self._bar is not None:
            self._bar.update(
                self._task, total=done.total, completed=done.done, documents=done.documents, tokens=done.tokens
            )
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share = done.done / max(done.total, 1)
            print(
                f"{share:.0%} of {done.total / MEBIBYTE:,.0f} MiB, {done.documents:,} documents, {done.tokens:,} tokens"
            )
