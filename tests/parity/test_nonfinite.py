"""Updates that are not finite: none reaches a checkpoint, and one that is left out changes nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kempnerforge_jax.training.train
import kempnerforge_torch.training.train
from shared_config import load_config
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.data import open_data
from shared_config.interchange import checkpoint, run_layout
from shared_config.interchange.checkpoint import TrainingState
from shared_config.schema import JobConfig
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.training.metrics import read_metrics
from shared_config.training.trainer import TrainingDivergedError

BACKENDS = {"torch": kempnerforge_torch.training.train, "jax": kempnerforge_jax.training.train}
SMALL = (
    "--model.dim=16", "--model.n_layers=2", "--model.n_heads=2", "--model.n_kv_heads=2", "--train.batch_size=1",
    "--train.seq_len=8", "--scheduler.warmup_steps=2", "--eval.steps=1", "--train.mixed_precision=fp32",
)  # fmt: skip


def job(preset: str, *overrides: str) -> JobConfig:
    return load_config(preset, [*SMALL, *overrides])


def poisoned(state: TrainingState) -> TrainingState:
    """The weights with a NaN that the loss meets."""
    weights = {name: value.copy() for name, value in state.weights.items()}
    weights["layers.1.attention_norm.weight"][0] = np.nan
    return TrainingState(state.step, weights, state.optimizer)


def arrays(state: TrainingState) -> dict[str, np.ndarray]:
    return {**state.weights, **state.optimizer}


@pytest.mark.parametrize("scan", ["false", "true"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("preset", ["debug", "debug_moe"])
def test_a_skipped_update_changes_nothing_but_the_step(preset: str, name: str, scan: str) -> None:
    config = job(preset, "--train.on_nonfinite=skip", f"--train.scan_layers={scan}")
    data, trainer = open_data(config), BACKENDS[name].Trainer(config, "cpu")
    trainer.step([data.batch(0)])
    bad = poisoned(trainer.state())
    trainer.load_state(bad)
    numbers = trainer.step([data.batch(1)])
    assert not np.isfinite(float(numbers["loss"]))
    after = trainer.state()
    assert after.step == 2
    assert set(arrays(after)) == set(arrays(bad))
    for key, value in arrays(bad).items():
        np.testing.assert_array_equal(arrays(after)[key], value, err_msg=key)


@pytest.mark.parametrize("preset", ["debug", "debug_moe"])
def test_both_backends_go_on_alike_after_a_skipped_update(preset: str) -> None:
    config = job(preset, "--train.on_nonfinite=skip")
    data, losses = open_data(config), {}
    for name, backend in BACKENDS.items():
        trainer = backend.Trainer(config, "cpu")
        trainer.step([data.batch(0)])
        good = trainer.state()
        trainer.load_state(poisoned(good))
        trainer.step([data.batch(1)])
        skipped = trainer.state()
        trainer.load_state(TrainingState(skipped.step, good.weights, skipped.optimizer))
        losses[name] = [float(trainer.step([data.batch(index)])["loss"]) for index in (2, 3, 4)]
        counts = {int(value) for key, value in trainer.state().optimizer.items() if key.startswith("t.")}
        assert counts == {4}, "of five steps one was left out"
    np.testing.assert_allclose(losses["torch"], losses["jax"], rtol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_skipping_alters_no_update_that_is_finite(name: str) -> None:
    states = {}
    for policy in ("stop", "skip"):
        config = job("debug_moe", f"--train.on_nonfinite={policy}")
        trainer, data = BACKENDS[name].Trainer(config, "cpu"), open_data(config)
        for index in range(3):
            trainer.step([data.batch(index)])
        states[policy] = arrays(trainer.state())
    for key, value in states["stop"].items():
        np.testing.assert_allclose(states["skip"][key], value, rtol=1e-5, atol=1e-7, err_msg=key)


OVERFLOWING = ("--optimizer.eps=1e-300", "--scheduler.warmup_steps=0")
"""An eps that is 0 in float32 divides 0 by 0 in the first update, whose loss and gradient are finite."""


@pytest.mark.parametrize("preset", ["debug", "debug_moe"])
@pytest.mark.parametrize("name", BACKENDS)
def test_an_update_to_weights_that_are_not_finite_is_skipped(name: str, preset: str) -> None:
    config = job(preset, "--train.on_nonfinite=skip", *OVERFLOWING)
    data, trainer = open_data(config), BACKENDS[name].Trainer(config, "cpu")
    before = trainer.state()
    numbers = trainer.step([data.batch(0)])
    assert np.isfinite(float(numbers["loss"]))
    assert np.isfinite(float(numbers["grad_norm"]))
    assert not numbers["taken"]
    for key, value in arrays(before).items():
        np.testing.assert_array_equal(arrays(trainer.state())[key], value, err_msg=key)


@pytest.mark.parametrize("name", BACKENDS)
def test_skipped_updates_are_counted_and_limited_through_a_resume(tmp_path: Path, name: str) -> None:
    kept = (
        f"--checkpoint.dir={tmp_path}", "--checkpoint.interval=1", "--train.on_nonfinite=skip",
        "--train.max_skipped_steps=3", "--scheduler.warmup_steps=0",
    )  # fmt: skip

    def run(*overrides: str) -> Any:
        backend: Any = BACKENDS[name]
        return backend.train(job("debug", *kept, *overrides), device="cpu")

    def counts() -> list[float]:
        return [record["skipped_steps"] for record in read_metrics(tmp_path / "metrics.jsonl")]

    run("--optimizer.eps=1e-300", "--train.max_steps=2")
    assert counts() == [1, 2]
    with pytest.raises(TrainingDivergedError, match=r"step 3: .*train\.max_skipped_steps = 3 updates in a row"):
        run("--optimizer.eps=1e-300", "--train.max_steps=9")
    assert run("--train.max_steps=3").metrics["skipped_steps"] == 2, "one that is taken"
    assert run("--optimizer.eps=1e-300", "--train.max_steps=4").step == 4
    assert "taken" not in read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert {int(value) for key, value in checkpoint.load(tmp_path).state.optimizer.items() if key[0] == "t"} <= {1, 2}


def stays_finite(
    name: str, weight: np.ndarray, gradient: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float = 0.01
) -> bool:
    """Of a step of two parameters, the first an ordinary one."""
    both = {"a": [np.full(3, 0.1)] * 4, "b": [weight, gradient, m, v]}
    narrow = {key: [array.astype(np.float32) for array in of_one] for key, of_one in both.items()}
    table = {key: ParameterSpec((3,), Constant(0.0), (None,)) for key in both}
    moments = {f"{kind}.{key}": narrow[key][place] for key in both for kind, place in (("m", 2), ("v", 3))}
    optimizer, rates = importlib.import_module(f"kempnerforge_{name}.training.optimizer"), Rates(np.float32(lr), 0.1)
    if name == "torch":
        own = {key: torch.nn.Parameter(torch.from_numpy(narrow[key][0].copy())) for key in both}
        built = optimizer.build_optimizer(own, table, OptimizerConfig())
        optimizer.set_optimizer_state(built, own, moments, 4)
        for key, parameter in own.items():
            parameter.grad = torch.from_numpy(narrow[key][1].copy())
        return bool(optimizer.stays_finite(built, rates))
    own, gradients = ({key: jnp.asarray(narrow[key][place]) for key in both} for place in (0, 1))
    built = optimizer.build_optimizer(own, table, OptimizerConfig())
    state = optimizer.set_optimizer_state(built.init(own), moments, 4)
    return bool(optimizer.stays_finite(built, gradients, state, own, rates))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_stays_finite_only_if_every_element_of_every_tensor_does(name: str) -> None:
    usual, zero = np.full(3, 0.1), np.zeros(3)
    assert stays_finite(name, usual, usual, usual, usual)
    assert stays_finite(name, usual, zero, zero, zero)
    one = np.array([0.0, 1.0, 0.0])
    assert not stays_finite(name, usual, zero, 1e35 * one, zero), "the step"
    assert not stays_finite(name, usual, 1e25 * one, usual, usual), "the second moment"
    assert not stays_finite(name, np.where(one, np.inf, 0.1), usual, usual, usual), "the weight"
    assert not stays_finite(name, usual, np.where(one, np.nan, 0.1), usual, usual), "the gradient"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("moments", [0.0, 2.0, 7.0])
def test_the_largest_step_that_stays_finite_is_that_of_the_formula(name: str, moments: float) -> None:
    """Kingma and Ba 2015, algorithm 1, of the fifth step from a weight of 0."""
    options = OptimizerConfig()
    b1, b2 = options.betas
    gradient, m, v = np.full(3, 3.0), np.full(3, moments), np.full(3, 5 * moments + 1)
    m_hat = (b1 * moments + (1 - b1) * 3) / (1 - b1**5)
    v_hat = (b2 * (5 * moments + 1) + (1 - b2) * 9) / (1 - b2**5)
    largest = float(np.finfo(np.float32).max) * (np.sqrt(v_hat) + options.eps) / m_hat
    usual = [np.zeros(3), gradient, m, v]
    assert stays_finite(name, *usual, lr=min(0.999 * largest, 3.4e38))
    if largest < 3.3e38:
        assert not stays_finite(name, *usual, lr=1.001 * largest)


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_that_are_not_finite_are_not_published(tmp_path: Path, name: str) -> None:
    kept = ("--checkpoint.keep_last_n=1", f"--checkpoint.dir={tmp_path}")
    good = BACKENDS[name].train(job("debug", *kept, "--train.max_steps=1"), device="cpu").checkpoint
    assert good is not None
    before = checkpoint.load(good).state
    bad = job("debug", *kept, *OVERFLOWING, "--train.max_steps=2")
    trainer: Any = BACKENDS[name]
    with pytest.raises(TrainingDivergedError) as refusal:
        trainer.train(bad, device="cpu")
    assert "step 2: " in str(refusal.value)
    assert str(good) in str(refusal.value)
    assert "not finite" in str(refusal.value)
    assert [path.name for path in tmp_path.glob("step_*")] == [good.name]
    for key, value in checkpoint.load(tmp_path).state.weights.items():
        np.testing.assert_array_equal(value, before.weights[key])


def test_both_backends_name_the_same_tensor_first(tmp_path: Path) -> None:
    found = {}
    for name, backend in BACKENDS.items():
        config = job(
            "debug", f"--checkpoint.dir={tmp_path / name}", "--optimizer.eps=1e-300", "--scheduler.warmup_steps=0",
            "--train.max_steps=1",
        )  # fmt: skip
        with pytest.raises(TrainingDivergedError) as refusal:
            backend.train(config, device="cpu")
        found[name] = str(refusal.value)
        assert "there is no checkpoint" in found[name]
        assert run_layout.latest(tmp_path / name) is None
    assert found["torch"] == found["jax"]
    assert "token_embedding.embedding.weight is not finite" in found["torch"]
