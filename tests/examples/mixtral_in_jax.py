"""A port of transformers' Mixtral to plain JAX: the Llama of `llama_in_jax` with a choice of experts.

Shapes: B batch, S sequence, T tokens of a batch, D width, E experts, K of them chosen, F width of an expert.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kempnerforge_jax.parity import tap
from shared_config.parity import Map, make_map
from tests.examples import llama_in_jax
from tests.examples.llama_in_jax import Sizes, attention, rms_norm, rotary, wide

CHOSEN = 2


def mixtral(weights: Any, tokens: Array, sizes: Sizes) -> Array:
    """Logits (B, S, V) of token ids (B, S)."""
    x = tap("embed", weights["embed"][tokens])
    rotation = rotary(tokens.shape[1], sizes, x.dtype)
    for number, layer in enumerate(weights["layers"]):
        name = f"layers.{number}"
        normed = tap(f"{name}.attention_norm", rms_norm(x, layer["attention_norm"], sizes.eps))
        x = x + tap(f"{name}.attention", attention(normed, layer, rotation, sizes, f"{name}.attention"))
        normed = tap(f"{name}.mlp_norm", rms_norm(tap(f"{name}.middle", x), layer["mlp_norm"], sizes.eps))
        x = tap(name, x + tap(f"{name}.mlp", mixture(normed, layer, f"{name}.mlp")))
    return tap("norm", rms_norm(x, weights["norm"], sizes.eps)) @ weights["head"]


def mixture(x: Array, layer: Any, name: str) -> Array:
    """Sums of what the chosen experts make of each token, (B, S, D) to (B, S, D) (Mixtral, arXiv:2401.04088)."""
    x_TD = x.reshape(-1, x.shape[-1])
    _, shares_TK, indices_TK = tap(f"{name}.router", route(x_TD, layer["router"]))
    return tap(f"{name}.experts", experts(x_TD, layer, shares_TK, indices_TK)).reshape(x.shape)


def route(x_TD: Array, router_DE: Array) -> tuple[Array, Array, Array]:
    """Logits (T, E), shares (T, K) and places (T, K) of the experts with the largest probabilities."""
    logits_TE = x_TD @ router_DE
    shares_TK, indices_TK = jax.lax.top_k(jax.nn.softmax(wide(logits_TE), axis=-1), CHOSEN)
    return logits_TE, shares_TK / shares_TK.sum(axis=-1, keepdims=True), indices_TK


def experts(x_TD: Array, layer: Any, shares_TK: Array, indices_TK: Array) -> Array:
    """SwiGLU of every expert, of which those that are chosen count."""
    gate, up = jnp.split(jnp.einsum("td,edf->tef", x_TD, layer["gate_up"]), 2, axis=-1)
    out_TED = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, layer["down"])
    chosen_TKE = jax.nn.one_hot(indices_TK, out_TED.shape[1], dtype=shares_TK.dtype)
    weighted_TED = wide(out_TED) * jnp.einsum("tk,tke->te", shares_TK, chosen_TKE)[..., None]
    return weighted_TED.astype(x_TD.dtype).sum(axis=1)


def names(sizes: Sizes, eager: bool = False) -> Map:
    """From the names and layouts of transformers to those of the port; see `llama_in_jax.names`."""
    of_llama = llama_in_jax.names(sizes, eager)
    own = make_map(
        {
            "model.layers.*.mlp.gate.weight": ("layers.*.router", "transpose"),
            "model.layers.*.mlp.experts.gate_up_proj": ("layers.*.gate_up", "transpose"),
            "model.layers.*.mlp.experts.down_proj": ("layers.*.down", "transpose"),
        },
        {
            "model.layers.*.mlp.gate.*": "layers.*.mlp.router.*",
            "model.layers.*.mlp.experts": "layers.*.mlp.experts",
        },
    )
    shared = (
        tuple(rule for rule in rules if ".mlp." not in rule.a[0]) for rules in (of_llama.weights, of_llama.activations)
    )
    return Map(*(rules + more for rules, more in zip(shared, (own.weights, own.activations), strict=True)))
