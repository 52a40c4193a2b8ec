"""How files that a user names are read: regular files only, whose size is known before a byte is.

A pipe would block, a device has no end: neither is ever opened.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shared_config.errors import UserError

PathLike = str | os.PathLike[str]

MAX_TOML_BYTES = 2**24
MAX_JSON_BYTES = 2**28
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: PathLike) -> int:
    """The size in bytes of a regular file; a symbolic link counts as what it leads to.

    Raises:
        UserError: it can't be found, or is a folder, a pipe, a socket or a device.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: can't be read: {_reason(error)}") from None
    return _size(path, found)


@contextmanager
def opened(path: PathLike, limit: int | None = None) -> Iterator[BinaryIO]:
    """A regular file of at most ``limit`` bytes, open for reading.

    Raises:
        UserError: as `check_regular`, or larger, or not readable, then or while it is read.
    """
    check_regular(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that took its place would not block
        with os.fdopen(descriptor, "rb") as file:
            size = _size(path, os.fstat(file.fileno()))
            if limit is not None and size > limit:
                raise UserError(f"{os.fspath(path)}: has {size} bytes; must be at most {limit}")
            yield file
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: can't be read: {_reason(error)}") from None


def read_bytes(path: PathLike, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        UserError: as `opened`.
    """
    with opened(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, limit) + 1)
        if len(content) > size:
            content += file.read(limit + 1 - len(content))
    if len(content) > limit:  # it grew, or belongs to a file system that tells no sizes
        raise UserError(f"{os.fspath(path)}: has more than {limit} bytes")
    return content


def read_text(path: PathLike, limit: int) -> str:
    """The content of a regular file in UTF-8; ends of lines stay as they are.

    Raises:
        UserError: as `opened`, or not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: can't be read: {error}") from None


def parse_json(text: str | bytes) -> object:
    """What a text means as JSON.

    Raises:
        ValueError: not JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def parse_toml(text: str) -> dict[str, object]:
    """What a text means as TOML.

    Raises:
        ValueError: not TOML, nested too deep, or with integers of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def read_json(path: PathLike, limit: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        UserError: as `read_text`, or not a JSON object.
    """
    text = read_text(path, limit)
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{os.fspath(path)}: must hold a JSON object")
    return fields


def check_inside(root: Path, name: str, follow_symlinks: bool = False) -> str:
    """What is wrong with a file that a data folder names; "" if nothing is, or if it is not there.

    Args:
        name: relative to ``root``.
        follow_symlinks: whether links may lead out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return "must lie within the folder"
    return _link_problem(root, name, follow_symlinks) or _kind_problem(root / name)


def files_below(
    root: Path, left_out: frozenset[str] = frozenset(), follow_symlinks: bool = False
) -> tuple[list[str], list[str]]:
    """The files below a folder, hidden ones and folders ``left_out`` skipped.

    Returns:
        names: relative paths with slashes, sorted.
        problems: "path: reason" of what is there and can't be read: links out of the folder, pipes, devices.
    """
    names: list[str] = []
    problems: list[str] = []
    pending, seen = [root], {root.resolve()}
    while pending:
        for entry in _entries(pending.pop()):
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.name.startswith(".") or (entry.name in left_out and entry.is_dir()):
                continue
            if entry.is_symlink() and (problem := _link_problem(root, name, follow_symlinks)):
                problems.append(f"{path}: {problem}")
            elif entry.is_dir():
                if path.resolve() not in seen and (follow_symlinks or not entry.is_symlink()):
                    seen.add(path.resolve())
                    pending.append(path)
            elif problem := _kind_problem(path):
                problems.append(f"{path}: {problem}")
            else:
                names.append(name)
    return sorted(names), sorted(problems)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: can't be read: {_reason(error)}") from None


def _link_problem(root: Path, name: str, follow_symlinks: bool) -> str:
    try:
        leads_out = not (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # circular links, invalid names
        return f"is a link that leads nowhere: {error}"
    if leads_out and not follow_symlinks:
        return "is a link out of the folder; set data.follow_symlinks = true to follow it"
    return ""


def _kind_problem(path: Path) -> str:
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):
        return ""
    return "" if kind == stat.S_IFREG else f"is {KINDS.get(kind, 'no file')}; must be a regular file"


def _size(path: PathLike, found: os.stat_result) -> int:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"{os.fspath(path)}: is {KINDS.get(kind, 'no file')}; must be a regular file")
    return found.st_size


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
