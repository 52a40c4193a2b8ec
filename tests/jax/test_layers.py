"""Layers of JAX as they begin, sums of their gradients, and the numbers that a compiled step is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kempnerforge_jax.model.adapter import AttentionalPoolAdapter, LinearAdapter, build_adapter
from kempnerforge_jax.model.build import build_model
from kempnerforge_jax.model.cross_attention import CrossAttentionBlock
from kempnerforge_jax.model.embedding import TokenEmbedding
from kempnerforge_jax.model.mlp import build_mlp
from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.moe import build_moe
from kempnerforge_jax.model.mot import MoTAttention
from kempnerforge_jax.model.norm import LayerNorm
from kempnerforge_jax.model.vision import VisionTower, build_vision_encoder
from kempnerforge_jax.registry import registry
from kempnerforge_jax.training import train
from shared_config.contract.vision import vit_tower
from shared_config.registry import temporary
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.vision import VisionEncoderConfig
from tests.jobs import tiny_job

VIT = {"type": "vit", "feature_dim": 16, "n_layers": 1, "n_heads": 2, "image_size": 4, "patch_size": 2}
TOWER = vit_tower(VisionEncoderConfig(**VIT))
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
BUILT = LAYERS | {
    "built adapter": lambda rngs: build_adapter(AdapterConfig(), 16, 16, rngs=rngs),
    "built encoder": lambda rngs: build_vision_encoder(VisionEncoderConfig(**VIT), rngs=rngs),
    "built model": lambda rngs: build_model(tiny_job(), rngs=rngs),
    "built vision-language model": lambda rngs: build_model(
        tiny_job(
            vlm={"arch": "cross_attention", "cross_attention_every_n_layers": 1, "max_text_len": 8}, vision_encoder=VIT
        ),
        rngs=rngs,
    ),
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


def built_mlp(activation: str) -> Any:
    return lambda rngs: build_mlp(16, 16, activation, rngs=rngs)


def squared(rngs: nnx.Rngs) -> nnx.Module:
    """A layer with an activation that was registered alone."""
    with temporary():
        registry.register("activation", "test_squared")(jnp.square)
        return build_mlp(16, 16, "test_squared", rngs=rngs)


BUILT |= {f"built MLP, {activation}": built_mlp(activation) for activation in ("silu", "geglu_tanh", "gelu")}
BUILT |= {"built MLP of one's own": squared}


@pytest.mark.parametrize("kind", BUILT)
def test_what_is_drawn_is_what_the_given_generator_draws(kind: str) -> None:
    """The same again of the same key; of another key, other values wherever they are drawn."""
    first, again, other = (
        {name: np.asarray(variable.get_value()) for name, variable in named_variables(BUILT[kind](nnx.Rngs(seed)))}
        for seed in (0, 0, 1)
    )
    assert any(np.unique(value).size > 1 for value in first.values()) or kind == "norm"
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        is_drawn = np.unique(value).size > 1 and "rope." not in name
        assert is_drawn == (value != other[name]).any(), name


def test_shared_heads_sum_their_gradients_in_float32() -> None:
    """In bfloat16, 256 and 1 are 256."""
    attention = MoTAttention(4, 4, 1, ("image", "text"), image_n_kv_heads=4, rngs=nnx.Rngs(0)).to(jnp.bfloat16)
    values = jnp.asarray([256, 1, 1, 2], jnp.bfloat16)[:, None]

    def loss(x: jax.Array) -> jax.Array:
        return (attention._heads("v", "text", x) * values).sum()

    weight = attention.v_proj["text"].weight
    assert weight is not None
    weight.set_value(jnp.ones_like(weight.get_value()))
    gradient = jax.grad(loss)(jnp.ones((1, 1, 4), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), np.full((1, 1, 4), 260))


def test_a_step_in_bfloat16_is_told_its_numbers_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, 257 labels would be 256, and a learning rate would have three digits."""
    job = tiny_job(
        train={"mixed_precision": "bf16", "max_steps": 300}, optimizer={"lr": 0.1}, scheduler={"warmup_steps": 0}
    )
    trainer = train.Trainer(job)
    told: list[tuple[Any, ...]] = []

    def step(*arguments: Any) -> tuple[Any, ...]:
        count, rates, progress = arguments[4:]
        told.append((count, *rates, progress))
        return *arguments[:3], {}

    monkeypatch.setattr(train, "compiled_step", lambda *_: step)
    batch = {"tokens": np.zeros((1, 300), np.int32), "labels": np.where(np.arange(300) < 257, 1, -100)[None]}
    rates = [trainer.rates(place) for place in range(3)]
    found = [trainer.step([batch]) for _ in rates]
    assert [metrics["tokens"] for metrics in found] == [257] * 3
    assert [metrics["lr"] for metrics in found] == [rate.lr for rate in rates]
    expected = np.array([[257, *rate, place / 300] for place, rate in enumerate(rates)], np.float32)
    np.testing.assert_array_equal(told, expected)
    assert {number.dtype for numbers in told for number in numbers} == {np.dtype(np.float32)}
    nothing = {**batch, "labels": np.full((1, 300), -100)}
    assert trainer.step([nothing])["tokens"] == 0
    assert told[-1][0] == 1, "what a sum over no labels is divided by"
