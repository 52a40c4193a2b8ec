"""Whether a trace or a training run is the one that was asked for, by its own metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.contract.initialise import state_hash
from shared_config.contract.lora import with_adapters
from shared_config.contract.vision import job_table
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import Checkpoint
from shared_config.interchange.toml import config_to_dict
from shared_config.interchange.vision import tower_of
from shared_config.parity.request import decode_names, logits_name, make_request, request_meta, seeded_values
from shared_config.parity.traces import GRADIENT, LOSS, ROUTING, UPDATED, Trace, TraceMeta
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig

DRAWN_ENCODERS = ("vit", "random")
IN_WORDS = {
    "weights_hash": "weights: other values",
    "tokens_hash": "tokens: other values",
    "initial_hash": "initial weights: none are recorded",
    "selection": "selection: not all tensors",
    "refed": "refed: its layers were given recorded inputs",
}


def expected_meta(
    config: JobConfig, seed: int, given_hash: str = "", *, tokens: np.ndarray | None = None, only: Sequence[str] = ()
) -> TraceMeta:
    """The metadata of a trace of a config and a seed, whatever its backend, device and dtype.

    Args:
        given_hash: of weights that are given; "" where they are drawn.
        tokens, only: what else was asked for; see `make_request`.
    """
    meta = request_meta(make_request(config, dtype="float64", seed=seed, tokens=tokens, only=only))
    return dataclasses.replace(meta, weights="given", weights_hash=given_hash) if given_hash else meta


def check_trace(trace: Trace, expected: TraceMeta, path: Path) -> Trace:
    """The same trace, once it says that it is what was asked for.

    Raises:
        UserError: naming the file and all that is not.
    """
    problems = [*_differences(trace.meta, expected)]
    if problems:
        raise UserError("\n  ".join([f"{path}: is not the trace that was asked for:", *problems]))
    return trace


def check_run(run: Checkpoint, backend: str, config: JobConfig) -> Checkpoint:
    """The last checkpoint of a training run, once it says that the run is what was asked for.

    Raises:
        UserError: naming the checkpoint and all that is not.
    """
    wanted = config_to_dict(config)
    problems = [*_unequal("backend", run.backend, backend), *_differences_of_config(run.config, wanted)]
    if problems:
        raise UserError("\n  ".join([f"{run.path}: is not of the run that was asked for:", *problems]))
    return run


def initial_hash(config: JobConfig, seed: int, *, trained: bool = False) -> str | None:
    """That of the seeded initial weights; None where not all come from the seed: some are read from files, or what is
    registered may draw them its own way. ``trained``: also of the adapters that a trainer has.
    """
    encoder, vlm = config.vision_encoder, config.vlm
    read = encoder is not None and (encoder.type not in DRAWN_ENCODERS or bool(encoder.path))
    read |= vlm is not None and vlm.warm_start_path != ""
    if read or config.model.model_type != ModelConfig.model_type:
        return None
    drawn = seeded_values(config, seed)
    return state_hash(with_adapters(drawn, config) if trained else drawn)


def expected_names(config: JobConfig) -> list[str]:
    """Tensors that a trace of a config has in any case: without them nothing is known of their group."""
    request = make_request(config, dtype="float64", seed=0)
    trained = [name for name, spec in job_table(config, tower_of(config)).items() if not spec.is_buffer]
    return [
        logits_name(config),
        LOSS,
        *(f"{group}/{name}" for group in (GRADIENT, UPDATED) for name in trained),
        *decode_names(request),
        *([ROUTING] if config.has_routers else []),
    ]


def missing_names(traces: Sequence[Trace], expected: Sequence[str]) -> list[str]:
    """Those of the expected tensors that no trace has. One that is a group alone is there where any of it is."""
    there = {part for trace in traces for name in trace.tensors for part in (name, name.partition("/")[0])}
    return [name for name in expected if name not in there]


def _differences(meta: TraceMeta, expected: TraceMeta) -> Iterator[str]:
    for field in ("backend", "dtype", "seed", "weights"):
        yield from _unequal(field, getattr(meta, field), getattr(expected, field))
    for field in ("weights_hash", "tokens_hash", "selection", "refed"):
        if getattr(meta, field) != getattr(expected, field):
            yield IN_WORDS[field]
    if not meta.initial_hash and "scenario" not in expected.extra:
        yield IN_WORDS["initial_hash"]
    if (meta.device == "cpu") != (expected.device == "cpu"):
        yield from _unequal("device", meta.device, expected.device)
    yield from _unequal("scenario", meta.extra.get("scenario"), expected.extra.get("scenario"))
    yield from _differences_of_config(meta.config_fields, expected.config_fields)


def _differences_of_config(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*found, *wanted]):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences_of_config(a, b, f"{prefix}{key}.")
        else:
            yield from _unequal(prefix + key, a, b)


def _unequal(name: str, found: Any, wanted: Any) -> Iterator[str]:
    if found != wanted:
        yield f"{name} = {found!r}: was to be {wanted!r}"
