"""Weights to compare with: fan-in normal matrices, norm weights in (0.5, 1.5), biases that are not 0, so that nothing
hides.

The names and shapes are written out here once more, apart from the parameter table of `shared_config`.
"""

from __future__ import annotations

import numpy as np

from shared_config.schema.model import ModelConfig
from tests.oracle.linear import below

Shapes = dict[str, tuple[int, ...]]


def draw_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float64 weights of the text model, drawn name by name."""
    return draw(text_shapes(config), seed)


def draw(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """float64 values for named shapes; what a tensor is, its name tells."""
    rng = np.random.default_rng(seed)
    return {name: _draw(name, shape, rng) for name, shape in shapes.items()}


def text_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every weight and buffer of the text model."""
    shapes: Shapes = {"token_embedding.embedding.weight": (config.vocab_size, config.dim)}
    for layer in range(config.n_layers):
        shapes |= below(f"layers.{layer}", block_shapes(config, layer))  # type: ignore[arg-type]
    shapes |= norm_shapes("norm", config)
    if not config.tie_embeddings:
        shapes["output_head.proj.weight"] = (config.vocab_size, config.dim)
    return shapes


def block_shapes(config: ModelConfig, layer: int) -> Shapes:
    dense = mlp_shapes("mlp", config.dim, config.computed_ffn_hidden_dim, config.activation, config.mlp_bias)
    norms = {
        f"{part}{place}_norm": norm_shapes(f"{part}{place}_norm", config)
        for part in ("attention", "mlp")
        for place, where in (("", "before"), ("_post", "after"))
        if config.norm_placement in (where, "both")
    }
    return {
        **norms.get("attention_norm", {}),
        **attention_shapes("attention", config),
        **norms.get("attention_post_norm", {}),
        **norms.get("mlp_norm", {}),
        **(moe_shapes("mlp", config) if config.is_moe_layer(layer) else dense),
        **norms.get("mlp_post_norm", {}),
    }


def attention_shapes(path: str, config: ModelConfig) -> Shapes:
    width, q, kv = config.dim, config.n_heads * config.head_size, config.kv_heads * config.head_size
    sizes = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q)}
    shapes: Shapes = {f"{path}.{name}.weight": size for name, size in sizes.items()}
    if config.attention_bias:
        biased = [name for name in sizes if name != "o_proj" or config.attention_output_bias]
        shapes |= {f"{path}.{name}.bias": sizes[name][:1] for name in biased}
    if config.qk_norm and config.qk_norm_over == "width":
        shapes |= {f"{path}.q_norm.weight": (q,), f"{path}.k_norm.weight": (kv,)}
    elif config.qk_norm:
        shapes |= {f"{path}.q_norm.weight": (config.head_size,), f"{path}.k_norm.weight": (config.head_size,)}
    return shapes


def mlp_shapes(path: str, dim: int, hidden: int, activation: str, bias: bool = False) -> Shapes:
    sizes = {"gate_proj": (hidden, dim)} if activation in ("silu", "geglu_tanh") else {}
    sizes |= {"up_proj": (hidden, dim), "down_proj": (dim, hidden)}
    shapes: Shapes = {f"{path}.{name}.weight": size for name, size in sizes.items()}
    return shapes | ({f"{path}.{name}.bias": size[:1] for name, size in sizes.items()} if bias else {})


def moe_shapes(path: str, config: ModelConfig) -> Shapes:
    experts, dim, hidden = config.num_experts, config.dim, config.computed_expert_ffn_hidden_dim
    shapes: Shapes = {f"{path}.router.gate.weight": (experts, dim)}
    if config.moe_router == "sigmoid_topk":
        shapes |= {f"{path}.router.expert_bias": (experts,), f"{path}.router.expert_ema": (experts,)}
    if config.moe_packed_experts:
        gate: Shapes = {f"{path}.gate_w": (experts, dim, hidden)} if config.is_gated else {}
        shapes |= {**gate, f"{path}.up_w": (experts, dim, hidden), f"{path}.down_w": (experts, hidden, dim)}
    else:
        for expert in range(experts):
            shapes |= mlp_shapes(f"{path}.experts.{expert}", dim, hidden, config.activation)
    if config.moe_shared_experts:
        shapes |= mlp_shapes(f"{path}.shared_expert", dim, hidden * config.moe_shared_experts, config.activation)
    if config.moe_shared_expert_gate:
        shapes[f"{path}.shared_expert_gate.weight"] = (1, dim)
    return shapes


def norm_shapes(path: str, config: ModelConfig) -> Shapes:
    shapes: Shapes = {f"{path}.weight": (config.dim,)}
    return shapes | {f"{path}.bias": (config.dim,)} if config.norm_type == "layernorm" else shapes


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name.endswith("expert_ema"):
        return np.full(shape, 1 / shape[0])
    if len(shape) == 1 and name.endswith("weight"):
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
        return rng.uniform(-0.2, 0.2, shape)
    fan_in = shape[-2] if name.endswith("_w") else shape[-1]
    return rng.standard_normal(shape) / np.sqrt(fan_in)
