"""The tensors of every kind of layer and module, and where they are declared."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from shared_config.contract.specs import (
    PACKED,
    Axes,
    Constant,
    Named,
    Normal,
    ParameterSpec,
    ParameterTable,
    fold,
    given,
    prefixed,
)
from shared_config.errors import ConfigError
from shared_config.registry import declaration, declare
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig, VLMConfig


def decoder_parameters(config: ModelConfig, vlm: VLMConfig | None = None) -> ParameterTable:
    """What the plain decoder has besides embedding, layers and head: its final norm."""
    return dict(prefixed("norm", _norm(config)))


def decoder_layer_parameters(config: ModelConfig, vlm: VLMConfig | None, layer: int) -> ParameterTable:
    """The tensors of a layer of the plain decoder."""
    return dict(_decoder_layer(config, _feed_forward(config, layer)))


def _decoder_layer(config: ModelConfig, feed_forward: Named) -> Named:
    parts = (("attention", _attention(config)), ("mlp", feed_forward))
    for name, part in parts:
        if config.norm_placement != "after":
            yield from prefixed(f"{name}_norm", _norm(config))
        yield from prefixed(name, part)
        if config.norm_placement != "before":
            yield from prefixed(f"{name}_post_norm", _norm(config))


def _feed_forward(config: ModelConfig, layer: int) -> Named:
    if config.is_moe_layer(layer):
        return _moe(config)
    return _mlp(config, config.computed_ffn_hidden_dim)


def _attention(config: ModelConfig) -> Named:
    biased = "qkvo" if config.attention_output_bias else "qkv"
    heads = (config.n_heads, config.kv_heads, config.head_size)
    yield from _projections(config, *heads, biased if config.attention_bias else "")
    if config.qk_norm:
        yield from _head_norms(config) if config.qk_norm_over == "head" else _width_norms(config)


def _head_norms(config: ModelConfig) -> Named:
    for name in ("q_norm.weight", "k_norm.weight"):
        yield name, _unit(config.qk_norm_type, (config.head_size,), ("head_dim",))


def _width_norms(config: ModelConfig) -> Named:
    for name, heads, axis in (("q_norm", config.n_heads, "heads"), ("k_norm", config.kv_heads, "kv_heads")):
        yield f"{name}.weight", _unit(config.qk_norm_type, (heads * config.head_size,), (axis,))


def _projections(config: ModelConfig, heads: int, kv_heads: int, head_dim: int, biased: str = "") -> Named:
    """Query, key, value and output projections; biases, of those that have one, after all weights."""
    h, dim = head_dim, config.dim
    yield "q_proj.weight", matrix(config, (heads * h, dim), ("heads", "embed"))
    yield "k_proj.weight", matrix(config, (kv_heads * h, dim), ("kv_heads", "embed"))
    yield "v_proj.weight", matrix(config, (kv_heads * h, dim), ("kv_heads", "embed"))
    yield "o_proj.weight", residual(config, (dim, heads * h), ("embed", "heads"))
    biases = (("q", heads * h, "heads"), ("k", kv_heads * h, "kv_heads"), ("v", kv_heads * h, "kv_heads"))
    for name, width, axis in (*biases, ("o", dim, "embed")):
        if name in biased:
            yield f"{name}_proj.bias", _zeros((width,), (axis,))


def _mlp(config: ModelConfig, hidden_dim: int) -> Named:
    """A feed-forward network."""
    return given((declaration("mlp", config.activation).parameters or _standard_mlp)(config, hidden_dim))


def _standard_mlp(config: ModelConfig, hidden_dim: int) -> ParameterTable:
    return _biased_mlp(config, hidden_dim, ("up_proj",))


def _gated_mlp(config: ModelConfig, hidden_dim: int) -> ParameterTable:
    return _biased_mlp(config, hidden_dim, ("gate_proj", "up_proj"))


def _biased_mlp(config: ModelConfig, hidden_dim: int, widening: tuple[str, ...]) -> ParameterTable:
    """Biases, if there are any, after all weights."""
    into = matrix(config, (hidden_dim, config.dim), ("mlp", "embed"))
    weights = {f"{name}.weight": into for name in widening}
    weights |= {"down_proj.weight": residual(config, (config.dim, hidden_dim), ("embed", "mlp"))}
    if not config.mlp_bias:
        return weights
    biases = {f"{name}.bias": _zeros((hidden_dim,), ("mlp",)) for name in widening}
    return {**weights, **biases, "down_proj.bias": _zeros((config.dim,), ("embed",))}


def _moe(config: ModelConfig) -> Named:
    experts, hidden_dim = config.num_experts, config.computed_expert_ffn_hidden_dim
    router = declaration("router", config.moe_router).parameters or router_parameters
    yield from prefixed("router", given(router(config)))
    yield from _experts(config, experts, hidden_dim, config.moe_packed_experts)
    if config.moe_shared_experts > 0:
        yield from prefixed("shared_expert", _mlp(config, hidden_dim * config.moe_shared_experts))
    if config.moe_shared_expert_gate:
        yield "shared_expert_gate.weight", matrix(config, (1, config.dim), (None, "embed"))


def router_parameters(config: ModelConfig) -> ParameterTable:
    """What every router has: its gate."""
    return _gate(config, config.num_experts)


def _balanced_router(config: ModelConfig) -> ParameterTable:
    experts = config.num_experts
    buffers = {
        name: ParameterSpec((experts,), Constant(value), ("routes",), is_buffer=True)
        for name, value in (("expert_bias", 0.0), ("expert_ema", 1.0 / experts))
    }
    return {**router_parameters(config), **buffers}


def _gate(config: ModelConfig, experts: int) -> ParameterTable:
    gate = matrix(config, (experts, config.dim), ("routes", "embed"))
    return {"gate.weight": replace(gate, full_precision=True)}


def _experts(config: ModelConfig, experts: int, hidden_dim: int, packed: bool) -> Named:
    if not packed:
        yield from prefixed(f"experts.{fold(range(experts))}", _mlp(config, hidden_dim))
        return
    for name, spec in _mlp(config, hidden_dim):
        if name not in PACKED or len(spec.shape) != 2:
            allowed = f"must be False, as only {', '.join(PACKED)} can be packed"
            given = f"with activation = {config.activation!r}, whose experts have {name}"
            raise ConfigError([f"model.moe_packed_experts = True: {allowed}; {given}"])
        shape, axes = (experts, *spec.shape[::-1]), ("experts", *spec.axes[::-1])
        yield PACKED[name], replace(spec, shape=shape, axes=axes)


def _cross_attention(config: ModelConfig, vlm: CrossAttentionConfig) -> ParameterTable:
    blocks = config.n_layers // vlm.cross_attention_every_n_layers
    prefix = f"cross_attention_layers.{fold(range(blocks))}" if blocks else ""
    added = dict(prefixed(prefix, _cross_attention_block(config, vlm))) if blocks else {}
    return {**added, **decoder_parameters(config)}


def _cross_attention_block(config: ModelConfig, vlm: CrossAttentionConfig) -> Named:
    """Starts as the identity: what writes to the residual stream is 0."""
    heads, kv_heads = vlm.resolved_heads(config.n_heads)
    yield from prefixed("attn_norm", _norm(config))
    yield from prefixed("attn", _silent(_projections(config, heads, kv_heads, vlm.resolved_head_dim(config))))
    yield from prefixed("mlp_norm", _norm(config))
    yield from prefixed("mlp", _silent(_mlp(config.replace(mlp_bias=False), config.computed_ffn_hidden_dim)))


def _moma_layer(config: ModelConfig, vlm: MoMaConfig, layer: int) -> ParameterTable:
    experts = [
        prefixed(f"experts.{modality}", _expert_choice(config, vlm.moma_experts_per_modality[modality]))
        for modality in vlm.moma_modalities
    ]
    return dict(_decoder_layer(config, itertools.chain.from_iterable(experts)))


def _expert_choice(config: ModelConfig, experts: int) -> Named:
    yield from prefixed("router", given(_gate(config, experts)))
    yield from _experts(config, experts, config.computed_expert_ffn_hidden_dim, packed=False)


def _mot(config: ModelConfig, vlm: MoTConfig) -> ParameterTable:
    norms = (prefixed(f"mot_norms.{modality}", _norm(config)) for modality in vlm.mot_modalities)
    return dict(itertools.chain.from_iterable(norms))


def _mot_layer(config: ModelConfig, vlm: MoTConfig, layer: int) -> ParameterTable:
    return dict(_mot_block(config, vlm, layer))


def _mot_block(config: ModelConfig, vlm: MoTConfig, layer: int) -> Named:
    """Own norms, projections and FFN for each modality; attention and dense FFN start silent."""
    for modality in vlm.mot_modalities:
        yield from prefixed(f"attn_norm.{modality}", _norm(config))
    per_modality = {modality: dict(_mot_projections(config, vlm, modality)) for modality in vlm.mot_modalities}
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        for modality, specs in per_modality.items():
            for part in ("weight", "bias"):
                if f"{projection}.{part}" in specs:
                    yield f"attn.{projection}.{modality}.{part}", specs[f"{projection}.{part}"]
    for modality in vlm.mot_modalities:
        yield from prefixed(f"mlp_norm.{modality}", _norm(config))
    for modality in vlm.mot_modalities:
        ffn = _feed_forward(config, layer)
        yield from prefixed(f"mlp.{modality}", ffn if config.is_moe_layer(layer) else _silent(ffn))


def _mot_projections(config: ModelConfig, vlm: MoTConfig, modality: str) -> Named:
    heads, kv_heads = config.n_heads, config.kv_heads
    if modality == "image":
        heads, kv_heads = vlm.resolved_image_heads(heads, kv_heads)
    yield from _silent(_projections(config, heads, kv_heads, config.head_size, "qkvo" if config.attention_bias else ""))
    if config.qk_norm:
        yield from _head_norms(config)


def _silent(specs: Named) -> Named:
    """The same tensors with those that write to the residual stream set to 0."""
    for name, spec in specs:
        yield name, replace(spec, initializer=Constant(0.0)) if spec.residual else spec


def _norm(config: ModelConfig) -> Named:
    return given((declaration("norm", config.norm_type).parameters or _scale)(config))


def _scale(config: ModelConfig) -> ParameterTable:
    return {"weight": _unit(config.norm_type, (config.dim,), ("embed",))}


def _scale_and_shift(config: ModelConfig) -> ParameterTable:
    return {**_scale(config), "bias": _zeros((config.dim,), ("embed",))}


def matrix(config: ModelConfig, shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    """A weight matrix: normal with the config's standard deviation, decayed."""
    return ParameterSpec(shape, Normal(config.init_std), axes, decay=True)


def residual(config: ModelConfig, shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    """A matrix that writes to the residual stream: scaled by 1/sqrt(2 * n_layers) (GPT-2, Radford et al. 2019)."""
    std = config.init_std / math.sqrt(2 * config.n_layers)
    return ParameterSpec(shape, Normal(std), axes, decay=True, residual=True)


def _unit(norm_type: str, shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    """The weight of a norm that only normalises."""
    return _zeros(shape, axes) if norm_type == "rmsnorm_1p" else ParameterSpec(shape, Constant(1.0), axes)


def _zeros(shape: tuple[int, ...], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Constant(0.0), axes)


declare("norm", "rmsnorm", parameters=_scale)
declare("norm", "rmsnorm_1p", parameters=_scale)
declare("norm", "layernorm", parameters=_scale_and_shift)
declare("mlp", "silu", parameters=_gated_mlp)
declare("mlp", "geglu_tanh", parameters=_gated_mlp)
declare("mlp", "gelu", parameters=_standard_mlp)
declare("mlp", "relu", parameters=_standard_mlp)
declare("router", "softmax_topk", parameters=router_parameters)
declare("router", "sigmoid_topk", parameters=_balanced_router)
declare("architecture", "joint_decoder", parameters=decoder_parameters)
declare("architecture", "cross_attention", parameters=_cross_attention)
declare("architecture", "mot", parameters=_mot, layer_parameters=_mot_layer, equal_layers=True)
declare("architecture", "moma", layer_parameters=_moma_layer, equal_layers=True)
