"""Which settings change the function that weights compute, and how two configs differ in them.

The function is that of decoding, in which experts have no capacity limits: `moe_capacity_factor` limits what training
and whole forwards compute, as the weights of losses do, and may be another one for the same weights. What the model is
shown belongs to the function: the frames of a clip, their number, size and sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.job import JobConfig


@dataclass(frozen=True)
class Difference:
    """A field whose value is another one there than here."""

    field: str
    here: Any
    there: Any

    def overriding(self, where: str) -> str:
        """That the value here is used all the same."""
        return (
            f"{self.field} = {self.here!r}, as the command line says, "
            f"not {self.there!r} as the weights of {where} were written with"
        )


def function_of(config: JobConfig) -> dict[str, Any]:
    """Dotted field -> value, for all fields that change what given weights compute.

    Spellings of the same function give the same values: derived fields are derived, and what has no effect is left out.
    """
    values = _prefixed("model", config.model.function_fields())
    values["vlm.arch"] = None if config.vlm is None else config.vlm.arch
    if config.vlm is not None:
        values |= _prefixed("vlm", config.vlm.function_fields() | config.vlm.resolved_with(config.model))
        used, resolved = config.vlm.uses_model_fields, config.model.resolved()
        values |= _prefixed("model", {name: resolved.get(name, getattr(config.model, name)) for name in used})
        values |= _prefixed("adapter", _adapter(config.adapter or AdapterConfig(), config.model.dim))
        values["video.max_frames"] = None
    if config.vision_encoder is not None:
        values |= _prefixed("vision_encoder", config.vision_encoder.function_fields())
    if config.video is not None:
        values |= _prefixed("video", config.video.function_fields())
    return values


def differences(here: JobConfig, there: JobConfig) -> list[Difference]:
    """The fields that change the function and are not equal, in the order of the schema."""
    return differing(function_of(here), function_of(there))


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Difference]:
    """The fields of both that are not equal. What only one of them has hangs on another field that differs."""
    return [
        Difference(name, value, there[name]) for name, value in here.items() if name in there and there[name] != value
    ]


def _adapter(adapter: AdapterConfig, dim: int) -> dict[str, Any]:
    values = adapter.function_fields()
    return values | {"hidden_dim": adapter.hidden_dim or dim} if "hidden_dim" in values else values


def _prefixed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
