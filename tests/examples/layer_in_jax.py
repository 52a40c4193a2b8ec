"""A custom layer in JAX: gated attention over documents; `layer_in_torch` is the same.

Shapes: B batch, S sequence, D width, H heads, h head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kempnerforge_jax.parity import tap


def gated_attention(weights: Any, x: Array, documents: Array, heads: int) -> Array:
    """Causal attention within documents, whose output a gate scales: (B, S, D) to (B, S, D)."""
    B, S, _ = x.shape
    qkv = tap("qkv", x @ weights["qkv"]["weight"].T + weights["qkv"]["bias"])
    q, k, v = (part.reshape(B, S, heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    places = jnp.arange(S)
    seen = (documents[:, :, None] == documents[:, None, :]) & (places[:, None] >= places)
    scores = jnp.where(seen[:, None], scores, -jnp.inf).astype(jnp.promote_types(x.dtype, jnp.float32))
    mixed = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores, axis=-1).astype(x.dtype), v).reshape(B, S, -1)
    gate = tap("gate", x @ weights["gate"]["weight"].T + weights["gate"]["bias"])
    return tap("out", tap("out@in", mixed * jax.nn.sigmoid(gate)) @ weights["out"]["weight"].T)
