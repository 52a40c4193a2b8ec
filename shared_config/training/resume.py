"""Where a run starts: from nothing, from given weights, or where its last checkpoint left it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared_config.contract.freeze import canonical_freeze_meta
from shared_config.contract.function import differences
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import Checkpoint, TrainingState, load
from shared_config.interchange.parts import StateParts, whole
from shared_config.interchange.run_layout import latest
from shared_config.interchange.source import read_model, to_stderr
from shared_config.interchange.together import ALONE, Processes
from shared_config.interchange.toml import config_from_dict
from shared_config.schema.base import Section, execution_names
from shared_config.schema.job import JobConfig
from shared_config.training.global_batch import accumulation

Say = Callable[[str], None]
ROWS_PER_STEP = "rows_per_step"
"""What the rows of a step are called in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The first step to take (counted from 0), the training rows consumed before it, the checkpoint they come from, how
    many updates were left out: in all, and just before it; and ``train.grad_accum_steps`` from here on.
    """

    step: int = 0
    rows: int = 0
    path: Path | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    grad_accum_steps: int = 1


def has_weights(config: JobConfig) -> bool:
    """Whether `restore` finds weights, so that none need be drawn."""
    return bool(config.checkpoint.load_path) or latest(config.checkpoint.dir) is not None


def restore(
    config: JobConfig,
    load_state: Callable[[TrainingState | StateParts], None],
    *,
    backend: str,
    fingerprint: str,
    say: Say,
    note: Say = to_stderr,
    overridden: Collection[str] = (),
    processes: Processes = ALONE,
    rows_per_batch: int,
) -> Start:
    """Give a trainer the state of the latest checkpoint of ``checkpoint.dir``, else the weights of
    ``checkpoint.load_path`` (native weights, a training run or checkpoint, a Hugging Face folder), else nothing.

    Args:
        say, note: tell the user what happens, and what they should know in any case.
        overridden: dotted fields that the command line sets; they may change the function of the weights, which is
            reported.
        processes: all that restore their parts; see `shared_config.interchange.checkpoint.load`.
        rows_per_batch: of a micro-batch, over all ranks.

    Raises:
        UserError: a damaged file, or weights of a model that differs, naming each field.
    """
    found = latest(config.checkpoint.dir)
    if found is not None:
        checkpoint = load(found, processes=processes)
        state = checkpoint.parts
        _compare(config, checkpoint, say, note, overridden)
        load_state(state)
        _announce(checkpoint, backend, fingerprint, say)
        steps = _accumulation(config, checkpoint, rows_per_batch, note, overridden)
        skipped = [_count(state, name) for name in ("skipped", "skipped_in_a_row")]
        return Start(state.step, checkpoint.rows, found, *skipped, grad_accum_steps=steps)
    if config.checkpoint.load_path:
        path = config.checkpoint.load_path
        notes: list[str] = []
        weights = read_model(path, config, overridden=overridden, say=notes.append).weights
        load_state(
            StateParts(step=0, weights={name: whole(name, tensor) for name, tensor in weights.items()}, optimizer={})
        )
        for line in notes:
            note(line)
        say(f"starting from the weights of {path}")
    return Start(grad_accum_steps=config.train.grad_accum_steps)


def _accumulation(
    config: JobConfig, checkpoint: Checkpoint, rows_per_batch: int, note: Say, overridden: Collection[str]
) -> int:
    rows = _count(checkpoint.parts, ROWS_PER_STEP)
    if not rows or not checkpoint.config:
        return config.train.grad_accum_steps
    before = config_from_dict(checkpoint.config).train
    found = accumulation(config, rows_per_batch, before, rows, overridden)
    if found.note:
        note(found.note)
    return found.grad_accum_steps


def _count(state: StateParts, name: str) -> int:
    number = state.extra.get(name, 0)
    assert isinstance(number, int)
    return number


def _announce(checkpoint: Checkpoint, backend: str, fingerprint: str, say: Say) -> None:
    written = f", written by {checkpoint.backend}" if checkpoint.backend != backend else ""
    say(f"resuming at step {checkpoint.parts.step} from {checkpoint.path}{written}")
    if checkpoint.fingerprint != fingerprint:
        say(
            "note: the training data are not those of the checkpoint; the run goes on at the same place of the new data"
        )


def _compare(config: JobConfig, checkpoint: Checkpoint, say: Say, note: Say, overridden: Collection[str]) -> None:
    if not checkpoint.config:
        return
    found = config_from_dict(checkpoint.config)
    if config.optimizer.name != found.optimizer.name:
        raise UserError(
            f"optimizer.name = {config.optimizer.name!r}: was {found.optimizer.name!r} when {checkpoint.path} was "
            "written, which keeps other moments; to start from its weights set checkpoint.dir to another folder and "
            "checkpoint.load_path to this one"
        )
    before = _flatten(found)
    now = _flatten(config)
    changed = {
        name: (before.get(name), now.get(name)) for name in {**before, **now} if before.get(name) != now.get(name)
    }
    differing = differences(config, found)
    refused = [difference for difference in differing if difference.field not in overridden]
    if config.lora != found.lora:
        raise UserError(
            f"lora = {config.lora}: was {found.lora} when {checkpoint.path} was written; set checkpoint.dir to another "
            "folder for a new run"
        )
    if refused:
        lines = [
            f"{item.field} = {item.here!r}: was {item.there!r} when {checkpoint.path} was written" for item in refused
        ]
        advice = "set checkpoint.dir to another folder for a new run, or the fields on the command line to go on"
        raise UserError("\n".join([*lines, advice]))
    for item in differing:
        note(f"note: {item.overriding(str(checkpoint.path))}")
    noted = [name for name in changed if name.partition(".")[0] not in execution_names(JobConfig)]
    if noted:
        changes = ", ".join(f"{name} {changed[name][0]!r} -> {changed[name][1]!r}" for name in noted)
        say(f"note: changed since the checkpoint: {changes}")


def _flatten(config: JobConfig) -> dict[str, Any]:
    """Values by field; specs that freeze the same are equal."""
    fields = dict(_leaves("", config))
    if config.vlm is not None:
        fields["vlm.freeze"] = canonical_freeze_meta(config.vlm.freeze)
    return fields


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Section):
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            yield from _leaves(f"{prefix}.{field.name}".lstrip("."), getattr(value, field.name))
    else:
        yield prefix, dict(value) if isinstance(value, Mapping) else value
