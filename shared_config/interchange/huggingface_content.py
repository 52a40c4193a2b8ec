"""The content of Hugging Face's config.json: its family, its numbers, and whether a value is of a kind."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shared_config.interchange.huggingface_description import DEFAULTS, Family
from shared_config.interchange.huggingface_families import FAMILIES

POSITIVE = "a positive integer"


def family_in(content: Mapping[str, object]) -> Family:
    """The family that the content names."""
    return FAMILIES[model_type(content)]


def model_type(content: Mapping[str, object]) -> str:
    """The name of the family."""
    name = content["model_type"]
    assert isinstance(name, str)
    return name


def default_of(family: Family, key: str) -> object:
    """What a key means that is left out."""
    return family.defaults[key] if key in family.defaults else DEFAULTS[key]


def number(fields: Mapping[str, object], key: str, default: float | None = None) -> float:
    """A number of fields in which `wrong_kinds` finds nothing; ``default`` where it is left out or null."""
    value = fields.get(key)
    value = default if value is None else value
    assert isinstance(value, int | float)
    return value


def is_of_kind(kind: str, value: object) -> bool:
    """Whether a JSON value is what a description of `KINDS` says."""
    if kind == "true or false":
        return isinstance(value, bool)
    if kind in ("an object", "a list", "a string"):
        return isinstance(value, {"an object": Mapping, "a list": list, "a string": str}[kind])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == "a number":
        return math.isfinite(value)
    return isinstance(value, int) and (kind != POSITIVE or value > 0)
