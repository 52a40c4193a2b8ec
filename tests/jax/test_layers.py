"""Layers of JAX as they begin, and sums of their gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kempnerforge_jax.model.adapter import AttentionalPoolAdapter, LinearAdapter
from kempnerforge_jax.model.cross_attention import CrossAttentionBlock
from kempnerforge_jax.model.embedding import TokenEmbedding
from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.moe import build_moe
from kempnerforge_jax.model.mot import MoTAttention
from kempnerforge_jax.model.norm import LayerNorm
from kempnerforge_jax.model.vision import VisionTower
from shared_config.contract.vision import vit_tower
from shared_config.schema.vision import VisionEncoderConfig

TOWER = vit_tower(VisionEncoderConfig(type="vit", feature_dim=16, n_layers=1, n_heads=2, image_size=4, patch_size=2))
LAYERS = {
    "tower": lambda rngs: VisionTower(dataclasses.replace(TOWER, class_token=True, pre_norm=True), rngs=rngs),
    "adapter": lambda rngs: LinearAdapter(16, 16, rngs=rngs),
    "pooling": lambda rngs: AttentionalPoolAdapter(16, 16, 2, 4, rngs=rngs),
    "cross-attention": lambda rngs: CrossAttentionBlock(16, 2, 1, 16, rngs=rngs),
    "modalities": lambda rngs: MoTAttention(16, 2, 1, ("image", "text"), bias=True, qk_norm=True, rngs=rngs),
    "experts": lambda rngs: build_moe(16, 16, 2, 1, router_type="sigmoid_topk", rngs=rngs),
    "embedding": lambda rngs: TokenEmbedding(16, 16, rngs=rngs),
    "norm": lambda rngs: LayerNorm(16, rngs=rngs),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_begin_in_float32_with_all_its_bits(kind: str) -> None:
    drawn = LAYERS[kind](nnx.Rngs(0))
    empty = nnx.eval_shape(lambda: LAYERS[kind](None))
    for layer in (drawn, empty):
        assert {variable.get_value().dtype for _, variable in named_variables(layer)} == {jnp.dtype("float32")}
    for name, variable in named_variables(drawn):
        value = np.asarray(variable.get_value())
        if value.ndim > 1 and value.any():
            assert (value != value.astype(jnp.bfloat16)).mean() > 0.9, name


def test_shared_heads_sum_their_gradients_in_float32() -> None:
    """In bfloat16, 256 and 1 are 256."""
    attention = MoTAttention(4, 4, 1, ("image", "text"), image_n_kv_heads=4, rngs=nnx.Rngs(0)).to(jnp.bfloat16)
    values = jnp.asarray([256, 1, 1, 2], jnp.bfloat16)[:, None]

    def loss(x: jax.Array) -> jax.Array:
        return (attention._heads("v", "text", x) * values).sum()

    weight = attention.v_proj["text"].weight
    weight.set_value(jnp.ones_like(weight.get_value()))
    gradient = jax.grad(loss)(jnp.ones((1, 1, 4), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), np.full((1, 1, 4), 260))
