"""Vision towers, adapters and cross-attention: PyTorch, JAX and the oracle compute the same, with all gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from kempnerforge_jax.model import adapter as jax_adapter
from kempnerforge_jax.model import cross_attention as jax_cross_attention
from kempnerforge_jax.model import noise as jax_noise
from kempnerforge_jax.model import vision as jax_vision
from kempnerforge_jax.model.state import get_state
from kempnerforge_torch.model import adapter as torch_adapter
from kempnerforge_torch.model import cross_attention as torch_cross_attention
from kempnerforge_torch.model import noise as torch_noise
from kempnerforge_torch.model import vision as torch_vision
from shared_config.contract import noise
from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import TowerConfig, adapter_table, tower_table
from shared_config.schema import AdapterConfig, CrossAttentionConfig, ModelConfig, VisionEncoderConfig
from tests.oracle.adapter import adapter as oracle_adapter
from tests.oracle.cross_attention import cross_attention_block
from tests.oracle.vision import vision_tower
from tests.parity.components import Component, assert_parity

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (3, 3, 12, 12)) / 127.5 - 1

SIGLIP = TowerConfig(
    image_size=12,
    patch_size=4,
    dim=18,
    n_layers=2,
    n_heads=3,
    ffn_hidden_dim=26,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-3,
)
CLIP = TowerConfig(
    image_size=12,
    patch_size=4,
    dim=18,
    n_layers=1,
    n_heads=3,
    ffn_hidden_dim=26,
    activation="quick_gelu",
    norm_eps=1e-5,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    final_norm=False,
)
CONFIG = ModelConfig(
    dim=20, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, vocab_size=37, ffn_hidden_dim=26, norm_eps=1e-3
)


def tower_component(tower: TowerConfig) -> Component:
    return Component(
        torch=lambda: torch_vision.VisionTower(tower),
        jax=lambda rngs: jax_vision.VisionTower(tower, rngs=rngs),
        table=tower_table(tower),
        call=lambda module, given: module(given["pixels"]),
        oracle=lambda weights, given: vision_tower(given["pixels"], weights, tower),
        vanishing={
            f"layers.{layer}.attention.k_proj.bias": f"layers.{layer}.attention.v_proj.bias"
            for layer in range(tower.n_layers)
        },
    )


def adapter_component(config: AdapterConfig) -> Component:
    return Component(
        torch=lambda: torch_adapter.build_adapter(config, 18, 20),
        jax=lambda rngs: jax_adapter.build_adapter(config, 18, 20, rngs=rngs),
        table=adapter_table(config, 18, 20),
        call=lambda module, given: module(given["x"]),
        oracle=lambda weights, given: oracle_adapter(given["x"], weights, config),
        vanishing={"k_proj.bias": "v_proj.bias"} if config.type == "attentional_pool" else {},
    )


def cross_attention_component(config: ModelConfig, vlm: CrossAttentionConfig) -> Component:
    heads, kv_heads = vlm.resolved_heads(config.n_heads)
    arguments: tuple[Any, ...] = (
        config.dim,
        heads,
        kv_heads,
        config.computed_ffn_hidden_dim,
        config.norm_type,
        config.activation,
    )
    options: dict[str, Any] = {"head_dim": vlm.resolved_head_dim(config), "norm_eps": config.norm_eps}
    path = "cross_attention_layers.0."
    table = {name.removeprefix(path): spec for name, spec in parameter_table(config, vlm).items() if path in name}

    def oracle(weights: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> np.ndarray:
        return cross_attention_block(given["x"], given["image"], weights, config, vlm, given.get("mask"))[0]

    return Component(
        torch=lambda: torch_cross_attention.CrossAttentionBlock(*arguments, **options),
        jax=lambda rngs: jax_cross_attention.CrossAttentionBlock(*arguments, **options, rngs=rngs),
        table=table,
        call=lambda module, given: module(given["x"], given["image"], given.get("mask")),
        oracle=oracle,
    )


@pytest.mark.parametrize("tower", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_towers(tower: TowerConfig) -> None:
    assert_parity(tower_component(tower), {"pixels": PIXELS})


def test_tower_whose_patches_leave_a_rest() -> None:
    tower = TowerConfig(**{**vars(SIGLIP), "image_size": 14, "n_layers": 0, "activation": "gelu"})
    pixels = RNG.standard_normal((2, 3, 14, 14))
    component = tower_component(tower)
    assert tower.num_tokens == 9
    module = component.torch()
    assert module(torch.from_numpy(pixels).float()).shape == (2, 9, 18)
    assert_parity(component, {"pixels": pixels})


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(hidden_dim=26),
        AdapterConfig(activation="silu"),
        AdapterConfig(type="linear"),
        AdapterConfig(type="avgpool", pool_window=2),
        AdapterConfig(type="avgpool", pool_window=5),
        AdapterConfig(type="attentional_pool", pool_window=3, pool_heads=3),
    ],
    ids=["mlp", "mlp_silu", "linear", "avgpool_ragged", "avgpool_whole", "attentional"],
)
def test_adapters(config: AdapterConfig) -> None:
    x = RNG.standard_normal((2, 9, 18)) + 0.3
    component = adapter_component(config)
    assert_parity(component, {"x": x})
    expected = (2, config.output_num_tokens(9), 20)
    built = component.torch()
    assert built(torch.from_numpy(x).float()).shape == expected
    assert built.output_num_tokens(9) == component.jax(rngs=None).output_num_tokens(9) == expected[1]


@pytest.mark.parametrize("kind", ["mlp_2layer", "linear", "avgpool", "attentional_pool"])
def test_adapters_of_jax_are_drawn_from_their_keys(kind: str) -> None:
    config = AdapterConfig(type=kind, pool_heads=1)
    first, again, other = (jax_adapter.build_adapter(config, 4, 6, rngs=nnx.Rngs(seed)) for seed in (1, 1, 2))
    for name, value in get_state(first).items():
        np.testing.assert_array_equal(value, get_state(again)[name])
        assert name.endswith("bias") or np.mean(value != get_state(other)[name]) > 0.9, name


@pytest.mark.parametrize("kind", ["mlp_2layer", "linear", "avgpool", "attentional_pool"])
def test_counts_of_tokens_agree_with_the_forward_always(kind: str) -> None:
    """For every grid and window: config and both backends say what comes out, or all refuse."""
    for window in range(1, 6):
        config = AdapterConfig(type=kind, pool_window=window, pool_heads=1)
        in_torch = torch_adapter.build_adapter(config, 2, 3)
        in_jax = jax_adapter.build_adapter(config, 2, 3, rngs=None)
        for tokens in (*(side * side for side in range(1, 8)), 6):
            x = torch.zeros(1, tokens, 2)
            forwards = (
                lambda x=x, adapter=in_torch: adapter(x),
                lambda x=x, adapter=in_jax: jax.eval_shape(adapter, jnp.zeros(x.shape)),
            )
            counts = [adapter.output_num_tokens for adapter in (config, in_torch, in_jax)]
            try:
                expected = config.output_num_tokens(tokens)
            except ValueError:
                for refused in (*(functools.partial(count, tokens) for count in counts), *forwards):
                    with pytest.raises(ValueError, match=r"num_input_tokens|window"):
                        refused()
                continue
            assert [count(tokens) for count in counts] == [expected] * 3
            assert [forward().shape for forward in forwards] == [(1, expected, 3)] * 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("config", "vlm"),
    [
        (CONFIG, CrossAttentionConfig(cross_attention_every_n_layers=2, cross_attention_n_kv_heads=2)),
        (
            CONFIG.replace(norm_type="layernorm", activation="gelu"),
            CrossAttentionConfig(cross_attention_every_n_layers=2, cross_attention_n_heads=5),
        ),
    ],
    ids=["grouped", "own_heads"],
)
def test_cross_attention(config: ModelConfig, vlm: CrossAttentionConfig, masked: bool) -> None:
    inputs = {"x": RNG.standard_normal((3, 8, 20)), "image": RNG.standard_normal((3, 5, 20))}
    if masked:
        inputs["mask"] = np.array([[True] * 5, [False, True, True, False, True], [False] * 5])
    assert_parity(cross_attention_component(config, vlm), inputs)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_image_noise_has_the_same_bits_everywhere(dtype: str) -> None:
    truth = noise.image_noise(PIXELS, 5, 7)
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    pixels = PIXELS.astype(numpy_dtype)
    pixels[2, 1, 0, 0] = np.nan
    expected = np.where(np.arange(3)[:, None, None] == 2, np.nan, truth)
    found = torch_noise.image_noise(torch.from_numpy(PIXELS).to(getattr(torch, dtype)), 5, 7)
    assert found.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(found.double().numpy(), truth)
    with jax.enable_x64(dtype == "float64"):
        traced = jax.jit(lambda p: jax_noise.image_noise(p, 5, 7))(jnp.asarray(pixels))
        assert traced.dtype == numpy_dtype
        np.testing.assert_array_equal(np.asarray(traced).astype(np.float64), expected)


@pytest.mark.parametrize("seed", [0, -7, 2**31 - 1])
def test_routing_noise_has_the_same_bits_everywhere(seed: int) -> None:
    expected = noise.routing_bits(seed, 2, 1, 9, 3)
    np.testing.assert_array_equal(torch_noise.routing_bits(torch.tensor(seed), 2, 1, 9, 3).numpy(), expected)
    traced = jax.jit(lambda s, layer: jax_noise.routing_bits(s, layer, 1, 9, 3))(jnp.int32(seed), jnp.int32(2))
    np.testing.assert_array_equal(np.asarray(traced), expected)
    gumbel = noise.gumbel_noise(seed, 2, 1, 9, 3)
    found = torch_noise.gumbel_noise(torch.tensor(seed), 2, 1, 9, 3, torch.float64).numpy()
    np.testing.assert_allclose(found, gumbel, rtol=1e-14)
    with jax.enable_x64(True):
        traced = jax_noise.gumbel_noise(jnp.int32(seed), 2, 1, 9, 3, jnp.float64)
        np.testing.assert_allclose(np.asarray(traced), gumbel, rtol=1e-14)


def test_random_encoders_agree_and_name_what_they_refuse() -> None:
    config = VisionEncoderConfig(feature_dim=6, num_tokens=4, image_size=12)
    torch_encoder = torch_vision.build_vision_encoder(config)
    jax_encoder = jax_vision.build_vision_encoder(config, rngs=None)
    found = torch_encoder(torch.from_numpy(PIXELS).float()).numpy()
    assert found.shape == (3, 4, 6)
    np.testing.assert_array_equal(found, np.asarray(jax_encoder(jnp.asarray(PIXELS, jnp.float32))))
    for bad in (PIXELS[0], PIXELS[:, :2], PIXELS[:, :, :8]):
        with pytest.raises(ValueError, match=r"pixel_values\.shape"):
            torch_encoder(torch.from_numpy(bad))
        with pytest.raises(ValueError, match=r"pixel_values\.shape"):
            jax_encoder(jnp.asarray(bad))
    with pytest.raises(ValueError, match=r"pixel_values\.dtype"):
        torch_encoder(torch.zeros(1, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pixel_values\.dtype"):
        jax_encoder(jnp.zeros((1, 3, 12, 12), jnp.uint8))


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (13, 9), (4, 31)])
def test_patches_of_images_that_are_no_squares(height: int, width: int) -> None:
    pixels = np.random.default_rng(1).standard_normal((2, 3, height, width)).astype(np.float32)
    truth = np.stack(
        [
            pixels[:, :, top : top + 4, left : left + 4].reshape(2, -1)
            for top in range(0, height - 3, 4)
            for left in range(0, width - 3, 4)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(torch_vision.patches(torch.from_numpy(pixels), 4).numpy(), truth)
    np.testing.assert_array_equal(jax_vision.patches(jnp.asarray(pixels), 4), truth)
