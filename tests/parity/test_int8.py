"""Weights that are held as int8: each within half a step of what it was, both backends the same function of them,
logits as near as moves of the weights within half a step bring them, and the bugs that this must show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.int8 import is_int8, quantised
from shared_config.parity.numerics import difference
from tests.mutants import BACKENDS, Mutant, in_a_process, mutants_in, not_killed
from tests.mutants_int8 import INT8_MUTANTS
from tests.parity.fp8_checks import SIDES, small_job
from tests.parity.int8_checks import (
    INT8_CHECKS,
    NIGHTLY,
    check_held,
    check_logits,
    check_refusals,
    held_names,
    logits_of,
    steps_of,
    stood_for,
    weights_of,
)

K, RUNS = 2.0, 3
"""Errors of logits in units of what moves of up to half a step do; 0.94 was the most."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [check_held, check_logits, check_refusals])
def test_int8_is_as_the_contract_says(backend: str, check: Callable[[str], None]) -> None:
    check(backend)


@pytest.mark.skipif(not NIGHTLY, reason="a process for each backend: HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_bugs_are_found(backend: str, record_property: Callable[[str, object], None]) -> None:
    mutants = mutants_in(INT8_MUTANTS, backend)
    count, left = len(mutants), in_a_process(survey, backend, mutants)
    record_property("figure", f"int8 in {backend}: {count - len(left)}/{count} killed")
    assert not left


def survey(backend: str, mutants: Sequence[Mutant]) -> dict[str, str]:
    return not_killed(mutants, backend, INT8_CHECKS)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(5, 7), (3, 7, 5)]), st.integers(-90, 90))
def test_codes_are_within_half_a_step(seed: int, shape: tuple[int, ...], exponent: int) -> None:
    """A step is a 127th of the largest weight of an output; an output of zeros has codes 0; no output depends on the
    others.
    """
    rng = np.random.default_rng(seed)
    weight = np.ldexp(rng.standard_normal(shape) * np.exp2(rng.uniform(-8, 8, shape)), exponent).astype(np.float32)
    weight = np.moveaxis(weight, 1, -1)
    weight[..., 1, :] = 0
    weight = np.moveaxis(weight, -1, 1)
    codes, scales = quantised(weight, "w")
    steps = steps_of(weight)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32
    assert scales.shape == steps.shape
    assert np.abs(codes.astype(int)).max() <= 127
    np.testing.assert_allclose(scales[steps > 0], steps[steps > 0], rtol=2.0**-23)
    assert (np.abs(codes * scales.astype(float) - weight) <= steps * (0.5 + 2.0**-15)).all()
    last = np.s_[-1:] if len(shape) == 2 else np.s_[..., -1:]
    np.testing.assert_array_equal(quantised(weight[last], "w")[0], codes[last])


def test_codes_are_the_nearest_multiples_of_a_127th() -> None:
    """Ties go to the even one; of packed experts (expert, in, out) a scale belongs to an output, too."""
    weight = np.array([[127, 0.5, 1.5, -2.5, -126.6, 0], [2, 3, -254, 5, 6, 0.9]], np.float32)
    expected = [[127, 0, 2, -2, -127, 0], [1, 2, -127, 2, 3, 0]]
    for held, axis in ((weight, 0), (weight.T[None], 2)):
        codes, scales = quantised(held, "w")
        assert scales.flatten().tolist() == [1, 2]
        assert scales.shape[axis] == 2
        assert (codes if axis == 0 else codes[0].T).tolist() == expected


@pytest.mark.parametrize("kind", ["dense", "packed experts", "mot"])
def test_logits_are_as_near_as_half_a_step_brings_them(kind: str) -> None:
    weights, rng = weights_of(kind), np.random.default_rng(1)
    held = held_names(list(weights))
    truth = logits_of("torch", kind, weights, int8=False)
    deltas = []
    for _ in range(RUNS):
        moved = {
            name: weight + rng.uniform(-0.5, 0.5, weight.shape) * steps_of(weight) if name in held else weight
            for name, weight in weights.items()
        }
        deltas.append(difference(logits_of("torch", kind, moved, int8=False), truth).rms_error)
    assert difference(logits_of("torch", kind, weights, int8=True), truth).rms_error <= K * max(deltas)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_those_of_the_numbers_that_codes_stand_for(backend: str) -> None:
    weights, job = weights_of("dense"), small_job("dense", precision="fp32")
    names = held_names(list(weights))
    exact = {name: stood_for(weight) if name in names else weight for name, weight in weights.items()}
    tokens = []
    for name, held, dtype in ((backend, weights, "int8"), ("torch", exact, "float32")):
        model = SIDES[name].module("model.build").load_model(job, held, "cpu", weights_dtype=dtype)
        generate = SIDES[name].module("model.generate").generate
        tokens.append(np.asarray(generate(model, [[1, 2, 3], [4, 5, 6]], 3, temperature=0.0)))
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(("name", "held"), [
    ("layers.0.attention.q_proj.weight", True), ("transformer.layers.3.mlp.experts.2.down_proj.weight", True),
    ("layers.1.mlp.up_w", True), ("cross_attention_layers.0.attn.o_proj.weight", True),
    ("layers.0.attn.v_proj.image.weight", True), ("layers.0.mlp.shared_expert.gate_proj.weight", True),
    ("layers.0.attention.q_proj.bias", False), ("layers.0.mlp.router.gate.weight", False),
    ("token_embedding.embedding.weight", False), ("output_head.proj.weight", False),
    ("layers.0.attention.q_norm.weight", False), ("vision_encoder.layers.0.attention.q_proj.weight", False),
    ("adapter.q_proj.weight", False), ("layers.0.attention.q_proj.weight_scale", False),
])  # fmt: skip
def test_products_of_layers_are_held(name: str, held: bool) -> None:
    assert is_int8(name) == held
