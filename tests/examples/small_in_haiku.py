"""The language model of `small_in_torch` as a function of Haiku; `NAMES` maps the names of PyTorch to its own.

Shapes: B batch, S sequence, D width, H heads, h head size.
"""

from __future__ import annotations

from typing import Any

import haiku as hk  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
from jax import Array

from kempnerforge_jax.parity import record
from shared_config.parity import Trace, make_map, transfer
from tests.examples.small import EPS, HEADS, HIDDEN, LAYERS, TOKENS, VOCABULARY, WIDTH, weights

PATHS = {
    "embed": "embed",
    "blocks.*.attention_norm": "block_*.attention_norm",
    "blocks.*.attention": "block_*.attention",
    "blocks.*.attention.qkv": "block_*.attention.qkv",
    "blocks.*.attention.out": "block_*.attention.out",
    "blocks.*.mlp_norm": "block_*.mlp_norm",
    "blocks.*.mlp.0": "block_*.linear",
    "blocks.*.mlp.2": "block_*.linear_1",
    "blocks.*": "block_*",
    "norm": "norm",
    "head": "head",
}
"""Modules of PyTorch -> of Haiku, with dots for slashes."""
PARTS = {
    "embed": {"weight": ("embeddings",)},
    "norm": {"weight": ("scale",), "bias": ("offset",)},
    "linear": {"weight": ("w", "transpose"), "bias": ("b",)},
}


def kind_of(path: str) -> str:
    """Of a module of PyTorch by its path, a key of `PARTS`."""
    return "embed" if path == "embed" else "norm" if path.endswith("norm") else "linear"


NAMES = make_map(
    {
        f"{theirs}.{part}": (f"{ours}.{own}", *layout)
        for theirs, ours in PATHS.items()
        for part, (own, *layout) in PARTS[kind_of(theirs)].items()
    },
    PATHS,
)


class Attention(hk.Module):
    """Causal attention, (B, S, D) to (B, S, D)."""

    def __call__(self, x: Array) -> Array:
        B, S, D = x.shape
        q, k, v = (part.reshape(B, S, HEADS, -1) for part in jnp.split(hk.Linear(3 * WIDTH, name="qkv")(x), 3, axis=-1))
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / (D // HEADS) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores, -jnp.inf)
        shares = jax.nn.softmax(wide(scores), axis=-1).astype(x.dtype)
        return hk.Linear(WIDTH, name="out")(jnp.einsum("bhst,bthd->bshd", shares, v).reshape(B, S, D))


class Block(hk.Module):
    """Attention and two products, each behind a norm."""

    def __init__(self, name: str):
        super().__init__(name)
        self.first, self.second = hk.Linear(HIDDEN), hk.Linear(WIDTH)

    def __call__(self, x: Array) -> Array:
        x = x + Attention(name="attention")(layer_norm("attention_norm")(x))
        return x + self.second(jax.nn.silu(self.first(layer_norm("mlp_norm")(x))))


def layer_norm(name: str) -> hk.LayerNorm:
    """LayerNorm over the width (arXiv:1607.06450)."""
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, eps=EPS, name=name)


def small(tokens: Array) -> Array:
    """Logits (B, S, V) of tokens (B, S)."""
    x = hk.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
    for number in range(LAYERS):
        x = hk.remat(Block(f"block_{number}"))(x)
    return hk.Linear(VOCABULARY, with_bias=False, name="head")(layer_norm("norm")(x))


def wide(x: Array) -> Array:
    """In at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def ours(**options: Any) -> Trace:
    """A recording of it."""
    function = hk.transform(small)
    own = transfer(weights(), NAMES)
    tree: dict[str, Any] = {}
    for path, values in jax.eval_shape(function.init, jax.random.key(0), TOKENS).items():
        dotted = path.replace("/~/", ".").replace("/", ".")
        tree[path] = {name: own[f"{dotted}.{name}"] for name in values}
    return record(function, (TOKENS,), weights=tree, **options)
