"""Nothing that has to run in float32 runs in bfloat16, in any module and pass, and in the dtype of its inputs else; no
integer is of less than 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.mutants import BACKENDS, Mutant, in_a_process, mutants_in, not_killed, of_this_run
from tests.mutants_precision import PRECISION_MUTANTS
from tests.parity.precision import idle
from tests.parity.precision_cases import JOBS, job_of
from tests.parity.precision_checks import (
    check_decoding,
    check_forward,
    check_full_precision,
    check_gradients_of,
    check_parts,
    check_steps,
)
from tests.parity.precision_rules import RULES
from tests.parity.rounding_checks import PARTS, check_factors, check_roundings


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_operations_are_those_that_may_be(backend: str) -> None:
    """And every rule that allows some is needed."""
    found = [*check_forward(backend), *check_parts(backend), *check_steps(backend)]
    found += check_gradients_of(backend, *PARTS, "draw")
    assert not idle(found, RULES[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_is_as_exact(backend: str) -> None:
    assert check_decoding(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_a_few_roundings_from_float64(backend: str) -> None:
    check_roundings(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_are_not_rounded(backend: str) -> None:
    check_factors(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_decides_a_route_stays_float32(backend: str) -> None:
    check_full_precision(backend)


def gradients_of(*names: str) -> Callable[[str], object]:
    """A check of parts with their gradients."""
    return lambda backend: check_gradients_of(backend, *names)


SIZES = {
    "dim", "ffn_dim_multiplier", "ffn_hidden_dim", "head_dim", "max_seq_len", "moe_expert_ffn_multiplier", "moe_top_k",
    "n_heads", "n_kv_heads", "n_layers", "vocab_size",
}  # fmt: skip
OF_TABLES = {"rope_scaling", "rope_theta", "window_rope_scaled", "window_rope_theta"}
"""Whatever they are, tables are made and read the same way."""
NOT_COMPUTED = {"family", "init_std", "model_type", "sdpa_backend", "norm_eps"}


def test_every_switch_of_a_model_is_in_some_job() -> None:
    jobs = [job_of(case).model for case in JOBS]
    values = {field: {repr(getattr(job, field)) for job in jobs} for field in vars(jobs[0])}
    assert {field for field, found in values.items() if len(found) == 1} <= SIZES | OF_TABLES | NOT_COMPUTED


CHECKS: dict[str, tuple[Callable[[str], object], ...]] = {
    "model.norm": (gradients_of("RMSNorm", "LayerNorm"),),
    "model.position": (gradients_of("rotation", "rotary tables"),),
    "model.adapter": (gradients_of("pooled"),),
    "model.attention": (
        gradients_of("attend", "probabilities"),
        lambda backend: check_roundings(backend, ["attend", "attend to all"]),
    ),
    "model.factors": (check_factors,),
    "model.mlp": (gradients_of("SwiGLU"),),
    "model.moe": (gradients_of("experts"), lambda backend: check_forward(backend, ["experts, balanced"])),
    "model.dispatch": (gradients_of("experts"),),
    "model.router": (gradients_of("combine weights", "losses of routers"),),
    "model.grouped": (gradients_of("tiled_outer", "looped_outer"),),
    "model.expert_choice": (gradients_of("experts that choose"),),
    "model.linear": (gradients_of("look-up", "bias"),),
    "model.vision": (gradients_of("quick_gelu"),),
    "model.sampling": (gradients_of("draw"),),
    "training.loss": (gradients_of("loss"),),
    "training.objective": (check_full_precision, lambda backend: check_steps(backend, ["relu"])),
    "training.train": (check_full_precision, lambda backend: check_steps(backend, ["relu"])),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_planted_is_found(backend: str, record_property: Callable[[str, object], None]) -> None:
    """Every fifth mutant, in JAX every sixth; all of them under HYPOTHESIS_PROFILE=nightly."""
    mutants = of_this_run(mutants_in(PRECISION_MUTANTS, backend), backend, every=6)
    count, left = len(mutants), in_a_process(survey, backend, mutants)
    record_property("figure", f"narrow mutants of {backend}: {count - len(left)}/{count} killed")
    assert not left


def survey(backend: str, mutants: Sequence[Mutant]) -> dict[str, str]:
    """The tests above have the checks without a bug."""
    return not_killed(mutants, backend, CHECKS)
