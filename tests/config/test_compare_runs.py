"""Two training runs that part: which step and parameter, and which of the usual suspects, is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from shared_config.errors import UserError
from shared_config.parity import compare_runs, make_map
from shared_config.parity.foreign.runs import AdamW, Step, Trainer

RNG = np.random.default_rng(0)
START = {"w": RNG.standard_normal((5, 3)), "bias": RNG.standard_normal(3), "scale": RNG.uniform(0.5, 1.5, 3)}
BATCHES = [RNG.standard_normal((8, 5)) for _ in range(6)]
RECIPE = AdamW(lr=(1e-3, 3e-3, 2e-3, 1e-3, 5e-4, 1e-4), eps=1e-8, weight_decay=0.1, decayed=frozenset({"w"}), clip=0.5)


def loss_and_gradients(values: Mapping[str, np.ndarray], x: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    own = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    output = torch.tanh(torch.tensor(x) @ own["w"] + own["bias"]) * own["scale"]
    loss = (output - 1).square().mean()
    loss.backward()
    return float(loss.detach()), {name: tensor.grad.numpy() for name, tensor in own.items() if tensor.grad is not None}


def trainer(recipe: AdamW = RECIPE, factor: float = 1.0) -> Trainer:
    """A training by NumPy's AdamW, which the test below holds to torch's."""
    given: list[Mapping[str, np.ndarray]] = []

    def step(batch: object) -> Step:
        assert isinstance(batch, np.ndarray)
        loss, gradients = loss_and_gradients(recipe.parameters_after(START, given), batch)
        given.append({name: factor * gradient for name, gradient in gradients.items()})
        return Step(loss, given[-1], recipe.parameters_after(START, given))

    return step


def with_torch(batch: object) -> Step:
    """One step of torch's AdamW after another."""
    assert isinstance(batch, np.ndarray)
    loss = (torch.tanh(torch.tensor(batch) @ OWN["w"] + OWN["bias"]) * OWN["scale"] - 1).square().mean()
    OPTIMIZER.zero_grad()
    loss.backward()
    gradients = {name: tensor.grad.numpy().copy() for name, tensor in OWN.items() if tensor.grad is not None}
    torch.nn.utils.clip_grad_norm_(OWN.values(), RECIPE.clip)
    lr = RECIPE.lr[STEPS.pop(0)]
    for group in OPTIMIZER.param_groups:
        group["lr"] = lr
    OPTIMIZER.step()
    return Step(float(loss.detach()), gradients, {name: tensor.detach().numpy().copy() for name, tensor in OWN.items()})


OWN = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
OPTIMIZER = torch.optim.AdamW(
    [{"params": [OWN["w"]], "weight_decay": 0.1}, {"params": [OWN["bias"], OWN["scale"]], "weight_decay": 0.0}],
    eps=1e-8,
)
STEPS = list(range(len(BATCHES)))


def test_the_recipe_is_the_adamw_of_torch() -> None:
    found = compare_runs(trainer(), with_torch, BATCHES, start=START, tolerance=1e-5)
    assert found.equal, found
    assert len(found.losses) == len(found.norms) == len(BATCHES)


SUSPECTS = {
    "eps: b has 1e-05": dataclasses.replace(RECIPE, eps=1e-5),
    "schedule: b is a step ahead": dataclasses.replace(RECIPE, lr=(*RECIPE.lr[1:], 1e-4)),
    "schedule: b begins at 0": dataclasses.replace(RECIPE, lr=(0.0, *RECIPE.lr[:-1])),
    "clipping: b does not clip": dataclasses.replace(RECIPE, clip=0.0),
    "bias correction: b has none": dataclasses.replace(RECIPE, corrected=False),
    "weight decay: b adds it to the gradient": dataclasses.replace(RECIPE, decoupled=False),
    "weight decay: b has none": dataclasses.replace(RECIPE, weight_decay=0.0),
    "weight decay: b decays all parameters": dataclasses.replace(RECIPE, decayed=frozenset(START)),
    "weight decay: b decays scale": dataclasses.replace(RECIPE, decayed=frozenset({"w", "scale"})),
    "parameters: b keeps them in bfloat16": dataclasses.replace(RECIPE, stored="bfloat16"),
}


@pytest.mark.parametrize("said", SUSPECTS)
def test_each_suspect_is_named_and_no_other(said: str) -> None:
    found = compare_runs(trainer(), trainer(SUSPECTS[said]), BATCHES, start=START, recipe=RECIPE, tolerance=1e-9)
    assert found.what == "update"
    assert found.suspect.startswith(said), found


def test_a_mean_of_means_is_seen_in_the_gradients_and_what_nothing_explains_is_not_named() -> None:
    found = compare_runs(trainer(), trainer(factor=0.8), BATCHES, start=START, recipe=RECIPE, tolerance=1e-9)
    assert (found.step, found.what, found.parameter) == (0, "gradients", "w")
    assert "all gradients of b are 0.8 times those of a" in found.suspect
    odd = dataclasses.replace(RECIPE, betas=(0.8, 0.99))
    found = compare_runs(trainer(), trainer(odd), BATCHES, start=START, recipe=RECIPE, tolerance=1e-9)
    assert (found.step, found.what, found.suspect) == (1, "update", "")


def test_names_and_recipes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="v, w: only one of the two runs"):
        compare_runs(trainer(), trainer(), BATCHES, start=START, names=make_map({"w": "v"}))
    with pytest.raises(UserError, match=r"recipe\.lr: has 6 steps: must be 7"):
        compare_runs(trainer(), trainer(), [*BATCHES, BATCHES[0]], start=START, recipe=RECIPE)
