"""A `ModelConfig` as the content of Hugging Face's config.json, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from shared_config.errors import ConfigError
from shared_config.interchange.huggingface_families import FAMILIES, Family, Settings
from shared_config.interchange.huggingface_family import family_of
from shared_config.interchange.huggingface_keys import (
    declared_window,
    family_in,
    fixed_keys,
    layer_kinds,
    missing_keys,
    model_type,
    num_experts,
    number,
    rope_settings,
    rope_type,
    uneven_layers,
    wrong_kinds,
)
from shared_config.schema.model import ModelConfig, RopeScaling


def config_to_huggingface(config: ModelConfig) -> dict[str, object]:
    """The content of config.json.

    Raises:
        ConfigError: as `family_of`.
    """
    name = family_of(config)
    family = FAMILIES[name]
    values = {**_values(config), "ffn_hidden_dim": config.computed_ffn_hidden_dim}
    content: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": name,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_huggingface(config.rope_scaling),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    content |= {key: values[field] for key, field in family.all_settings.items()}
    return {
        **content,
        **_window_to_huggingface(config, family),
        **_experts_to_huggingface(config, family),
    }


def _values(config: ModelConfig) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def _window_to_huggingface(config: ModelConfig, family: Family) -> dict[str, object]:
    if family.windows is None:
        return {}
    content: dict[str, object] = {"sliding_window": config.sliding_window}
    if family.windows.switch:
        content |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return content


def _experts_to_huggingface(config: ModelConfig, family: Family) -> dict[str, object]:
    experts = family.experts
    if experts is None:
        return {}
    content: dict[str, object] = {key: getattr(config, field) for key, field in family.expert_settings.items()}
    width = config.computed_expert_ffn_hidden_dim
    content |= {experts.number: config.num_experts, experts.width: width}
    content |= {} if experts.shared is None else {experts.shared: config.moe_shared_experts * width}
    return content if "moe_frequency" not in experts.settings.values() else {**content, "mlp_only_layers": []}


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


def config_from_huggingface(content: object) -> dict[str, object]:
    """Fields of `ModelConfig` from the content of config.json.

    Raises:
        ConfigError: naming every key whose value a `ModelConfig` can't express.
    """
    if not isinstance(content, Mapping) or content.get("model_type") not in tuple(FAMILIES):
        found = content.get("model_type") if isinstance(content, Mapping) else content
        raise ConfigError([f"model_type = {found!r}: must be one of {', '.join(FAMILIES)}"])
    problems = list(wrong_kinds(content)) or [*missing_keys(content), *fixed_keys(content), *uneven_layers(content)]
    if problems:
        raise ConfigError(problems)
    family = family_in(content)
    fields = _read(content, family, family.all_settings)
    heads = content["num_attention_heads"]
    fields |= {
        "n_kv_heads": fields["n_kv_heads"] or heads,
        "head_dim": fields["head_dim"] or content["hidden_size"] // heads,
        "rope_theta": _theta(content, family),
        "rope_scaling": _scaling_from_huggingface(content),
        "sliding_window": _window(content, family),
        "family": model_type(content),
    }
    return {**family.fixed, **fields, **_experts_from_huggingface(content, family)}


def _read(content: Mapping[str, object], family: Family, settings: Settings) -> dict[str, object]:
    return {field: content[key] if key in content else family.default(key) for key, field in settings.items()}


def _theta(content: Mapping[str, object], family: Family) -> float:
    default = family.default("rope_theta")
    assert isinstance(default, float)
    return float(number(rope_settings(content), "rope_theta", number(content, "rope_theta", default)))


def _window(content: Mapping[str, object], family: Family) -> int | None:
    """Mistral's layer_types are read as transformers does, which takes such a model for a Ministral."""
    kinds = layer_kinds(content)
    if kinds is None and family.windows is not None and family.windows.from_layer:
        first = number(content, "max_window_layers", 28)
        kinds = ["sliding_attention" if first <= 0 else "full_attention"]
    return None if kinds and kinds[0] == "full_attention" else declared_window(content)


def _experts_from_huggingface(content: Mapping[str, object], family: Family) -> dict[str, object]:
    experts = family.experts
    if experts is None:
        return {}
    width = number(content, experts.width) / number(content, "intermediate_size")
    fields: dict[str, object] = {"num_experts": num_experts(content), "moe_expert_ffn_multiplier": width}
    if experts.shared is not None:
        fields |= {"moe_shared_experts": int(number(content, experts.shared) / number(content, experts.width))}
    return fields | _read(content, family, family.expert_settings)


def _scaling_from_huggingface(content: Mapping[str, object]) -> dict[str, object]:
    rope = rope_settings(content)
    kind = rope_type(rope)
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
