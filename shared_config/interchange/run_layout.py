"""A run's folder: the checkpoints in it, which of them stay, and what the state file of each says."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict, TypeGuard, TypeVar

from safetensors import SafetensorError

from shared_config.errors import UserError
from shared_config.interchange.former import current_fields
from shared_config.interchange.reading import MAX_JSON_BYTES, parse_json, read_text

FORMAT = 3
PARTED = 3
"""The first format whose tensors an index finds; before, each was whole in one file."""
NAMED = 2
"""The first format whose names and fields are those of now."""
WEIGHTS, OPTIMIZER, INDEX, STATE = "weights.safetensors", "optimizer.safetensors", "index.json", "state.json"
METRICS = "metrics.jsonl"
"""Beside the checkpoints of a run."""
STEP_NAME = re.compile(r"step_(\d{8,})")

T = TypeVar("T")


class FileFields(TypedDict):
    """What a state says of a file beside it."""

    bytes: int
    sha256: str


class StateFields(TypedDict):
    """The content of a state file; see `Checkpoint`."""

    format: int
    step: int
    rows: int
    fingerprint: str
    backend: str
    versions: dict[str, str]
    extra: dict[str, object]
    config: dict[str, object]
    files: dict[str, FileFields]
    checksum: NotRequired[str]


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder; None if there is none."""
    published = published_steps(Path(folder))
    return published[max(published)] if published else None


def clean(folder: str | Path) -> None:
    """Remove what writers that were killed left behind, and finish what they had begun."""
    for left in sorted(Path(folder).glob(".step_*.*")):
        final = left.with_name(left.stem[1:])
        if left.suffix == ".old" and not final.exists():
            left.rename(final)
        elif left.suffix in (".new", ".old", ".gone"):
            remove(left)


def with_room(folder: str | Path, keep: int | None, write: Callable[[], T], milestones: int = 0) -> T:
    """What ``write`` gives; if it finds the disk full, `make_space`, and call it once more.

    Raises:
        UserError: the disk is still full; it says what is kept.
    """
    folder = Path(folder)
    try:
        return write()
    except (OSError, UserError) as error:
        if not is_full(error):
            raise
    make_space(folder, keep, milestones)
    try:
        return write()
    except (OSError, UserError) as error:
        if not is_full(error):
            raise
        raise no_space(folder, keep) from error


def make_space(folder: Path, keep: int | None, milestones: int = 0) -> None:
    """Remove leftovers and the oldest checkpoints, down to one less than ``keep`` but never the newest whole one."""
    clean(folder)
    newest = _newest_whole(folder)
    if keep is not None and newest is not None:
        prune(folder, max(1, keep - 1), spare=newest, milestones=milestones)


def no_space(folder: Path, keep: int | None) -> UserError:
    """The disk is full, and all that may be removed has been; says what is kept."""
    clean(folder)
    kept = ", ".join(path.name for _, path in sorted(published_steps(folder).items())) or "no checkpoint"
    return UserError(
        f"{folder}: No space left on device, also without what checkpoint.keep_last_n = {keep} gives up; "
        f"kept: {kept}; free some space and start the run again"
    )


def prune(folder: str | Path, keep: int, spare: Path | None = None, milestones: int = 0) -> None:
    """Remove all but the ``keep`` checkpoints of the highest steps; ``spare`` stays in any case, and so do those whose
    step is a multiple of ``milestones``, which are not counted (0: there are none such).
    """
    published = {
        step: path for step, path in published_steps(Path(folder)).items() if not milestones or step % milestones
    }
    for step in sorted(published)[: max(0, len(published) - keep)]:
        if published[step] != spare:
            gone = hidden(published[step], "gone")
            published[step].rename(gone)
            remove(gone)


def remove(path: Path) -> None:
    """Remove a folder or a file; of a symbolic link, the link."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def hidden(final: Path, suffix: str) -> Path:
    """Where the folder of a checkpoint stands while it is written, or before it is removed."""
    return final.with_name(f".{final.name}.{suffix}")


def published_steps(folder: Path) -> dict[int, Path]:
    """Checkpoints by step. One that was being replaced when its writer died counts under its hidden name."""
    found: dict[int, Path] = {}
    for path in [*folder.glob(".step_*.old"), *folder.glob("step_*")]:
        match = STEP_NAME.fullmatch(path.name if path.suffix != ".old" else path.stem[1:])
        if match and path.is_dir():
            found[int(match[1])] = path
    return found


def is_full(error: BaseException) -> bool:
    """Whether the disk or the quota was at its end; safetensors says so in words only."""
    causes = (error, error.__cause__)
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or (isinstance(cause, SafetensorError) and ("os error 28" in str(cause) or "os error 122" in str(cause)))
        for cause in causes
    )


def _newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there, in full length."""
    for _, path in sorted(published_steps(folder).items(), reverse=True):
        try:
            files = read_state(path / STATE)["files"]
            if all((path / name).stat().st_size == described["bytes"] for name, described in files.items()):
                return path
        except (UserError, OSError, KeyError):
            continue
    return None


def read_state(file: Path) -> StateFields:
    """The content of a state file, its config in today's terms.

    Raises:
        UserError: it can't be read, is corrupt, or is of a newer format.
    """
    try:
        fields = parse_json(read_text(file, MAX_JSON_BYTES))
    except (UserError, ValueError) as error:
        raise UserError(f"{file}: can't be read ({error}){advice(file)}") from None
    if not _is_state(fields):
        raise UserError(f"{file}: not the state of a training checkpoint{advice(file)}")
    if fields["format"] > FORMAT:
        raise UserError(f"{file}: format {fields['format']} is newer than this version reads ({FORMAT})")
    if fields.pop("checksum", "") != checksum(fields):
        raise UserError(f"{file}: corrupt: its checksum does not match{advice(file)}")
    return fields if fields["format"] >= NAMED else {**fields, "config": current_fields(fields["config"])}


def _is_state(fields: object) -> TypeGuard[StateFields]:
    return isinstance(fields, dict) and isinstance(fields.get("format"), int)


def advice(file: Path) -> str:
    """How to continue without the checkpoint of a file."""
    return f"; remove {file.parent} to go on from the checkpoint before it"


def checksum(fields: Mapping[str, object]) -> str:
    """SHA-256 of a state's fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
