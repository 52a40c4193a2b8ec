"""States of optimisers in two runs: any pair of trainers agrees, and the first entry that parts is named, with why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings

import kempnerforge_jax.training.optimizer as ours_in_jax
import kempnerforge_torch.training.optimizer as ours_in_torch
from kempnerforge_jax.parity import optimizer_state as state_of_optax
from kempnerforge_torch.parity import optimizer_state as state_of_torch
from shared_config import load_config
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.data import open_data
from shared_config.errors import UserError
from shared_config.interchange.states import host_array
from shared_config.parity import RunComparison, Step, compare_runs, make_map
from shared_config.schema import OptimizerConfig

NIGHTLY = settings.get_current_profile_name() == "nightly"
RNG = np.random.default_rng(0)
START = {"w": RNG.standard_normal((5, 3)), "bias": RNG.standard_normal(3)}
TABLE = {name: ParameterSpec(value.shape, Constant(0.0), (None,) * value.ndim) for name, value in START.items()}
BATCHES = [RNG.standard_normal((8, 5)) for _ in range(3)]
LR, BETAS, AVERAGING = 1e-2, (0.9, 0.99), 0.8
RATES = Rates(LR, 0.0)
TRANSPOSED = make_map({"w": ("w", "transpose")})

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Bug:
    """What goes wrong in a step, from 0, and what is to be said of it, of a run b with it."""

    what: str
    kind: str
    suspect: str
    betas: tuple[float, float] = BETAS
    counted: int = 0
    stale: bool = False


NO_BUG = Bug("", "", "")
BUGS = {
    "first beta": Bug("state", "m", "takes 0.2 of the gradient, a takes 0.1 of the gradient", betas=(0.8, 0.99)),
    "second beta": Bug("state", "v", "takes 0.05 of the gradient squared, a takes 0.01", betas=(0.9, 0.95)),
    "count": Bug("state", "t", "b counts", counted=1),
    "stale average": Bug("averages", "ema", "ema: b leaves it as it was before this step", stale=True),
}


def loss_and_gradients(values: Arrays, x: Any) -> tuple[float, dict[str, np.ndarray]]:
    own = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    loss = (torch.tanh(torch.tensor(x) @ own["w"] + own["bias"]) - 1).square().mean()
    loss.backward()
    return float(loss.detach()), {name: tensor.grad.numpy() for name, tensor in own.items() if tensor.grad is not None}


class InTorch:
    """AdamW of torch, and an average of the weights."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.own = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
        self.average = {f"ema.{name}": value.copy() for name, value in START.items()}
        self.optimizer = torch.optim.AdamW([*self.own.values()], LR, betas, 1e-8, 0.0)

    def step(self, gradients: Arrays, bug: Bug) -> tuple[Arrays, Mapping[str, Any]]:
        for name, tensor in self.own.items():
            tensor.grad = torch.tensor(gradients[name])
        self.optimizer.step()
        for tensor in self.own.values():
            self.optimizer.state[tensor]["step"] += bug.counted
        values = {name: tensor.detach().numpy().copy() for name, tensor in self.own.items()}
        self.average = averaged(self.average, values, bug)
        return values, {**state_of_torch(self.optimizer, self.own), **self.average}


class InOptax:
    """The same with optax."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.own: dict[str, Any] = {name: jnp.asarray(value) for name, value in START.items()}
        self.average = {f"ema.{name}": value.copy() for name, value in START.items()}
        optimizer = optax.adamw(optax.constant_schedule(LR), *betas, 1e-8, weight_decay=0.0)
        self.state: Any = optimizer.init(self.own)
        self.update: Any = optimizer.update

    def step(self, gradients: Arrays, bug: Bug) -> tuple[Arrays, Mapping[str, Any]]:
        updates, state = self.update(gradients, self.state, self.own)
        self.own = {name: value + updates[name] for name, value in self.own.items()}
        self.state = (state[0]._replace(count=state[0].count + bug.counted), *state[1:])
        values = {name: np.asarray(value) for name, value in self.own.items()}
        self.average = averaged(self.average, values, bug)
        return values, {**state_of_optax(self.state, self.own), **self.average}


def averaged(average: Arrays, values: Arrays, bug: Bug) -> dict[str, np.ndarray]:
    """The averages after a step."""
    if bug.stale:
        return dict(average)
    return {f"ema.{n}": AVERAGING * average[f"ema.{n}"] + (1 - AVERAGING) * value for n, value in values.items()}


def our_config(betas: tuple[float, float]) -> OptimizerConfig:
    return OptimizerConfig(lr=LR, betas=betas, eps=1e-8, weight_decay=0.0, ema_decay=AVERAGING)


def with_bug(state: Mapping[str, Any], before: Mapping[str, Any], bug: Bug) -> dict[str, np.ndarray]:
    """A state of ours, of copies; its averages are those of weights less the weights."""
    found = {name: np.array(host_array(name, value)) for name, value in state.items()}
    found |= {name: value + bug.counted for name, value in found.items() if name.startswith("t.")}
    return found | ({name: before[name] for name in found if name.startswith("ema.")} if bug.stale else {})


class OursInTorch:
    """The optimiser of our trainer."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.own: dict[str, Any] = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
        self.optimizer = ours_in_torch.build_optimizer(self.own, TABLE, our_config(betas))

    def step(self, gradients: Arrays, bug: Bug) -> tuple[Arrays, Mapping[str, Any]]:
        before = {n: v.numpy().copy() for n, v in ours_in_torch.get_optimizer_state(self.optimizer, self.own).items()}
        for name, tensor in self.own.items():
            tensor.grad = torch.tensor(gradients[name])
        ours_in_torch.update(self.optimizer, RATES)
        state = with_bug(ours_in_torch.get_optimizer_state(self.optimizer, self.own), before, bug)
        ours_in_torch.set_optimizer_state(self.optimizer, self.own, state, 0)
        values = {name: tensor.detach().numpy().copy() for name, tensor in self.own.items()}
        return values, ours_in_torch.get_optimizer_state(self.optimizer, self.own)


class OursInJax:
    """The same in JAX."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.own: dict[str, Any] = {name: jnp.asarray(value) for name, value in START.items()}
        self.optimizer = ours_in_jax.build_optimizer(self.own, TABLE, our_config(betas))
        self.state = self.optimizer.init(self.own)

    def step(self, gradients: Arrays, bug: Bug) -> tuple[Arrays, Mapping[str, Any]]:
        before = ours_in_jax.get_optimizer_state(self.state)
        given = {name: jnp.asarray(value) for name, value in gradients.items()}
        self.own, self.state = ours_in_jax.update(self.optimizer, given, self.state, self.own, RATES)
        state = with_bug(ours_in_jax.get_optimizer_state(self.state), before, bug)
        self.state = ours_in_jax.set_optimizer_state(self.state, state, 0)
        return {name: np.asarray(value) for name, value in self.own.items()}, ours_in_jax.get_optimizer_state(
            self.state
        )


PAIRS = ((InTorch, InOptax), (InTorch, InTorch), (InOptax, InOptax), (OursInTorch, OursInJax), (OursInJax, OursInTorch))


def compared(pair: tuple[Any, Any], bug: Bug = NO_BUG, at: int = 0, transposed: bool = False) -> RunComparison:
    """Two runs, the second with a bug in one step."""

    def trainer(kind: Any, bug: Bug, transposed: bool) -> Any:
        own, values, places = kind(bug.betas), dict(START), iter(range(len(BATCHES)))

        def step(batch: object) -> Step:
            loss, gradients = loss_and_gradients(values, batch)
            found, state = own.step(gradients, bug if next(places) == at else NO_BUG)
            values.update(found)
            shown = [{n: v.T if transposed and v.ndim > 1 else v for n, v in part.items()}
                     for part in (gradients, found, state)]  # fmt: skip
            return Step(loss, *shown)

        return step

    with jax.enable_x64(True):
        trainers = trainer(pair[0], NO_BUG, False), trainer(pair[1], bug, transposed)
        return compare_runs(*trainers, BATCHES, start=START, names=TRANSPOSED if transposed else None, tolerance=1e-9)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_pairs_of_trainers_keep_the_same(pair: tuple[Any, Any], transposed: bool) -> None:
    found = compared(pair, transposed=transposed)
    assert found.equal, found
    assert found.unshared == (("t@1",) if pair == (InTorch, InOptax) else ())


@settings(max_examples=12 if not NIGHTLY else 200)
@given(
    name=st.sampled_from([*BUGS]), pair=st.sampled_from(PAIRS), at=st.integers(0, 2), transposed=st.booleans(),
)  # fmt: skip
def test_the_first_entry_that_differs_is_named(name: str, pair: Any, at: int, transposed: bool) -> None:
    bug = BUGS[name]
    found = compared(pair, bug, at, transposed)
    assert (found.what, found.parameter.partition(".")[0]) == (bug.what, bug.kind), found
    assert found.step == (0 if bug.betas != BETAS else at)
    if not (bug.stale and (at == 0 or pair[1] in (OursInTorch, OursInJax))):
        assert bug.suspect in found.suspect, found


def test_shares_of_later_steps_are_told() -> None:
    """A moment that begins as a's, with another beta from the second step on."""
    found = compared_moments([(0.9, 0.1), (0.9, 0.1)], [(0.9, 0.1), (0.7, 0.3)])
    said = "m: b keeps 0.7 of it and takes 0.3 of the gradient, a keeps 0.9 of it and takes 0.1 of the gradient"
    assert (found.step, found.parameter, found.suspect) == (1, "m.x", said)
    assert compared_moments([(0.9, 0.1)] * 2, [(0.9, 0.1)] * 2).equal


def compared_moments(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> RunComparison:
    def trainer(shares: list[tuple[float, float]]) -> Any:
        def steps() -> Iterator[Step]:
            moment = np.zeros(4)
            for place, (kept, taken) in enumerate(shares):
                gradient = np.cos(np.arange(4.0) * (place + 1))
                moment *= kept
                moment += taken * gradient
                yield Step(1.0, {"x": gradient}, {"x": np.full(4, float(place))}, {"m.x": moment})

        made = steps()
        return lambda _: next(made)

    return compare_runs(trainer(a), trainer(b), [0] * len(a), start={"x": np.full(4, -1.0)})


def test_counts_are_compared_exactly_and_what_does_not_fit_is_refused() -> None:
    def trainer(state: Mapping[str, Any]) -> Any:
        return lambda _: Step(1.0, {}, {"x": np.ones(2), "y": np.ones(2)}, state)

    def runs(a: Mapping[str, Any], b: Mapping[str, Any]) -> RunComparison:
        return compare_runs(trainer(a), trainer(b), [0], start={"x": np.zeros(2), "y": np.zeros(2)})

    found = runs({"t.x": 3_000_000}, {"t.x": 3_000_001})
    assert (found.parameter, found.suspect) == ("t.x", "t: b counts 3000001 updates, a 3000000")
    assert runs({"m.x": np.ones(2)}, {"v.x": np.ones(2)}).unshared == ("m", "v")
    with pytest.raises(UserError, match=r"state: m\.z: must be a kind, a dot and one of x, y"):
        runs({"m.z": np.ones(2)}, {})
    with pytest.raises(UserError, match=r"state: m\.x: shape = \(3,\): must be \(\) or that of x, \(2,\)"):
        runs({"m.x": np.ones(3)}, {})
    with pytest.raises(UserError, match=r"state: m\.y: only one of the two runs keeps it"):
        runs({"m.x": np.ones(2)}, {"m.x": np.ones(2), "m.y": np.ones(2)})


@pytest.mark.skipif(not NIGHTLY, reason="compiles a model: HYPOTHESIS_PROFILE=nightly")
def test_our_trainers_keep_the_same() -> None:
    from kempnerforge_jax.training.train import Trainer as JaxTrainer
    from kempnerforge_torch.training.train import Trainer as TorchTrainer

    flags = ["--train.mixed_precision=fp32", "--train.max_steps=9", "--train.compile_model=false",
             "--optimizer.ema_decay=0.9", "--train.seq_len=8",
             "--model.max_seq_len=8", "--model.dim=16", "--model.n_heads=2"]  # fmt: skip
    config = load_config("debug", flags)
    data = open_data(config)

    def trainer(kind: Any) -> Any:
        own = kind(config)

        def step(place: Any) -> Step:
            loss = float(own.step([data.batch(place)])["loss"])
            state = own.state()
            return Step(loss, {}, {n: np.array(v) for n, v in state.weights.items()}, state.optimizer)

        return step, {name: np.array(value) for name, value in own.state().weights.items()}

    (a, start), (b, _) = trainer(TorchTrainer), trainer(JaxTrainer)
    found = compare_runs(a, b, [0, 1, 2], start=start, tolerance=1e-2)
    assert found.equal, found
    assert found.unshared == ()
