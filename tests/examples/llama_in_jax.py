"""A port of transformers' Llama to plain JAX: functions of a tree of weights, with taps where its parts end.

Shapes: B batch, S sequence, D width, H query heads, K key/value heads, h head size. Weights are (in, out), queries and
keys rotate pairs of neighbours, and gate and up are one matrix: unlike the original in all three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kempnerforge_jax.parity import tap
from shared_config.parity import Map, make_map, parse_op
from shared_config.parity.foreign.mapping import Rule


class Sizes(NamedTuple):
    """Of a Llama."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    theta: float = 10000.0


def llama(weights: Any, tokens: Array, sizes: Sizes) -> Array:
    """Logits (B, S, V) of token ids (B, S)."""
    x = tap("embed", weights["embed"][tokens])
    rotation = rotary(tokens.shape[1], sizes, x.dtype)
    for number, layer in enumerate(weights["layers"]):
        name = f"layers.{number}"
        normed = tap(f"{name}.attention_norm", rms_norm(x, layer["attention_norm"], sizes.eps))
        x = x + tap(f"{name}.attention", attention(normed, layer, rotation, sizes, f"{name}.attention"))
        normed = tap(f"{name}.mlp_norm", rms_norm(tap(f"{name}.middle", x), layer["mlp_norm"], sizes.eps))
        x = tap(name, x + tap(f"{name}.mlp", mlp(normed, layer, f"{name}.mlp")))
    return tap("norm", rms_norm(x, weights["norm"], sizes.eps)) @ weights["head"]


def attention(x: Array, layer: Any, rotation: tuple[Array, Array], sizes: Sizes, name: str) -> Array:
    """Causal attention of groups of query heads, (B, S, D) to (B, S, D)."""
    B, S, _ = x.shape
    q, k, v = (tap(f"{name}.{part}", x @ layer[f"w{part}"]) for part in "qkv")
    q_BSKGh = rotated(q.reshape(B, S, sizes.heads, -1), rotation).reshape(B, S, sizes.kv_heads, -1, sizes.head_dim)
    k_BSKh = rotated(k.reshape(B, S, sizes.kv_heads, -1), rotation)
    scores = jnp.einsum("bskgh,btkh->bkgst", q_BSKGh, k_BSKh) * sizes.head_dim**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores, -jnp.inf)
    probabilities = jax.nn.softmax(wide(scores), axis=-1).astype(x.dtype)
    values = jnp.einsum("bkgst,btkh->bskgh", probabilities, v.reshape(B, S, sizes.kv_heads, -1))
    return tap(f"{name}.mixed", values.reshape(B, S, -1)) @ layer["wo"]


def mlp(x: Array, layer: Any, name: str) -> Array:
    """SwiGLU, (B, S, D) to (B, S, D)."""
    gate, up = jnp.split(tap(f"{name}.gate_up", x @ layer["gate_up"]), 2, axis=-1)
    return tap(f"{name}.product", jax.nn.silu(gate) * up) @ layer["down"]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """In at least float32."""
    y = wide(x)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return weight * y.astype(x.dtype)


def rotary(length: int, sizes: Sizes, dtype: Any) -> tuple[Array, Array]:
    """Cosine and sine (S, h / 2), whose frequencies are float32, as the original has them."""
    exponents = np.arange(0, sizes.head_dim, 2, dtype=np.float32) / np.float32(sizes.head_dim)
    frequencies = np.float32(1) / np.float32(sizes.theta) ** exponents
    angles = wide(jnp.arange(length)[:, None].astype(dtype)) * frequencies
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotated(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Pairs of neighbours of (B, S, H, h), turned by the angle of their position (RoPE, arXiv:2104.09864)."""
    cosine, sine = (part[:, None, :] for part in rotation)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1)
    return turned.reshape(x.shape)


def wide(x: Array) -> Array:
    """In at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def names(sizes: Sizes, eager: bool = False) -> Map:
    """From the names and layouts of transformers to those of the port.

    Args:
        eager: whether the original's attention also puts out its probabilities.
    """
    weights = {
        "model.embed_tokens.weight": "embed",
        "model.layers.*.input_layernorm.weight": "layers.*.attention_norm",
        "model.layers.*.self_attn.q_proj.weight": ("layers.*.wq", f"interleave {sizes.heads}", "transpose"),
        "model.layers.*.self_attn.k_proj.weight": ("layers.*.wk", f"interleave {sizes.kv_heads}", "transpose"),
        "model.layers.*.self_attn.v_proj.weight": ("layers.*.wv", "transpose"),
        "model.layers.*.self_attn.o_proj.weight": ("layers.*.wo", "transpose"),
        "model.layers.*.post_attention_layernorm.weight": "layers.*.mlp_norm",
        "model.layers.*.mlp.down_proj.weight": ("layers.*.down", "transpose"),
        "model.norm.weight": "norm",
        "lm_head.weight": ("head", "transpose"),
    }
    activations = {
        "model.embed_tokens": "embed",
        "model.layers.*.input_layernorm": "layers.*.attention_norm",
        "model.layers.*.self_attn.q_proj": ("layers.*.attention.q", f"interleave {sizes.heads} axis=-1"),
        "model.layers.*.self_attn.k_proj": ("layers.*.attention.k", f"interleave {sizes.kv_heads} axis=-1"),
        "model.layers.*.self_attn.v_proj": "layers.*.attention.v",
        "model.layers.*.self_attn.o_proj@in": "layers.*.attention.mixed",
        f"model.layers.*.self_attn{'.0' * eager}": "layers.*.attention",
        "model.layers.*.post_attention_layernorm@in": "layers.*.middle",
        "model.layers.*.post_attention_layernorm": "layers.*.mlp_norm",
        "model.layers.*.mlp.down_proj@in": "layers.*.mlp.product",
        "model.layers.*.mlp": "layers.*.mlp",
        "model.layers.*": "layers.*",
        "model.norm": "norm",
    }
    plain = make_map(weights, activations)
    gate_up = [f"model.layers.*.mlp.{part}_proj" for part in ("gate", "up")]
    fused = Rule(tuple(f"{part}.weight" for part in gate_up), ("layers.*.gate_up",), (parse_op("transpose"),), 0)
    put_out = Rule(tuple(gate_up), ("layers.*.mlp.gate_up",), (), -1)
    return Map((*plain.weights, fused), (*plain.activations, put_out))


def nested(flat: dict[str, np.ndarray], layers: int) -> dict[str, Any]:
    """The tree of weights that `llama` takes."""
    of_layer = [
        {name.split(".")[2]: value for name, value in flat.items() if name.startswith(f"layers.{n}.")}
        for n in range(layers)
    ]
    return {**{name: value for name, value in flat.items() if "." not in name}, "layers": of_layer}
