"""A checkpoint on its way to disk: each process writes what it holds, while it continues with other work.

The folder is made under a hidden name. Each process writes its files there, and last a list of them, with the place of
every part in its tensor. Once all have, the first puts the lists together as the index, and renames the folder, which
nobody has seen until then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared_config.errors import UserError
from shared_config.interchange.files import file_errors, folder_target, make_folder
from shared_config.interchange.parts import Part, Parts, StateParts, covers
from shared_config.interchange.reading import MAX_JSON_BYTES, check_regular, parse_json, read_text
from shared_config.interchange.run_layout import (
    INDEX,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    FileFields,
    advice,
    checksum,
    clean,
    hidden,
    is_full,
    make_space,
    no_space,
    prune,
)
from shared_config.interchange.tensors import DTYPES, TensorFile, write_tensors
from shared_config.interchange.together import ALONE, Processes

DONE, FULL, FAILED, WRITING = range(4)
"""How far a process is: one that still writes is waited for, whatever the others say."""

FILES = {"weights": WEIGHTS, "optimizer": OPTIMIZER}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Saving:
    """The writing of one checkpoint, which all processes of a run begin, ask for and end at the same places.

    Attributes:
        final: the folder of the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        state: StateParts,
        fields: Mapping[str, object],
        *,
        keep: int | None = None,
        milestones: int = 0,
        processes: Processes = ALONE,
    ):
        """Begin it, in a thread.

        Args:
            state: its arrays must not change until the end.
            fields: of the state file.
            keep, milestones: see `shared_config.interchange.run_layout.prune`.

        Raises:
            UserError: something other than a folder is in its place.
        """
        self.final = folder / f"step_{state.step:08d}"
        self._folder, self._state, self._fields = folder, state, fields
        self._keep, self._milestones, self._processes = keep, milestones, processes
        with processes.agreed():
            self._target = folder_target(self.final)
        self._aside = hidden(self._target, "new")
        self._made_space = False
        self._begin()

    def poll(self) -> Path | None:
        """The checkpoint, once it is there; None as long as one of the processes writes.

        Raises:
            UserError: it can't be written, by one of the processes, which says why. What was there before is still
                there.
        """
        status, failed = self._processes.worst(self._status)
        if status == WRITING:
            return None
        if status == DONE:
            status, failed = self._by_the_first(self._publish), 0
        if status == DONE:
            return self.final
        self._by_the_first(lambda: shutil.rmtree(self._aside, ignore_errors=True))
        if status == FULL and not self._made_space:
            self._made_space = True
            self._by_the_first(lambda: make_space(self._folder, self._keep, self._milestones))
            self._begin()
            return None
        if status == FULL and failed == self._processes.rank:
            raise no_space(self._folder, self._keep) from self._error
        raise self._processes.error_of(failed, self._error)

    def finish(self) -> Path:
        """The checkpoint; waits for it.

        Raises:
            UserError: as `poll`.
        """
        while True:
            self._thread.join()
            done = self.poll()
            if done is not None:
                return done

    def _begin(self) -> None:
        self._error: Exception | None = None
        self._status = self._by_the_first(self._prepare)
        self._thread = threading.Thread(target=self._write, daemon=True)
        if self._status == DONE:
            self._status = WRITING
        self._thread.start()

    def _write(self) -> None:
        if self._status == WRITING:
            self._status = self._attempt(lambda: write_share(self._aside, self._state, self._processes))

    def _prepare(self) -> None:
        for place in {self._folder, make_folder(self._target.parent)}:
            clean(place)
        self._aside.mkdir()

    def _publish(self) -> None:
        files = put_together(self._aside, self._processes.count)
        fields = {**self._fields, "files": files}
        text = json.dumps({"checksum": checksum(fields), **fields}, indent=1, allow_nan=False)
        (self._aside / STATE).write_text(text + "\n", encoding="utf-8")
        _sync(self._aside / STATE)
        _sync(self._aside)
        _rename(self._aside, self._target)
        if self._keep is not None:
            prune(self._folder, self._keep, spare=self.final, milestones=self._milestones)

    def _by_the_first(self, action: Callable[[], None]) -> int:
        """How what the first process alone does ends, as all know it."""
        return self._processes.largest(self._attempt(action) if self._processes.is_main else DONE)

    def _attempt(self, action: Callable[[], None]) -> int:
        try:
            with file_errors(self.final, "the checkpoint can't be written"):
                action()
        except Exception as error:
            self._error = error
            return FULL if is_full(error) else FAILED
        return DONE


def write_share(folder: Path, state: StateParts, processes: Processes) -> None:
    """Write what this process holds, and a list of it.

    Raises:
        UserError: it can't be written, or the folder that the first process has made is not seen here.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; all processes of a run must see the same folder")
    listed: dict[str, Any] = {"files": {}, "tensors": {}}
    for kind, tensors in state.kinds.items():
        file = folder / _file_name(FILES[kind], processes)
        stored = {
            _key(name, number): part.values for name, parts in tensors.items() for number, part in enumerate(parts.held)
        }
        if stored or processes.count == 1:
            write_tensors(file, stored)
            listed["files"][file.name] = describe(file)
        listed["tensors"][kind] = {
            name: {
                "dtype": NAMES.get(parts.dtype.newbyteorder("="), str(parts.dtype)),
                "shape": list(parts.shape),
                "parts": [[file.name, list(part.start), list(part.stop)] for part in parts.held],
            }
            for name, parts in tensors.items()
        }
    share = _share(folder, processes.rank)
    share.write_text(json.dumps(listed), encoding="utf-8")
    _sync(share)


def put_together(folder: Path, count: int) -> dict[str, FileFields]:
    """Write the index of what all processes have written. Returns the description of each file.

    Raises:
        UserError: parts of a tensor are missing, or there twice.
    """
    files: dict[str, FileFields] = {}
    tensors: dict[str, dict[str, Any]] = {kind: {} for kind in FILES}
    for rank in range(count):
        share = _share(folder, rank)
        listed: Any = parse_json(read_text(share, MAX_JSON_BYTES))
        share.unlink()
        files |= listed["files"]
        for kind, found in listed["tensors"].items():
            for name, entry in found.items():
                tensors[kind].setdefault(name, {**entry, "parts": []})["parts"] += entry["parts"]
    for kind in FILES:
        _check_covered(folder / INDEX, tensors[kind])
    numbers = {file: number for number, file in enumerate(files)}
    for entry in (entry for found in tensors.values() for entry in found.values()):
        entry["parts"] = [[numbers[file], start, stop] for file, start, stop in entry["parts"]]
    index = folder / INDEX
    index.write_text(json.dumps({"files": list(files), **tensors}) + "\n", encoding="utf-8")
    _sync(index)
    return {**files, INDEX: describe(index)}


def read_parts(folder: Path, kinds: tuple[str, ...]) -> dict[str, dict[str, Parts]]:
    """The tensors of these kinds, mapped from the files of a checkpoint.

    Raises:
        UserError: files that do not hold what the index says.
    """
    try:
        index: Any = parse_json(read_text(folder / INDEX, MAX_JSON_BYTES))
        files = [folder / file for file in index["files"]]
        opened: dict[Path, TensorFile] = {}
        found: dict[str, dict[str, Parts]] = {}
        for kind in kinds:
            found[kind] = {name: _stored(name, entry, files, opened) for name, entry in index[kind].items()}
            _check_covered(folder / INDEX, index[kind])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX}: is no index of parts: {error!r}{advice(folder / INDEX)}") from error
    return found


def describe(file: Path) -> FileFields:
    """Length and checksum of a file."""
    if file.exists():
        check_regular(file)
    with file.open("rb") as opened:
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _stored(name: str, entry: Mapping[str, Any], files: list[Path], opened: dict[Path, TensorFile]) -> Parts:
    """The parts of one tensor, as files hold them."""
    held, numbers = [], dict.fromkeys(files, 0)
    for number, start, stop in entry["parts"]:
        path = files[number]
        file = opened.setdefault(path, opened.get(path) or TensorFile(path))
        part = Part(tuple(start), file.read(_key(name, numbers[path])))
        if part.stop != tuple(stop):
            raise UserError(f"{path}: holds {name!r} up to {list(part.stop)}, not {stop}{advice(path)}")
        numbers[path] += 1
        held.append(part)
    return Parts(tuple(entry["shape"]), DTYPES[entry["dtype"]], tuple(held))


def _check_covered(index: Path, tensors: Mapping[str, Any]) -> None:
    for name, entry in tensors.items():
        if not covers(entry["shape"], [(start, stop) for _, start, stop in entry["parts"]]):
            places = ", ".join(f"{start} to {stop}" for _, start, stop in entry["parts"]) or "none"
            raise UserError(f"{index}: the parts of {name!r} are no whole {tuple(entry['shape'])}: {places}")


def _key(name: str, number: int) -> str:
    """What the part of a tensor with that number in its file is called there."""
    return name if number == 0 else f"{name}#{number}"


def _file_name(file: str, processes: Processes) -> str:
    """As "weights-00001-of-00004.safetensors"; of one process "weights.safetensors"."""
    if processes.count == 1:
        return file
    name = Path(file)
    return f"{name.stem}-{processes.rank + 1:05d}-of-{processes.count:05d}{name.suffix}"


def _share(folder: Path, rank: int) -> Path:
    return folder / f"written-{rank + 1:05d}.json"


def _rename(aside: Path, final: Path) -> None:
    old = hidden(final, "old")
    replaces = final.exists()
    if replaces:
        final.rename(old)
    aside.rename(final)
    _sync(final.parent)
    if replaces:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
