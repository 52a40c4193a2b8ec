"""The parameter table: name -> shape, initialiser and logical axes of every weight and buffer of a model.

Both backends build exactly these tensors, in this orientation; initialising, sharding, counting and loading read the
table.

Names of axes: vocab, embed (the residual width), heads and kv_heads (times head_dim), head_dim, mlp, experts; None
for an axis that is never sharded. A linear weight is (out, in); packed experts are (expert, in, out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig, VLMConfig

Axes = tuple[str | None, ...]
Named = Iterator[tuple[str, "ParameterSpec"]]

EMBEDDING = "token_embedding.embedding.weight"
HEAD = "output_head.proj.weight"


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


Initializer = Normal | Constant


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor of the model.

    Attributes:
        shape: sizes.
        initializer: distribution of the initial values.
        axes: logical name of each axis, as long as ``shape``.
        is_buffer: not trained by gradient, float32 whatever the compute dtype.
        full_precision: stays float32 in mixed precision (what decides a route).
        decay: whether weight decay acts on it.
    """

    shape: tuple[int, ...]
    initializer: Initializer
    axes: Axes
    is_buffer: bool = False
    full_precision: bool = False
    decay: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


ParameterTable = dict[str, ParameterSpec]


def parameter_table(config: ModelConfig, vlm: VLMConfig | None = None) -> ParameterTable:
    """Every tensor that a `Transformer` owns, in model order.

    A tied output head owns nothing: it is listed in `aliases`.
    """
    table: ParameterTable = {EMBEDDING: _matrix(config, (config.vocab_size, config.dim), ("vocab", "embed"))}
    for layer in range(config.n_layers):
        table.update(_prefixed(f"layers.{layer}", _layer(config, vlm, layer)))
    if isinstance(vlm, CrossAttentionConfig):
        for block in range(config.n_layers // vlm.cross_attention_every_n_layers):
            table.update(_prefixed(f"cross_attention_layers.{block}", _cross_attention_block(config, vlm)))
    if isinstance(vlm, MoTConfig):
        for modality in vlm.mot_modalities:
            table.update(_prefixed(f"mot_norms.{modality}", _norm(config, config.dim)))
    else:
        table.update(_prefixed("norm", _norm(config, config.dim)))
    if not config.tie_embeddings:
        table[HEAD] = _matrix(config, (config.vocab_size, config.dim), ("vocab", "embed"))
    return table


def aliases(config: ModelConfig) -> dict[str, str]:
    """Names that are another tensor of the table: alias -> name."""
    return {HEAD: EMBEDDING} if config.tie_embeddings else {}


def _layer(config: ModelConfig, vlm: VLMConfig | None, layer: int) -> Named:
    if isinstance(vlm, MoTConfig):
        yield from _mot_layer(config, vlm, layer)
        return
    yield from _prefixed("attention_norm", _norm(config, config.dim))
    yield from _prefixed("attention", _attention(config))
    yield from _prefixed("mlp_norm", _norm(config, config.dim))
    if isinstance(vlm, MoMaConfig):
        for modality in vlm.moma_modalities:
            experts = vlm.moma_experts_per_modality[modality]
            yield from _prefixed(f"mlp.{modality}", _expert_choice(config, experts))
    else:
        yield from _prefixed("mlp", _feed_forward(config, layer))


def _feed_forward(config: ModelConfig, layer: int) -> Named:
    if config.is_moe_layer(layer):
        return _moe(config)
    return _mlp(config, config.computed_ffn_hidden_dim)


def _attention(config: ModelConfig) -> Named:
    yield from _projections(config, config.n_heads, config.kv_heads, config.attention_bias)
    if config.qk_norm:
        yield from _head_norms(config)


def _head_norms(config: ModelConfig) -> Named:
    for name in ("q_norm.weight", "k_norm.weight"):
        yield name, _ones((config.head_size,), ("head_dim",))


def _projections(config: ModelConfig, heads: int, kv_heads: int, bias: bool = False) -> Named:
    """Query, key, value and output projections, biases after all weights."""
    h, dim = config.head_size, config.dim
    yield "q_proj.weight", _matrix(config, (heads * h, dim), ("heads", "embed"))
    yield "k_proj.weight", _matrix(config, (kv_heads * h, dim), ("kv_heads", "embed"))
    yield "v_proj.weight", _matrix(config, (kv_heads * h, dim), ("kv_heads", "embed"))
    yield "o_proj.weight", _residual(config, (dim, heads * h), ("embed", "heads"))
    if bias:
        yield "q_proj.bias", _zeros((heads * h,), ("heads",))
        yield "k_proj.bias", _zeros((kv_heads * h,), ("kv_heads",))
        yield "v_proj.bias", _zeros((kv_heads * h,), ("kv_heads",))
        yield "o_proj.bias", _zeros((dim,), ("embed",))


def _mlp(config: ModelConfig, hidden_dim: int) -> Named:
    """A feed-forward network: gated when the activation is silu."""
    if config.activation == "silu":
        yield "gate_proj.weight", _matrix(config, (hidden_dim, config.dim), ("mlp", "embed"))
    yield "up_proj.weight", _matrix(config, (hidden_dim, config.dim), ("mlp", "embed"))
    yield "down_proj.weight", _residual(config, (config.dim, hidden_dim), ("embed", "mlp"))


def _moe(config: ModelConfig) -> Named:
    experts, hidden_dim = config.num_experts, config.computed_expert_ffn_hidden_dim
    yield from _prefixed("router", _router(config, experts))
    if config.moe_router == "sigmoid_topk":
        for name in ("expert_bias", "expert_ema"):
            value = 0.0 if name == "expert_bias" else 1.0 / experts
            yield f"router.{name}", ParameterSpec((experts,), Constant(value), ("experts",), is_buffer=True)
    yield from _experts(config, experts, hidden_dim, config.moe_packed_experts)
    if config.moe_shared_experts > 0:
        yield from _prefixed("shared_expert", _mlp(config, hidden_dim * config.moe_shared_experts))


def _expert_choice(config: ModelConfig, experts: int) -> Named:
    yield from _prefixed("router", _router(config, experts))
    yield from _experts(config, experts, config.computed_expert_ffn_hidden_dim, packed=False)


def _router(config: ModelConfig, experts: int) -> Named:
    gate = _matrix(config, (experts, config.dim), ("experts", "embed"))
    yield "gate.weight", replace(gate, full_precision=True)


def _experts(config: ModelConfig, experts: int, hidden_dim: int, packed: bool) -> Named:
    if not packed:
        for expert in range(experts):
            yield from _prefixed(f"experts.{expert}", _mlp(config, hidden_dim))
        return
    into, out_of = (experts, config.dim, hidden_dim), (experts, hidden_dim, config.dim)
    if config.activation == "silu":
        yield "gate_w", _matrix(config, into, ("experts", "embed", "mlp"))
    yield "up_w", _matrix(config, into, ("experts", "embed", "mlp"))
    yield "down_w", _residual(config, out_of, ("experts", "mlp", "embed"))


def _cross_attention_block(config: ModelConfig, vlm: CrossAttentionConfig) -> Named:
    """Starts as the identity: what writes to the residual stream is 0."""
    heads, kv_heads = vlm.resolved_heads(config.n_heads, config.kv_heads)
    yield from _prefixed("attention_norm", _norm(config, config.dim))
    yield from _prefixed("attention", _silent(_projections(config, heads, kv_heads)))
    yield from _prefixed("mlp_norm", _norm(config, config.dim))
    yield from _prefixed("mlp", _silent(_mlp(config, config.computed_ffn_hidden_dim)))


def _mot_layer(config: ModelConfig, vlm: MoTConfig, layer: int) -> Named:
    """Own norms, projections and FFN for each modality; attention and dense FFN start silent."""
    for modality in vlm.mot_modalities:
        yield from _prefixed(f"attn_norm.{modality}", _norm(config, config.dim))
    per_modality = {modality: dict(_mot_projections(config, vlm, modality)) for modality in vlm.mot_modalities}
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        for modality, specs in per_modality.items():
            for part in ("weight", "bias"):
                if f"{projection}.{part}" in specs:
                    yield f"attn.{projection}.{modality}.{part}", specs[f"{projection}.{part}"]
    for modality in vlm.mot_modalities:
        yield from _prefixed(f"mlp_norm.{modality}", _norm(config, config.dim))
    for modality in vlm.mot_modalities:
        ffn = _feed_forward(config, layer)
        yield from _prefixed(f"mlp.{modality}", ffn if config.is_moe_layer(layer) else _silent(ffn))


def _mot_projections(config: ModelConfig, vlm: MoTConfig, modality: str) -> Named:
    heads, kv_heads = config.n_heads, config.kv_heads
    if modality == "image":
        heads, kv_heads = vlm.resolved_image_heads(heads, kv_heads)
    yield from _silent(_projections(config, heads, kv_heads, config.attention_bias))
    if config.qk_norm:
        yield from _head_norms(config)


def _silent(specs: Named) -> Named:
    """The same tensors with those that write to the residual stream set to 0."""
    for name, spec in specs:
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        yield name, replace(spec, initializer=Constant(0.0)) if writes else spec


def _norm(config: ModelConfig, dim: int) -> Named:
    yield "weight", _ones((dim,), ("embed",))
    if config.norm_type == "layernorm":
        yield "bias", _zeros((dim,), ("embed",))


def _matrix(config: ModelConfig, shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Normal(config.init_std), axes, decay=True)


def _residual(config: ModelConfig, shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    """A matrix that writes to the residual stream: scaled by 1/sqrt(2 * n_layers) (GPT-2, Radford et al. 2019)."""
    return ParameterSpec(shape, Normal(config.init_std / math.sqrt(2 * config.n_layers)), axes, decay=True)


def _ones(shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Constant(1.0), axes)


def _zeros(shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Constant(0.0), axes)


def _prefixed(prefix: str, specs: Named) -> Named:
    for name, spec in specs:
        yield f"{prefix}.{name}", spec
