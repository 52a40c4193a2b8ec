"""Calls as the documentation of the model package has them, standing alone, in both backends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from kempnerforge_torch.model import moma as torch_moma
from shared_config.contract.noise import image_noise
from shared_config.contract.routing import RouterId, by_router, map_routers, router_ids
from shared_config.interchange.activations import read_activations
from shared_config.registry import temporary
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.base import section
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import MoMaConfig, VLMConfig
from tests.parity.backends import BACKENDS, on_both

RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((2, 3, 4, 4))
FEATURES = RNG.standard_normal((2, 16, 12))
X = RNG.standard_normal((2, 6, 16))
CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=23, max_seq_len=32, ffn_hidden_dim=24)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Encoders and adapters


@on_both
def test_a_random_encoder_is_told_its_sizes_and_a_seed(backend: Any) -> None:
    builder = backend.module("model.vision").RandomVisionEncoder
    default, encoder = (backend.build(builder, **sizes) for sizes in ({}, {"num_tokens": 5, "feature_dim": 7}))
    assert (default.num_tokens, default.feature_dim) == (16, 768)
    pixel_values = backend.array(PIXELS)
    found = backend.numpy(encoder(pixel_values=pixel_values))
    np.testing.assert_array_equal(found, image_noise(PIXELS, 5, 7))
    other = backend.numpy(backend.build(builder, num_tokens=5, feature_dim=7, seed=3)(pixel_values))
    np.testing.assert_array_equal(other, image_noise(PIXELS, 5, 7, seed=3))
    assert np.mean(found != other) > 0.9


@on_both
@pytest.mark.parametrize("kind", ["AvgPoolAdapter", "AttentionalPoolAdapter"])
def test_a_window_may_be_given_with_a_call(backend: Any, kind: str) -> None:
    builder = getattr(backend.module("model.adapter"), kind)
    heads = {"pool_heads": 3} if kind == "AttentionalPoolAdapter" else {}
    weights = backend.module("model.state").get_state(backend.build(builder, 12, 8, **heads))
    small, large = (backend.build(builder, in_dim=12, out_dim=8, pool_window=w, **heads) for w in (2, 4))
    for adapter in (small, large):
        backend.module("model.state").set_state(adapter, {name: _varied(w) for name, w in weights.items()})
    x = backend.array(FEATURES)
    assert [a.output_num_tokens(num_input_tokens=16) for a in (small, large)] == [4, 1]
    found, wide, none, truth = backend.call(
        lambda x: (small(x), small(x, pool_window=4), small(x, pool_window=None), large(x)), x
    )
    assert found.shape == (2, 4, 8)
    np.testing.assert_allclose(backend.numpy(wide), backend.numpy(truth), rtol=1e-12)
    np.testing.assert_array_equal(backend.numpy(none), backend.numpy(found))


@on_both
@pytest.mark.parametrize("kind", ["MLP2LayerAdapter", "LinearAdapter", "AvgPoolAdapter", "AttentionalPoolAdapter"])
def test_adapters_draw_their_weights_anew(backend: Any, kind: str) -> None:
    """As they start: weights normal(0, 1 / sqrt(inputs)), biases 0."""
    builder, state = getattr(backend.module("model.adapter"), kind), backend.module("model.state")
    rngs = _rngs(backend)
    adapter = builder(in_dim=256, out_dim=128, **rngs)
    start = {name: np.array(value) for name, value in backend.numpy(state.get_state(adapter)).items()}
    state.set_state(adapter, {name: np.full_like(value, 7) for name, value in start.items()})
    adapter.reset_parameters(**rngs)
    again = backend.numpy(state.get_state(adapter))
    for values in (start, again):
        for name, value in values.items():
            if name.endswith("bias"):
                assert (value == 0).all(), name
            else:
                assert value.std() == pytest.approx(value.shape[1] ** -0.5, rel=0.05), name
                assert abs(value.mean()) < 0.01, name
    assert all((again[name] != start[name]).any() for name in start if name.endswith("weight"))


def _varied(value: Any) -> np.ndarray:
    return np.sin(np.arange(np.prod(value.shape))).reshape(value.shape)


def _rngs(backend: Any) -> dict[str, Any]:
    return {} if backend.name == "torch" else {"rngs": nnx.Rngs(0)}


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a transformer


@on_both
def test_a_plain_transformer_has_empty_places_for_the_parts_of_others(backend: Any) -> None:
    model = backend.build(backend.module("model.transformer").Transformer, CONFIG)
    assert len(model.cross_attention_layers) == len(model.mot_norms) == 0
    assert not any("cross" in name or "mot" in name for name in backend.module("model.state").get_state(model))
    attention = backend.build(backend.module("model.cross_attention").CrossAttention, 16, 4, 2, head_dim=8)
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (4, 2, 8)


def rope_of(backend: Any, length: int) -> tuple[Any, Any]:
    """cos and sin of positions 0 ... length - 1 for heads of 4."""
    tables = backend.module("model.position").precompute_rope_frequencies(4, length)
    return tuple(backend.array(backend.numpy(table), "float64") for table in tables)


def drawn(backend: Any, module: Any, *, keep: str = "nothing", seed: int = 3) -> Any:
    """The module with weights under which nothing hides, but for those whose names contain ``keep``."""
    state = backend.module("model.state")
    own = {name: np.array(value) for name, value in backend.numpy(state.get_state(module)).items()}
    rng = np.random.default_rng(seed)
    new = {name: rng.standard_normal(value.shape) / value.shape[-1] ** 0.5 for name, value in own.items()}
    state.set_state(module, {name: own[name] if keep in name else new[name] for name in own})
    return module


def moved(backend: Any, x: np.ndarray, place: int) -> Any:
    other = x.copy()
    other[:, place] += 1.0
    return backend.array(other)


@on_both
@pytest.mark.parametrize("experts", [0, 3])
def test_a_block_gives_a_tensor_and_run_its_stats_too(backend: Any, experts: int) -> None:
    config = CONFIG.replace(num_experts=experts)
    block = drawn(backend, backend.build(backend.module("model.transformer").TransformerBlock, config, layer_idx=0))
    rope_cos, rope_sin = rope_of(backend, 6)
    x, doc_ids = backend.array(X), backend.array(np.array([[0, 0, 0, 1, 1, 1]] * 2))
    out = backend.call(block, x, rope_cos, rope_sin, doc_ids=doc_ids)
    assert out.shape == X.shape
    output = backend.call(block.run, x, rope_cos, rope_sin, doc_ids=doc_ids)
    np.testing.assert_array_equal(backend.numpy(output.x), backend.numpy(out))
    assert (output.stats is None) == (experts == 0)
    assert experts == 0 or backend.numpy(output.stats.expert_counts).sum() == 2 * X.shape[0] * X.shape[1]
    other = backend.call(block, moved(backend, X, 2), rope_cos, rope_sin, doc_ids=doc_ids)
    changed = backend.numpy(other) != backend.numpy(out)
    np.testing.assert_array_equal(changed.any(axis=(0, 2)), [False, False, True, False, False, False])
    cache = backend.module("model.attention").KVCache(2, 8, 2, 4, out.dtype, **_place(backend))

    def in_two(x: Any, rope_cos: Any, rope_sin: Any, cache: Any) -> Any:
        first = block(x[:, :4], rope_cos[:4], rope_sin[:4], kv_cache=cache)
        first, cache = (first, cache) if backend.name == "torch" else first
        rest = block(x[:, 4:], rope_cos[4:], rope_sin[4:], kv_cache=cache)
        return first, rest if backend.name == "torch" else rest[0], block(x, rope_cos, rope_sin)

    first, rest, truth = map(backend.numpy, backend.call(in_two, x, rope_cos, rope_sin, cache))
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), truth, rtol=1e-9, atol=1e-12)


def _place(backend: Any) -> dict[str, Any]:
    return {"device": "cpu"} if backend.name == "torch" else {}


# ----------------------------------------------------------------------------------------------------------------------
# Streams of modalities


@on_both
def test_streams_of_modalities_attend_as_one_sequence(backend: Any) -> None:
    """Weights of one attention for both modalities make the plain one of the joined sequence."""
    joint = drawn(backend, backend.build(backend.module("model.attention").Attention, 16, 4, 2, qk_norm=True))
    weights = backend.numpy(backend.module("model.state").get_state(joint))
    attention = backend.build(backend.module("model.mot").MoTAttention, 16, 4, 2, ("image", "text"), qk_norm=True)
    copies = {
        name.replace(".weight", f".{modality}.weight"): value
        for name, value in weights.items()
        for modality in ("image", "text")
    }
    backend.module("model.state").set_state(attention, copies)
    streams = {"text": backend.array(X[:, 2:]), "image": backend.array(X[:, :2])}
    tables = rope_of(backend, 6)
    rope = {"image": tuple(rows[:2] for rows in tables), "text": tuple(rows[2:] for rows in tables)}
    real = backend.array(np.array([[True] * 6, [False, True, True, True, False, True]]))
    for mask in (None, real):
        out = backend.call(attention, streams, rope, key_padding_mask=mask)
        assert {name: part.shape for name, part in out.items()} == {"image": (2, 2, 16), "text": (2, 4, 16)}
        truth = backend.numpy(backend.call(joint, backend.array(X), *tables, key_padding_mask=mask))
        found = np.concatenate([backend.numpy(out[name]) for name in ("image", "text")], axis=1)
        np.testing.assert_allclose(found, truth, rtol=1e-10, atol=1e-13)
    alone = backend.call(attention, {"text": streams["text"]}, rope)
    truth = backend.call(joint, streams["text"], *rope["text"])
    np.testing.assert_allclose(backend.numpy(alone["text"]), backend.numpy(truth), rtol=1e-10, atol=1e-13)
    later = {**streams, "text": moved(backend, X[:, 2:], 3)}
    for is_causal in (True, False):
        before, after = (backend.call(attention, given, rope, is_causal=is_causal) for given in (streams, later))
        same = np.array_equal(backend.numpy(before["image"]), backend.numpy(after["image"]))
        assert same == is_causal
    hidden = backend.array(np.arange(6)[None] < np.array([[5], [5]]))
    before, after = (backend.call(attention, given, rope, False, hidden) for given in (streams, later))
    np.testing.assert_array_equal(backend.numpy(before["image"]), backend.numpy(after["image"]))
    for wrong in ({"sound": streams["text"]}, {}, streams["text"]):
        with pytest.raises(ValueError, match="streams"):
            attention(wrong, rope)


@on_both
def test_a_block_of_streams_starts_as_the_identity(backend: Any) -> None:
    streams = {"image": backend.array(X[:, :2]), "text": backend.array(X[:, 2:])}
    rope = {"image": rope_of(backend, 2), "text": rope_of(backend, 4)}
    for layer_config in (CONFIG, CONFIG.replace(num_experts=2)):
        block = backend.module("model.mot").MoTBlock(layer_config, ("image", "text"), 0, **_rngs(backend))
        block.to(**{"dtype": torch.float64} if backend.name == "torch" else {"dtype": "float64"})
        if not layer_config.is_moe:
            for name, part in backend.call(block, streams, rope).items():
                np.testing.assert_array_equal(backend.numpy(part), backend.numpy(streams[name]))
        drawn(backend, block)
        out, output = (backend.call(call, streams, rope) for call in (block, block.run))
        for name, part in streams.items():
            assert out[name].shape == part.shape
            assert np.abs(backend.numpy(out[name]) - backend.numpy(part)).max() > 0.1
            np.testing.assert_array_equal(backend.numpy(output.x[name]), backend.numpy(out[name]))
        assert (output.stats is None) == (not layer_config.is_moe)
        if layer_config.is_moe:
            counts = {name: backend.numpy(stats.expert_counts).sum() for name, stats in output.stats.items()}
            assert counts == {"image": 2 * 2 * 2, "text": 2 * 4 * 2}
        later = backend.call(block, {**streams, "text": moved(backend, X[:, 2:], 0)}, rope)
        np.testing.assert_array_equal(backend.numpy(later["image"]), backend.numpy(out["image"]))


# ----------------------------------------------------------------------------------------------------------------------
# Experts that choose


@on_both
@pytest.mark.parametrize(("activation", "counts"), [("silu", [5, 0, 7]), ("relu", [2, 3, 7])])
def test_rows_that_are_sorted_by_expert_are_multiplied_in_groups(
    backend: Any, activation: str, counts: list[int]
) -> None:
    moe, mlp = backend.module("model.moe"), backend.module("model.mlp")
    experts = [drawn(backend, backend.build(mlp.build_mlp, 16, 24, activation), seed=i) for i in range(3)]
    rows, ends = backend.array(X.reshape(-1, 16)), [0, *np.cumsum(counts)]
    parts = backend.run(lambda rows: [expert(rows) for expert in experts], X.reshape(-1, 16))
    truth = np.concatenate([part[ends[place] : ends[place + 1]] for place, part in enumerate(parts)])
    assert (truth != 0).any(axis=1).all()
    found = backend.call(
        lambda rows: moe.grouped_expert_forward(x_sorted=rows, tokens_per_expert=counts, experts=experts), rows
    )
    np.testing.assert_allclose(backend.numpy(found), truth, rtol=1e-10, atol=1e-13)
    held = [backend.numpy(backend.module("model.state").get_state(expert)) for expert in experts]
    packed = {name: backend.array(np.stack([one[name].T for one in held])) for name in held[0]}
    up_w, down_w, gate_w = (packed.get(f"{name}_proj.weight") for name in ("up", "down", "gate"))
    act = mlp.ACTIVATIONS[activation]
    found = backend.call(moe.grouped_expert_forward_packed, rows, counts, up_w, down_w, gate_w, act)
    np.testing.assert_allclose(backend.numpy(found), truth, rtol=1e-10, atol=1e-13)
    for wrong in ([5, 7], [5, 0, 6], [5, -1, 8]):
        with pytest.raises(ValueError, match="tokens_per_expert"):
            moe.grouped_expert_forward(rows, wrong, experts)


@on_both
def test_experts_choose_their_best_tokens(backend: Any) -> None:
    moma, tokens = backend.module("model.moma"), X.reshape(-1, 16)
    router = drawn(backend, backend.build(moma.ExpertChoiceSigmoidRouter, 16, 3, capacity_factor=0.25))
    router = router.eval() if backend.name == "torch" else router
    x = backend.array(tokens)
    weights, chosen = (backend.numpy(part) for part in backend.call(router, x=x))
    logits = tokens @ backend.numpy(backend.module("model.state").get_state(router))["gate.weight"].T
    best = np.argsort(-logits, axis=0, kind="stable")[:3]
    np.testing.assert_array_equal(chosen, best)
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(-np.take_along_axis(logits, best, axis=0))), rtol=1e-12)

    layer = backend.build(moma.ExpertChoiceMoE, 16, 24, num_experts=3, capacity_factor=0.25, gumbel_noise=False)
    drawn(backend, layer)
    assert backend.numpy(layer.expert_counts).tolist() == [0, 0, 0]
    out = backend.numpy(layer(x))
    assert backend.numpy(layer.expert_counts).tolist() == [3, 3, 3]
    np.testing.assert_array_equal(backend.numpy(layer(backend.array(X))).reshape(-1, 16), out)
    weights, chosen = (backend.numpy(part) for part in backend.call(layer.router, x))
    taken = np.isin(np.arange(len(tokens)), chosen)
    np.testing.assert_array_equal((out != 0).any(axis=1), taken)
    expert = next(iter(layer.experts)) if backend.name == "torch" else layer.experts["0"]
    given = backend.numpy(backend.call(expert, x))
    only = [t for t in chosen[:, 0] if (chosen == t).sum() == 1]
    for token in only:
        place = int(np.flatnonzero(chosen[:, 0] == token)[0])
        np.testing.assert_allclose(out[token], weights[place, 0] * given[token], rtol=1e-10)
    assert only


@on_both
def test_the_router_of_each_modality_is_balanced_by_its_own_counts(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a layer it stands; those built in have no bias."""
    moved: dict[int, Any] = {}
    router = backend.module("model.expert_choice").ExpertChoiceSigmoidRouter
    update = lambda self, counts: moved.update({self.num_experts: counts})  # noqa: E731
    monkeypatch.setattr(router, "update_bias", update, raising=False)
    vlm = MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3})
    model = backend.build(backend.module("model.transformer").Transformer, CONFIG, vlm_config=vlm)
    model.update_moe_bias({1: {"image": "counts of 2", "text": "counts of 3"}})
    assert moved == {2: "counts of 2", 3: "counts of 3"}
    paths = ("layers.1.mlp.router", "layers.1.mlp.image.router", "transformer.layers.1.mlp.experts.image.router")
    assert [router_ids(path) for path in paths] == [[(1, "")], [(1, "image")], [(1, "image")]]
    assert [router_ids(path) for path in ("layers.1.mlp", "layers.1.mlp.router.gate", "router")] == [[], [], []]
    assert [str(router) for router in (RouterId(1), RouterId(1, "image"))] == ["1", "1.image"]
    assert RouterId(1, "image").named("z_loss", "transformer.") == "transformer.layers.1.image.z_loss"
    nested = {0: 5, 2: {"image": 6, "text": 7}}
    assert map_routers(lambda router, value: by_router(nested)[router] - value, nested) == {
        0: 0,
        2: {"image": 0, "text": 0},
    }
    assert list(by_router(nested)) == [(0, ""), (2, "image"), (2, "text")]


@on_both
def test_experts_of_a_modality_see_its_tokens_alone(backend: Any) -> None:
    moma, ids = backend.module("model.moma"), np.array([[0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1]])
    arguments = (CONFIG, ("image", "text"), {"image": 2, "text": 3}, {"image": 0.5, "text": 1 / 3})
    layer = drawn(backend, backend.build(moma.MoMaFFN, *arguments, gumbel_noise=False))
    modality_ids, real = backend.array(ids), np.array([[True] * 5 + [False], [True] * 6])
    out = backend.numpy(backend.call(layer, backend.array(X), modality_ids))
    for index, name in enumerate(("image", "text")):
        alone = backend.numpy(backend.call(layer._experts(name), backend.array(X[ids == index])))
        np.testing.assert_allclose(out[ids == index], alone, rtol=1e-10, atol=1e-13)
    masked = backend.numpy(backend.call(layer, backend.array(X), modality_ids, key_padding_mask=backend.array(real)))
    assert (masked[~real] == 0).all()
    alone = backend.numpy(backend.call(layer._experts("text"), backend.array(X[(ids == 1) & real])))
    np.testing.assert_allclose(masked[(ids == 1) & real], alone, rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="modality_ids"):
        layer(backend.array(X))

    block = drawn(backend, backend.build(moma.MoMaBlock, *arguments, gumbel_noise=False, layer_idx=1))
    rope = rope_of(backend, 6)
    one_document = backend.array(np.zeros((2, 6), np.int64))
    out = backend.call(block, backend.array(X), *rope, modality_ids, doc_ids=one_document)
    output = backend.call(block.run, backend.array(X), *rope, modality_ids=modality_ids)
    np.testing.assert_allclose(backend.numpy(output.x), backend.numpy(out), rtol=1e-12)
    counts = {name: backend.numpy(stats.expert_counts).tolist() for name, stats in output.stats.items()}
    assert counts == {"image": [2, 2], "text": [3, 3, 3]}
    documents = backend.array(np.array([[0, 0, 1, 1, 1, 2]] * 2))
    mask = backend.module("model.mask").Mask(causal=True, query_doc_ids=documents, key_doc_ids=documents)
    apart = backend.numpy(backend.call(block, backend.array(X), *rope, modality_ids, doc_ids=documents))
    masked = backend.numpy(backend.call(block, backend.array(X), *rope, modality_ids, mask=mask))
    np.testing.assert_allclose(apart, masked, rtol=1e-10, atol=1e-13)
    assert np.abs(apart - backend.numpy(out)).max() > 1e-3


@on_both
def test_padding_among_the_members_of_a_layer_takes_no_expert(backend: Any) -> None:
    layer = drawn(backend, backend.build(backend.module("model.moe").build_moe, 16, 24, 3, 2))
    real, members = RNG.random((2, 2, 6)) < 0.6
    routed = real & members
    assert 0 < routed.sum() < members.sum() < 12
    output = backend.call(layer.run, backend.array(X), backend.array(real), members=backend.array(members))
    alone = backend.call(layer.run, backend.array(X[routed][None]))
    np.testing.assert_allclose(backend.numpy(output.x)[routed], backend.numpy(alone.x)[0], rtol=1e-10)
    assert (backend.numpy(output.x)[~routed] == 0).all()
    counts, expected = (backend.numpy(each.stats.expert_counts) for each in (output, alone))
    np.testing.assert_array_equal(counts, expected)


def test_torch_draws_noise_in_training_alone() -> None:
    router = BACKENDS[0].build(torch_moma.ExpertChoiceSigmoidRouter, 16, 3, 0.5)
    plain = BACKENDS[0].build(torch_moma.ExpertChoiceSigmoidRouter, 16, 3, 0.5, gumbel_noise=False)
    x = torch.from_numpy(X.reshape(-1, 16))
    assert all(torch.equal(plain(x)[1], plain(x)[1]) for _ in range(3))
    assert any(not torch.equal(router(x)[1], router(x)[1]) for _ in range(3))
    assert all(torch.equal(router.eval()(x)[1], router(x)[1]) for _ in range(3))


# ----------------------------------------------------------------------------------------------------------------------
# Strategies

CLIPS = RNG.uniform(-1, 1, (2, 3, 3, 4, 4))
TEXT = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
STRATEGIES = {
    "joint_decoder": "JointDecoderStrategy",
    "cross_attention": "CrossAttentionStrategy",
    "mot": "MoTStrategy",
    "moma": "MoMaStrategy",
}


def wrapper_of(backend: Any, arch: str, **fields: Any) -> Any:
    return backend.build(
        backend.module("model.vlm").build_vlm_wrapper,
        CONFIG,
        VisionEncoderConfig(num_tokens=4, feature_dim=6),
        AdapterConfig(type="avgpool"),
        VLMConfig.for_arch(arch, max_text_len=8, **fields),
        frames_per_clip=3,
    )


@on_both
@pytest.mark.parametrize("arch", STRATEGIES)
def test_strategies_prepare_pixels_for_the_transformer(backend: Any, arch: str) -> None:
    every = {"cross_attention_every_n_layers": 2} if arch == "cross_attention" else {}
    wrapper, vlm = wrapper_of(backend, arch, **every), backend.module("model.vlm")
    strategy = getattr(vlm, STRATEGIES[arch])()
    assert type(wrapper.strategy) is type(strategy) is type(vlm.build_modality_strategy(wrapper.transformer.vlm_config))
    assert isinstance(strategy, vlm.ModalityStrategy)
    in_stream = 0 if arch == "cross_attention" else 3
    assert strategy.num_image_tokens(wrapper) == wrapper.num_image_tokens == in_stream
    assert wrapper.transformer.num_image_tokens == in_stream
    pixel_values, input_ids = backend.array(CLIPS), backend.array(TEXT)
    frame_mask = backend.array(np.array([[True, False, True], [True, True, True]]))
    image = backend.call(
        lambda pixel_values, input_ids, frame_mask: strategy.prepare(
            wrapper=wrapper, pixel_values=pixel_values, input_ids=input_ids, frame_mask=frame_mask
        ),
        pixel_values,
        input_ids,
        frame_mask,
    )
    embeds, mask = (backend.numpy(part) for part in backend.call(wrapper.encode_images, pixel_values, frame_mask))
    held = image.image_features if arch == "cross_attention" else image.prefix_embeds
    np.testing.assert_array_equal(backend.numpy(held), embeds)
    np.testing.assert_array_equal(mask, [[True, False, True], [True] * 3])
    np.testing.assert_array_equal((embeds == 0).all(axis=-1), ~mask)
    if arch == "cross_attention":
        np.testing.assert_array_equal(backend.numpy(image.image_mask), mask)
        assert image.key_padding_mask is None
    else:
        real = np.concatenate([mask, np.ones((2, 4), bool)], axis=1)
        np.testing.assert_array_equal(backend.numpy(image.key_padding_mask), real)
        assert image.output_slice == slice(3, None)
    labels = backend.array(TEXT)
    wrapper = wrapper.eval() if backend.name == "torch" else wrapper

    def called(pixel_values: Any, input_ids: Any, labels: Any, frame_mask: Any) -> Any:
        logits, given = wrapper(pixel_values, input_ids, labels, frame_mask)
        assert given is labels
        return logits

    logits = backend.call(called, pixel_values, input_ids, labels, frame_mask)
    direct = backend.call(wrapper.transformer, input_ids, modality=image)
    np.testing.assert_array_equal(backend.numpy(logits), backend.numpy(direct))


@pytest.fixture(scope="module")
def last_token() -> Iterator[str]:
    """The name of an architecture that sees one token of the image."""

    @section
    class LastTokenConfig(VLMConfig, arch="last_token_of_tests"):
        arch: str = "last_token_of_tests"

        def residual_stream_image_tokens(self, num_tokens: int) -> int:
            return 1

    yield LastTokenConfig().arch
    VLMConfig.forget(LastTokenConfig().arch)


@on_both
def test_a_strategy_of_a_user_is_a_subclass_and_a_name(backend: Any, last_token: str) -> None:
    vlm = backend.module("model.vlm")

    class LastTokenStrategy(vlm.ModalityStrategy):
        def prepare(self, wrapper: Any, pixel_values: Any, input_ids: Any, frame_mask: Any = None) -> Any:
            embeds, _ = wrapper.encode_images(pixel_values, frame_mask)
            context = backend.module("model.modality").ModalityContext
            return context(prefix_embeds=embeds[:, -1:], output_slice=slice(1, None))

        def num_image_tokens(self, wrapper: Any) -> int:
            return 1

    with temporary():
        backend.module("registry").registry.register("modality_strategy", last_token)(LastTokenStrategy)
        wrapper = wrapper_of(backend, last_token)
    joint = wrapper_of(backend, "joint_decoder")
    state = backend.module("model.state")
    state.set_state(joint, {name: np.array(value) for name, value in backend.numpy(state.get_state(wrapper)).items()})
    assert wrapper.num_image_tokens == wrapper.transformer.num_image_tokens == 1
    assert isinstance(wrapper.strategy, LastTokenStrategy)
    pixel_values, input_ids = backend.array(CLIPS), backend.array(TEXT)
    for text_mask in (None, backend.array(np.array([[True] * 3 + [False], [True] * 4]))):
        found = backend.call(wrapper.run, pixel_values, input_ids, text_mask=text_mask).logits
        last = backend.call(joint.run, backend.array(CLIPS[:, -1:]), input_ids, text_mask=text_mask).logits
        np.testing.assert_allclose(backend.numpy(found), backend.numpy(last), rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


@on_both
def test_one_integer_stands_for_a_list_of_one(backend: Any) -> None:
    model = drawn(backend, backend.build(backend.module("model.transformer").Transformer, CONFIG))
    generate, options = backend.module("model.generate").generate, {"temperature": 0.0, "pad_token_id": -1}
    free = backend.numpy(generate(model, [[1, 2, 3]], 4, prompt_lengths=2, **options))
    np.testing.assert_array_equal(free, backend.numpy(generate(model, [[1, 2]], 4, **options)))
    stop = int(free[0, 3])
    made = 1 + free[0, 2:].tolist().index(stop)
    for eos_token_id in (stop, [stop]):
        ended = backend.numpy(generate(model, [[1, 2]], 4, eos_token_id=eos_token_id, **options))
        np.testing.assert_array_equal(ended, free[:, : 2 + made])
    with pytest.raises(ValueError, match="must be one for each of 2 prompts"):
        generate(model, [[1, 2], [3, 4]], 4, prompt_lengths=2, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Files


@on_both
def test_saved_activations_get_the_suffix_of_their_format(backend: Any, tmp_path: Path) -> None:
    save = backend.module("model.hooks").save_activations
    for name in ("plain", "step.10", "done.npz"):
        save({"norm": backend.array(FEATURES, "float32")}, tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["done.npz", "plain.npz", "step.10.npz"]
    np.testing.assert_array_equal(read_activations(tmp_path / "plain.npz")["norm"], FEATURES.astype(np.float32))


@on_both
def test_a_run_of_experts_takes_what_a_call_takes(backend: Any) -> None:
    layer = drawn(backend, backend.build(backend.module("model.moe").build_moe, 16, 24, 3, 1, capacity_factor=0.5))
    valid, members = (RNG.random((2, 6)) < share for share in (0.8, 0.5))
    given = {"members": backend.array(members & valid), "limit_capacity": True}
    whole, few = (backend.call(layer.run, backend.array(X), backend.array(valid), **options) for options in ({}, given))
    y, stats = backend.call(layer, backend.array(X), backend.array(valid), **given, return_stats=True)
    np.testing.assert_array_equal(backend.numpy(few.x), backend.numpy(y))
    np.testing.assert_array_equal(backend.numpy(few.stats.expert_counts), backend.numpy(stats.expert_counts))
    assert np.abs(backend.numpy(few.x) - backend.numpy(whole.x)).max() > 1e-6


@on_both
def test_ids_of_modalities_are_checked(backend: Any) -> None:
    layout, context = backend.module("model.layout"), backend.module("model.modality").ModalityContext
    x, names = backend.array(X), ("image", "text")
    for bad in (-1, 2):
        ids = backend.array(np.where(np.arange(6) == 3, bad, np.ones((2, 6), np.int32)))
        with pytest.raises(ValueError, match=f"modality_ids = {bad}: ids must be in"):
            layout.layout_of(names, ids, x)
        with pytest.raises(ValueError, match=f"modality_ids = {bad}: ids must be in"):
            layout.stream_layout(names, context(inputs_embeds=x, modality_ids=ids), x)
    with pytest.raises(ValueError, match="modality_ids is given: with kv_caches the image must come as prefix_embeds"):
        layout.positions_after(None, context(inputs_embeds=x, modality_ids=ids), None)


@on_both
def test_an_architecture_that_nobody_registered_is_named(backend: Any) -> None:
    build = backend.module("model.transformer").build_architecture
    with pytest.raises(KeyError, match=r"(?s)Unknown architecture: 'nowhere'.*mot"):
        build(CONFIG, SimpleNamespace(arch="nowhere"))


@on_both
def test_a_mask_may_be_what_it_allows(backend: Any) -> None:
    attention, rng = backend.module("model.attention"), np.random.default_rng(4)
    q, k, v = (rng.standard_normal((2, 3, length, 4)) for length in (5, 6, 6))
    allowed = rng.random((2, 1, 5, 6)) < 0.6
    allowed[..., 0] = True
    scores = np.where(allowed, q @ k.swapaxes(2, 3) / 2, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    given = [*map(backend.array, (q, k, v)), backend.array(allowed)]
    np.testing.assert_allclose(
        backend.numpy(backend.call(attention.attend, *given)), weights @ v, rtol=1e-10, atol=1e-12
    )
    found = backend.numpy(backend.call(attention.attention_weights, given[0], given[1], given[3]))
    np.testing.assert_allclose(found, weights, rtol=1e-10, atol=1e-12)


@on_both
def test_text_alone_is_masked_too(backend: Any) -> None:
    wrapper = wrapper_of(backend, "joint_decoder")
    ids, mask = np.array([[1, 2, 3, 4]] * 2), np.array([[False, True, True, True], [True] * 4])
    context = wrapper.context(None, backend.array(ids), text_mask=backend.array(mask))
    np.testing.assert_array_equal(backend.numpy(context.key_padding_mask), mask)
    other = np.where(mask, ids, 9)
    first, second, plain = (
        backend.numpy(backend.call(wrapper.run, None, backend.array(each), **options).logits)
        for each, options in (
            (ids, {"text_mask": backend.array(mask)}),
            (other, {"text_mask": backend.array(mask)}),
            (ids, {}),
        )
    )
    np.testing.assert_array_equal(first[mask], second[mask])
    np.testing.assert_array_equal(first[1], plain[1])
    assert np.abs(first[0] - plain[0]).max() > 1e-3
