"""Files that are either whole or not there: written aside in the same folder, then renamed over the final name."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from shared_config.errors import UserError

PathLike = str | os.PathLike[str]


@contextmanager
def written_aside(path: PathLike) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path``; rename it to ``path`` at the end, remove it if the body raises.

    The data reaches the disk before the name does, so that a crash leaves the old file or the new one, never a part.

    Raises:
        UserError: if the folder or the file can't be written.
    """
    path = Path(path)
    with file_errors(path, "can't be written"):
        aside = make_aside(path)
        try:
            yield aside
            commit(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def make_aside(path: Path) -> Path:
    """A new empty file in the folder of ``path`` (made if need be), under a hidden name that no reader looks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    aside.touch(exist_ok=False)
    return aside


def commit(aside: Path, path: Path) -> None:
    """Give a finished file its final name."""
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


@contextmanager
def file_errors(path: PathLike, problem: str) -> Iterator[None]:
    """Turn what the system or the safetensors library says about a file into one `UserError` that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{os.fspath(path)}: {problem}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
