"""The Hugging Face family that a `ModelConfig` is written as: the one that it names, or the only one that can be."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator

from shared_config.errors import ConfigError
from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.interchange.huggingface_layers import layers_not_expressed
from shared_config.schema.model import ModelConfig


def family_of(config: ModelConfig) -> str:
    """The ``model_type`` of a config: its ``family``, or without one the only family that expresses it.

    Raises:
        ConfigError: as `families_of`, or several families express it and none is named.
    """
    first, *others = families_of(config)
    if others:
        names = " or ".join([first, *others])
        advice = f"set it, as in --model.family {first}"
        raise ConfigError([f"model.family = None: must be {names}, each of which expresses this config; {advice}"])
    return first


def families_of(config: ModelConfig) -> tuple[str, ...]:
    """The families that a config may be written as, at least one: its ``family``, or without one all that express it,
    those that have to be named only where no other does. Those of one config have the same names for its tensors.

    Raises:
        ConfigError: the named family does not express it, or none does, naming every setting that is in the way.
    """
    able = tuple(name for name in FAMILIES if not dict(_not_expressed(config, name)))
    if config.family in able:
        return (config.family,)
    able = tuple(name for name in able if not FAMILIES[name].by_name) or able
    if config.family is None and able:
        return able
    problems = list(_refusals(config, _alike(config) if config.family is None else [config.family]))
    if able:
        problems += [
            f"model.family = {config.family!r}: must be {' or '.join(able)} with all other settings as they are"
        ]
    raise ConfigError(problems)


def _alike(config: ModelConfig) -> list[str]:
    """Of the families whose models have the experts, and the norms of queries and keys, that the config has, those that
    lack least.
    """
    wanted = (config.is_moe, config.qk_norm)
    alike = [name for name, one in FAMILIES.items() if (one.experts is not None, one.fixed["qk_norm"]) == wanted]
    lacking = {name: len(dict(_not_expressed(config, name))) for name in alike if not FAMILIES[name].by_name}
    return [name for name, count in lacking.items() if count == min(lacking.values())]


def _refusals(config: ModelConfig, families: Iterable[str]) -> Iterator[str]:
    lacking: dict[tuple[str, str], list[str]] = {}
    for family in families:
        for problem in _not_expressed(config, family):
            lacking.setdefault(problem, []).append(family)
    for (field, needed), names in lacking.items():
        subject = f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'}"
        value = operator.attrgetter(field)(config)
        yield f"model.{field} = {value!r}: Hugging Face's {subject} no such setting: must be {needed}"


def _not_expressed(config: ModelConfig, name: str) -> Iterator[tuple[str, str]]:
    """Fields whose values a family can't express, with what they must be."""
    if FAMILIES[name].experts is not None and not config.is_moe:
        yield "num_experts", "positive"
    plain = config.replace(attention_scale=None, window_rope_theta=None)
    derived = {"attention_scale": plain.attention_scale, "window_rope_theta": plain.window_rope_theta}
    for field, meant in FAMILIES[name].fixed.items():
        needed = derived.get(field) if meant is None else meant
        if getattr(config, field) != needed and field not in config.idle():
            yield field, repr(needed)
    if FAMILIES[name].scaled_embeddings and config.embedding_scale != math.sqrt(config.dim):
        yield "embedding_scale", f"{math.sqrt(config.dim)!r}, the square root of the width"
    if FAMILIES[name].query_scalar is not None and round(config.score_scale**-2) ** -0.5 != config.score_scale:
        yield "attention_scale", "1 / sqrt(n) for an integer n"
    yield from layers_not_expressed(config, FAMILIES[name])
    if config.rope_scaling.type not in ("none", *FAMILIES[name].rope_types):
        yield "rope_scaling.type", "'none'"
