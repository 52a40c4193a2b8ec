"""Standard output and error that outlive what they lead to: a terminal that is gone, a closed pipe, a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from typing import IO, TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


class OutlivingFile(io.FileIO):
    """A terminal; what is written once it is gone is dropped."""

    def write(self, data: Buffer, /) -> int:
        """Write, unless the reader is gone."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _discard(self.fileno())
            return memoryview(data).nbytes


def outliving(stream: TextIO) -> TextIO:
    """A stream to the same terminal that drops what is written once it is gone; other streams are as they were."""
    try:
        descriptor = stream.fileno()
        is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
    except (OSError, ValueError, AttributeError):  # closed, or no file
        return stream
    if not is_device:
        return stream
    raw = OutlivingFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=raw.isatty()
    )


def discard(stream: IO[str]) -> None:
    """Drop what is written to standard output or error from now on, and what waits there; other streams stay."""
    if stream is sys.stdout or stream is sys.stderr:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            _discard(stream.fileno())


def flush() -> None:
    """Bring to their end what waits in standard output and error; what can't be written is dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            discard(stream)


def _discard(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
