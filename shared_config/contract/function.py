"""Which settings change the function that weights compute, and how two configs differ in them.

The function is that of decoding, in which experts have no capacity limits: `moe_capacity_factor` limits what training
and whole forwards compute, as the weights of losses do, and may differ for the same weights. What the model is shown
belongs to the function: the frames of a clip, their number, size and sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.architecture import VLMConfig
from shared_config.schema.base import Section, function_names
from shared_config.schema.job import JobConfig


@dataclass(frozen=True)
class Difference:
    """A field whose value differs."""

    field: str
    here: object
    there: object

    def overriding(self, where: str) -> str:
        """That the value here is used all the same."""
        return (
            f"{self.field} = {self.here!r}, as the command line says, "
            f"not {self.there!r} as the weights of {where} were written with"
        )


def function_of(config: JobConfig) -> dict[str, object]:
    """Dotted field -> value, for all fields that change what given weights compute.

    Spellings of the same function give the same values: derived fields are derived, and what has no effect is left out.
    """
    values: dict[str, object] = {}
    for name in function_names(type(config)):
        values |= _prefixed(name, _section_fields(config, getattr(config, name)))
    if config.vlm is not None:
        used, resolved = config.vlm.uses_model_fields, config.model.resolved()
        values |= _prefixed("model", {name: resolved.get(name, getattr(config.model, name)) for name in used})
        values |= {} if config.adapter else _prefixed("adapter", _section_fields(config, AdapterConfig()))
        values.setdefault("video.max_frames", None)
    values.setdefault("vlm.arch", None)
    return values


def differences(here: JobConfig, there: JobConfig) -> list[Difference]:
    """The fields that change the function and are not equal, in the order of the schema."""
    return differing(function_of(here), function_of(there))


def differing(here: Mapping[str, object], there: Mapping[str, object]) -> list[Difference]:
    """The fields of both that are not equal. One that only one of them has depends on another that differs."""
    return [
        Difference(name, value, there[name]) for name, value in here.items() if name in there and there[name] != value
    ]


def _section_fields(config: JobConfig, section: Section | None) -> dict[str, object]:
    """The fields of one section, those derived from the model as they come out."""
    if section is None:
        return {}
    values = section.function_fields()
    if isinstance(section, VLMConfig):
        values |= section.resolved_with(config.model)
    if isinstance(section, AdapterConfig) and "hidden_dim" in values:
        values["hidden_dim"] = section.hidden_dim or config.model.dim
    return values


def _prefixed(section: str, values: Mapping[str, object]) -> dict[str, object]:
    return {f"{section}.{name}": dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
