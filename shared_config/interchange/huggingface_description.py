"""What describes a Hugging Face family: what its models compute, the keys of config.json that say so, what transformers
takes an absent key for, and the names of tensors.
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
    "window_rope_theta": None,
    "window_rope_scaled": True,
    "mlp_bias": False,
    "qk_norm": False,
    "qk_norm_over": "head",
    "norm_placement": "before",
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_divisor": 1.0,
    "attention_softcap": None,
    "logit_softcap": None,
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


@dataclass(frozen=True)
class Windows:
    """How config.json says which layers have a window.

    Attributes:
        switch: there is one only where ``use_sliding_window`` is true.
        from_layer: ``max_window_layers`` counts the layers before the first that has one, unless ``layer_types`` lists
            them all.
        full_every: without ``layer_types`` all have one but the last of so many; None: all have.
        interval: the key that says otherwise.
        of_unrotated: without ``layer_types`` those have one that are not rotated.
        listed: ``layer_types`` is obeyed; otherwise it must agree.
        mixed: some layers may have one and others not.
    """

    switch: bool = False
    from_layer: bool = False
    full_every: int | None = None
    interval: str | None = None
    of_unrotated: bool = False
    listed: bool = False
    mixed: bool = False


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
        activation: the key of the activation, and its names, the one that is written first.
        scaled_embeddings: those of tokens are multiplied by the square root of their width.
        query_scalar: the key of the number whose square root scores are divided by.
        unrotated: ``no_rope_layers`` lists layers without rotary positions.
        rope_by_kind: rotary settings of layers with a window are their own, and never scaled.
        window_theta: the key of their theta that older models have.
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
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu", "swish"))
    scaled_embeddings: bool = False
    query_scalar: str | None = None
    unrotated: bool = False
    rope_by_kind: bool = False
    window_theta: str | None = None
    modules: Mapping[str, str] = field(default_factory=lambda: LAYER_MODULES)
    renamed: Mapping[str, str] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    by_name: bool = False

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
        said |= {"window_rope_theta"} if self.rope_by_kind else set()
        said |= {"embedding_scale"} if self.scaled_embeddings else set()
        said |= {"attention_scale"} if self.query_scalar is not None else set()
        said |= {"moe_shared_experts"} if self.experts is not None and self.experts.shared else set()
        return {name: value for name, value in {**plain, **self.means}.items() if name not in said}
