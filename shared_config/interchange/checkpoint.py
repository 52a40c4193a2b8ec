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

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.contract.moments import UPDATES
from shared_config.errors import UserError
from shared_config.interchange.files import file_errors, folder_target, make_folder
from shared_config.interchange.former import current_state
from shared_config.interchange.reading import check_regular
from shared_config.interchange.run_layout import (
    FORMAT,
    OPTIMIZER,
    STATE,
    STEP_NAME,
    WEIGHTS,
    advice,
    checksum,
    clean,
    hidden,
    latest,
    prune,
    read_state,
    with_room,
)
from shared_config.interchange.tensors import read_tensors, write_tensors

LIBRARIES = ("numpy", "torch", "jax", "flax")

Arrays = dict[str, np.ndarray]


@dataclass
class TrainingState:
    """What a trainer needs to continue as if it had never stopped.

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

    Where the disk is full, checkpoints that ``keep`` would drop after this one are removed first; the newest whole one
    stays.

    Raises:
        NonFiniteError: a weight or a moment is not finite. Nothing is written nor removed.
        UserError: it can't be written, say for lack of space, or something other than a folder is in its place. What
            was there before is still there.
    """
    folder = Path(folder)
    final = folder / f"step_{state.step:08d}"
    target = folder_target(final)
    bad = first_nonfinite(state)
    if bad is not None:
        raise NonFiniteError(final, bad)
    aside = hidden(target, "new")
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
    fields = read_state(folder / STATE)
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
    return read_state(_resolve(Path(path)) / STATE)["config"]


def is_checkpoint(path: str | Path) -> bool:
    """Whether `load` has something to read there: a checkpoint, or a run's folder with one."""
    return (Path(path) / STATE).exists() or latest(path) is not None


def first_nonfinite(state: TrainingState) -> str | None:
    """The first of the weights and moments with a value that is not finite, in the order of the weights, each before
    its moments; None if there is none.
    """
    arrays = {**state.weights, **state.optimizer}
    kinds = dict.fromkeys(name.partition(".")[0] for name in state.optimizer)
    prefixes = ("", *(f"{kind}." for kind in kinds if kind != UPDATES))
    ordered = [prefix + name for name in state.weights for prefix in prefixes if prefix + name in arrays]
    names = dict.fromkeys([*ordered, *arrays])
    return next((name for name in names if not np.isfinite(arrays[name]).all()), None)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect numbers, read without importing them."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _resolve(path: Path) -> Path:
    if (path / STATE).exists() or STEP_NAME.fullmatch(path.name):
        return path
    found = latest(path)
    if found is None:
        raise UserError(f"{path}: no checkpoint, nor a folder with checkpoints (step_00000050, ...)")
    return found


def _publish(aside: Path, final: Path) -> None:
    old = hidden(final, "old")
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
    text = json.dumps({"checksum": checksum(fields), **fields}, indent=1, allow_nan=False)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")
    _sync(folder / STATE)
    _sync(folder)


def _read_arrays(file: Path, files: dict[str, Any]) -> Arrays:
    expected = files[file.name]
    try:
        found = _describe(file)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}){advice(file)}") from None
    if found["bytes"] != expected["bytes"]:
        raise UserError(f"{file}: truncated: {found['bytes']} bytes instead of {expected['bytes']}{advice(file)}")
    if found != expected:
        raise UserError(f"{file}: corrupt: its checksum does not match {STATE}{advice(file)}")
    return read_tensors(file)


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
