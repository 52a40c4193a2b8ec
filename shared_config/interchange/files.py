"""Files that are either whole or not there: written aside in the same folder, then renamed over the final name."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from shared_config.errors import UserError

PathLike = str | os.PathLike[str]

KINDS = {
    stat.S_IFDIR: "a folder; the name of a file to write is needed",
    stat.S_IFCHR: "a device; only regular files are written",
    stat.S_IFBLK: "a device; only regular files are written",
    stat.S_IFIFO: "a named pipe; only regular files are written",
    stat.S_IFSOCK: "a socket; only regular files are written",
}
"""What is never written over."""


def regular_target(path: PathLike) -> Path:
    """The file that is written in the name of ``path``: what a symbolic link leads to, whether it exists or not.

    Raises:
        UserError: something other than a regular file is there, or it can't be inspected.
    """
    target = Path(os.path.realpath(path))
    try:
        kind = stat.S_IFMT(target.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return target
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)!r}: can't be written: {_reason(error)}") from error
    if kind in KINDS:
        raise UserError(f"{os.fspath(path)}: is {KINDS[kind]}")
    return target


def folder_target(path: PathLike) -> Path:
    """The folder that is written to in the name of ``path``: what a symbolic link leads to, whether it exists or not.

    Raises:
        UserError: something other than a folder is there, or it can't be inspected.
    """
    target = Path(os.path.realpath(path))
    try:
        kind = stat.S_IFMT(target.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return target
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)!r}: can't be written to: {_reason(error)}") from error
    if kind != stat.S_IFDIR:
        said = KINDS.get(kind, "a file").partition(";")[0]
        raise UserError(f"{os.fspath(path)}: is {said}; the name of a folder is needed")
    return target


def make_folder(path: PathLike) -> Path:
    """The folder that ``path`` leads to, made if need be.

    Raises:
        OSError: it can't be made.
        UserError: as `folder_target`.
    """
    target = folder_target(path)
    target.mkdir(parents=True, exist_ok=True)
    return target


@contextmanager
def written_aside(path: PathLike) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path``; rename it to ``path`` at the end, remove it if the body raises.

    The data reaches the disk before the name does, so that a crash leaves the old file or the new one, never a part. A
    symbolic link stays: the file that it leads to is written.

    Raises:
        UserError: if the folder or the file can't be written, or if ``path`` is a folder, device, pipe or socket.
    """
    with file_errors(path, "can't be written"):
        aside = make_aside(path)
        try:
            yield aside
            commit(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def make_aside(path: PathLike) -> Path:
    """A new empty file in the folder of what is written for ``path`` (made if need be), under a hidden name that no
    reader looks for.

    Raises:
        UserError: as `regular_target`.
    """
    target = regular_target(path)
    make_folder(target.parent)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    aside.touch(exist_ok=False)
    return aside


def commit(aside: Path, path: PathLike) -> None:
    """Give a finished file its final name.

    Raises:
        UserError: as `regular_target`.
    """
    target = regular_target(path)
    _sync(aside)
    os.replace(aside, target)
    _sync(target.parent)


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
