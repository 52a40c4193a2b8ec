"""Optimisers of both backends against NumPy: several steps of matrices, a stack of matrices, an embedding and a vector,
some of which have no gradient in some steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from shared_config.contract.averaging import average_of, averaged
from shared_config.contract.moments import moment_names
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.schema.optimizer import OptimizerConfig
from tests.oracle import optimizers as oracle
from tests.parity.backends import Jax, Torch

Arrays = dict[str, np.ndarray]
SHAPES = {
    "layers.0.wide.weight": (3, 5),
    "layers.0.tall.weight": (6, 2),
    "layers.1.experts_w": (5, 4, 3),
    "layers.1.norm.weight": (4,),
    "token_embedding.embedding.weight": (5, 3),
}


@dataclass(frozen=True)
class Case:
    """Steps of an optimiser: with the shapes, the warm-up, and for each step the parameters that have no gradient."""

    config: OptimizerConfig
    frozen: Sequence[frozenset[str]]
    warmup: int = 2
    decays: Sequence[float] = (0.3, 0.1)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = tuple(SHAPES.items())
    seed: int = 0

    @property
    def table(self) -> dict[str, ParameterSpec]:
        return {
            name: ParameterSpec(shape, Constant(0.0), (None,) * len(shape), decay=len(shape) > 1)
            for name, shape in self.shapes
        }

    def drawn(self, number: int) -> Arrays:
        rng = np.random.default_rng([self.seed, number])
        return {name: rng.standard_normal(shape) for name, shape in self.shapes}

    def gradients(self, step: int) -> Arrays:
        return {name: value for name, value in self.drawn(step + 1).items() if name not in self.frozen[step]}

    def lr(self, step: int) -> float:
        return self.config.lr * min(1.0, (step + 1) / self.warmup)

    def rates(self, step: int) -> Rates:
        squares = [self.lr(i) ** 2 for i in range(step + 1)]
        return Rates(self.lr(step), self.decays[step % len(self.decays)], squares[-1] / sum(squares))


def steps_of(backend: Torch | Jax, case: Case) -> Arrays:
    """Weights, moments and counts after all steps."""
    return torch_steps(backend, case) if backend.name == "torch" else jax_steps(backend, case)


def torch_steps(backend: Torch | Jax, case: Case) -> Arrays:
    module = backend.module("training.optimizer")
    own = {name: backend.array(value).requires_grad_() for name, value in case.drawn(0).items()}
    optimizer = module.build_optimizer(own, case.table, case.config)
    for step in range(len(case.frozen)):
        given = case.gradients(step)
        for name, parameter in own.items():
            parameter.grad = backend.array(given[name]) if name in given else None
        module.update(optimizer, case.rates(step))
    return backend.numpy(own | module.get_optimizer_state(optimizer, own))


def jax_steps(backend: Torch | Jax, case: Case) -> Arrays:
    module = backend.module("training.optimizer")
    own = {name: backend.array(value) for name, value in case.drawn(0).items()}
    optimizer = module.build_optimizer(own, case.table, case.config)
    update, kept = jax.jit(lambda *values: module.update(optimizer, *values)), optimizer.init(own)
    for step in range(len(case.frozen)):
        given = {name: backend.array(value) for name, value in case.gradients(step).items()}
        rates = Rates(*(backend.array(np.float64(rate)) for rate in case.rates(step)))
        moved, states = update(given, module.states_of(kept, given), {name: own[name] for name in given}, rates)
        own, kept = own | moved, module.with_states(kept, states)
    return backend.numpy(own | module.get_optimizer_state(kept))


def truth_of(case: Case) -> Arrays:
    """What `steps_of` is to be; averages are kept as the difference to the weights."""
    result: Arrays = {}
    for name in case.table:
        kept = kept_of(case, name)
        p = kept["p"]
        apart = {**kept, "d": kept["z"] - p, "ema": kept["ema"] - p}
        wanted = moment_names(case.config, case.table, [name])
        result |= {name: p, f"t.{name}": kept["t"], **{moment: apart[moment.partition(".")[0]] for moment in wanted}}
    return result


def kept_of(case: Case, name: str) -> Arrays:
    """A parameter p, its moments, averages x and ema, the sequence z, and the count t of updates."""
    start = case.drawn(0)[name]
    kept = {**dict.fromkeys("mv", np.zeros_like(start)), **dict.fromkeys(("p", "x", "z", "ema"), start)}
    counted = 0
    for step in range(len(case.frozen)):
        if name in case.gradients(step):
            counted += 1
            p, changed = _step(case, name, kept["p"], case.gradients(step)[name], kept, step, counted)
            kept |= {"p": p, **changed, "ema": oracle.averaged(kept["ema"], p, case.config.ema_decay)}
    return {**kept, "t": np.array(counted)}


def _step(case: Case, name: str, p: Any, g: Any, kept: Any, step: int, counted: int) -> Any:
    config, shape = case.config, dict(case.shapes)[name]
    decay = case.rates(step).decay if len(shape) > 1 else 0.0
    if config.name == "schedule_free_adamw":
        rates = [case.lr(i) for i in range(step + 1)]
        own = {"decay": decay, "betas": config.betas, "eps": config.eps, "t": counted}
        return oracle.schedule_free(p, g, kept, rates=rates, **own)
    common = {"lr": case.lr(step), "decay": decay}
    if config.name == "lion":
        return oracle.lion(p, g, kept, betas=config.betas, **common)
    if config.name == "muon" and name.startswith("layers") and len(shape) > 1:
        own = {"momentum": config.momentum, "nesterov": config.nesterov, "steps": config.newton_schulz_steps}
        return oracle.muon(p, g, kept, **own, **common)
    return oracle.adamw(p, g, kept, betas=config.betas, eps=config.eps, t=counted, **common)


def assert_is(found: Arrays, truth: Arrays) -> None:
    assert set(found) == set(truth)
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


NONE = frozenset[str]()
FROZEN = (NONE, frozenset({"layers.1.norm.weight"}), frozenset({"layers.0.wide.weight"}), NONE)
CASES = {
    "adamw": Case(OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-3, ema_decay=0.9), FROZEN),
    "lion": Case(OptimizerConfig(name="lion", lr=0.01, betas=(0.8, 0.9), ema_decay=0.8), FROZEN),
    "muon": Case(OptimizerConfig(name="muon", lr=0.01, momentum=0.9, newton_schulz_steps=3), FROZEN),
    "muon without Nesterov's momentum": Case(OptimizerConfig(name="muon", lr=0.01, nesterov=False), FROZEN[:2]),
    "schedule_free_adamw": Case(
        OptimizerConfig(name="schedule_free_adamw", lr=0.01, betas=(0.8, 0.9), eps=1e-3), FROZEN
    ),
}


def check_averages(backend: str) -> None:
    """What is evaluated is the average of the papers."""
    own = {"torch": Torch, "jax": Jax}[backend]()
    with jax.enable_x64(True):
        for name, kept in (("adamw", "ema"), ("schedule_free_adamw", "x")):
            case = CASES[name]
            found, average = steps_of(own, case), average_of(case.config)
            assert average is not None
            values = averaged(average, {one: found[one] for one in case.table}, found)
            for one, value in values.items():
                np.testing.assert_allclose(value, kept_of(case, one)[kept], rtol=1e-10, atol=1e-12, err_msg=one)


def check_optimizers(backend: str) -> None:
    """Every optimiser, for a few steps."""
    own = {"torch": Torch, "jax": Jax}[backend]()
    with jax.enable_x64(True):
        for name, case in CASES.items():
            try:
                assert_is(steps_of(own, case), truth_of(case))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
