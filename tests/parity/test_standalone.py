"""Layers called by themselves, outside of a model: with caches of their own, in narrow dtypes, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.schema.model import ModelConfig
from tests.parity.backends import Torch, on_both

CONFIG = ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=11, max_seq_len=16, ffn_hidden_dim=12)
EXPERTS = CONFIG.replace(num_experts=3, moe_top_k=2)
MODALITIES = ("image", "text")
X = np.random.default_rng(0).standard_normal((2, 6, 8))
DOCUMENTS = np.array([[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2]])
REAL = np.array([[True] * 6, [False, True, True, True, True, False]])


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def drawn(backend: Torch, module: Any) -> Any:
    """The module with weights under which nothing hides."""
    state, rng = backend.module("model.state"), np.random.default_rng(3)
    shapes = {name: value.shape for name, value in state.get_state(module).items()}
    state.set_state(module, {name: rng.standard_normal(shape) for name, shape in shapes.items()})
    return module


def rope_of(backend: Torch, start: int, stop: int) -> tuple[Any, Any]:
    tables = backend.module("model.position").precompute_rope_frequencies(4, 16)
    cos, sin = (backend.array(backend.numpy(table)[start:stop]) for table in tables)
    return cos, sin


def in_two_calls(backend: Torch, layer: Any, first: tuple[Any, ...], second: tuple[Any, ...], cut: int) -> list[Any]:
    """What a layer that is given a cache puts out for the positions up to ``cut``, and for those after it."""
    cache: Any = backend.module("model.kv_cache").KVCache(2, 8, 1, 4, backend.array(X).dtype)
    outputs = []
    for arguments, places in ((first, slice(0, cut)), (second, slice(cut, None))):
        given = {"doc_ids": backend.array(DOCUMENTS[:, places]), "key_padding_mask": backend.array(REAL[:, places])}
        output = backend.call(layer, *arguments, kv_cache=cache, **given)
        output, cache = (output, cache) if backend.name == "torch" else output
        outputs.append(backend.numpy(output))
    return outputs


@on_both
def test_a_router_by_itself_keeps_what_its_documented_calls_measure(backend: Torch) -> None:
    router = backend.build(backend.module("model.router").SoftmaxTopKRouter, 8, 3, 2)
    x, other = backend.array(X[0]), backend.array(X[1])
    stats = router.run(x).stats
    assert router.expert_counts.tolist() == [0, 0, 0]
    router(x)
    router.run(other)
    assert router.expert_counts.tolist() == stats.expert_counts.tolist()
    np.testing.assert_array_equal(backend.numpy(router.aux_loss), backend.numpy(stats.aux_loss))


@on_both
def test_a_cache_is_told_of_documents_and_padding(backend: Torch) -> None:
    layer = drawn(backend, backend.build(backend.module("model.block").TransformerBlock, EXPERTS, 0))
    x, marks = backend.array(X), {"doc_ids": backend.array(DOCUMENTS), "key_padding_mask": backend.array(REAL)}
    whole = backend.numpy(backend.call(layer, x, *rope_of(backend, 0, 6), **marks))
    calls = ((x[:, :3], *rope_of(backend, 0, 3)), (x[:, 3:], *rope_of(backend, 3, 6)))
    found = np.concatenate(in_two_calls(backend, layer, *calls, 3), axis=1)
    np.testing.assert_allclose(found, whole, rtol=1e-10, atol=1e-12)


@on_both
def test_a_cache_is_told_of_documents_and_padding_of_modalities(backend: Torch) -> None:
    layer = drawn(backend, backend.build(backend.module("model.mot").MoTBlock, EXPERTS, MODALITIES, 0))
    image, text, later = (backend.array(X[:, places]) for places in (slice(0, 2), slice(2, None), slice(3, None)))
    marks = {"doc_ids": backend.array(DOCUMENTS), "key_padding_mask": backend.array(REAL)}
    rope = {"image": rope_of(backend, 0, 2), "text": rope_of(backend, 0, 4)}
    whole = backend.numpy(backend.call(layer, {"image": image, "text": text}, rope, **marks))
    first = {"image": image, "text": text[:, :1]}, {"image": rope["image"], "text": rope_of(backend, 0, 1)}
    found, rest = in_two_calls(backend, layer, first, ({"text": later}, {"text": rope_of(backend, 1, 4)}), 3)
    np.testing.assert_allclose(found["image"], whole["image"], rtol=1e-10, atol=1e-12)
    joined = np.concatenate([found["text"], rest["text"]], axis=1)
    np.testing.assert_allclose(joined, whole["text"], rtol=1e-10, atol=1e-12)


@on_both
def test_counts_are_int32_before_and_after_a_call(backend: Torch) -> None:
    moe, choice = backend.module("model.moe"), backend.module("model.expert_choice")
    layers = [
        backend.build(moe.build_moe, 8, 4, 3, 2),
        backend.build(moe.build_moe, 8, 4, 3, 2, router_type="sigmoid_topk"),
        backend.build(choice.ExpertChoiceMoE, 8, 4, 3, 0.5),
    ]
    for layer in layers:
        assert backend.numpy(layer.expert_counts).dtype == np.int32
        assert backend.numpy(layer.expert_counts).tolist() == [0, 0, 0]
        stats = layer(backend.array(X), return_stats=True)[1]
        for counted in (stats.expert_counts, stats.dropped, layer.expert_counts):
            assert backend.numpy(counted).dtype == np.int32
    router = layers[0].router
    assert [backend.numpy(loss).dtype for loss in (router.aux_loss, router.z_loss)] == [np.float64] * 2
    fresh = backend.build(backend.module("model.router").SoftmaxTopKRouter, 8, 3, 2)
    for getter in ("aux_loss", "z_loss"):
        found = backend.numpy(getattr(fresh, getter))
        assert (found.dtype, found.shape, float(found)) == (np.float64, (), 0.0)


@on_both
@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_narrow_arrays_are_rotated_and_weighed_in_float32(backend: Torch, narrow: str) -> None:
    """Each result is that of the same numbers in float32, rounded once."""
    position, attention = backend.module("model.position"), backend.module("model.attention")
    heads = backend.array(X[:, :, None, :].swapaxes(1, 2), narrow)
    cos, sin = (backend.array(backend.numpy(table), "float32") for table in rope_of(backend, 3, 9))
    rows = backend.build(position.RotaryTables, 4, 16)(backend.array(np.arange(3)), heads.dtype)
    assert [backend.numpy(row).dtype for row in rows] == [np.float32] * 2
    heads = heads[..., :4]
    wide = backend.array(backend.numpy(heads).astype(np.float32))
    turned = backend.numpy(position.apply_rope(heads, cos, sin))
    exact = backend.numpy(position.apply_rope(wide, cos, sin)).astype(turned.dtype)
    np.testing.assert_array_equal(turned.astype(np.float32), exact.astype(np.float32))
    weights = backend.numpy(attention.attention_weights(heads, heads))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, backend.numpy(attention.attention_weights(wide, wide)), rtol=1e-5, atol=1e-7)


@on_both
def test_ids_of_any_integer_type_name_the_same_rows(backend: Torch) -> None:
    embedding = drawn(backend, backend.build(backend.module("model.embedding").TokenEmbedding, 200, 3))
    ids = np.array([[0, 5, 127], [1, 2, 3]])
    rows = backend.numpy(embedding(backend.array(ids)))
    table = backend.numpy(backend.module("model.state").get_state(embedding))["embedding.weight"]
    np.testing.assert_array_equal(rows, table[ids])
    for kind in ("int8", "uint8", "int16", "int32"):
        np.testing.assert_array_equal(backend.numpy(embedding(backend.array(ids.astype(kind)))), rows)


@on_both
def test_pixels_up_to_the_largest_number_are_finite(backend: Torch) -> None:
    """The largest of float32 has no bfloat16 below infinity; beyond float32, a pixel is not finite."""
    noise = backend.module("model.noise").image_noise
    largest = np.full((1, 3, 2, 2), np.finfo(np.float32).max, np.float32)
    assert np.isfinite(backend.numpy(noise(backend.array(largest), 2, 3))).all()
    assert np.isnan(backend.numpy(noise(backend.array(np.full((1, 3, 2, 2), 1e39)), 2, 3))).all()


def message_of(function: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        function(*args, **options)
    return str(caught.value)


@on_both
def test_ids_that_name_nothing_are_shown_with_what_is_allowed(backend: Torch) -> None:
    check = backend.module("model.checks").check_ids
    ids = backend.array(np.array([[0, 23, 5], [-1, 22, -100]]))
    assert message_of(check, "tokens", ids, 23) == "tokens = 23: ids must be in [0, 23); 3 of 6 are not"
    allowed = "labels = 23: ids must be in [0, 23) or -100; 2 of 6 are not"
    assert message_of(check, "labels", ids, 23, -100) == allowed
    check("any", ids)
    check("labels", backend.array(np.array([0, 22, -100])), 23, -100)
    for values in (np.array([True]), np.array([0.5]), np.array([0.5 + 1j])):
        assert "must be an integer type" in message_of(check, "tokens", backend.array(values))


@on_both
def test_experts_that_differ_are_named(backend: Torch) -> None:
    moe, mlp, router = (backend.module(f"model.{name}") for name in ("moe", "mlp", "router"))
    gate = backend.build(router.SoftmaxTopKRouter, 8, 2, 1)
    kinds = [backend.build(mlp.build_mlp, 8, 4, activation) for activation in ("silu", "gelu", "relu")]
    must = "must be layers of one type, all with the same activation"
    assert message_of(moe.MoEMLP, gate, kinds[:2]) == f"experts = StandardMLP, SwiGLUMLP: {must}"
    assert message_of(moe.MoEMLP, gate, kinds[1:]) == f"experts = StandardMLP: {must}"
    assert message_of(moe.MoEMLP, gate, []) == f"experts = none: {must}"


@on_both
def test_a_module_that_does_not_fit_its_table_is_refused_tensor_by_tensor(backend: Torch) -> None:
    layer = backend.build(backend.module("model.adapter").LinearAdapter, 3, 2)
    initialise = backend.module("model.init").init_from_table
    before = backend.numpy(backend.module("model.state").get_state(layer))
    head = "the model doesn't fit its parameter table:\n"
    bias = "proj.bias.shape = (2,): must be in the table"
    table = {shape: {"proj.weight": ParameterSpec(shape, Constant(1.0), (None, None))} for shape in ((2, 3), (3, 2))}
    assert message_of(initialise, layer, table[2, 3], 0) == head + bias
    weight = "proj.weight.shape = (2, 3): must be (3, 2)"
    assert message_of(initialise, layer, table[3, 2], 0) == f"{head}{weight}\n{bias}"
    after = backend.numpy(backend.module("model.state").get_state(layer))
    assert all(np.array_equal(before[name], after[name]) for name in before)


@on_both
def test_a_name_that_is_almost_right_gets_a_hint(backend: Torch) -> None:
    hooks = backend.module("model.hooks")
    layer = backend.build(backend.module("model.block").TransformerBlock, CONFIG, 0)
    names = hooks.activation_names(layer)
    listed = ", ".join(names)
    message = message_of(hooks.ActivationStore, layer, ["mlp_norm", "atention_norm"])
    assert message.startswith("name = 'atention_norm': no such module; did you mean 'attention_norm' or ")
    assert message.endswith(f"? Modules: {listed}")
    assert message_of(hooks.ActivationStore, layer, ["zzz"]) == f"name = 'zzz': no such module Modules: {listed}"
    store = hooks.ActivationStore(layer, (name for name in ("mlp_norm", "mlp")))
    assert list(store.layer_names) == ["mlp_norm", "mlp"]
    assert hooks.ActivationStore(layer).layer_names == names
    assert message_of(store.get, "attention").endswith("Modules: mlp_norm, mlp")


@on_both
def test_what_is_known_of_the_text_joins_what_is_known_of_the_image(backend: Torch) -> None:
    vlm, context = backend.module("model.vlm"), backend.module("model.modality").ModalityContext
    prefix, mask = backend.array(X[:, :2]), backend.array(REAL[:, :3])
    seeds = [backend.array(np.array(seed, np.int32)) for seed in (5, 6)]
    partly = backend.array(np.array([[True, False, True, True, False], [True] * 5]))
    for real, expected in (
        (None, np.concatenate([np.ones((2, 2), bool), REAL[:, :3]], axis=1)),
        (partly, backend.numpy(partly) & np.concatenate([np.ones((2, 2), bool), REAL[:, :3]], axis=1)),
    ):
        joined = vlm.with_text(context(prefix_embeds=prefix, key_padding_mask=real), mask, None)
        np.testing.assert_array_equal(backend.numpy(joined.key_padding_mask), expected)
        assert joined.prefix_embeds is prefix
        assert joined.noise_seed is None
    beside = vlm.with_text(context(image_features=prefix, noise_seed=seeds[0]), mask, None)
    np.testing.assert_array_equal(backend.numpy(beside.key_padding_mask), REAL[:, :3])
    assert beside.noise_seed is seeds[0]
    assert vlm.with_text(beside, None, seeds[1]).noise_seed is seeds[1]
    assert vlm.with_text(beside, None, None).key_padding_mask is beside.key_padding_mask
    assert vlm.with_text(context(image_features=prefix), None, None).key_padding_mask is None
