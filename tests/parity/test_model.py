"""The text model is one function: torch, JAX and the NumPy oracle give the same activations, loss and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.parity.runners import (
    assert_parts_within,
    assert_run_within,
    assert_same_runs,
    oracle_movements,
    run_jax,
    run_oracle,
    run_torch,
)
from tests.strategies import MAX_SEQ_LEN, inputs, model_configs

BACKENDS = {"torch": run_torch, "jax": run_jax}

ONE_SHAPE: dict[str, Any] = {
    "batches": (3,),
    "lengths": (8,),
}  # every shape is a compilation, and drawn configs vary it
FIXED = {
    "grouped": ModelConfig(
        dim=20, head_dim=6, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24,
        max_seq_len=MAX_SEQ_LEN, qk_norm=True, sliding_window=4, attention_bias=True,
    ),
    "plain": ModelConfig(
        dim=24, n_layers=2, n_heads=3, vocab_size=13, ffn_hidden_dim=50, max_seq_len=MAX_SEQ_LEN,
        norm_type="layernorm", norm_eps=1e-2, activation="gelu", tie_embeddings=True, rope_theta=50.0,
        rope_scaling=RopeScaling(type="yarn", factor=8.0, original_max_seq_len=16),
    ),
}  # fmt: skip


def weights_of(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    return validation_weights(parameter_table(config), seed)


@given(st.data())
def test_any_config_is_the_same_function_in_both_backends_and_the_oracle(data: st.DataObject) -> None:
    config = data.draw(model_configs())
    batch = data.draw(inputs(config))
    seed = data.draw(st.integers(0, 99))
    note(f"seed {seed}")
    check_float64(config, batch, seed)


@pytest.mark.parametrize("name", sorted(FIXED))
@settings(max_examples=settings().max_examples // 2)
@given(st.data())
def test_any_input_gives_the_same_in_float64(name: str, data: st.DataObject) -> None:
    config = FIXED[name]
    check_float64(config, data.draw(inputs(config, **ONE_SHAPE)), data.draw(st.integers(0, 10**6)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(FIXED))
@settings(max_examples=settings().max_examples // 2)
@given(st.data())
def test_rounding_stays_within_what_the_weights_rounding_does(name: str, dtype: str, data: st.DataObject) -> None:
    config, seed = FIXED[name], data.draw(st.integers(0, 10**6))
    batch, weights = data.draw(inputs(config, **ONE_SHAPE)), weights_of(config, seed)
    truth, moved = run_oracle(config, weights, batch), oracle_movements(config, weights, batch, dtype)
    for backend, run in BACKENDS.items():
        context = f"{backend}, seed {seed}, {config}"
        found = run(config, weights, batch, dtype)
        assert_run_within(found, truth, moved.deltas, dtype, context)
        assert_parts_within(found, truth, moved, dtype, config, context)


def check_float64(config: ModelConfig, batch: Any, seed: int) -> None:
    weights = weights_of(config, seed)
    truth = run_oracle(config, weights, batch)
    runs = {backend: run(config, weights, batch) for backend, run in BACKENDS.items()}
    assert set(runs["torch"].activations) == set(runs["jax"].activations)
    for backend, run in runs.items():
        assert_same_runs(run, truth, f"{backend}, seed {seed}, {config}")
    assert_same_runs(runs["torch"], runs["jax"], f"torch against JAX, seed {seed}, {config}")
