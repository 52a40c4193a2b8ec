"""The Hugging Face families that can be read and written, one description each: what their models compute, the keys of
config.json that say so, what transformers takes an absent key for, and the names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Settings = Mapping[str, str]
"""Key of config.json -> field of `ModelConfig` that has the same value."""

SIZES: Settings = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
"""What every config.json has to say: transformers' defaults are those of its first model, which nobody means."""

SETTINGS: Settings = {
    **SIZES,
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_seq_len",
    "initializer_range": "init_std",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""Those of every family."""

DEFAULTS: Mapping[str, object] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
"""What absent keys mean where a family doesn't say otherwise."""

PLAIN: Mapping[str, object] = {
    "model_type": "transformer",
    "activation": "silu",
    "norm_type": "rmsnorm",
    "attention_bias": False,
    "attention_output_bias": True,
    "attention_scale": None,
    "mlp_bias": False,
    "qk_norm": False,
    "qk_norm_over": "head",
    "norm_placement": "before",
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_divisor": 1.0,
}
"""What fields of `ModelConfig` are in a family that neither has a key for them nor means something else."""

PLAIN_EXPERTS: Mapping[str, object] = {
    "moe_router": "softmax_topk",
    "moe_shared_experts": 0,
    "moe_shared_expert_gate": False,
    "moe_capacity_factor": 0.0,
    "moe_routed_scaling": 1.0,
    "moe_norm_topk_prob": True,
    "moe_frequency": 1,
}
"""The same of a family with experts."""

EXPERT_SETTINGS: Settings = {"num_experts_per_tok": "moe_top_k", "router_aux_loss_coef": "moe_aux_loss_weight"}
"""Those of every family with experts."""

MODULES = {"token_embedding.embedding.": "model.embed_tokens.", "norm.": "model.norm.", "output_head.proj.": "lm_head."}
LAYER_MODULES = {
    "attention_norm.": "input_layernorm.",
    "attention.": "self_attn.",
    "mlp_norm.": "post_attention_layernorm.",
    "mlp.router.gate.": "mlp.gate.",
    "mlp.": "mlp.",
}
"""Start of a tensor's name in a layer -> that of Hugging Face."""

NORMS_AFTER = {
    "attention.": "self_attn.",
    "attention_post_norm.": "post_attention_layernorm.",
    "mlp.": "mlp.",
    "mlp_post_norm.": "post_feedforward_layernorm.",
}


@dataclass(frozen=True)
class Windows:
    """How config.json says which layers have a window.

    Attributes:
        switch: there is one only where ``use_sliding_window`` is true.
        from_layer: ``max_window_layers`` counts the layers before the first that has one, unless ``layer_types`` lists
            them all.
        listed: ``layer_types`` is obeyed; otherwise it must agree.
    """

    switch: bool = False
    from_layer: bool = False
    listed: bool = False


@dataclass(frozen=True)
class Experts:
    """How config.json describes a mixture of experts.

    Attributes:
        number: the key of how many there are.
        either: ``num_experts`` and ``num_local_experts`` are both read.
        width: of an expert.
        shared: the key of the shared expert's width; None: there is none.
        settings: other keys.
    """

    number: str
    width: str
    settings: Settings = field(default_factory=dict)
    shared: str | None = None
    either: bool = True


@dataclass(frozen=True)
class Family:
    """What one Hugging Face architecture computes and can express.

    Attributes:
        settings: keys besides `SETTINGS`.
        defaults: of absent keys, where they aren't `DEFAULTS`.
        means: values of fields that all its models have, where they aren't `PLAIN`.
        refused: keys that change the function in other ways than a `ModelConfig` can, but for one value.
        not_null: keys that may not be null here.
        windows, experts: None: no model has them.
        modules: `LAYER_MODULES`, or others.
        renamed: parts of names within a module. Tensors that come to have one name are one there: their rows follow
            each other.
        rope_types: kinds of rotary scaling.
        by_name: a config that names no family is taken for one of this only where no other expresses it.
    """

    architecture: str
    settings: Settings = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    means: Mapping[str, object] = field(default_factory=dict)
    refused: Mapping[str, object] = field(default_factory=dict)
    not_null: frozenset[str] = frozenset()
    windows: Windows | None = None
    experts: Experts | None = None
    modules: Mapping[str, str] = field(default_factory=lambda: LAYER_MODULES)
    renamed: Mapping[str, str] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    by_name: bool = False

    def default(self, key: str) -> object:
        """What a key means that is left out."""
        return self.defaults[key] if key in self.defaults else DEFAULTS[key]

    @property
    def all_settings(self) -> Settings:
        """Keys and fields, those of experts not."""
        return {**SETTINGS, **self.settings}

    @property
    def expert_settings(self) -> Settings:
        """Keys and fields of experts."""
        return {} if self.experts is None else {**EXPERT_SETTINGS, **self.experts.settings}

    @property
    def fixed(self) -> Mapping[str, object]:
        """Fields that no key sets, with the values that they have."""
        plain = {**PLAIN, **({"sliding_window": None} if self.windows is None else {})}
        plain |= {"num_experts": 0} if self.experts is None else PLAIN_EXPERTS
        said = {*self.all_settings.values(), *self.expert_settings.values()}
        said |= {"moe_shared_experts"} if self.experts is not None and self.experts.shared else set()
        return {name: value for name, value in {**plain, **self.means}.items() if name not in said}


BIAS: Settings = {"attention_bias": "attention_bias"}

QWEN_EXPERTS: Settings = {"decoder_sparse_step": "moe_frequency", "norm_topk_prob": "moe_norm_topk_prob"}

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
        windows=Windows(switch=True, from_layer=True, listed=True),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        settings=BIAS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        means={"qk_norm": True},
        not_null=frozenset({"head_dim"}),
        windows=Windows(switch=True, from_layer=True, listed=True),
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
}
