"""Mixtures of experts are one function: torch, JAX and the NumPy oracle agree in routes, outputs, losses and gradients.

Shapes: B batch, S sequence, T = B * S tokens, D model dim, E experts, k choices of each token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig
from tests.oracle.router import expert_bias_rate, expert_bias_update
from tests.parity import runners
from tests.parity.moe_layers import (
    BACKENDS,
    GATE,
    Layer,
    Run,
    build_with,
    deltas,
    is_full_precision,
    module,
    replaying,
    route_margins,
    run,
    run_oracle,
    with_fields,
)
from tests.strategies import MAX_SEQ_LEN, Inputs, inputs, model_configs, paddings
from tests.tolerance import BFLOAT16_K, FORWARD_K, GRADIENT_K, assert_same_function, assert_within

BATCH, LENGTH = 3, 8
MEANS = ("aux_loss", "z_loss", "entropy")
"""Sums of many terms, whose rounding adds up where that of the weights averages out."""

LAYERS = {
    "softmax_packed": Layer(
        packed_experts=True, capacity_factor=0.6, gradient_scale=True, shared_experts=2, routed_scaling=1.5
    ),
    "sigmoid_unpacked": Layer(
        num_experts=6, top_k=3, activation="gelu", router_type="sigmoid_topk", sequence_aux_loss_weight=0.4
    ),
    "sigmoid_packed": Layer(
        num_experts=3, top_k=1, activation="relu", router_type="sigmoid_topk", packed_experts=True,
        capacity_factor=1.25, norm_topk_prob=False, routed_scaling=2.5,
    ),
}  # fmt: skip


def draw_case(data: st.DataObject, layer: Layer) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Weights, x and validity. With ties, x and gate are such that logits are exact, and many of them equal."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6), label="seed"))
    weights = layer.weights(int(rng.integers(10**6)))
    x_BSD = rng.standard_normal((BATCH, LENGTH, layer.dim)).astype(ml_dtypes.bfloat16).astype(np.float64)
    if data.draw(st.booleans(), label="ties"):
        x_BSD = rng.integers(-1, 2, x_BSD.shape).astype(np.float64)
        weights[GATE] = rng.integers(-2, 3, weights[GATE].shape) / 4
        if "router.expert_bias" in weights:
            weights["router.expert_bias"] = rng.integers(-1, 2, layer.num_experts) / 8
    valid_BS = data.draw(st.one_of(st.just(np.ones((BATCH, LENGTH), bool)), paddings(BATCH, LENGTH)), label="valid")
    return weights, x_BSD, valid_BS


def assert_same_runs(found: Run, truth: Run, context: Any) -> None:
    np.testing.assert_array_equal(found.indices_Tk, truth.indices_Tk, err_msg=str(context))
    np.testing.assert_array_equal(found.counts_E, truth.counts_E, err_msg=str(context))
    assert found.dropped == truth.dropped, context
    for name, value in truth.named.items():
        assert_same_function(found.named[name], value, name, context=context)


@pytest.mark.parametrize("name", sorted(LAYERS))
@given(st.data())
def test_layers_are_the_same_function_in_float64(name: str, data: st.DataObject) -> None:
    layer = LAYERS[name]
    weights, x_BSD, valid_BS = draw_case(data, layer)
    truth = run_oracle(layer, weights, x_BSD, valid_BS)
    runs = {backend: run(backend, layer, weights, x_BSD, valid_BS) for backend in BACKENDS}
    for backend, found in runs.items():
        assert_same_runs(found, truth, f"{backend} against the oracle")
    assert_same_runs(runs["torch"], runs["jax"], "torch against JAX")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(LAYERS))
@given(st.data())
@settings(max_examples=max(settings().max_examples // 2, 1))
def test_rounding_stays_within_what_the_weights_rounding_does(name: str, dtype: str, data: st.DataObject) -> None:
    """Routes may differ from the exact ones where these are tied within rounding; then the truth takes those found."""
    layer = LAYERS[name]
    weights, x_BSD, valid_BS = draw_case(data, layer)
    weights = {key: as_held(key, value, dtype) for key, value in weights.items()}
    for backend in BACKENDS:
        found = run(backend, layer, weights, x_BSD, valid_BS, dtype)
        assert route_margins(layer, weights, x_BSD, found.indices_Tk) <= 1e-5
        with replaying(found.indices_Tk):
            truth = run_oracle(layer, weights, x_BSD, valid_BS)
            allowed = deltas(layer, weights, x_BSD, valid_BS, dtype)
        np.testing.assert_array_equal(found.counts_E, truth.counts_E)
        assert found.dropped == truth.dropped
        for key, value in truth.named.items():
            full = key == "weights" or key in MEANS
            narrow = dtype == "bfloat16" and not full
            K = BFLOAT16_K if narrow else GRADIENT_K if key.startswith("gradient/") else FORWARD_K
            roundoff = 2.0**-8 if narrow else 2.0**-22 if key in MEANS else 2.0**-24
            assert_within(found.named[key], value, allowed[key], K, key, roundoff=roundoff, context=backend)


def as_held(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """The value rounded to the dtype that a training step holds it in, so that all start from the same weights."""
    narrow = dtype == "bfloat16" and not is_full_precision(name)
    return value.astype(ml_dtypes.bfloat16 if narrow else np.float32).astype(np.float64)


@pytest.mark.parametrize("schedule", ["constant", "cosine_decay", "linear_warmup"])
def test_bias_after_twenty_steps(schedule: str) -> None:
    """Two micro-batches per step; the bias moves once, by the counts of both, and moves the routes of the next step."""
    layer = with_fields(LAYERS["sigmoid_unpacked"], bias_schedule=schedule, sequence_aux_loss_weight=0.0)
    rng = np.random.default_rng(3)
    batches = rng.standard_normal((20, 2, BATCH, LENGTH, layer.dim)) + rng.standard_normal(layer.dim)
    rate, names = 0.5, ("router.expert_bias", "router.expert_ema")
    found = {}
    for backend in ("oracle", *BACKENDS):
        weights = layer.weights(5) | {names[0]: np.zeros(layer.num_experts)}
        history = []
        for step, micro_batches in enumerate(batches):
            runs = [
                run_oracle(layer, weights, x) if backend == "oracle" else run(backend, layer, weights, x)
                for x in micro_batches
            ]
            counts_E = np.sum([one.counts_E for one in runs], axis=0)
            if backend == "oracle":
                now = expert_bias_rate(rate, schedule, step, 20)
                moved = expert_bias_update(*(weights[name] for name in names), counts_E, rate=now)
            else:
                moved = updated(backend, layer, weights, counts_E, rate, step)
            weights |= dict(zip(names, moved, strict=True))
            history.append(np.concatenate([one.indices_Tk for one in runs]))
        found[backend] = (weights, np.stack(history))
    for backend in BACKENDS:
        np.testing.assert_array_equal(found[backend][1], found["oracle"][1])
        for name in names:
            assert_same_function(found[backend][0][name], found["oracle"][0][name], name, context=backend)
    assert np.ptp(found["oracle"][0][names[0]]) > 0.01
    assert any((found["oracle"][1][0] != later).any() for later in found["oracle"][1][1:])


def updated(
    backend: str, layer: Layer, weights: dict[str, np.ndarray], counts_E: np.ndarray, rate: float, step: int
) -> Iterator[np.ndarray]:
    with jax.enable_x64(True):
        router = build_with(backend, layer, weights).router
        router.bias_update_rate = rate
        router.set_step(step, 20)
        state = module(backend, "state")
        router.update_bias(state.from_numpy(counts_E.astype(np.int32)))
        values = state.get_state(router)
        return (state.to_numpy(values[name]) for name in ("expert_bias", "expert_ema"))


# Whole models

MODEL = ModelConfig(
    dim=20, head_dim=6, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=MAX_SEQ_LEN,
    num_experts=5, moe_top_k=2, moe_frequency=2, moe_router="sigmoid_topk", moe_shared_experts=1,
    moe_sequence_aux_loss_weight=0.3, moe_aux_loss_weight=0.5, moe_router_z_loss_weight=0.1, moe_packed_experts=True,
)  # fmt: skip
RUNNERS = {"torch": runners.run_torch, "jax": runners.run_jax}


@given(st.data())
@settings(max_examples=max(settings().max_examples // 10, 1))
def test_any_model_of_experts_is_the_same_function(data: st.DataObject) -> None:
    config = data.draw(model_configs(experts=True))
    batch, seed = data.draw(inputs(config)), data.draw(st.integers(0, 99))
    note(f"seed {seed}")
    weights = validation_weights(parameter_table(config), seed)
    truth = runners.run_oracle(config, weights, batch)
    for backend, run_model in RUNNERS.items():
        runners.assert_same_runs(run_model(config, weights, batch), truth, f"{backend}, seed {seed}, {config}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=max(settings().max_examples // 3, 1))
def test_rounding_of_models_with_replayed_routes(backend: str, dtype: str, seed: int) -> None:
    """The model chooses its routes; they must be the best ones within rounding, and the truth then takes them."""
    tokens_BS = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (2, LENGTH), dtype=np.int32)
    batch = Inputs(tokens=tokens_BS, labels=np.roll(tokens_BS, 1, axis=1))
    weights = validation_weights(parameter_table(MODEL), seed)
    with recording(backend) as routes:
        found = RUNNERS[backend](MODEL, weights, batch, dtype)
        jax.effects_barrier()
    assert len(routes) == 1
    with replaying(*routes):
        truth = runners.run_oracle(MODEL, weights, batch)
        allowed = runners.oracle_deltas(MODEL, weights, batch, dtype)
    K = BFLOAT16_K if dtype == "bfloat16" else FORWARD_K
    preference_TE = truth.activations[f"{ROUTER}.gate"]
    preference_TE = 1 / (1 + np.exp(-preference_TE)) + weights[f"{ROUTER}.expert_bias"]
    best_Tk = -np.sort(-preference_TE, axis=1)[:, : MODEL.moe_top_k]
    short = float(np.max(best_Tk - np.take_along_axis(preference_TE, routes[0], axis=1)))
    assert short <= 5 * K * allowed[f"{ROUTER}.gate"]
    runners.assert_run_within(found, truth, allowed, dtype, f"{backend}, seed {seed}")
    runners.assert_same_counts(found, truth)


ROUTER = "layers.1.mlp.router"
recorded: list[np.ndarray] = []


@contextlib.contextmanager
def recording(backend: str) -> Iterator[list[np.ndarray]]:
    """The experts that each router chooses within; JAX's compiled model, which no other test uses, always tells."""
    router = module(backend, "router")
    choose = router.top_k_lowest_first
    recorded.clear()

    def told(scores_TE: Any, k: int) -> Any:
        indices_Tk = choose(scores_TE, k)
        if backend == "jax":
            jax.debug.callback(lambda indices: recorded.append(np.asarray(indices)), indices_Tk)
        else:
            recorded.append(indices_Tk.numpy())
        return indices_Tk

    with mock.patch.object(router, "top_k_lowest_first", told):
        yield recorded
