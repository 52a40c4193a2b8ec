"""The language model of `small_in_torch` as a module of Equinox, with the same names.

Shapes: B batch, S sequence, D width, H heads, h head size.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
from jax import Array

from kempnerforge_jax.parity import record
from shared_config.parity import Trace
from tests.examples.small import EPS, HEADS, HIDDEN, LAYERS, TOKENS, VOCABULARY, WIDTH, weights


def each(module: Any, x: Array) -> Array:
    """A module of vectors, for every position of a batch."""
    return jax.vmap(jax.vmap(module))(x)


class Attention(eqx.Module):
    """Causal attention, (B, S, D) to (B, S, D)."""

    qkv: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key: Array):
        self.qkv, self.out = eqx.nn.Linear(WIDTH, 3 * WIDTH, key=key), eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def __call__(self, x: Array) -> Array:
        B, S, D = x.shape
        q, k, v = (part.reshape(B, S, HEADS, -1) for part in jnp.split(each(self.qkv, x), 3, axis=-1))
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / (D // HEADS) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores, -jnp.inf)
        shares = jax.nn.softmax(wide(scores), axis=-1).astype(x.dtype)
        return each(self.out, jnp.einsum("bhst,bthd->bshd", shares, v).reshape(B, S, D))


class Block(eqx.Module):
    """Attention and two products, each behind a norm."""

    attention_norm: eqx.nn.LayerNorm
    attention: Attention
    mlp_norm: eqx.nn.LayerNorm
    mlp: list[Any]

    def __init__(self, key: Array):
        self.attention_norm, self.mlp_norm = (eqx.nn.LayerNorm(WIDTH, eps=EPS) for _ in range(2))
        self.attention = Attention(key)
        layers = eqx.nn.Linear(WIDTH, HIDDEN, key=key), eqx.nn.Linear(HIDDEN, WIDTH, key=key)
        self.mlp = [layers[0], jax.nn.silu, layers[1]]

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(each(self.attention_norm, x))
        first, activation, second = self.mlp
        return x + each(second, activation(each(first, each(self.mlp_norm, x))))


class Small(eqx.Module):
    """Logits (B, S, V) of tokens (B, S)."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: Array):
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=key)
        self.blocks = [Block(key) for _ in range(LAYERS)]
        self.norm = eqx.nn.LayerNorm(WIDTH, eps=EPS)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=key)

    @eqx.filter_jit
    def __call__(self, tokens: Array) -> Array:
        x = each(self.embed, tokens)
        for block in self.blocks:
            x = eqx.filter_checkpoint(block)(x)
        return each(self.head, each(self.norm, x))


def wide(x: Array) -> Array:
    """In at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def ours(**options: Any) -> Trace:
    """A recording of it."""
    return record(Small(jax.random.key(0)), (TOKENS,), weights=weights(), **options)
