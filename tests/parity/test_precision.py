"""Nothing that has to run in float32 runs in bfloat16, in any module and pass, and in the dtype of its inputs else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.mutants import BACKENDS, Mutant, planted
from tests.mutants_precision import PRECISION_MUTANTS
from tests.parity.precision import idle
from tests.parity.precision_checks import (
    check_decoding,
    check_forward,
    check_full_precision,
    check_gradients_of,
    check_parts,
    check_steps,
)
from tests.parity.precision_rules import RULES
from tests.parity.rounding_checks import PARTS, check_roundings


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
def test_what_decides_a_route_stays_float32(backend: str) -> None:
    check_full_precision(backend)


def gradients_of(*names: str) -> Callable[[str], object]:
    """A check of parts with their gradients."""
    return lambda backend: check_gradients_of(backend, *names)


CHECKS: dict[str, tuple[Callable[[str], object], ...]] = {
    "model.norm": (gradients_of("RMSNorm", "LayerNorm"),),
    "model.position": (gradients_of("rotation", "rotary tables"),),
    "model.adapter": (gradients_of("pooled"),),
    "model.attention": (
        gradients_of("attend", "probabilities"),
        lambda backend: check_roundings(backend, ["attend", "attend to all"]),
    ),
    "model.mlp": (gradients_of("SwiGLU"),),
    "model.moe": (gradients_of("experts", "experts of an accelerator"),),
    "model.router": (gradients_of("combine weights", "losses of routers"),),
    "model.looped": (gradients_of("experts"),),
    "model.grouped": (gradients_of("tiled_outer", "looped_outer"),),
    "model.moma": (gradients_of("experts that choose"),),
    "model.embedding": (gradients_of("look-up"),),
    "model.linear": (gradients_of("look-up", "bias"),),
    "model.vision": (gradients_of("quick_gelu"),),
    "model.generate": (gradients_of("draw"),),
    "training.loss": (gradients_of("loss"),),
    "training.train": (check_full_precision, lambda backend: check_steps(backend, ["relu"])),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_planted_is_found(backend: str, record_property: Callable[[str, object], None]) -> None:
    mutants = [mutant for mutant in PRECISION_MUTANTS if getattr(mutant, backend) is not None]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        survivors = pool.submit(surviving, backend).result()
    record_property("figure", f"narrow mutants of {backend}: {len(mutants) - len(survivors)}/{len(mutants)} killed")
    assert not survivors


def surviving(backend: str) -> list[str]:
    """To be called in a process of its own: operators that a mutated module registers replace the real ones."""
    for check in dict.fromkeys(check for checks in CHECKS.values() for check in checks):
        check(backend)
    mutants = [mutant for mutant in PRECISION_MUTANTS if getattr(mutant, backend) is not None]
    return [str(mutant) for mutant in mutants if not is_found(mutant, backend)]


def is_found(mutant: Mutant, backend: str) -> bool:
    """Whether a check says so, by its assertion."""
    with planted(mutant, backend):
        for check in CHECKS[mutant.component]:
            try:
                check(backend)
            except AssertionError:
                return True
            except Exception as error:
                raise RuntimeError(f"{mutant}: crashes, and shows nothing") from error
    return False
