"""Products in FP8: the recipe against the paper's numbers, codes and products against the oracle in both backends, and
the bugs that this must show; training steps near each other, and the same however they are recomputed or scanned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared_config.contract.fp8 import BACKWARD, FLOOR, FORWARD, fits, is_fp8
from shared_config.errors import ConfigError
from shared_config.parity.dtypes import roundoffs_of
from tests.jobs import draw_batch
from tests.mutants import BACKENDS, Mutant, in_a_process, mutants_in, not_killed
from tests.mutants_fp8 import FP8_MUTANTS
from tests.oracle import fp8 as oracle
from tests.parity.fp8_checks import FP8_CHECKS, SIDES, check_codes, drawn, small_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 2.0**-127, 2.0**-91, 2.0**-90, 3e38, np.inf, -np.inf, np.nan)
LOSS, NORM = 1e-3, 2e-2
"""How far two backends in FP8 may be apart, of a few steps: a code that rounds the other way is 2^-4 of its value."""

CHECKS = dict.fromkeys(check for checks in FP8_CHECKS.values() for check in checks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_fp8_is_as_the_contract_says(backend: str, check: Callable[[str], None]) -> None:
    check(backend)


@pytest.mark.skipif(not NIGHTLY, reason="a process for each backend: HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_bugs_are_found(backend: str, record_property: Callable[[str, object], None]) -> None:
    mutants = mutants_in(FP8_MUTANTS, backend)
    count, left = len(mutants), in_a_process(survey, backend, mutants)
    record_property("figure", f"FP8 in {backend}: {count - len(left)}/{count} killed")
    assert not left


def survey(backend: str, mutants: Sequence[Mutant]) -> dict[str, str]:
    return not_killed(mutants, backend, FP8_CHECKS)


def test_formats_are_those_of_the_paper() -> None:
    """As `ml_dtypes` has them, too: every code is the number that its bits say."""
    for format, grid, largest, bits in ((FORWARD, oracle.E4M3, 448, 3), (BACKWARD, oracle.E5M2, 57344, 2)):
        dtype = np.dtype(format.name)
        assert format.largest == grid.values[-1] == float(ml_dtypes.finfo(dtype).max) == largest
        assert format.unit_roundoff == float(ml_dtypes.finfo(dtype).eps) / 2 == 2.0 ** -(bits + 1)
        np.testing.assert_array_equal(np.arange(grid.last + 1, dtype=np.uint8).view(dtype).astype(float), grid.values)
        for scale in (np.float32(FLOOR) * np.float32(1 / largest), np.float32(3.39e38) * np.float32(1 / largest)):
            assert min(scale, 1 / scale) >= np.finfo(np.float32).tiny
        assert 2.0**-126 * largest / FLOOR < grid.values[1] / 2


def test_weights_are_moved_as_far_as_they_are_rounded() -> None:
    """By which the limits of a comparison are made."""
    job = small_job("experts")
    of = {dtype: roundoffs_of(job, dtype) for dtype in ("float32", "bfloat16", "fp8")}
    for name, in_fp8 in (
        ("layers.1.attention.q_proj.weight", 2.0**-4),
        ("layers.2.mlp.shared_expert.up_proj.weight", 2.0**-4),
        ("layers.3.attention.q_proj.weight", 2.0**-8),
        ("layers.1.mlp.experts.0.up_proj.weight", 2.0**-8),
        ("output_head.proj.weight", 2.0**-8),
    ):
        assert [of[dtype](name) for dtype in of] == [2.0**-24, 2.0**-8, in_fp8], name


@given(st.integers(0, 2**32 - 1), st.integers(-126, 120), st.lists(st.sampled_from(SPECIAL), max_size=3))
@example(0, 0, [np.nan])
@example(0, -126, [2.0**-127])
def test_codes_of_any_rows(seed: int, exponent: int, special: list[float]) -> None:
    """Halfway between two codes as well: ties go to the even one."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(oracle.E4M3.values, (8, 16)) * rng.choice([-1, 1], (8, 16))
    rows = np.ldexp(np.where(rng.random((8, 16)) < 0.5, codes * (1 + 2.0**-5), rng.standard_normal((8, 16))), exponent)
    rows[rng.random(8) < 0.5, 0] = np.ldexp(448.0, min(exponent, 118))
    rows[0, : len(special)] = special
    with np.errstate(over="ignore"):
        given = rows.astype(np.float32).astype(ml_dtypes.bfloat16)
    for backend in BACKENDS:
        check_codes(backend, given)


def test_a_row_does_not_depend_on_the_others() -> None:
    """As with a scale for each row, and not with one for all."""
    rows = drawn(5, 4, 16)
    whole = oracle.quantise(rows, oracle.E4M3)[0]
    np.testing.assert_array_equal(oracle.quantise(rows[2:3], oracle.E4M3)[0], whole[2:3])


@pytest.mark.parametrize(("path", "inside"), [
    ("layers.{}.attention.q_proj", True), ("transformer.layers.{}.mlp.down_proj", True),
    ("layers.{}.mlp.experts.0.up_proj", False), ("layers.{}.mlp.experts.text.experts.0.up_proj", False),
    ("layers.{}.mlp.router.gate", False), ("cross_attention_layers.{}.attn.q_proj", False),
    ("vision_encoder.layers.{}.attention.q_proj", False), ("output_head.proj", False),
])  # fmt: skip
def test_the_first_and_the_last_layer_stay_in_bfloat16(path: str, inside: bool) -> None:
    assert [is_fp8(path.format(layer), 12) for layer in range(12)] == [inside and 0 < n < 11 for n in range(12)]


def test_sizes_that_fit_are_multiples_of_16() -> None:
    sizes = (0, 8, 15, 16, 24, 32)
    for found in itertools.product(sizes, repeat=3):
        assert fits(*found) == (found[0] > 0 and not any(size & 15 for size in found)), found


@pytest.mark.parametrize(("change", "said"), [
    ({"model": {"n_layers": 2}}, "train.mixed_precision = 'fp8': needs model.n_layers of 3 or more"),
    ({"model": {"dim": 40, "head_dim": 10}}, "a model.dim that 16 divides; they are 4 and 40"),
    ({"distributed": {"tp": 2}}, "distributed.tp = 2: must be 1 with train.mixed_precision = 'fp8'"),
    ({"distributed": {"cp": 2}}, "distributed.cp = 2: must be 1 with train.mixed_precision = 'fp8'"),
])  # fmt: skip
def test_what_can_not_be_is_refused(change: dict[str, Any], said: str) -> None:
    job = small_job()
    sections = {name: getattr(job, name).replace(**fields) for name, fields in change.items()}
    with pytest.raises(ConfigError) as refusal:
        job.replace(**sections).validate(world_size=2)
    assert said in str(refusal.value)


def steps_of(backend: str, **train: Any) -> dict[str, Any]:
    """Losses and norms of a few steps, and the weights after them."""
    job = small_job(**train)
    trainer = SIDES[backend].module("training.train").Trainer(job, "cpu")
    metrics = [trainer.step([draw_batch(job, seed)]) for seed in range(3)]
    return {
        "loss": np.array([float(one["loss"]) for one in metrics]),
        "norm": np.array([float(one["grad_norm"]) for one in metrics]),
        "weights": trainer.state().weights,
    }


def test_steps_of_the_backends_are_near_each_other() -> None:
    """And not those of bfloat16."""
    torch, jax, plain = steps_of("torch"), steps_of("jax"), steps_of("torch", precision="bf16")
    np.testing.assert_allclose(jax["loss"], torch["loss"], rtol=LOSS)
    np.testing.assert_allclose(jax["norm"], torch["norm"], rtol=NORM)
    assert not np.array_equal(plain["loss"], torch["loss"])


RECOMPUTED = [
    ("torch", {"activation_checkpointing": "full"}),
    ("torch", {"activation_checkpointing": "narrow"}),
    ("torch", {"activation_checkpointing": "selective"}),
    *([("jax", {"activation_checkpointing": "narrow"}), ("jax", {"scan_layers": True}),
       ("jax", {"activation_checkpointing": "full", "scan_layers": True}),
       ("torch", {"compile_model": True, "activation_checkpointing": "selective"})] if NIGHTLY else []),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "options"), RECOMPUTED)
def test_steps_are_the_same_however_they_are_computed(backend: str, options: dict[str, Any]) -> None:
    """To the bit in eager torch; a compiler sums in another order."""
    plain, other = steps_of(backend), steps_of(backend, **options)
    if backend == "torch" and "compile_model" not in options:
        for name, weight in plain["weights"].items():
            np.testing.assert_array_equal(other["weights"][name], weight, err_msg=name)
    np.testing.assert_allclose(other["loss"], plain["loss"], rtol=LOSS)
    np.testing.assert_allclose(other["norm"], plain["norm"], rtol=NORM)
