"""What must hold of every mixture of experts, checked on each backend by itself.

Shapes: B batch, S sequence, T = B * S tokens, D model dim, F expert width, E experts, k choices of each token,
R = k * T rows.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from shared_config.schema.model import ModelConfig
from tests.oracle.linear import submodule
from tests.oracle.mlp import mlp
from tests.oracle.moe import capacity, expert_weights, find_room
from tests.oracle.router import softmax
from tests.parity.moe_layers import BACKENDS, GATE, Layer, Run, module, run, run_oracle, with_fields
from tests.tolerance import assert_same_function

BATCH, LENGTH = 3, 8
RNG = np.random.default_rng(11)
SOFTMAX = Layer(packed_experts=True, shared_experts=2)
SIGMOID = Layer(router_type="sigmoid_topk", top_k=3, activation="gelu", sequence_aux_loss_weight=0.4)
X_BSD = RNG.standard_normal((BATCH, LENGTH, SOFTMAX.dim))
ALL = np.ones((BATCH, LENGTH), bool)
SOME = ALL & (RNG.random(ALL.shape) > 0.3)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_router = pytest.mark.parametrize("layer", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])


def assert_same(found: Run, expected: Run, names: tuple[str, ...] | None = None) -> None:
    for name in names or tuple(expected.named):
        assert_same_function(found.named[name], expected.named[name], name)


# Experts


@each_backend
def test_packed_experts_equal_unpacked_ones(backend: str) -> None:
    weights = SOFTMAX.weights()
    packed = run(backend, SOFTMAX, weights, X_BSD, SOME)
    layer = with_fields(SOFTMAX, packed_experts=False)
    unpacked = run(backend, layer, layer.unpacked(weights), X_BSD, SOME)
    assert_same(unpacked, packed, tuple(packed.values))
    for name, gradient in SOFTMAX.unpacked(packed.gradients).items():
        assert_same_function(unpacked.gradients[name], gradient, name)


@each_backend
@pytest.mark.parametrize("packed", [True, False])
def test_initial_experts_have_the_distribution_of_the_table_packed_or_not(backend: str, packed: bool) -> None:
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=2, vocab_size=7, ffn_hidden_dim=96, num_experts=4, moe_packed_experts=packed
    )
    values = state_of(backend, config)
    found = {
        name: np.concatenate([v.ravel() for k, v in values.items() if ".mlp." in k and k.endswith(ends)])
        for name, ends in {
            "gate": ("gate_w", "gate_proj.weight"),
            "up": ("up_w", "up_proj.weight"),
            "down": ("down_w", "down_proj.weight"),
        }.items()
    }
    for name, drawn in found.items():
        std = config.init_std / (math.sqrt(2 * config.n_layers) if name == "down" else 1)
        assert drawn.size == 2 * 4 * 64 * 96
        assert abs(drawn.std() / std - 1) < 0.02
        assert abs(drawn.mean()) < 0.02 * std
        assert abs(np.mean(np.abs(drawn) < std) - 0.6827) < 0.01


@each_backend
def test_all_experts_chosen_is_a_dense_mixture(backend: str) -> None:
    layer = with_fields(SOFTMAX, top_k=SOFTMAX.num_experts, shared_experts=0)
    weights = layer.weights()
    share_BSE = softmax(X_BSD @ weights[GATE].T)
    each_EBSD = [mlp(X_BSD, expert_weights(weights, e), "silu")[0] for e in range(layer.num_experts)]
    found = run(backend, layer, weights, X_BSD, ALL)
    assert_same_function(found.output, np.einsum("bse,ebsd->bsd", share_BSE, np.stack(each_EBSD)), "output")
    assert (found.counts_E == BATCH * LENGTH).all()


@each_backend
def test_shared_expert_has_the_full_width_and_is_added(backend: str) -> None:
    weights = SOFTMAX.weights()
    shape = weights["shared_expert.up_proj.weight"].shape
    assert shape == (2 * SOFTMAX.hidden_dim, SOFTMAX.dim)
    with_shared = run(backend, SOFTMAX, weights, X_BSD, ALL)
    routed = {name: value for name, value in weights.items() if "shared" not in name}
    without = run(backend, with_fields(SOFTMAX, shared_experts=0), routed, X_BSD, ALL)
    shared_BSD = mlp(X_BSD, submodule(weights, "shared_expert"), "silu")[0]
    assert_same_function(with_shared.output, without.output + shared_BSD, "output")


@each_backend
@each_router
def test_permuting_experts_permutes_counts_only(backend: str, layer: Layer) -> None:
    weights, order = layer.weights(), np.random.default_rng(2).permutation(layer.num_experts)
    moved = {name: value[order] if value.shape[0] == layer.num_experts else value for name, value in weights.items()}
    if not layer.packed_experts:
        moved |= {
            f"experts.{new}.{name}": value
            for new, old in enumerate(order)
            for name, value in submodule(weights, f"experts.{old}").items()
        }
    before, after = (run(backend, layer, each, X_BSD, SOME) for each in (weights, moved))
    assert_same(after, before, ("output", "weights", "aux_loss", "z_loss", "entropy", "gradient/x"))
    np.testing.assert_array_equal(after.counts_E, before.counts_E[order])
    np.testing.assert_array_equal(order[after.indices_Tk], before.indices_Tk)


@each_backend
@each_router
def test_experts_with_all_tokens_and_experts_with_none(backend: str, layer: Layer) -> None:
    layer = with_fields(layer, gradient_scale=True, packed_experts=False, shared_experts=0)
    weights, crowded = layer.weights(), {2, 0, 4} if layer.top_k == 3 else {2, 4}
    for expert in crowded:
        weights[GATE][expert] += (8 + expert) * np.eye(layer.dim)[0]
    x_BSD = np.abs(X_BSD) + np.eye(layer.dim)[0]
    found = run(backend, layer, weights, x_BSD, ALL)
    assert found.counts_E.tolist() == [BATCH * LENGTH * (expert in crowded) for expert in range(5)]
    expected = run_oracle(layer, weights, x_BSD, ALL)
    assert_same(found, expected, tuple(name for name in expected.named if name != "entropy"))
    for name, gradient in found.gradients.items():
        assert np.isfinite(gradient).all()
        if name.startswith("experts."):
            assert gradient.any() == (int(name.split(".")[1]) in crowded)


@each_backend
@each_router
def test_gradient_scale_leaves_the_forward_and_evens_the_experts(backend: str, layer: Layer) -> None:
    layer = with_fields(layer, packed_experts=False, shared_experts=0)
    weights = layer.weights()
    weights[GATE][1] *= 3
    plain = run(backend, layer, weights, X_BSD, SOME)
    scaled = run(backend, with_fields(layer, gradient_scale=True), weights, X_BSD, SOME)
    for name, value in plain.values.items():
        assert_same_function(scaled.values[name], value, name)  # bits differ if XLA joins other operations to a loop
        if backend == "torch":
            np.testing.assert_array_equal(scaled.values[name], value)
    factors_E = plain.counts_E.mean() / plain.counts_E
    assert np.ptp(factors_E) > 0.1
    for name, gradient in plain.gradients.items():
        if name.startswith("experts."):
            gradient = gradient * factors_E[int(name.split(".")[1])]
        if name != "x":
            assert_same_function(scaled.gradients[name], gradient, name)


# Tokens


@each_backend
@each_router
def test_rows_do_not_influence_each_other_without_capacity(backend: str, layer: Layer) -> None:
    weights = layer.weights()
    other_BSD = np.concatenate([X_BSD[:1], np.random.default_rng(4).standard_normal(X_BSD[1:].shape)])
    before, after = (run(backend, layer, weights, x_BSD, ALL) for x_BSD in (X_BSD, other_BSD))
    np.testing.assert_array_equal(after.indices_Tk[:LENGTH], before.indices_Tk[:LENGTH])
    assert_same_function(after.output[0], before.output[0], "output")
    assert np.abs(after.output[1:] - before.output[1:]).min() > 0


@each_backend
@each_router
def test_padding_is_never_routed(backend: str, layer: Layer) -> None:
    """With first come, first served, padding that took a place would push a real token out."""
    layer = with_fields(layer, capacity_factor=1.0)
    weights = layer.weights()
    before = run(backend, layer, weights, X_BSD, SOME)
    loud = run(backend, layer, weights, np.where(SOME[:, :, None], X_BSD, 50.0), SOME)
    assert before.counts_E.sum() == SOME.sum() * layer.top_k
    np.testing.assert_array_equal(loud.counts_E, before.counts_E)
    assert loud.dropped == before.dropped
    assert_same_function(loud.output[SOME], before.output[SOME], "output")
    assert_same(loud, before, ("aux_loss", "z_loss", "entropy"))
    for name, gradient in before.gradients.items():
        if "shared" not in name and name != "x":
            assert_same_function(loud.gradients[name], gradient, name)
    alone_BSD = mlp(X_BSD, submodule(weights, "shared_expert"), "silu")[0] if layer.shared_experts else 0 * X_BSD
    assert_same_function(before.output[~SOME], alone_BSD[~SOME], "padding")


@each_backend
@each_router
def test_padding_throughout_gives_no_loss_and_no_nan(backend: str, layer: Layer) -> None:
    found = run(backend, layer, layer.weights(), X_BSD, ~ALL)
    assert found.aux_loss == found.z_loss == found.entropy == found.counts_E.sum() == found.dropped == 0
    assert not found.gradients[GATE].any()
    assert all(np.isfinite(value).all() for value in found.named.values())


@each_backend
@each_router
@pytest.mark.parametrize("shape", [(0, LENGTH), (BATCH, 0)])
def test_zero_tokens(backend: str, layer: Layer, shape: tuple[int, int]) -> None:
    layer = with_fields(layer, capacity_factor=1.0, gradient_scale=True)
    found = run(backend, layer, layer.weights(), np.zeros((*shape, layer.dim)), np.ones(shape, bool))
    assert found.output.shape == (*shape, layer.dim)
    assert found.aux_loss == found.z_loss == found.entropy == found.counts_E.sum() == found.dropped == 0
    assert not any(gradient.any() for gradient in found.gradients.values())


# Routes


@each_backend
def test_a_constant_added_to_every_bias_changes_nothing(backend: str) -> None:
    weights = SIGMOID.weights()
    before = run(backend, SIGMOID, weights, X_BSD, SOME)
    biased = weights | {"router.expert_bias": weights["router.expert_bias"] + 0.625}
    after = run(backend, SIGMOID, biased, X_BSD, SOME)
    for name, value in before.named.items():
        np.testing.assert_array_equal(after.named[name], value)
    np.testing.assert_array_equal(after.indices_Tk, before.indices_Tk)


@each_backend
def test_the_bias_chooses_and_does_not_weigh(backend: str) -> None:
    weights = SIGMOID.weights() | {"router.expert_bias": np.array([0.0, 2.0, 2.0, 0.0, 2.0])}
    found = run(backend, SIGMOID, weights, X_BSD, SOME)
    assert set(np.unique(found.indices_Tk)) == {1, 2, 4}
    scores_TE = 1 / (1 + np.exp(-X_BSD.reshape(-1, SIGMOID.dim) @ weights[GATE].T))
    chosen_Tk = np.take_along_axis(scores_TE, found.indices_Tk, axis=1)
    assert_same_function(found.weights, chosen_Tk / chosen_Tk.sum(axis=1, keepdims=True), "weights")


@each_backend
@each_router
def test_ties_go_to_the_lowest_index(backend: str, layer: Layer) -> None:
    weights = layer.weights()
    if layer is SIGMOID:
        weights["router.expert_bias"][:] = 0.25
    found = run(backend, layer, weights, np.zeros_like(X_BSD), ALL)
    assert (found.indices_Tk == np.arange(layer.top_k)).all()
    assert_same_function(found.entropy, np.asarray(math.log(layer.num_experts)), "entropy")
    assert_same_function(found.z_loss, np.asarray(math.log(layer.num_experts) ** 2), "z_loss")


@each_backend
def test_sequences_are_balanced_each_by_itself(backend: str) -> None:
    """Each sequence on an expert of its own: balanced over the batch, collapsed within a sequence."""
    layer = with_fields(SIGMOID, num_experts=3, top_k=1)
    weights = layer.weights() | {GATE: 20 * np.eye(3, layer.dim), "router.expert_bias": np.zeros(3)}
    x_BSD = np.repeat(np.eye(3, layer.dim)[:, None], LENGTH, axis=1) * 2 - 1
    found = run(backend, layer, weights, x_BSD, ALL)
    assert found.counts_E.tolist() == [LENGTH] * 3
    assert abs(found.aux_loss - 3 * layer.sequence_aux_loss_weight) < 1e-6


# Dispatch


@st.composite
def choices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, float]:
    experts, top_k, tokens = draw(st.sampled_from([(1, 1, 6), (3, 2, 7), (4, 4, 5)]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    crowded = rng.dirichlet(np.ones(experts))
    indices_Tk = np.argsort(rng.random((tokens, experts)) / crowded, axis=1)[:, :top_k].astype(np.int32)
    valid_T = np.array(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return indices_Tk, valid_T, experts, draw(st.sampled_from([0.0, 0.3, 1.0, 1.3]))


@each_backend
@given(case=choices())
def test_dispatch_keeps_what_the_specification_keeps(
    backend: str, case: tuple[np.ndarray, np.ndarray, int, float]
) -> None:
    indices_Tk, valid_T, experts, factor = case
    tokens, top_k = indices_Tk.shape
    room = capacity(tokens, top_k, experts, factor)
    assignment_R, row_R, ends_E = planned(backend, indices_Tk, valid_T, experts, room)
    np.testing.assert_array_equal(assignment_R[row_R], np.arange(tokens * top_k))
    kept_Tk, start = find_room(indices_Tk, valid_T, experts, room), 0
    for expert, end in enumerate(ends_E):
        slots, found = np.divmod(assignment_R[start:end], tokens)
        assert (np.diff(assignment_R[start:end]) > 0).all()
        assert (indices_Tk[found, slots] == expert).all()
        assert kept_Tk[found, slots].all()
        assert room is None or end - start <= room
        start = end
    assert ends_E[-1] == kept_Tk.sum()


# Grouped products

GROUPED = {
    "torch": ["grouped", "tiled"],
    "jax": ["grouped", "looped", "tiled", "ragged"],
}


@pytest.mark.parametrize(("backend", "kind"), [(b, kind) for b, kinds in GROUPED.items() for kind in kinds])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@given(sizes=st.lists(st.sampled_from([0, 0, 1, 3, 5, 9]), min_size=4, max_size=4), rest=st.integers(0, 3))
def test_grouped_products(backend: str, kind: str, dtype: str, sizes: list[int], rest: int) -> None:
    """Rows of no group come out 0 and count in no sum, even if they are NaN."""
    ends_E, rows = np.cumsum(sizes).astype(np.int32), 40
    rng = np.random.default_rng(sum(sizes) + rest)
    x_RD, w_EDF, y_RF = (rng.standard_normal(shape) for shape in ((rows, 6), (4, 6, 5), (rows, 5)))
    x_RD, w_EDF, y_RF = (array.astype(jnp.bfloat16).astype(np.float64) for array in (x_RD, w_EDF, y_RF))
    product_RF, outer_EDF, start = np.zeros((rows, 5)), np.zeros((4, 6, 5)), 0
    for e, end in enumerate(ends_E):
        product_RF[start:end] = x_RD[start:end] @ w_EDF[e]
        outer_EDF[e] = x_RD[start:end].T @ y_RF[start:end]
        start = end
    x_RD[start:] = y_RF[start:] = np.nan
    found = grouped(backend, kind, dtype)(x_RD, w_EDF, y_RF, ends_E)
    roundoff = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    for value, truth in zip(found, (product_RF, outer_EDF), strict=True):
        assert np.abs(value - truth).max() <= 4 * roundoff * np.abs(truth).max()


def grouped(backend: str, kind: str, dtype: str) -> Any:
    names = [f"{kind}_{what}" for what in ("matmul", "outer")]
    matmul, outer = (getattr(module(backend, "grouped"), name) for name in names)
    blocks = {"tiled": {"tile_rows": 4}, "looped": {"loop_rows": 4}}.get(kind, {})
    if backend == "torch":

        def run_torch(*arrays: np.ndarray) -> list[np.ndarray]:
            x, w, y = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in arrays[:3])
            ends = torch.from_numpy(arrays[3])
            both = (matmul(x, w, ends, **blocks), outer(x, y, ends, **blocks))
            assert all(value.dtype == x.dtype for value in both)
            return [value.double().numpy() for value in both]

        return run_torch

    def run_jax(*arrays: np.ndarray) -> list[np.ndarray]:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            x, w, y = (jnp.asarray(array, dtype) for array in arrays[:3])
            both = jitted(matmul, **blocks)(x, w, arrays[3]), jitted(outer, **blocks)(x, y, arrays[3])
            assert all(value.dtype == x.dtype for value in both)
            return [np.asarray(value).astype(np.float64) for value in both]

    return run_jax


@functools.lru_cache
def jitted(function: Any, **static: int) -> Any:
    return jax.jit(functools.partial(function, **static))


def planned(
    backend: str, indices_Tk: np.ndarray, valid_T: np.ndarray, experts: int, room: int | None
) -> list[np.ndarray]:
    plan = module(backend, "dispatch").plan_dispatch
    if backend == "torch":
        parts = plan(torch.from_numpy(indices_Tk.astype(np.int64)), torch.from_numpy(valid_T), experts, room)
    else:
        parts = jitted_plan(plan, experts, room)(indices_Tk, valid_T)
    assert str(parts.ends_E.dtype).endswith("int32")
    return [np.asarray(part) for part in parts]


@functools.lru_cache
def jitted_plan(plan: Any, experts: int, room: int | None) -> Any:
    return jax.jit(lambda indices_Tk, valid_T: plan(indices_Tk, valid_T, experts, room))


# Construction


@each_backend
def test_what_cannot_be_built_is_refused_by_name(backend: str) -> None:
    for fields, message in [
        ({"top_k": 6}, "top_k = 6: must be from 1 to num_experts = 5"),
        ({"top_k": 0}, "top_k = 0"),
        ({"capacity_factor": -1.0}, "capacity_factor = -1.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor = nan"),
        ({"capacity_factor": float("inf")}, "capacity_factor = inf"),
        (
            {"router_type": "sigmoid_topk", "bias_schedule": "linear"},
            "bias_schedule = 'linear': must be one of constant",
        ),
        ({"sequence_aux_loss_weight": 0.1}, "moe_router = 'softmax_topk'.*sequence_aux_loss_weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            Layer(**fields).build(backend)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"Unknown router: 'hash'; available: .*sigmoid_topk, softmax_topk"):
        Layer(router_type="hash").build(backend)
    built, other = Layer().build(backend), Layer(activation="gelu").build(backend)
    experts = [
        built.experts["0"] if backend == "jax" else built.experts[0],
        other.experts["0" if backend == "jax" else 0],
    ]
    for mixed in (experts, []):
        with pytest.raises(ValueError, match=r"experts = .*: must be layers of one type, all with the same activation"):
            module(backend, "moe").MoEMLP(built.router, mixed)
    kinds = [type(name, (type(experts[0]),), {}) for name in "hcafebgd"]
    for expert, kind in zip(many := [copy.copy(experts[0]) for _ in kinds], kinds, strict=True):
        expert.__class__ = kind
    with pytest.raises(ValueError, match=r"experts = a, b, c, d, e, f, g, h: must be layers of one type"):
        module(backend, "moe").MoEMLP(built.router, many)


@each_backend
def test_a_router_that_knows_no_step_stands_at_the_start(backend: str) -> None:
    """Then, and at the first step, a cosine gives the whole rate; halfway half of it."""
    counts, build = np.array([6, 2, 0, 0]), module(backend, "router").SigmoidTopKRouter
    options = {"rngs": None} if backend == "jax" else {}
    moved = []
    for schedule, step in (("constant", None), ("cosine_decay", None), ("cosine_decay", 0), ("cosine_decay", 5)):
        router = build(2, 4, 1, bias_schedule=schedule, **options)
        if step is not None:
            router.set_step(step, 10)
        router.update_bias(jnp.asarray(counts) if backend == "jax" else torch.from_numpy(counts))
        bias = router.expert_bias if backend == "torch" else router.expert_bias.get_value()
        moved.append(np.asarray(bias))
    np.testing.assert_allclose(moved, np.outer([1, 1, 1, 0.5], moved[0]), rtol=1e-6)
    assert moved[0].any()


def state_of(backend: str, config: ModelConfig) -> dict[str, np.ndarray]:
    transformer, state = module(backend, "transformer").Transformer, module(backend, "state")
    torch.manual_seed(0)
    model = transformer(config, **({"rngs": nnx.Rngs(0)} if backend == "jax" else {}))
    return {name: state.to_numpy(value) for name, value in state.get_state(model).items()}
