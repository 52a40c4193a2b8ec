"""A `ModelConfig` as the content of Hugging Face's config.json, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shared_config.errors import ConfigError
from shared_config.interchange.huggingface_family import family_of
from shared_config.interchange.huggingface_keys import (
    FAMILIES,
    declared_window,
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
    family = family_of(config)
    content: dict[str, object] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.computed_ffn_hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_huggingface(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "llama":
        content |= {"mlp_bias": False}
    else:
        content |= {"sliding_window": config.sliding_window}
    if family.startswith("qwen3"):
        content |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return content | _experts_to_huggingface(config, family)


def _experts_to_huggingface(config: ModelConfig, family: str) -> dict[str, object]:
    if not config.is_moe:
        return {}
    width = config.computed_expert_ffn_hidden_dim
    content: dict[str, object] = {
        "num_experts_per_tok": config.moe_top_k,
        "router_aux_loss_coef": config.moe_aux_loss_weight,
    }
    if family == "mixtral":
        return content | {"num_local_experts": config.num_experts, "intermediate_size": width}
    return content | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": width,
        "decoder_sparse_step": config.moe_frequency,
        "mlp_only_layers": [],
        "norm_topk_prob": config.moe_norm_topk_prob,
    }


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
    family = FAMILIES[model_type(content)]
    heads = content["num_attention_heads"]
    fields = {
        "vocab_size": content["vocab_size"],
        "dim": content["hidden_size"],
        "n_layers": content["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": content.get("num_key_value_heads", family.kv_heads) or heads,
        "head_dim": content.get("head_dim", family.head_dim) or content["hidden_size"] // heads,
        "ffn_hidden_dim": content["intermediate_size"],
        "max_seq_len": content.get("max_position_embeddings", family.max_seq_len),
        "init_std": content.get("initializer_range", 0.02),
        "norm_type": "rmsnorm",
        "norm_eps": content.get("rms_norm_eps", family.norm_eps),
        "activation": "silu",
        "rope_theta": float(
            number(rope_settings(content), "rope_theta", number(content, "rope_theta", family.rope_theta))
        ),
        "rope_scaling": _scaling_from_huggingface(content),
        "sliding_window": _window(content),
        "attention_bias": content.get("attention_bias", False),
        "tie_embeddings": content.get("tie_word_embeddings", False),
        "qk_norm": family.qk_norm,
        "family": model_type(content),
    }
    return fields | (_experts_from_huggingface(content) if family.experts else {})


def _window(content: Mapping[str, object]) -> int | None:
    """Mistral's layer_types are read as transformers does, which takes such a model for a Ministral."""
    kinds = layer_kinds(content)
    if kinds is None and model_type(content) == "qwen3":
        first = number(content, "max_window_layers", 28)
        kinds = ["sliding_attention" if first <= 0 else "full_attention"]
    return None if kinds and kinds[0] == "full_attention" else declared_window(content)


def _experts_from_huggingface(content: Mapping[str, object]) -> dict[str, object]:
    mixtral = model_type(content) == "mixtral"
    return {
        "num_experts": num_experts(content),
        "moe_top_k": content["num_experts_per_tok"],
        "moe_frequency": 1 if mixtral else content.get("decoder_sparse_step", 1),
        "moe_router": "softmax_topk",
        "moe_norm_topk_prob": True if mixtral else content.get("norm_topk_prob", False),
        "moe_aux_loss_weight": float(number(content, "router_aux_loss_coef", 0.001)),
        "moe_expert_ffn_multiplier": (
            1.0 if mixtral else number(content, "moe_intermediate_size") / number(content, "intermediate_size")
        ),
    }


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
