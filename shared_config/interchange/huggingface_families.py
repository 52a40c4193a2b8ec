"""The Hugging Face families that can be read and written, one description each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared_config.interchange.huggingface_description import (
    LAYER_MODULES,
    Experts,
    Family,
    Settings,
    Windows,
)

NORMS_AFTER = {
    "attention.": "self_attn.",
    "attention_post_norm.": "post_attention_layernorm.",
    "mlp.": "mlp.",
    "mlp_post_norm.": "post_feedforward_layernorm.",
}

NORMS_AROUND = {
    "attention_norm.": "input_layernorm.",
    "attention.": "self_attn.",
    "attention_post_norm.": "post_attention_layernorm.",
    "mlp_norm.": "pre_feedforward_layernorm.",
    "mlp.": "mlp.",
    "mlp_post_norm.": "post_feedforward_layernorm.",
}

BIAS: Settings = {"attention_bias": "attention_bias"}

QWEN_EXPERTS: Settings = {"decoder_sparse_step": "moe_frequency", "norm_topk_prob": "moe_norm_topk_prob"}

GEMMA_DEFAULTS: Mapping[str, object] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
GEMMA_SETTINGS: Settings = {**BIAS, "final_logit_softcapping": "logit_softcap"}
GEMMA: Mapping[str, object] = {
    "norm_type": "rmsnorm_1p",
    "norm_placement": "both",
    "activation": "geglu_tanh",
}

_IN_GEMMA: dict[str, Any] = {
    "not_null": frozenset({"num_key_value_heads", "head_dim"}),
    "activation": ("hidden_activation", ("gelu_pytorch_tanh",)),
    "scaled_embeddings": True,
    "query_scalar": "query_pre_attn_scalar",
    "modules": NORMS_AROUND,
}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        settings={**BIAS, "mlp_bias": "mlp_bias"},
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        not_null=frozenset({"num_key_value_heads"}),
        windows=Windows(listed=True),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        not_null=frozenset({"num_key_value_heads"}),
        windows=Windows(),
        experts=Experts("num_local_experts", "intermediate_size"),
        modules=LAYER_MODULES | {"mlp.router.gate.": "block_sparse_moe.gate.", "mlp.": "block_sparse_moe."},
        renamed={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        not_null=frozenset({"head_dim"}),
        defaults={"num_key_value_heads": 32},
        means={"attention_bias": True, "attention_output_bias": False},
        windows=Windows(switch=True, from_layer=True, listed=True, mixed=True),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        settings=BIAS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        means={"qk_norm": True},
        not_null=frozenset({"head_dim"}),
        windows=Windows(switch=True, from_layer=True, listed=True, mixed=True),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        settings=BIAS,
        defaults={"num_key_value_heads": 4},
        means={"qk_norm": True},
        not_null=frozenset({"num_key_value_heads", "head_dim"}),
        windows=Windows(switch=True),
        experts=Experts("num_experts", "moe_intermediate_size", QWEN_EXPERTS),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        not_null=frozenset({"head_dim"}),
        settings=BIAS,
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        means={"qk_norm": True, "qk_norm_over": "width", "norm_placement": "after"},
        modules=NORMS_AFTER,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
        not_null=frozenset({"head_dim"}),
        windows=Windows(),
        renamed={
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
        },
        rope_types=("default",),
        by_name=True,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        not_null=frozenset({"head_dim"}),
        settings={
            **BIAS,
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_divisor",
        },
        defaults={
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        by_name=True,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        settings={"qkv_bias": "attention_bias"},
        defaults={"qkv_bias": True, "num_key_value_heads": 16},
        means={"attention_output_bias": False, "moe_shared_expert_gate": True},
        refused={"use_sliding_window": False},
        not_null=frozenset({"num_key_value_heads", "head_dim"}),
        experts=Experts(
            "num_experts", "moe_intermediate_size", QWEN_EXPERTS, shared="shared_expert_intermediate_size", either=False
        ),
        by_name=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        settings={**BIAS, "mlp_bias": "mlp_bias"},
        not_null=frozenset({"head_dim"}),
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        windows=Windows(switch=True, of_unrotated=True, listed=True, mixed=True),
        unrotated=True,
        by_name=True,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        settings=BIAS,
        not_null=frozenset({"head_dim"}),
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "window_rope_theta": 5e5,
        },
        means={"qk_norm": True, "qk_norm_over": "width", "norm_placement": "after", "window_rope_scaled": False},
        windows=Windows(full_every=4, listed=True, mixed=True),
        rope_by_kind=True,
        modules=NORMS_AFTER,
        by_name=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        settings=BIAS,
        means={"norm_type": "rmsnorm_1p", "activation": "geglu_tanh"},
        refused={"use_bidirectional_attention": False},
        not_null=frozenset({"num_key_value_heads", "head_dim"}),
        activation=("hidden_act", ("gelu_pytorch_tanh", "gelu")),  # both are the approximation there
        scaled_embeddings=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        defaults=GEMMA_DEFAULTS
        | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        settings={**GEMMA_SETTINGS, "attn_logit_softcapping": "attention_softcap"},
        means=GEMMA,
        refused={"use_bidirectional_attention": False},
        windows=Windows(full_every=2, listed=True, mixed=True),
        **_IN_GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        defaults=GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "window_rope_theta": 1e4,
        },
        settings=GEMMA_SETTINGS,
        refused={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        means={**GEMMA, "qk_norm": True, "window_rope_scaled": False},
        windows=Windows(full_every=6, interval="sliding_window_pattern", listed=True, mixed=True),
        rope_by_kind=True,
        window_theta="rope_local_base_freq",
        **_IN_GEMMA,
    ),
}

LACKING: Mapping[str, Mapping[str, str]] = {
    "cohere": {
        "model_type": "attention and feed-forward parts side by side, and rotary positions of neighbouring channels",
        "layer_norm_eps": "norms that subtract the mean and have no bias",
    },
    "gpt_oss": {
        "model_type": "a learned score of each head that no key has (self_attn.sinks), and experts with biases",
        "swiglu_limit": "gates that are cut off",
    },
    "deepseek_v3": {
        "kv_lora_rank": "keys and values from a latent that all heads share",
        "n_group": "routers that choose groups of experts first",
        "first_k_dense_replace": "dense layers before those with experts",
    },
}
"""Families that are often asked for, and what their models have that none here has, by the key that says so."""
