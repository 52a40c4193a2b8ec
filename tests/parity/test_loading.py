"""Models that get their weights: no initial value is drawn, each tensor is read once, as the rank needs it, and has the
bits that a model with drawn values has once it is given them; and no more than a stack of experts is copied at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.decoding import DTYPES
from shared_config.contract.parameters import parameter_table
from shared_config.interchange.huggingface import (
    from_huggingface,
    to_huggingface,
    views_from_huggingface,
)
from shared_config.interchange.parts import Parts, StateParts, whole
from shared_config.parity.numerics import difference
from shared_config.parity.request import make_request
from shared_config.parity.validation import validation_weights
from tests.mutants import BACKENDS
from tests.oracle import transformer as oracle
from tests.parity.fp8_checks import SIDES, small_job
from tests.parity.loading_checks import MIXTURE, check_given, check_stacks, nothing_drawn
from tests.tolerance import BFLOAT16_K, FORWARD_K, SAME_FUNCTION, assert_within, perturbation_delta, unit_roundoff

KINDS = ("dense", "packed experts", "mot")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_given_are_not_drawn_first(backend: str, kind: str) -> None:
    check_given(backend, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_computes_in_the_dtype_that_is_asked_for(backend: str, dtype: str) -> None:
    """Of weights in bfloat16, as near to the oracle as rounding the weights in that dtype comes."""
    side, job = SIDES[backend], small_job(precision="fp32")
    weights = {
        name: value.astype(ml_dtypes.bfloat16)
        for name, value in make_request(job, dtype="float64", seed=3).weights.items()
    }
    tokens = np.random.default_rng(0).integers(0, job.model.vocab_size, (2, 13)).astype(np.int32)
    exact = {name: value.astype(np.float64) for name, value in weights.items()}

    def logits(values: dict[str, np.ndarray]) -> np.ndarray:
        return oracle.transformer(values, job.model, tokens).logits

    with side.module("training.mixed_precision").arithmetic(dtype) as own, jax.default_matmul_precision("highest"):
        model = side.module("model.build").load_model(job, weights, "cpu", dtype=dtype)
        found = side.run(lambda tokens: model.run(tokens).logits, tokens)
    assert str(found.dtype) == dtype == str(own).removeprefix("torch.")
    roundoff, truth = unit_roundoff(found.dtype), logits(exact)
    if dtype == "float64":
        assert difference(found, truth).relative_error <= SAME_FUNCTION
    else:
        delta = perturbation_delta(logits, exact, roundoff)["output"]
        assert_within(found, truth, delta, BFLOAT16_K if dtype == "bfloat16" else FORWARD_K)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_takes_its_weights_without_drawing_any(backend: str) -> None:
    """And begins as one that has drawn some and was given the same, its optimiser too."""
    side, job = SIDES[backend], small_job("packed experts", precision="fp32")
    weights = make_request(job, dtype="float64", seed=3).weights
    given_state = StateParts(0, {name: whole(name, value) for name, value in weights.items()}, {})
    trainer = side.module("training.train").Trainer
    with nothing_drawn(backend):
        bare = trainer(job, "cpu", draws=False)
        bare.load_state(given_state)
    drawn = trainer(job, "cpu")
    drawn.load_state(given_state)
    found, expected = bare.state(), drawn.state()
    for own, others in ((found.weights, expected.weights), (found.optimizer, expected.optimizer)):
        assert own.keys() == others.keys()
        assert all(own[name].tobytes() == others[name].tobytes() for name in own)
    bare.load_state(expected)
    assert bare.state().optimizer.keys() == expected.optimizer.keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", [{"name": "schedule_free_adamw"}, {"ema_decay": 0.5}], ids=str)
def test_a_trainer_that_only_evaluates_has_no_moments(backend: str, optimizer: dict[str, Any]) -> None:
    """And says of the weights what one that may train says."""
    side = SIDES[backend]
    job = small_job("dense", precision="fp32")
    constant, average = job.scheduler.replace(name="constant"), job.eval.replace(average="ema_decay" in optimizer)
    job = job.replace(optimizer=job.optimizer.replace(**optimizer), scheduler=constant, eval=average)
    weights = make_request(job, dtype="float64", seed=3).weights
    state = StateParts(0, {name: whole(name, value) for name, value in weights.items()}, {})
    trainers = [
        side.module("training.train").Trainer(job, "cpu", draws=False, trains=trains) for trains in (False, True)
    ]
    tokens = np.random.default_rng(0).integers(0, job.model.vocab_size, (2, 13)).astype(np.int32)
    found = []
    for trainer in trainers:
        trainer.load_state(state)
        found.append(float(trainer.evaluate([{"tokens": tokens, "labels": tokens}])["loss"]))
    assert found[0] == found[1]
    assert trainers[0].state().optimizer == {}
    assert trainers[1].state().optimizer != {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_than_a_stack_of_experts_is_copied_at_a_time(backend: str) -> None:
    check_stacks(backend)


class Untouched(np.ndarray):
    """Values that may be looked at, but not read."""

    def __getitem__(self, index: Any) -> Any:
        assert index is None, f"{index} was read"
        return super().__getitem__(index)


@given(st.data())
def test_a_box_of_packed_experts_reads_only_those_that_it_holds(data: st.DataObject) -> None:
    config = MIXTURE.model.replace(n_layers=1, dim=8, n_heads=2, n_kv_heads=1)
    foreign = to_huggingface(validation_weights(parameter_table(config), 1), config)
    packed = from_huggingface(foreign, config)
    name = data.draw(st.sampled_from([name for name in packed if name.endswith("_w")]))
    sides = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in packed[name].shape]
    box = tuple(slice(start, stop) for start, stop in sides)
    held = {f".experts.{number}." for number in range(*sides[0])}
    for other, values in foreign.items():
        if ".experts." in other and not any(place in other for place in held):
            foreign[other] = values.view(Untouched)
    views = views_from_huggingface(foreign, config)[name]
    assert isinstance(views, Parts)
    np.testing.assert_array_equal(views[box], packed[name][box])
