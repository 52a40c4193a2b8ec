"""Parameters that are frozen and thawed: each is updated as if there had only been the steps that it took part in."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge_jax.training import optimizer as jax_optimizer
from kempnerforge_jax.training.train import Trainer as JaxTrainer
from kempnerforge_torch.training import optimizer as torch_optimizer
from kempnerforge_torch.training.train import Trainer as TorchTrainer
from shared_config import load_config
from shared_config.contract.parameters import parameter_table
from shared_config.contract.schedule import Rates
from shared_config.data import open_data
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import TrainingState
from shared_config.schema.model import ModelConfig
from shared_config.schema.optimizer import OptimizerConfig
from tests.oracle.optimizer import adamw_step, initial_state

TABLE = parameter_table(ModelConfig(dim=4, n_layers=2, n_heads=2, ffn_hidden_dim=4, vocab_size=5, max_seq_len=4))
NAMES = tuple(TABLE)
CONFIG = OptimizerConfig(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
LR = 0.01
RATES = Rates(LR, CONFIG.weight_decay)
TRAINERS = {"torch": TorchTrainer, "jax": JaxTrainer}

Arrays = dict[str, np.ndarray]
Frozen = Sequence[frozenset[str]]


def drawn(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(spec.shape) for name, spec in TABLE.items()}


def gradients(step: int, frozen: frozenset[str]) -> Arrays:
    return {name: value for name, value in drawn(100 + step).items() if name not in frozen}


def fresh(weights: Arrays) -> TrainingState:
    return TrainingState(0, weights, {})


def torch_steps(state: TrainingState, schedule: Frozen) -> TrainingState:
    """The state after a step for each set of frozen names."""
    own = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in state.weights.items()}
    optimizer = torch_optimizer.build_optimizer(own, TABLE, CONFIG)
    torch_optimizer.set_rates(optimizer, RATES)
    if state.step:
        torch_optimizer.set_optimizer_state(optimizer, own, state.optimizer, state.step)
    for step, frozen in enumerate(schedule, state.step):
        given_now = gradients(step, frozen)
        for name, parameter in own.items():
            parameter.grad = torch.from_numpy(given_now[name]) if name in given_now else None
        optimizer.step()
    kept = torch_optimizer.get_optimizer_state(optimizer, own)
    weights = {name: parameter.detach().numpy() for name, parameter in own.items()}
    return TrainingState(state.step + len(schedule), weights, {name: t.numpy() for name, t in kept.items()})


def jax_steps(state: TrainingState, schedule: Frozen) -> TrainingState:
    with jax.enable_x64(True):
        own = {name: jnp.asarray(value) for name, value in state.weights.items()}
        kept = jax_optimizer.build_optimizer(own, TABLE, CONFIG).init(own)
        if state.step:
            kept = jax_optimizer.set_optimizer_state(kept, state.optimizer, state.step)
        for step, frozen in enumerate(schedule, state.step):
            given_now = {name: jnp.asarray(value) for name, value in gradients(step, frozen).items()}
            some = {name: own[name] for name in given_now}
            optimizer = jax_optimizer.build_optimizer(some, TABLE, CONFIG)
            states = jax_optimizer.states_of(kept, some)
            moved, states = jax_optimizer.update(optimizer, given_now, states, some, RATES)
            own, kept = own | moved, jax_optimizer.with_states(kept, states)
        moments = jax_optimizer.get_optimizer_state(kept)
        weights = {name: np.asarray(value) for name, value in own.items()}
        return TrainingState(state.step + len(schedule), weights, {name: np.asarray(a) for name, a in moments.items()})


STEPS = {"torch": torch_steps, "jax": jax_steps}


def real_adamw(weights: Arrays, schedule: Frozen) -> Arrays:
    """The optimiser of PyTorch, as it is built by default, stepping with the gradients that there are."""
    own = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in weights.items()}
    groups = [
        {"params": [own[n] for n in NAMES if TABLE[n].decay == decay], "weight_decay": CONFIG.weight_decay * decay}
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=CONFIG.betas, eps=CONFIG.eps)
    for step, frozen in enumerate(schedule):
        given_now = gradients(step, frozen)
        for name, parameter in own.items():
            parameter.grad = torch.from_numpy(given_now[name]) if name in given_now else None
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in own.items()}


def through_a_file(state: TrainingState) -> TrainingState:
    with tempfile.TemporaryDirectory() as folder:
        loaded = checkpoint.load(checkpoint.save(Path(folder), state)).state
        weights, optimizer = (
            {name: np.array(value) for name, value in part.items()} for part in (loaded.weights, loaded.optimizer)
        )
        return TrainingState(loaded.step, weights, optimizer)


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-11, atol=1e-13, err_msg=name)


@given(
    schedule=st.lists(st.frozensets(st.sampled_from(NAMES)), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    first=st.sampled_from(sorted(STEPS)),
    second=st.sampled_from(sorted(STEPS)),
)
def test_a_thawed_parameter_is_updated_as_by_the_adamw_of_torch(
    schedule: list[frozenset[str]], cut: int, first: str, second: str
) -> None:
    weights = drawn(0)
    state = STEPS[first](fresh(weights), schedule[:cut])
    state = STEPS[second](through_a_file(state), schedule[cut:])
    assert_close(state.weights, real_adamw(weights, schedule))
    truth, kept = weights, initial_state(weights)
    for step, frozen in enumerate(schedule):
        truth, kept = adamw_step(
            truth, gradients(step, frozen), kept, lr=LR, betas=CONFIG.betas, eps=CONFIG.eps,
            weight_decay=CONFIG.weight_decay, decayed=[name for name, spec in TABLE.items() if spec.decay],
        )  # fmt: skip
    assert_close(state.weights, truth)
    moments = {f"m.{n}": m for n, m in kept.m.items()} | {f"v.{n}": v for n, v in kept.v.items()}
    assert_close(state.optimizer, moments | {f"t.{name}": kept.steps.get(name, 0) for name in NAMES})


@pytest.mark.parametrize("name", STEPS)
def test_moments_without_counts_are_those_of_as_many_steps_as_the_run(name: str) -> None:
    schedule = [frozenset[str]()] * 5
    whole = STEPS[name](fresh(drawn(0)), schedule)
    part = STEPS[name](fresh(drawn(0)), schedule[:3])
    part.optimizer = {key: value for key, value in part.optimizer.items() if not key.startswith("t.")}
    resumed = STEPS[name](part, schedule[3:])
    assert_close(resumed.weights, whole.weights)
    assert_close(resumed.optimizer, whole.optimizer)


VLM = [
    "--model.dim=32", "--model.n_layers=1", "--model.n_heads=4", "--model.n_kv_heads=2", "--model.ffn_hidden_dim=48",
    "--vision_encoder.image_size=16", "--vision_encoder.feature_dim=24", "--vision_encoder.n_heads=3",
    "--vision_encoder.n_layers=1", "--train.batch_size=2", "--scheduler.warmup_steps=0", "--optimizer.lr=1e-3",
    "--optimizer.eps=1e-20", "--optimizer.weight_decay=0", "--scheduler.name=constant", "--vlm.max_text_len=48",
    "--vlm.freeze=[{module = 'adapter'}]",
    "--vlm.freeze_schedule=[{start_step = 4, specs = []}, {start_step = 6, specs = [{module = 'adapter'}]}]",
]  # fmt: skip


def test_trainers_count_the_updates_of_each_parameter() -> None:
    config = load_config("debug_vlm_joint_decoder", VLM)
    data = open_data(config)
    for name, build in TRAINERS.items():
        trainer = build(config, "cpu")
        for step in range(4):
            trainer.step([data.batch(step)])
        before = trainer.state()
        trainer.step([data.batch(4)])
        after = trainer.state()
        adapter = [key for key in before.weights if key.startswith("adapter.")]
        largest = max(float(np.abs(after.weights[key] - before.weights[key]).max()) for key in adapter)
        assert largest == pytest.approx(config.optimizer.lr, rel=1e-3), f"{name}: the first update is one of lr"
        for step in range(5, 8):
            trainer.step([data.batch(step)])
        counts = {key[2:]: int(t) for key, t in trainer.state().optimizer.items() if key.startswith("t.")}
        assert counts == {key: 2 if key in adapter else 8 for key in counts}
        assert set(adapter) < set(counts)


def test_layers_of_a_stack_have_counts_of_their_own() -> None:
    overrides = (
        "--model.dim=16",
        "--model.n_heads=2",
        "--model.n_kv_heads=2",
        "--train.batch_size=1",
        "--train.seq_len=8",
    )
    states = {}
    for scan in ("false", "true"):
        config = load_config("debug", [*overrides, f"--train.scan_layers={scan}"])
        trainer = JaxTrainer(config, "cpu")
        state = trainer.state()
        for place, key in enumerate(name for name in state.optimizer if name.startswith("t.")):
            state.optimizer[key] = np.array(place, np.int32)
        trainer.load_state(TrainingState(50, state.weights, state.optimizer))
        trainer.step([open_data(config).batch(0)])
        states[scan] = trainer.state()
    found, expected = states["true"], states["false"]
    assert {key: int(t) for key, t in found.optimizer.items() if key[0] == "t"} == {
        key: int(t) for key, t in expected.optimizer.items() if key[0] == "t"
    }
    for key, value in expected.weights.items():
        np.testing.assert_allclose(found.weights[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
