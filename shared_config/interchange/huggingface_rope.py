"""Rotary settings of Hugging Face's config.json: those of a model, or of its layers with and without a window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from shared_config.interchange.huggingface_content import POSITIVE, default_of, family_in, is_of_kind, number
from shared_config.interchange.huggingface_description import Family
from shared_config.interchange.huggingface_layers import FULL, SLIDING
from shared_config.schema.model import ModelConfig
from shared_config.schema.rope import RopeScaling

ROPE_KINDS = {
    "rope_theta": "a number",
    "factor": "a number",
    "original_max_position_embeddings": POSITIVE,
    "low_freq_factor": "a number",
    "high_freq_factor": "a number",
    "beta_fast": "a number",
    "beta_slow": "a number",
    "attention_factor": "a number",
    "mscale": "a number",
    "mscale_all_dim": "a number",
    "partial_rotary_factor": "a number",
}

ROPE_DEFAULTED = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
ROPE_DEFAULTED += ("mscale", "mscale_all_dim", "partial_rotary_factor", "factor")
"""Rotary keys for which null means what leaving them out means."""


def wrong_rope_kinds(content: Mapping[str, object]) -> Iterator[str]:
    """Rotary settings that are not of the JSON type that they have to be."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = content.get(name)
        if not isinstance(rope, Mapping):
            continue
        if name == "rope_parameters" and family_in(content).rope_by_kind:
            yield from _wrong_by_kind(name, rope)
        else:
            yield from _wrong_kinds(name, rope)


def _wrong_by_kind(name: str, rope: Mapping[str, object]) -> Iterator[str]:
    for kind, own in rope.items():
        if kind not in (FULL, SLIDING):
            yield f"{name}.{kind} = {own!r}: must be within {FULL} or {SLIDING}"
        elif isinstance(own, Mapping):
            yield from _wrong_kinds(f"{name}.{kind}", own)
        elif own is not None:
            yield f"{name}.{kind} = {own!r}: must be an object"


def _wrong_kinds(name: str, rope: Mapping[str, object]) -> Iterator[str]:
    for key, value in rope.items():
        if isinstance(value, Mapping):
            yield f"{name}.{key} = {value!r}: must be no object; one setting for all layers"
        elif (
            key in ROPE_KINDS
            and not (value is None and key in ROPE_DEFAULTED)
            and not is_of_kind(ROPE_KINDS[key], value)
        ):
            yield f"{name}.{key} = {value!r}: must be {ROPE_KINDS[key]}"


def rope_problems(content: Mapping[str, object]) -> Iterator[str]:
    """What a `ModelConfig` can't express of rotary settings."""
    yield from _scaling_problems(_rope(content), family_in(content).rope_types)
    if family_in(content).rope_by_kind and (kind := _rope_type(_rope(content, SLIDING))) != "default":
        yield f"rope_parameters.{SLIDING}.rope_type = {kind!r}: must be 'default'"
    by_kind = content.get("rope_parameters") if family_in(content).rope_by_kind else None
    if isinstance(by_kind, Mapping) and by_kind.get(FULL) is None and content.get("rope_scaling") is not None:
        yield f"rope_parameters.{FULL} = None: must be given beside rope_scaling, which changes it"


def _scaling_problems(rope: Mapping[str, object], kinds: tuple[str, ...]) -> Iterator[str]:
    kind = _rope_type(rope)
    if kind not in kinds:
        yield f"rope_type = {kind!r}: must be one of {', '.join(kinds)}"
    elif kind != "default" and not isinstance(rope.get("factor"), int | float):
        yield f"rope factor = {rope.get('factor')!r}: must be a number"
    for name in ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ():
        if name not in rope:
            yield f"rope {name}: must be given with rope_type 'llama3'"
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        yield f"partial_rotary_factor = {rope['partial_rotary_factor']!r}: must be 1.0"
    if kind == "yarn" and rope.get("truncate", True) is not True:
        yield f"rope truncate = {rope['truncate']!r}: must be True"


def rope_from_huggingface(content: Mapping[str, object]) -> dict[str, object]:
    """Theta and scaling; of a family with settings of their own for layers with a window, the theta of these."""
    family = family_in(content)
    theta = number(_rope(content), "rope_theta", number(content, "rope_theta", _default(family, "rope_theta")))
    fields: dict[str, object] = {"rope_theta": float(theta), "rope_scaling": _scaling_from_huggingface(content)}
    if family.rope_by_kind:
        default = number(content, family.window_theta or "", _default(family, "window_rope_theta"))
        fields["window_rope_theta"] = float(number(_rope(content, SLIDING), "rope_theta", default))
    return fields


def _default(family: Family, key: str) -> float:
    default = default_of(family, key)
    assert isinstance(default, float)
    return default


def _rope(content: Mapping[str, object], kind: str = FULL) -> Mapping[str, object]:
    """Settings under their old name, or their new one (transformers 5); where both stand, the old one counts. Of
    settings by kind of layer, those of layers with a window have no old name, and ``type`` no meaning.
    """
    old, new = content.get("rope_scaling"), content.get("rope_parameters")
    if not family_in(content).rope_by_kind:
        rope = old or new
        return rope if isinstance(rope, Mapping) else {}
    own = new.get(kind) if isinstance(new, Mapping) else {"rope_type": "default"}
    own = own if isinstance(own, Mapping) else {}
    return {**own, **old} if kind == FULL and isinstance(old, Mapping) else own


def _rope_type(rope: Mapping[str, object]) -> object:
    """The kind of rotary scaling, under its old or new name."""
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling_from_huggingface(content: Mapping[str, object]) -> dict[str, object]:
    rope = _rope(content)
    kind = _rope_type(rope)
    if kind == "default":
        return {"type": "none"}
    fields: dict[str, object] = {"type": kind, "factor": float(number(rope, "factor"))}
    if kind == "linear":
        return fields
    inner = rope.get("original_max_position_embeddings", content.get("max_position_embeddings"))
    fields |= {"original_max_seq_len": content.get("original_max_position_embeddings", inner)}
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return fields | {name: float(number(rope, name)) for name in names if name in rope}
    fields |= {name: float(number(rope, name)) for name in ("beta_fast", "beta_slow") if rope.get(name)}
    return fields | {"attention_factor": _yarn_attention_factor(rope)}


def _yarn_attention_factor(rope: Mapping[str, object]) -> float | None:
    """None for the factor of the paper, 0.1 ln(factor) + 1; DeepSeek's two scales give a ratio of such factors."""
    if rope.get("attention_factor") is not None:
        return float(number(rope, "attention_factor"))
    numerator, denominator = number(rope, "mscale", 0), number(rope, "mscale_all_dim", 0)
    if not (numerator and denominator):
        return None
    growth = 0.1 * math.log(number(rope, "factor"))
    return (numerator * growth + 1.0) / (denominator * growth + 1.0)


def rope_to_huggingface(config: ModelConfig, family: Family) -> dict[str, object]:
    """The keys of rotary settings. Those by kind of layer are said in both ways: older transformers don't read the new
    one.
    """
    scaling = _scaling_to_huggingface(config.rope_scaling)
    content: dict[str, object] = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if not family.rope_by_kind:
        return content
    full = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    sliding = {"rope_type": "default", "rope_theta": config.window_rope_theta}
    content |= {} if family.window_theta is None else {family.window_theta: config.window_rope_theta}
    return {**content, "rope_parameters": {FULL: full, SLIDING: sliding}}


def _scaling_to_huggingface(scaling: RopeScaling) -> dict[str, object] | None:
    if scaling.type == "none":
        return None
    content: dict[str, object] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.original_max_seq_len is not None:
        content |= {"original_max_position_embeddings": scaling.original_max_seq_len}
    if scaling.type == "llama3":
        content |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        content |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        content |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return content
