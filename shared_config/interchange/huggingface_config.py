"""A `ModelConfig` as the content of Hugging Face's config.json, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from shared_config.errors import ConfigError
from shared_config.interchange.huggingface_content import default_of, family_in, model_type, number
from shared_config.interchange.huggingface_description import Family, Settings
from shared_config.interchange.huggingface_families import FAMILIES, LACKING
from shared_config.interchange.huggingface_family import family_of
from shared_config.interchange.huggingface_keys import fixed_keys, missing_keys, num_experts, wrong_kinds
from shared_config.interchange.huggingface_layers import layer_problems, layers_from_huggingface, layers_to_huggingface
from shared_config.interchange.huggingface_rope import rope_from_huggingface, rope_to_huggingface
from shared_config.schema.model import ModelConfig


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
        family.activation[0]: family.activation[1][0],
        **rope_to_huggingface(config, family),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    content |= {key: values[field] for key, field in family.all_settings.items()}
    if family.query_scalar is not None:
        content[family.query_scalar] = round(config.score_scale**-2)
    return {
        **content,
        **layers_to_huggingface(config, family),
        **_experts_to_huggingface(config, family),
    }


def _values(config: ModelConfig) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def _experts_to_huggingface(config: ModelConfig, family: Family) -> dict[str, object]:
    experts = family.experts
    if experts is None:
        return {}
    content: dict[str, object] = {key: getattr(config, field) for key, field in family.expert_settings.items()}
    width = config.computed_expert_ffn_hidden_dim
    content |= {experts.number: config.num_experts, experts.width: width}
    content |= {} if experts.shared is None else {experts.shared: config.moe_shared_experts * width}
    return content if "moe_frequency" not in experts.settings.values() else {**content, "mlp_only_layers": []}


def config_from_huggingface(content: object) -> dict[str, object]:
    """Fields of `ModelConfig` from the content of config.json.

    Raises:
        ConfigError: naming every key whose value a `ModelConfig` can't express.
    """
    if not isinstance(content, Mapping) or content.get("model_type") not in tuple(FAMILIES):
        raise ConfigError(list(_unknown(content)))
    problems = list(wrong_kinds(content)) or [*missing_keys(content), *fixed_keys(content), *layer_problems(content)]
    if problems:
        raise ConfigError(problems)
    family = family_in(content)
    fields = _read(content, family, family.all_settings)
    heads = content["num_attention_heads"]
    fields |= {
        "n_kv_heads": fields["n_kv_heads"] or heads,
        "head_dim": fields["head_dim"] or content["hidden_size"] // heads,
        **rope_from_huggingface(content),
        **layers_from_huggingface(content),
        "family": model_type(content),
    }
    if family.scaled_embeddings:
        fields["embedding_scale"] = math.sqrt(number(content, "hidden_size"))
    if family.query_scalar is not None:
        scalar = content.get(family.query_scalar, default_of(family, family.query_scalar))
        assert isinstance(scalar, int)
        fields["attention_scale"] = scalar**-0.5
    return {**family.fixed, **fields, **_experts_from_huggingface(content, family)}


def _unknown(content: object) -> Iterator[str]:
    """What is said of a model of no family."""
    known = content if isinstance(content, Mapping) else {}
    found = known.get("model_type") if isinstance(content, Mapping) else content
    yield f"model_type = {found!r}: must be one of {', '.join(FAMILIES)}"
    for key, lacking in LACKING.get(str(found), {}).items():
        yield f"{key} = {known.get(key)!r}: no model here has {lacking}"


def _read(content: Mapping[str, object], family: Family, settings: Settings) -> dict[str, object]:
    return {field: content[key] if key in content else default_of(family, key) for key, field in settings.items()}


def _experts_from_huggingface(content: Mapping[str, object], family: Family) -> dict[str, object]:
    experts = family.experts
    if experts is None:
        return {}
    width = number(content, experts.width) / number(content, "intermediate_size")
    fields: dict[str, object] = {"num_experts": num_experts(content), "moe_expert_ffn_multiplier": width}
    if experts.shared is not None:
        fields |= {"moe_shared_experts": int(number(content, experts.shared) / number(content, experts.width))}
    return fields | _read(content, family, family.expert_settings)
