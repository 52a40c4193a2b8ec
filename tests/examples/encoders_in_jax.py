"""Ports of transformers' BERT (post-norm, a mask of padding) and ViT (pre-norm, channels last) to plain JAX.

Shapes: B batch, S sequence, D width, H heads, h head size, F hidden width, P patch size, C channels. Weights are
(in, out), queries, keys and values one matrix, and images (B, height, width, C): unlike the originals in all three.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kempnerforge_jax.parity import tap
from shared_config.parity import Map, make_map, parse_op
from shared_config.parity.foreign.mapping import Rule

EPS = 1e-12
TO_LAST = "permute 0 2 3 1"


def bert(weights: Any, tokens: Array, mask: Array, heads: int) -> dict[str, Array]:
    """Hidden states (B, S, D) and the pooled ones (B, D) of token ids (B, S) and a mask (B, S), 0 where padding is."""
    x = tap("words", weights["words"][tokens]) + weights["types"][0] + weights["positions"][: tokens.shape[1]]
    x = normed("embed_norm", x, weights["embed_norm"])
    for number in range(len(weights["layers"])):
        name, own = f"layers.{number}", weights["layers"][str(number)]
        x = x + attention(f"{name}.attention", x, own["attention"], heads, mask[:, None, None, :] > 0)
        x = normed(f"{name}.attention_norm", x, own["attention_norm"])
        x = normed(f"{name}.mlp_norm", x + mlp(f"{name}.mlp", x, own["mlp"]), own["mlp_norm"])
    return {"last_hidden_state": x, "pooler_output": pooled(x, weights["pooler"])}


def vit(weights: Any, images: Array, heads: int) -> dict[str, Array]:
    """Hidden states (B, S, D) and the pooled ones (B, D) of images (B, height, width, C)."""
    kernel = weights["patches"]["kernel"]
    layout = ("NHWC", "HWIO", "NHWC")
    patches = jax.lax.conv_general_dilated(images, kernel, kernel.shape[:2], "VALID", dimension_numbers=layout)
    patches = tap("patches", patches + weights["patches"]["bias"])
    patches = patches.reshape(len(images), -1, patches.shape[-1])
    first = jnp.broadcast_to(weights["class"], (len(images), 1, patches.shape[-1]))
    x = tap("embed", jnp.concatenate([first, patches], axis=1) + weights["positions"])
    for number in range(len(weights["layers"])):
        name, own = f"layers.{number}", weights["layers"][str(number)]
        y = normed(f"{name}.attention_norm", x, own["attention_norm"])
        x = x + attention(f"{name}.attention", y, own["attention"], heads)
        y = normed(f"{name}.mlp_norm", x, own["mlp_norm"])
        x = tap(name, x + mlp(f"{name}.mlp", y, own["mlp"]))
    x = normed("norm", x, weights["norm"])
    return {"last_hidden_state": x, "pooler_output": pooled(x, weights["pooler"])}


def attention(name: str, x: Array, own: Any, heads: int, mask: Array | None = None) -> Array:
    """Of every position to all that a mask (B, 1, 1, S) leaves, (B, S, D) to (B, S, D)."""
    B, S, D = x.shape
    qkv = tap(f"{name}.qkv", dense(x, own["qkv"]))
    q_BSHh, k_BSHh, v_BSHh = (part.reshape(B, S, heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("bshd,bthd->bhst", q_BSHh, k_BSHh) * (D // heads) ** -0.5
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    shares = jax.nn.softmax(wide(scores), axis=-1).astype(x.dtype)
    mixed = tap(f"{name}.mixed", jnp.einsum("bhst,bthd->bshd", shares, v_BSHh).reshape(B, S, D))
    return tap(name, dense(mixed, own["out"]))


def mlp(name: str, x: Array, own: Any) -> Array:
    """Two products, (B, S, D) to (B, S, D), with the exact GELU (arXiv:1606.08415) between them."""
    hidden = tap(f"{name}.hidden", jax.nn.gelu(tap(f"{name}.up", dense(x, own["up"])), approximate=False))
    return tap(name, dense(hidden, own["down"]))


def pooled(x: Array, own: Any) -> Array:
    """Of the first position, (B, S, D) to (B, D)."""
    return tap("pooler", jnp.tanh(dense(x[:, 0], own)))


def normed(name: str, x: Array, own: Any) -> Array:
    """LayerNorm over the width (arXiv:1607.06450), in at least float32; what it is given is recorded, too."""
    y = wide(tap(f"{name}@in", x))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS)
    return tap(name, (y * own["scale"] + own["bias"]).astype(x.dtype))


def dense(x: Array, own: Any) -> Array:
    """A product and a bias."""
    return x @ own["kernel"] + own["bias"]


def wide(x: Array) -> Array:
    """In at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def names_of_bert() -> Map:
    """From the names and layouts of transformers to those of the port."""
    layer = "encoder.layer.*"
    products = {
        f"{layer}.attention.output.dense": "layers.*.attention.out",
        f"{layer}.intermediate.dense": "layers.*.mlp.up",
        f"{layer}.output.dense": "layers.*.mlp.down",
        "pooler.dense": "pooler",
    }
    norms = {
        "embeddings.LayerNorm": "embed_norm",
        f"{layer}.attention.output.LayerNorm": "layers.*.attention_norm",
        f"{layer}.output.LayerNorm": "layers.*.mlp_norm",
    }
    tables = {
        "embeddings.word_embeddings.weight": "words",
        "embeddings.token_type_embeddings.weight": "types",
        "embeddings.position_embeddings.weight": "positions",
    }
    activations = {
        "embeddings.word_embeddings": "words",
        **norms,
        f"{layer}.attention.output.dense": "layers.*.attention",
        f"{layer}.attention.self.0": "layers.*.attention.mixed",
        f"{layer}.intermediate.dense": "layers.*.mlp.up",
        f"{layer}.intermediate": "layers.*.mlp.hidden",
        f"{layer}.output.dense": "layers.*.mlp",
        "pooler": "pooler",
    }
    parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    return joined(make_map(parameters(products, norms) | tables, activations), parts)


def names_of_vit() -> Map:
    """From the names and layouts of transformers to those of the port."""
    products = {
        "layers.*.attention.o_proj": "layers.*.attention.out",
        "layers.*.mlp.fc1": "layers.*.mlp.up",
        "layers.*.mlp.fc2": "layers.*.mlp.down",
        "pooler.dense": "pooler",
    }
    norms = {
        "layers.*.layernorm_before": "layers.*.attention_norm",
        "layers.*.layernorm_after": "layers.*.mlp_norm",
        "layernorm": "norm",
    }
    patches = "embeddings.patch_embeddings.projection"
    tables = {
        "embeddings.cls_token": "class",
        "embeddings.position_embeddings": "positions",
        f"{patches}.weight": ("patches.kernel", "permute 2 3 1 0"),
        f"{patches}.bias": "patches.bias",
        "input.pixel_values": ("input.0", TO_LAST),
    }
    activations = {
        patches: ("patches", TO_LAST),
        "embeddings": "embed",
        **norms,
        "layers.*.attention.o_proj": "layers.*.attention",
        "layers.*.attention.o_proj@in": "layers.*.attention.mixed",
        "layers.*.mlp.fc1": "layers.*.mlp.up",
        "layers.*.mlp.activation_fn": "layers.*.mlp.hidden",
        "layers.*.mlp": "layers.*.mlp",
        "layers.*": "layers.*",
        "pooler": "pooler",
    }
    parts = [f"layers.*.attention.{part}_proj" for part in "qkv"]
    return joined(make_map(parameters(products, norms) | tables, activations), parts)


def parameters(products: dict[str, str], norms: dict[str, str]) -> dict[str, Any]:
    """Rules for the parameters of modules: original -> port."""
    return {
        **{f"{a}.weight": (f"{b}.kernel", "transpose") for a, b in products.items()},
        **{f"{a}.weight": f"{b}.scale" for a, b in norms.items()},
        **{f"{a}.bias": f"{b}.bias" for a, b in (products | norms).items()},
    }


def joined(plain: Map, parts: list[str]) -> Map:
    """With rules for queries, keys and values, which are three modules of the originals and one of the port."""
    kernels, biases = (tuple(f"{part}.{kind}" for part in parts) for kind in ("weight", "bias"))
    own = (
        Rule(kernels, ("layers.*.attention.qkv.kernel",), (parse_op("transpose"),)),
        Rule(biases, ("layers.*.attention.qkv.bias",)),
    )
    put_out = Rule(tuple(parts), ("layers.*.attention.qkv",), (), -1)
    return Map((*plain.weights, *own), (*plain.activations, put_out))


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tree of weights by the dots of their names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree
