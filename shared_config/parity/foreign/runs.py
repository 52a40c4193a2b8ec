"""Two training runs, step by step: what parts first, and which of the usual suspects it is.

A suspect is named only where AdamW (arXiv:1711.05101) with it, and nothing else changed, makes of the second run's own
gradients the parameters that it has; of a state, only where the run's own numbers show it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from shared_config.contract.moments import AVERAGE
from shared_config.errors import UserError
from shared_config.parity.foreign import states
from shared_config.parity.foreign.mapping import Map
from shared_config.parity.foreign.states import Kept, Kinds
from shared_config.parity.foreign.transfer import transfer
from shared_config.parity.numerics import as_float64, relative_error

Arrays = Mapping[str, np.ndarray]

LOSS, GRADIENTS, STATE, UPDATE, AVERAGES = "loss", "gradients", "state", "update", "averages"
EPS = (0.0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
REPRODUCED = 1e-4
"""Relative error of changes of parameters up to which a suspect is confirmed: those of float32."""
BETTER = 0.1
"""Share of the error without the suspect that may be left with it."""


@dataclass(frozen=True)
class Step:
    """What a trainer says of one step.

    Attributes:
        loss: that was differentiated.
        gradients: of the loss, before they are clipped, by parameter.
        parameters: after the step.
        state: of the optimiser after the step, as ``m.<parameter>``; see `states`. Tensors of any library, of a
            parameter's shape or scalars; ``optimizer_state`` of each framework gives it.
    """

    loss: float
    gradients: Arrays
    parameters: Arrays
    state: Mapping[str, object] = field(default_factory=dict)


Trainer = Callable[[object], Step]
"""Takes a batch and does one step."""


@dataclass(frozen=True)
class AdamW:
    """The optimiser that both runs were to have.

    Attributes:
        lr: of each step.
        decayed: names of the parameters that decay.
        clip: largest norm of all gradients together; 0 for none.
        corrected: whether moments are divided by 1 - beta^step.
        decoupled: whether decay is apart from the gradient, as in AdamW, or added to it, as in Adam with L2.
        stored: dtype of the parameters between steps; "" for float64.
    """

    lr: tuple[float, ...]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decayed: frozenset[str] = frozenset()
    clip: float = 0.0
    corrected: bool = True
    decoupled: bool = True
    stored: str = ""

    def parameters_after(self, start: Arrays, gradients: Sequence[Arrays]) -> dict[str, np.ndarray]:
        """Parameters after a step for each set of gradients, in float64."""
        values = {name: as_float64(value) for name, value in start.items()}
        first, second = ({name: np.zeros(value.shape) for name, value in values.items()} for _ in range(2))
        for step, given in enumerate(gradients, 1):
            norm = norm_of(given)
            factor = min(1.0, self.clip / norm) if self.clip and norm else 1.0
            for name, value in values.items():
                decay = self.weight_decay * (name in self.decayed)
                gradient = factor * as_float64(given[name]) + (0.0 if self.decoupled else decay * value)
                first[name] = self.betas[0] * first[name] + (1 - self.betas[0]) * gradient
                second[name] = self.betas[1] * second[name] + (1 - self.betas[1]) * gradient**2
                mean, square = (
                    moment / (1 - beta**step if self.corrected else 1.0)
                    for moment, beta in ((first[name], self.betas[0]), (second[name], self.betas[1]))
                )
                change = mean / (np.sqrt(square) + self.eps) + (decay * value if self.decoupled else 0.0)
                values[name] = self._stored(value - self.lr[step - 1] * change)
        return values

    def _stored(self, value: np.ndarray) -> np.ndarray:
        dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "": np.float64}[self.stored]
        return value.astype(dtype).astype(np.float64)


@dataclass(frozen=True)
class RunComparison:
    """What comparing two runs found.

    Attributes:
        losses, norms: of each step, of both; norms of all gradients together.
        step: the first that differs, from 0; None if none does.
        what: "loss", "gradients", "state" (but averages of weights), "update" or "averages": what differs first in that
            step; "" if nothing does.
        parameter: whose gradient or update parts first, or the entry of the state.
        error: relative, of it.
        suspect: in words, where one is confirmed.
        unshared: kinds of a state that only one of the two keeps, which are not compared.
    """

    losses: tuple[tuple[float, float], ...]
    norms: tuple[tuple[float, float], ...]
    step: int | None = None
    what: str = ""
    parameter: str = ""
    error: float = 0.0
    suspect: str = ""
    unshared: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether the runs are the same."""
        return self.step is None


@dataclass
class _Run:
    start: Arrays
    steps: list[Step] = field(default_factory=list)
    states: list[Kinds] = field(default_factory=list)

    @property
    def kept(self) -> Kept:
        """The state after the last step."""
        return Kept(self.states[-1], self.states[-2] if len(self.states) > 1 else {}, self.steps[-1].gradients)


def compare_runs(
    trainer_a: Trainer,
    trainer_b: Trainer,
    batches: Sequence[object],
    *,
    start: Arrays,
    names: Map | None = None,
    recipe: AdamW | None = None,
    tolerance: float = 1e-5,
) -> RunComparison:
    """Train both on the same batches until they part.

    Args:
        start: parameters before the first step, of the first.
        names: from the names and layouts of the first to those of the second.
        recipe: the optimiser that both were to have, with the names of the second; None to look for no suspects.
        tolerance: relative error of losses, gradients and changes of parameters, and half that of states; 1e-5 is for
            float32, 1e-9 for float64. Counts are compared exactly.

    Raises:
        UserError: the two don't have the same parameters, or the same of a kind of state, or the recipe has too few
            steps.
    """
    if recipe is not None and len(recipe.lr) < len(batches):
        raise UserError(f"recipe.lr: has {len(recipe.lr)} steps: must be {len(batches)} or more")
    a, b = _Run(transfer(start, names)), _Run(transfer(start, names))
    losses: list[tuple[float, float]] = []
    norms: list[tuple[float, float]] = []
    alone: tuple[str, ...] = ()
    for place, batch in enumerate(batches):
        found_a, found_b = trainer_a(batch), trainer_b(batch)
        step_a = Step(found_a.loss, transfer(found_a.gradients, names), transfer(found_a.parameters, names))
        if step_a.parameters.keys() != found_b.parameters.keys():
            others = sorted(step_a.parameters.keys() ^ found_b.parameters.keys())
            raise UserError(f"{', '.join(others)}: only one of the two runs has such a parameter; a map may name it")
        a.steps.append(step_a)
        b.steps.append(found_b)
        a.states.append(states.aligned(found_a.state, found_a.parameters, names))
        b.states.append(states.aligned(found_b.state, found_b.parameters))
        alone = states.unshared(a.states[-1], b.states[-1])
        losses.append((step_a.loss, found_b.loss))
        norms.append((norm_of(step_a.gradients), norm_of(found_b.gradients)))
        what, name, error = _first_difference(a, b, tolerance)
        if what:
            said = next(_suspects(what, name, a, b, recipe, tolerance), "")
            return RunComparison(tuple(losses), tuple(norms), place, what, name, error, said, alone)
    return RunComparison(tuple(losses), tuple(norms), unshared=alone)


def norm_of(gradients: Arrays) -> float:
    """Of all gradients together."""
    return math.sqrt(sum(float(np.sum(np.square(as_float64(value)))) for value in gradients.values()))


def _first_difference(a: _Run, b: _Run, tolerance: float) -> tuple[str, str, float]:
    """(what, parameter or entry, relative error) of the last step of both."""
    last_a, last_b = a.steps[-1], b.steps[-1]
    error = relative_error(last_b.loss, last_a.loss)
    if not error <= tolerance:
        return LOSS, "", error
    moments_a, averages_a = (
        {k: own for k, own in a.states[-1].items() if (k == AVERAGE) is ema} for ema in (False, True)
    )
    found = (
        (GRADIENTS, lambda: _first_of(last_a.gradients, last_b.gradients, tolerance)),
        (STATE, lambda: states.first_difference(moments_a, b.states[-1], tolerance)),
        (UPDATE, lambda: _first_of(_changes(a), _changes(b), tolerance)),
        (AVERAGES, lambda: states.first_difference(averages_a, b.states[-1], tolerance)),
    )
    for what, first in found:
        name, error = first()
        if name:
            return what, name, error
    return "", "", 0.0


def _first_of(a: Arrays, b: Arrays, tolerance: float) -> tuple[str, float]:
    errors = ((name, relative_error(b[name], value)) for name, value in a.items())
    return next(((name, error) for name, error in errors if not error <= tolerance), ("", 0.0))


def _changes(run: _Run) -> dict[str, np.ndarray]:
    """Of parameters, in the last step."""
    before = run.steps[-2].parameters if len(run.steps) > 1 else run.start
    return {name: as_float64(value) - as_float64(before[name]) for name, value in run.steps[-1].parameters.items()}


def _suspects(what: str, name: str, a: _Run, b: _Run, recipe: AdamW | None, tolerance: float) -> Iterator[str]:
    """What is confirmed, in words."""
    last_a, last_b = a.steps[-1], b.steps[-1]
    if what in (STATE, AVERAGES):
        yield from states.state_suspects(name, a.kept, b.kept, tolerance)
    if what in (LOSS, GRADIENTS):
        ratios = [
            norm_of({"": last_b.gradients[n]}) / norm_of({"": v}) for n, v in last_a.gradients.items() if np.any(v)
        ]
        scaled = {name: value * ratios[0] for name, value in last_a.gradients.items()} if ratios else {}
        if scaled and all(
            relative_error(last_b.gradients[name], value) <= 10 * tolerance for name, value in scaled.items()
        ):
            yield (
                f"all gradients of b are {ratios[0]:.6g} times those of a: another mean (of micro-batches, or over "
                "tokens), or clipping before they were recorded"
            )
    elif what != AVERAGES and recipe is not None and _distance(recipe, a) <= REPRODUCED:
        allowed = min(REPRODUCED, BETTER * _distance(recipe, b))
        errors = {said: _distance(variant, b) for said, variant in _variants(recipe, b)}
        said = min(errors, key=errors.__getitem__)  # the first of those that come to the same
        if errors[said] <= allowed:
            yield said


def _variants(recipe: AdamW, run: _Run) -> Iterator[tuple[str, AdamW]]:
    """The usual suspects."""
    replace = dataclasses.replace
    for eps in EPS:
        if eps != recipe.eps:
            yield f"eps: b has {eps:g} where {recipe.eps:g} was to be", replace(recipe, eps=eps)
    for said, lr in (
        ("b is a step ahead", (*recipe.lr[1:], recipe.lr[-1])),
        ("b is a step behind", (recipe.lr[0], *recipe.lr[:-1])),
        ("b begins at 0", (0.0, *recipe.lr[:-1])),
    ):
        yield f"schedule: {said}", replace(recipe, lr=lr)
    yield "clipping: b does not clip", replace(recipe, clip=0.0)
    for clip in (1.0,) if not recipe.clip else ():
        yield f"clipping: b clips to {clip:g}", replace(recipe, clip=clip)
    yield "bias correction: b has none", replace(recipe, corrected=False)
    yield "weight decay: b adds it to the gradient", replace(recipe, decoupled=False)
    yield "weight decay: b has none", replace(recipe, weight_decay=0.0)
    yield "weight decay: b decays all parameters", replace(recipe, decayed=frozenset(run.start))
    matrices = frozenset(name for name, value in run.start.items() if np.ndim(value) > 1)
    yield "weight decay: b decays matrices alone", replace(recipe, decayed=matrices)
    for name in run.start:
        verb = "does not decay" if name in recipe.decayed else "decays"
        yield f"weight decay: b {verb} {name}", replace(recipe, decayed=recipe.decayed ^ {name})
    for dtype in ("bfloat16", "float16"):
        yield f"parameters: b keeps them in {dtype} between steps", replace(recipe, stored=dtype)


def _distance(recipe: AdamW, run: _Run) -> float:
    """How far what an optimiser makes of a run's gradients is from its parameters: the largest relative error of all
    that has changed.
    """
    found = recipe.parameters_after(run.start, [step.gradients for step in run.steps])
    last = run.steps[-1].parameters
    starts = {name: as_float64(run.start[name]) for name in last}
    return max(relative_error(as_float64(last[n]) - start, found[n] - start) for n, start in starts.items())
