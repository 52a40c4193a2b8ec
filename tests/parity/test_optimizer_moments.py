"""An added optimiser keeps what it declares: one moment by a name of its own, from training to checkpoints and back, in
both backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from kempnerforge_jax.registry import registry as jax_registry
from kempnerforge_jax.training import optimizer as jax_optimizer
from kempnerforge_jax.training.train import Trainer as JaxTrainer
from kempnerforge_torch.registry import registry as torch_registry
from kempnerforge_torch.training.train import Trainer as TorchTrainer
from shared_config import load_config
from shared_config.contract.counts import training_memory
from shared_config.contract.freeze import moments_under
from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.data import open_data
from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from shared_config.parity.validation import validation_moments
from shared_config.registry import declare, temporary
from shared_config.schema import FreezeSpec, OptimizerConfig, VLMConfig

NAME = "heavy_ball"
CONFIG = (
    "--model.dim=16", "--model.n_layers=2", "--model.n_heads=2", "--model.ffn_hidden_dim=24", "--model.max_seq_len=8",
    "--train.seq_len=8", "--train.batch_size=2", "--train.mixed_precision=fp32", "--train.compile_model=false",
    "--train.max_steps=9", "--scheduler.name=constant", f"--optimizer.name={NAME}", "--optimizer.lr=0.01",
)  # fmt: skip
TRAINERS: dict[str, Any] = {"torch": TorchTrainer, "jax": JaxTrainer}


class HeavyBall(torch.optim.Optimizer):
    """v <- b v + g, p <- p - lr (v + weight_decay p) (Polyak 1964)."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.lr, "decay": config.betas[0]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    velocity = self.state[p]["velocity"]
                    velocity.mul_(group["decay"]).add_(p.grad)
                    p -= group["lr"] * (velocity + group["weight_decay"] * p)
                    self.state[p]["step"] += 1


class HeavyBallState(NamedTuple):
    velocity: jax.Array
    count: jax.Array


def heavy_ball(config: OptimizerConfig) -> optax.GradientTransformation:
    def init(params: Any) -> HeavyBallState:
        return HeavyBallState(jnp.zeros(params.shape, params.dtype), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, HeavyBallState]:
        velocity = config.betas[0] * state.velocity + updates
        return velocity, HeavyBallState(velocity, state.count + 1)

    return optax.GradientTransformation(init, update)


@pytest.fixture(autouse=True)
def _registered_for_one_test() -> Iterator[None]:
    with temporary():
        declare("optimizer", NAME, moments=["velocity"])
        torch_registry.register("optimizer", NAME)(HeavyBall)
        jax_registry.register("optimizer", NAME)(heavy_ball)
        yield


def test_an_optimiser_of_one_moment_trains_and_resumes_in_either_backend(tmp_path: Path) -> None:
    config = load_config("debug", [*CONFIG, "--train.scan_layers=true"])
    data = open_data(config)
    names = [name for name, spec in parameter_table(config.model).items() if not spec.is_buffer]
    whole: dict[str, Any] = {}
    for backend, trainer_of in TRAINERS.items():
        trainer = trainer_of(config)
        for step in range(4):
            if step == 2:
                checkpoint.save(tmp_path / backend, trainer.state(), backend=backend)
            trainer.step([data.batch(step)])
        whole[backend] = trainer.state()
    assert list(whole["jax"].optimizer) == list(whole["torch"].optimizer)
    assert [*whole["torch"].optimizer] == [*(f"velocity.{name}" for name in names), *(f"t.{name}" for name in names)]
    assert {int(whole["jax"].optimizer[f"t.{name}"]) for name in names} == {4}
    for backend, trainer_of in TRAINERS.items():
        other = "jax" if backend == "torch" else "torch"
        trainer = trainer_of(config)
        trainer.load_state(checkpoint.load(tmp_path / other).state)
        for step in (2, 3):
            trainer.step([data.batch(step)])
        same(trainer.state(), whole[backend])
    same(whole["jax"], whole["torch"])
    without = checkpoint.load(tmp_path / "jax").state
    dropped = without.optimizer.pop(f"velocity.{names[0]}")
    for trainer_of in TRAINERS.values():
        with pytest.raises(UserError, match=rf"velocity\.{names[0]}"):
            trainer_of(config).load_state(without)
    assert np.abs(dropped).max() > 0


def same(one: Any, other: Any) -> None:
    for part in ("weights", "optimizer"):
        for name, value in getattr(other, part).items():
            np.testing.assert_allclose(getattr(one, part)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_facts_of_an_optimiser_follow_from_its_moments() -> None:
    job = load_config("debug", CONFIG)
    adamw = job.replace(optimizer=OptimizerConfig())
    memory = training_memory(job)
    assert (memory.optimizer, training_memory(adamw).optimizer) == (memory.gradients, 2 * memory.gradients)
    table = {name: ParameterSpec((2, 3), Constant(0.0), (None, None)) for name in ("transformer.a", "adapter.b")}
    drawn = validation_moments(table, 1, job.optimizer)
    assert list(drawn) == ["velocity.transformer.a", "velocity.adapter.b"]
    assert min(value.min() for value in drawn.values()) < 0 < max(value.max() for value in drawn.values())
    vlm = VLMConfig.for_arch("joint_decoder", freeze=(FreezeSpec("transformer"),))
    moved = moments_under(vlm, table, {"velocity.transformer.a": np.ones((2, 3))}, job.optimizer)
    assert {name: value.shape for name, value in moved.items()} == {"velocity.adapter.b": (2, 3), "t.adapter.b": ()}


def test_moments_that_are_not_as_declared_are_refused() -> None:
    jax_registry.register("optimizer", "undeclared")(heavy_ball)
    with pytest.raises(ValueError, match=r"optimizer 'undeclared': .*\['velocity', 't'\].*\['t', 'm', 'v'\]"):
        jax_optimizer.build_optimizer({}, {}, OptimizerConfig(name="undeclared"))
    for moments in (["t"], ["a", "a"], ["a.b"]):
        with pytest.raises(ValueError, match="moments = "):
            declare("optimizer", "other", moments=moments)
    with pytest.raises(ValueError, match="only"):
        declare("norm", "other", moments=["a"])
