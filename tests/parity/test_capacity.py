"""What experts count: capacity is an argument of the call, a modality's experts count its own tokens, and the unit of
all counts but those of the sequence-wise loss is one call of the layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.loader import load_config
from shared_config.parity.numerics import relative_error
from shared_config.parity.request import decode_reference, logits_name
from shared_config.parity.traces import DECODE
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoTConfig
from tests.oracle.weights import draw
from tests.parity.backends import on_both
from tests.parity.moe_layers import Layer, build_with, run_oracle

SMALL = ["--model.dim=16", "--model.n_layers=2", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.vocab_size=37"]
EXPERTS = ["--model.num_experts=4", "--model.moe_top_k=2"]
TIGHT = ["--model.moe_capacity_factor=0.5"]
SIGMOID = ["--model.moe_router=sigmoid_topk", "--model.moe_packed_experts=true", "--model.sliding_window=5"]
MOT = MoTConfig(max_text_len=8)
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


@on_both
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("debug", []),
        ("debug", TIGHT),
        ("debug", [*TIGHT, *SIGMOID]),
        ("debug_vlm_joint_decoder", TIGHT),
        ("debug_vlm_cross_attention", TIGHT),
        ("debug_vlm_mot", []),
        ("debug_vlm_mot", TIGHT),
    ],
)
def test_a_correct_model_decodes_as_its_forward_whatever_its_capacity(
    backend: Any, preset: str, changes: list[str]
) -> None:
    config = load_config(preset, [*SMALL, *EXPERTS, *changes])
    reference = decode_reference(config)
    assert (reference == logits_name(config)) == (not changes)
    only = [reference, f"{DECODE}/prefill", logits_name(config)]
    tokens = RNG.integers(0, 37, (2, 8), np.int32)
    trace = backend.module("trace").record(config, device="cpu", tokens=tokens, deltas=False, only=only)
    truth = trace.tensors[reference]
    assert relative_error(trace.tensors[f"{DECODE}/prefill"], truth) < 1e-12
    if changes:
        assert relative_error(trace.tensors[logits_name(config)], truth) > 1e-2, "the capacity is felt"


@on_both
def test_what_is_recorded_of_decoding_has_the_delta_of_its_forward(backend: Any) -> None:
    config = load_config("debug", [*SMALL, *EXPERTS, *TIGHT])
    tokens = RNG.integers(0, 37, (2, 8), np.int32)
    only = [f"{DECODE}/prefill"]
    trace = backend.module("trace").record(config, device="cpu", tokens=tokens, only=only, dtype="float32")
    deltas = trace.meta.deltas["float32"]
    assert deltas[f"{DECODE}/prefill"] == deltas[f"{DECODE}/whole"] > 0


@on_both
def test_generation_rewrites_no_module(backend: Any) -> None:
    """A call within the call, of the same model, has its capacity."""
    config = ModelConfig(
        dim=16, n_layers=1, n_heads=2, vocab_size=19, ffn_hidden_dim=24, max_seq_len=64, num_experts=3,
        moe_capacity_factor=0.5,
    )  # fmt: skip
    table = parameter_table(config)
    model = backend.model(config, draw({name: spec.shape for name, spec in table.items()}, 3))
    tokens = backend.array(RNG.integers(0, 19, (2, 9)))
    before = backend.numpy(model.run(tokens).logits)
    running = backend.module("model.generate").stream(model, [[1, 2, 3], [4]], 4)
    next(running)
    np.testing.assert_array_equal(backend.numpy(model.run(tokens).logits), before)
    list(running)
    if backend.name == "torch":
        seen: list[float] = []
        mixture = model.layers["0"].mlp
        mixture.router.register_forward_hook(lambda *_: seen.append(mixture.capacity_factor))
        backend.module("model.generate").generate(model, [[1, 2, 3], [4]], 4)
        assert set(seen) == {0.5}
    free = backend.numpy(model.run(tokens, limit_capacity=False).logits)
    assert relative_error(before, free) > 1e-2


# A modality's own tokens


def mot_block(backend: Any, router: str, factor: float, top_k: int, packed: bool) -> Any:
    """A block whose attention is silent: what it adds to a position is what its modality's experts do."""
    config = ModelConfig(
        dim=8, n_layers=1, n_heads=2, vocab_size=5, ffn_hidden_dim=12, num_experts=4, moe_router=router,
        moe_top_k=top_k, moe_capacity_factor=factor, moe_packed_experts=packed, moe_gradient_scale=True,
        moe_shared_experts=1,
    )  # fmt: skip
    path = "layers.0."
    table = {name.removeprefix(path): spec for name, spec in parameter_table(config, MOT).items() if path in name}
    state = draw({name: spec.shape for name, spec in table.items()}, 2)
    state |= {name: 0 * value for name, value in state.items() if "o_proj" in name}
    block = backend.build(backend.module("model.mot").MoTBlock, config, MOT.mot_modalities, 0)
    backend.module("model.state").set_state(block, state)
    return block


def called(backend: Any, block: Any, x: np.ndarray, layout: Any, valid: np.ndarray | None) -> tuple[Any, Any]:
    mask = None if valid is None else backend.array(valid)

    def run(*given: Any) -> Any:
        x, *rotations = given
        return tuple(block.run(x, tuple(rotations), layout=layout, key_padding_mask=mask)[:2])

    return backend.run(run, x, *(make((x.shape[1], 2)) for make in (np.ones, np.zeros)))


@on_both
@given(
    text=st.sampled_from([1, 4, 6]),
    images=st.sampled_from([0, 2, 9]),
    factor=st.sampled_from([0.0, 0.5, 1.0, 1.3, 1e-30, 1e30]),
    top_k=st.sampled_from([1, 2]),
    router=st.sampled_from(["softmax_topk", "sigmoid_topk"]),
    packed=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=4)
def test_a_modality_does_not_depend_on_how_many_tokens_the_other_has(
    backend: Any, text: int, images: int, factor: float, top_k: int, router: str, packed: bool, padded: bool, seed: int
) -> None:
    """Output, counts, what is dropped, losses: as the text alone, with an image before it, or mixed by ids."""
    rng = np.random.default_rng(seed)
    block, layout_of = mot_block(backend, router, factor, top_k, packed), backend.module("model.mot").Layout
    names = MOT.mot_modalities
    x_text, x_image = (rng.standard_normal((2, n, 8)) for n in (text, images))
    valid = np.ones((2, text + images), bool)
    if padded:
        valid[:, images + text // 2 :] = False

    def prefixed(x: np.ndarray, image: int, valid: np.ndarray) -> tuple[np.ndarray, Any]:
        spans = (("image", 0, image), ("text", image, x.shape[1]))
        out, stats = called(backend, block, x, layout_of(names, spans=spans), valid if padded else None)
        return out[:, image:], stats["text"]

    alone, truth = prefixed(x_text, 0, valid[:, images:])
    together, stats = prefixed(np.concatenate([x_image, x_text], axis=1), images, valid)
    places = np.sort(rng.choice(images + text, text, replace=False))
    ids, order = np.zeros((2, images + text), np.int32), np.zeros(images + text, int)
    ids[:, places] = 1
    order[ids[0] == 0], order[places] = np.arange(images), np.arange(images, images + text)
    mixed = np.concatenate([x_image, x_text], axis=1)[:, order]
    out, by_ids = called(backend, block, mixed, layout_of(names, ids=backend.array(ids)), valid[:, order])
    for found, other in ((together, stats), (out[:, places], by_ids["text"])):
        assert relative_error(found, alone) < 1e-12
        np.testing.assert_array_equal(other.expert_counts, truth.expert_counts)
        assert other.dropped == truth.dropped
        for name in ("aux_loss", "z_loss", "entropy"):
            np.testing.assert_allclose(getattr(other, name), getattr(truth, name), rtol=1e-12)


@on_both
@pytest.mark.parametrize("by_ids", [False, True])
def test_eight_tokens_give_four_experts_room_for_two_each(backend: Any, by_ids: bool) -> None:
    block, layout_of = mot_block(backend, "softmax_topk", 1.0, 1, False), backend.module("model.mot").Layout
    x = np.random.default_rng(0).standard_normal((1, 40, 8))
    layout = layout_of(MOT.mot_modalities, spans=(("image", 0, 32), ("text", 32, 40)))
    if by_ids:
        layout = layout_of(MOT.mot_modalities, ids=backend.array((np.arange(40)[None] >= 32).astype(np.int32)))
    _, stats = called(backend, block, x, layout, None)
    for name, room in (("image", 8), ("text", 2)):
        assert stats[name].dropped == np.maximum(stats[name].expert_counts - room, 0).sum() > 0


# The unit of what is counted


@on_both
@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk"])
def test_the_unit_of_counts_is_the_micro_batch(backend: Any, router: str) -> None:
    """Capacity, gradient factors and the balancing loss are those of all sequences of a call, and of no others."""
    layer = Layer(capacity_factor=0.6, gradient_scale=True, router_type=router)
    weights, x = layer.weights(), RNG.standard_normal((4, 6, 10))
    model = build_with(backend.name, layer, weights)

    def measured(part: np.ndarray) -> tuple[np.ndarray, Any, np.ndarray]:
        out, stats = backend.run(lambda x: model(x, return_stats=True), part)
        (gradient,) = backend.gradients(lambda x: model(x, return_stats=True)[0], part)
        return out, stats, gradient

    whole, halves = measured(x), [measured(part) for part in (x[:2], x[2:])]
    for part, (out, stats, _) in zip((x, x[:2], x[2:]), (whole, *halves), strict=True):
        truth = run_oracle(layer, weights, part)
        assert relative_error(out, truth.output) < 1e-12
        assert stats.dropped == truth.dropped
        room = math.ceil(part.shape[0] * 6 * 2 / 5 * 0.6 - 1e-9)
        assert stats.dropped == np.maximum(stats.expert_counts - room, 0).sum()
        np.testing.assert_allclose(stats.aux_loss, truth.aux_loss, rtol=1e-12)
    np.testing.assert_array_equal(whole[1].expert_counts, sum(stats.expert_counts for _, stats, _ in halves))
    if router == "softmax_topk":
        assert abs(whole[1].aux_loss - np.mean([stats.aux_loss for _, stats, _ in halves])) > 1e-4
    for place in (0, 2):
        assert relative_error(np.concatenate([half[place] for half in halves]), whole[place]) > 1e-3


@on_both
@given(cut=st.sampled_from([(2, 2), (1, 1, 2)]), seed=st.integers(0, 99), padded=st.booleans())
@settings(max_examples=6)
def test_the_sequence_wise_loss_does_not_depend_on_how_a_batch_is_cut(
    backend: Any, cut: tuple[int, ...], seed: int, padded: bool
) -> None:
    """The mean over sequences, and its gradient."""
    layer = Layer(router_type="sigmoid_topk", sequence_aux_loss_weight=0.5)
    model = build_with(backend.name, layer, layer.weights())
    x = np.random.default_rng(seed).standard_normal((4, 6, 10))
    valid = np.ones((4, 6), bool)
    if padded:
        valid[::2, 4:] = False

    def loss(x: Any, valid: Any) -> Any:
        return model(x, valid, return_stats=True)[1].aux_loss

    def measured(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        mask = backend.array(valid[rows])
        share = len(valid[rows]) / 4
        (gradient,) = backend.gradients(lambda x: share * loss(x, mask), x[rows])
        return share * backend.run(loss, x[rows], valid[rows]), gradient

    bounds = np.cumsum((0, *cut))
    parts = [measured(slice(start, stop)) for start, stop in itertools.pairwise(bounds)]
    whole, gradient = measured(slice(None))
    np.testing.assert_allclose(sum(value for value, _ in parts), whole, rtol=1e-12)
    assert relative_error(np.concatenate([part for _, part in parts]), gradient) < 1e-12
    assert np.abs(gradient).max() > 0
