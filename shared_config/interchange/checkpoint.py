"""Training checkpoints: one folder per step that both backends write and read.

``<run>/step_00000050/`` is the state after 50 updates:

    weights.safetensors     parameters and buffers by name
    optimizer.safetensors   moments ``m.<parameter>`` and ``v.<parameter>``; ``t.<parameter>``, updates that it took (in
                            files written before these were counted there are none: each is the step)
    state.json              step, place in the data, config, random state, backend, versions, checksums of all files

A folder is written aside as ``.step_00000050.new``, brought to disk and renamed, so that whenever the machine stops
there is the old checkpoint or the new one. One process may write to a run's folder at a time; any number may read.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError

from shared_config.errors import UserError
from shared_config.interchange.files import file_errors, folder_target, make_folder
from shared_config.interchange.former import current_fields, current_state
from shared_config.interchange.reading import MAX_JSON_BYTES, check_regular, parse_json, read_text
from shared_config.interchange.tensors import read_tensors, write_tensors

FORMAT = 2
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
METRICS = "metrics.jsonl"
"""Beside the checkpoints of a run."""
STEP_NAME = re.compile(r"step_(\d{8,})")
LIBRARIES = ("numpy", "torch", "jax", "flax")

Arrays = dict[str, np.ndarray]
T = TypeVar("T")


@dataclass
class TrainingState:
    """What a trainer needs to go on as if it had never stopped.

    Attributes:
        step: updates done.
        weights: parameters and buffers by name.
        optimizer: moments ``m.<parameter>`` and ``v.<parameter>``, and counts of updates ``t.<parameter>``, each the
            step if there are none.
        extra: anything else, as JSON values: the state of random generators, for one.
    """

    step: int
    weights: Arrays
    optimizer: Arrays
    extra: dict[str, Any] = field(default_factory=dict)


class NonFiniteError(UserError):
    """A state that is not to be kept. ``name`` is that of the first tensor that is not finite."""

    def __init__(self, path: Path, name: str):
        super().__init__(f"{path}: not written: {name} is not finite")
        self.name = name


@dataclass
class Checkpoint:
    """A training state and where it came from.

    Attributes:
        rows: training rows consumed over all ranks.
        fingerprint: of the data they came from.
        config: nested dict, see `shared_config.loader.config_from_dict`.
        backend: which one wrote it.
    """

    path: Path
    state: TrainingState
    rows: int
    fingerprint: str
    config: dict[str, Any]
    backend: str
    versions: dict[str, str]


def save(
    folder: str | Path,
    state: TrainingState,
    *,
    rows: int = 0,
    fingerprint: str = "",
    config: Mapping[str, Any] | None = None,
    backend: str = "",
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of ``state.step`` to a run's folder; one of the same step is replaced. Returns its path.

    Args:
        keep: how many of the newest checkpoints stay; None: all.

    Where the disk is full, checkpoints that ``keep`` gives up once this one is there make room for it; the newest
    whole one stays.

    Raises:
        NonFiniteError: a weight or a moment is not finite. Nothing is written nor removed.
        UserError: it can't be written, say for lack of space, or its place is taken by something that is no folder.
            What was there before is still there.
    """
    folder = Path(folder)
    final = folder / f"step_{state.step:08d}"
    target = folder_target(final)
    bad = first_nonfinite(state)
    if bad is not None:
        raise NonFiniteError(final, bad)
    aside = _hidden(target, "new")
    fields = {
        "format": FORMAT,
        "step": state.step,
        "rows": rows,
        "fingerprint": fingerprint,
        "backend": backend,
        "versions": installed_versions(),
        "extra": state.extra,
        "config": dict(config or {}),
    }

    def write() -> None:
        make_folder(folder)
        for place in {folder, make_folder(target.parent)}:
            clean(place)
        aside.mkdir()
        try:
            _write_files(aside, state, fields)
            _publish(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    with file_errors(final, "the checkpoint can't be written"):
        with_room(folder, keep, write)
        if keep is not None:
            prune(folder, keep, spare=final)
    return final


def load(path: str | Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint, or the latest one of a run's folder.

    Every file that is read is checked against its checksum. The arrays are mapped from the files, copied on write.

    Raises:
        UserError: there is none, or a file is missing, truncated, corrupt or of a newer format; it names the file.
    """
    folder = _resolve(Path(path))
    fields = _read_state(folder / STATE)
    weights = _read_arrays(folder / WEIGHTS, fields["files"])
    optimizer = _read_arrays(folder / OPTIMIZER, fields["files"]) if with_optimizer else {}
    if fields["format"] < FORMAT:
        weights, optimizer = current_state(weights, optimizer, fields["config"])
    return Checkpoint(
        path=folder,
        state=TrainingState(fields["step"], weights, optimizer, fields["extra"]),
        **{name: fields[name] for name in ("rows", "fingerprint", "config", "backend", "versions")},
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a checkpoint, or of the latest one of a run's folder; {} if its writer gave none.

    Raises:
        UserError: as `load`.
    """
    return _read_state(_resolve(Path(path)) / STATE)["config"]


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder; None if there is none."""
    published = _published(Path(folder))
    return published[max(published)] if published else None


def is_checkpoint(path: str | Path) -> bool:
    """Whether `load` has something to read there: a checkpoint, or a run's folder with one."""
    return (Path(path) / STATE).exists() or latest(path) is not None


def clean(folder: str | Path) -> None:
    """Remove what writers that were killed left behind, and finish what they had begun."""
    for left in sorted(Path(folder).glob(".step_*.*")):
        final = left.with_name(left.stem[1:])
        if left.suffix == ".old" and not final.exists():
            left.rename(final)
        elif left.suffix in (".new", ".old", ".gone"):
            _remove(left)


def with_room(folder: str | Path, keep: int | None, write: Callable[[], T]) -> T:
    """What ``write`` gives; if it finds the disk full, remove leftovers and the oldest checkpoints, down to one less
    than ``keep`` but never the newest whole one, and call it once more.

    Raises:
        UserError: the disk is still full; it says what is kept.
    """
    folder = Path(folder)
    try:
        return write()
    except (OSError, UserError) as error:
        if not _is_full(error):
            raise
    clean(folder)
    whole = _newest_whole(folder)
    if keep is not None and whole is not None:
        prune(folder, max(1, keep - 1), spare=whole)
    try:
        return write()
    except (OSError, UserError) as error:
        if not _is_full(error):
            raise
        clean(folder)
        kept = ", ".join(path.name for _, path in sorted(_published(folder).items())) or "no checkpoint"
        raise UserError(
            f"{folder}: No space left on device, also without what checkpoint.keep_last_n = {keep} gives up; "
            f"kept: {kept}; free some space and start the run again"
        ) from error


def first_nonfinite(state: TrainingState) -> str | None:
    """The first of the weights and moments with a value that is not finite, in the order of the weights, each before
    its moments; None if there is none.
    """
    arrays = {**state.weights, **state.optimizer}
    ordered = [prefix + name for name in state.weights for prefix in ("", "m.", "v.") if prefix + name in arrays]
    names = dict.fromkeys([*ordered, *arrays])
    return next((name for name in names if not np.isfinite(arrays[name]).all()), None)


def prune(folder: str | Path, keep: int, spare: Path | None = None) -> None:
    """Remove all but the ``keep`` checkpoints of the highest steps; ``spare`` stays in any case."""
    published = _published(Path(folder))
    for step in sorted(published)[: max(0, len(published) - keep)]:
        if published[step] != spare:
            gone = _hidden(published[step], "gone")
            published[step].rename(gone)
            _remove(gone)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that bear on numbers, read without importing them."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _remove(path: Path) -> None:
    """Remove a folder or a file; of a symbolic link, the link."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}.{suffix}")


def _published(folder: Path) -> dict[int, Path]:
    """Checkpoints by step. One that was being replaced when its writer died counts under its hidden name."""
    found: dict[int, Path] = {}
    for path in [*folder.glob(".step_*.old"), *folder.glob("step_*")]:
        match = STEP_NAME.fullmatch(path.name if path.suffix != ".old" else path.stem[1:])
        if match and path.is_dir():
            found[int(match[1])] = path
    return found


def _is_full(error: BaseException) -> bool:
    """Whether the disk or the quota was at its end; safetensors says so in words only."""
    causes = (error, error.__cause__)
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or (isinstance(cause, SafetensorError) and ("os error 28" in str(cause) or "os error 122" in str(cause)))
        for cause in causes
    )


def _newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there, in full length."""
    for _, path in sorted(_published(folder).items(), reverse=True):
        try:
            files = _read_state(path / STATE)["files"]
            if all((path / name).stat().st_size == described["bytes"] for name, described in files.items()):
                return path
        except (UserError, OSError, KeyError):
            continue
    return None


def _resolve(path: Path) -> Path:
    if (path / STATE).exists() or STEP_NAME.fullmatch(path.name):
        return path
    found = latest(path)
    if found is None:
        raise UserError(f"{path}: no checkpoint, nor a folder with checkpoints (step_00000050, ...)")
    return found


def _publish(aside: Path, final: Path) -> None:
    old = _hidden(final, "old")
    replaces = final.exists()
    if replaces:
        final.rename(old)
    aside.rename(final)
    _sync(final.parent)
    if replaces:
        shutil.rmtree(old)


def _write_files(folder: Path, state: TrainingState, fields: dict[str, Any]) -> None:
    write_tensors(folder / WEIGHTS, state.weights)
    write_tensors(folder / OPTIMIZER, state.optimizer)
    files = {name: _describe(folder / name) for name in (WEIGHTS, OPTIMIZER)}
    fields = {**fields, "files": files}
    text = json.dumps({"checksum": _checksum(fields), **fields}, indent=1, allow_nan=False)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")
    _sync(folder / STATE)
    _sync(folder)


def _read_arrays(file: Path, files: dict[str, Any]) -> Arrays:
    expected = files[file.name]
    try:
        found = _describe(file)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}){_advice(file)}") from None
    if found["bytes"] != expected["bytes"]:
        raise UserError(f"{file}: truncated: {found['bytes']} bytes instead of {expected['bytes']}{_advice(file)}")
    if found != expected:
        raise UserError(f"{file}: corrupt: its checksum does not match {STATE}{_advice(file)}")
    return read_tensors(file)


def _read_state(file: Path) -> dict[str, Any]:
    try:
        fields = parse_json(read_text(file, MAX_JSON_BYTES))
    except (UserError, ValueError) as error:
        raise UserError(f"{file}: can't be read ({error}){_advice(file)}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise UserError(f"{file}: not the state of a training checkpoint{_advice(file)}")
    if fields["format"] > FORMAT:
        raise UserError(f"{file}: format {fields['format']} is newer than this version reads ({FORMAT})")
    if fields.pop("checksum", "") != _checksum(fields):
        raise UserError(f"{file}: corrupt: its checksum does not match{_advice(file)}")
    return fields if fields["format"] == FORMAT else {**fields, "config": current_fields(fields["config"])}


def _advice(file: Path) -> str:
    return f"; remove {file.parent} to go on from the checkpoint before it"


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    if file.exists():
        check_regular(file)
    with file.open("rb") as opened:
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
