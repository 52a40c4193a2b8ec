"""Training checkpoints: one folder per step that both backends write and read, in any layout.

``<run>/step_00000050/`` is the state after 50 updates:

    weights.safetensors     parameters and buffers by name
    optimizer.safetensors   moments ``m.<parameter>`` and ``v.<parameter>``; ``t.<parameter>``, updates that it took (in
                            files written before these were counted there are none: each is the step)
    index.json              of each tensor its shape, and the files that hold parts of it, with the place of each
    state.json              step, place in the data, config, random state, backend, versions, checksums of all files

Each of several processes writes the parts that it holds, to files such as ``weights-00001-of-00004.safetensors``; of
those that hold the same part, one does. A reader maps the files, and reads what it needs of any tensor.

A folder is written aside as ``.step_00000050.new``, brought to disk and renamed, so that whenever the machine stops
there is the old checkpoint or the new one. One run may write to its folder at a time; any number may read.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from shared_config.contract.moments import UPDATES
from shared_config.errors import UserError
from shared_config.interchange.former import current_state
from shared_config.interchange.parts import Parts, StateParts, whole
from shared_config.interchange.run_layout import (
    FORMAT,
    INDEX,
    NAMED,
    PARTED,
    STATE,
    STEP_NAME,
    FileFields,
    StateFields,
    advice,
    latest,
    read_state,
)
from shared_config.interchange.saving import FILES, Saving, describe, read_parts
from shared_config.interchange.tensors import read_tensors
from shared_config.interchange.together import ALONE, Processes

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
    extra: dict[str, object] = field(default_factory=dict)

    def parts(self) -> StateParts:
        """The same, each tensor in one part."""
        weights, optimizer = (
            {name: whole(name, array) for name, array in arrays.items()} for arrays in (self.weights, self.optimizer)
        )
        return StateParts(self.step, weights, optimizer, self.extra)


class NonFiniteError(UserError):
    """A state that is not to be kept. ``name`` is that of the first tensor that is not finite."""

    def __init__(self, path: Path, name: str):
        super().__init__(f"{path}: not written: {name} is not finite")
        self.name = name


@dataclass
class Checkpoint:
    """A training state and where it came from.

    Attributes:
        parts: the state, of which nothing has been read yet.
        rows: training rows consumed over all ranks.
        fingerprint: of the data they came from.
        config: nested dict, see `shared_config.loader.config_from_dict`.
        backend: which one wrote it.
    """

    path: Path
    parts: StateParts
    rows: int
    fingerprint: str
    config: dict[str, object]
    backend: str
    versions: dict[str, str]

    @cached_property
    def state(self) -> TrainingState:
        """The state, each tensor whole. Those in one part stay mapped from their file, copied on write."""
        return whole_state(self.parts)


def whole_state(parts: StateParts) -> TrainingState:
    """The state of which all parts are held, each tensor whole; one in a single part is not copied."""
    weights, optimizer = (
        {name: np.asarray(tensor) for name, tensor in tensors.items()} for tensors in parts.kinds.values()
    )
    return TrainingState(parts.step, weights, optimizer, parts.extra)


def save(
    folder: str | Path,
    state: TrainingState | StateParts,
    *,
    rows: int = 0,
    fingerprint: str = "",
    config: Mapping[str, object] | None = None,
    backend: str = "",
    keep: int | None = None,
    milestones: int = 0,
    processes: Processes = ALONE,
) -> Path:
    """Write a checkpoint, as `begin` does, and wait for it. Returns its path.

    Raises:
        NonFiniteError, UserError: as `begin` and `Saving.finish`.
    """
    return begin(
        folder,
        state,
        rows=rows,
        fingerprint=fingerprint,
        config=config,
        backend=backend,
        keep=keep,
        milestones=milestones,
        processes=processes,
    ).finish()


def begin(
    folder: str | Path,
    state: TrainingState | StateParts,
    *,
    rows: int = 0,
    fingerprint: str = "",
    config: Mapping[str, object] | None = None,
    backend: str = "",
    keep: int | None = None,
    milestones: int = 0,
    processes: Processes = ALONE,
) -> Saving:
    """Begin to write the checkpoint of ``state.step`` to a run's folder; one of the same step is replaced.

    All processes call it at the same place, each with what it holds; together that is every part of every tensor once.

    Args:
        state: its arrays must not change until the checkpoint is there.
        keep: how many of the newest checkpoints stay; None: all.
        milestones: those whose step is a multiple of it stay, too; 0: none.

    Where the disk is full, checkpoints that ``keep`` would drop after this one are removed first; the newest whole one
    stays.

    Raises:
        NonFiniteError: a weight or a moment is not finite. Nothing is written nor removed.
        UserError: it can't be written, say for lack of space, or something other than a folder is in its place. What
            was there before is still there.
    """
    folder = Path(folder)
    bad = first_nonfinite(state)
    found, holder = processes.worst(int(bad is not None))
    if found:
        error = NonFiniteError(folder / f"step_{state.step:08d}", bad or "a tensor of another process")
        error.shown_elsewhere = holder != processes.rank
        raise error
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
    parts = state.parts() if isinstance(state, TrainingState) else state
    return Saving(folder, parts, fields, keep=keep, milestones=milestones, processes=processes)


def load(path: str | Path, *, with_optimizer: bool = True, processes: Processes = ALONE) -> Checkpoint:
    """Open a checkpoint, or the latest one of a run's folder.

    Every file that is read is checked against its checksum; of several processes each checks some of them, and all have
    to ask whether another has failed. The arrays are mapped from the files, copied on write.

    Raises:
        UserError: there is none, or a file is missing, truncated, corrupt or of a newer format; it names the file.
    """
    folder = _resolve(Path(path))
    fields = read_state(folder / STATE)
    kinds = ("weights", "optimizer") if with_optimizer else ("weights",)
    files = [name for name in fields["files"] if name.startswith(tuple(Path(FILES[kind]).stem for kind in kinds))]
    shared = {name: number % processes.count for number, name in enumerate(files)} | {INDEX: processes.rank}
    for name, described in fields["files"].items():
        if shared.get(name) == processes.rank:
            _check(folder / name, described)
    if fields["format"] >= PARTED:
        parts = StateParts(fields["step"], **{"optimizer": {}, **read_parts(folder, kinds)}, extra=fields["extra"])
    else:
        parts = _former_state(folder, fields, kinds).parts()
    return Checkpoint(
        folder,
        parts,
        rows=fields["rows"],
        fingerprint=fields["fingerprint"],
        config=fields["config"],
        backend=fields["backend"],
        versions=fields["versions"],
    )


def read_config(path: str | Path) -> dict[str, object]:
    """The config of a checkpoint, or of the latest one of a run's folder; {} if its writer gave none.

    Raises:
        UserError: as `load`.
    """
    return read_state(_resolve(Path(path)) / STATE)["config"]


def is_checkpoint(path: str | Path) -> bool:
    """Whether `load` has something to read there: a checkpoint, or a run's folder with one."""
    return (Path(path) / STATE).exists() or latest(path) is not None


def first_nonfinite(state: TrainingState | StateParts) -> str | None:
    """The first of the weights and moments with a value that is not finite, in the order of the weights, each before
    its moments; None if there is none.
    """
    arrays = {**state.weights, **state.optimizer}
    kinds = dict.fromkeys(name.partition(".")[0] for name in state.optimizer)
    prefixes = ("", *(f"{kind}." for kind in kinds if kind != UPDATES))
    ordered = [prefix + name for name in state.weights for prefix in prefixes if prefix + name in arrays]
    names = dict.fromkeys([*ordered, *arrays])
    return next((name for name in names if not _is_finite(arrays[name])), None)


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


def _former_state(folder: Path, fields: StateFields, kinds: tuple[str, ...]) -> TrainingState:
    """The state of a checkpoint without an index: each tensor is whole in the one file of its kind."""
    arrays = {"optimizer": {}, **{kind: read_tensors(folder / FILES[kind]) for kind in kinds}}
    weights, optimizer = arrays["weights"], arrays["optimizer"]
    if fields["format"] < NAMED:
        weights, optimizer = current_state(weights, optimizer, fields["config"])
    return TrainingState(fields["step"], weights, optimizer, fields["extra"])


def _check(file: Path, expected: FileFields) -> None:
    try:
        found = describe(file)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}){advice(file)}") from None
    if found["bytes"] != expected["bytes"]:
        raise UserError(f"{file}: truncated: {found['bytes']} bytes instead of {expected['bytes']}{advice(file)}")
    if found != expected:
        raise UserError(f"{file}: corrupt: its checksum does not match {STATE}{advice(file)}")


def _is_finite(values: np.ndarray | Parts) -> bool:
    held = [part.values for part in values.held] if isinstance(values, Parts) else [values]
    return all(bool(np.isfinite(array).all()) for array in held)
