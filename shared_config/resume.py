"""Where a run starts: from nothing, from given weights, or where its last checkpoint left it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared_config.contract.freeze import canonical_freeze_meta
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import Checkpoint, TrainingState, is_checkpoint, latest, load
from shared_config.interchange.weights import load_weights
from shared_config.loader import config_from_dict
from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig

MODEL_SECTIONS = ("model", "vision_encoder", "adapter", "vlm")
FREE_FIELDS = frozenset(
    [
        "model.max_seq_len",
        "model.sdpa_backend",
        "model.init_std",
        "model.moe_aux_loss_weight",
        "model.moe_sequence_aux_loss_weight",
        "model.moe_router_z_loss_weight",
        "model.moe_gradient_scale",
        "model.moe_capacity_factor",
        "model.moe_bias_schedule",
        "vision_encoder.path",
        "vlm.max_text_len",
        "vlm.freeze",
        "vlm.freeze_schedule",
        "vlm.mot_warm_start_from_text",
        "vlm.mot_warm_start_path",
        "vlm.moma_capacity_factor",
        "vlm.moma_gumbel_noise",
    ]
)
"""Fields of the model that may change within a run: they alter how it trains or runs, not what its weights mean."""
SILENT_SECTIONS = ("checkpoint", "metrics", "eval", "profiling", "distributed")

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Start:
    """The first step to take (counted from 0), the training rows consumed before it, the checkpoint they come from."""

    step: int = 0
    rows: int = 0
    path: Path | None = None


def restore(
    config: JobConfig, load_state: Callable[[TrainingState], None], *, backend: str, fingerprint: str, say: Say
) -> Start:
    """Give a trainer the state of the latest checkpoint of ``checkpoint.dir``, else the weights of
    ``checkpoint.load_path`` (native weights or a training checkpoint), else nothing.

    Raises:
        UserError: a damaged file, or a checkpoint of a model that differs, naming each field.
    """
    found = latest(config.checkpoint.dir)
    if found is not None:
        checkpoint = load(found)
        _compare(config, checkpoint, say)
        load_state(checkpoint.state)
        _announce(checkpoint, backend, fingerprint, say)
        return Start(checkpoint.state.step, checkpoint.rows, found)
    if config.checkpoint.load_path:
        path = config.checkpoint.load_path
        weights = load(path, with_optimizer=False).state.weights if is_checkpoint(path) else load_weights(path)
        load_state(TrainingState(step=0, weights=weights, optimizer={}))
        say(f"starting from the weights of {path}")
    return Start()


def _announce(checkpoint: Checkpoint, backend: str, fingerprint: str, say: Say) -> None:
    written = f", written by {checkpoint.backend}" if checkpoint.backend != backend else ""
    say(f"resuming at step {checkpoint.state.step} from {checkpoint.path}{written}")
    if checkpoint.fingerprint != fingerprint:
        say(
            "note: the training data are not those of the checkpoint; the run goes on at the same place of the new data"
        )


def _compare(config: JobConfig, checkpoint: Checkpoint, say: Say) -> None:
    if not checkpoint.config:
        return
    before = _flatten(config_from_dict(checkpoint.config))
    now = _flatten(config)
    changed = {
        name: (before.get(name), now.get(name)) for name in {**before, **now} if before.get(name) != now.get(name)
    }
    refused = [name for name in changed if name.split(".")[0] in MODEL_SECTIONS and name not in FREE_FIELDS]
    if refused:
        lines = [
            f"{name} = {changed[name][1]!r}: was {changed[name][0]!r} when {checkpoint.path} was written"
            for name in refused
        ]
        raise UserError("\n".join([*lines, "set checkpoint.dir to another folder for a new run"]))
    told = [name for name in changed if name.split(".")[0] not in SILENT_SECTIONS]
    if told:
        changes = ", ".join(f"{name} {changed[name][0]!r} -> {changed[name][1]!r}" for name in told)
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
