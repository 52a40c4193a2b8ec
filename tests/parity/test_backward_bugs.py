"""Bugs in the backward pass alone of ports of transformers' Llama and Mixtral: with the other side's recorded inputs,
and its recorded gradients of outputs, each stands alone, whichever side is fed, also by the command.

Under HYPOTHESIS_PROFILE=nightly; `test_refed_gradients` checks by day what is recorded.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.parity import Trace, compare_functions
from shared_config.parity.foreign.site import made_in
from shared_config.parity.result import EQUAL, WITHIN, Comparison
from tests.cli.processes import run_python
from tests.examples import mixtral_in_jax
from tests.parity import test_mixtral_bugs as of_mixtral
from tests.parity.foreign_bugs import BACKWARD_BUGS, STOP, Bug, with_change
from tests.parity.test_foreign_bugs import foreign, names_of, port

pytestmark = pytest.mark.skipif(
    settings.get_current_profile_name() != "nightly", reason="takes minutes: HYPOTHESIS_PROFILE=nightly"
)
DTYPES = ("float32", "bfloat16")
NORM, SHARES = "cotangent/layers.*.mlp_norm", of_mixtral.SHARES
MIXTRAL_BUGS = {
    "router not trained": (f"{SHARES}, ind", f"{STOP}({SHARES}), ind", {"gradient/layers.*.router", NORM}),
    "shares not trained": (
        '"tk,tke->te", shares_TK',
        f'"tk,tke->te", {STOP}(shares_TK)',
        {"cotangent/layers.*.mlp.router.1"},
    ),
    "down not trained": ('up, layer["down"]', f'up, {STOP}(layer["down"])', {"gradient/layers.*.down"}),
    "gate stopped": ("jax.nn.silu(gate)", f"{STOP}(jax.nn.silu(gate))", {"gradient/layers.*.gate_up", NORM}),
}
"""Text, what stands in its place, and the gradients that are wrong then."""
THEIRS = """from tests.parity.test_foreign_bugs import foreign
from kempnerforge_torch.parity import record


def theirs(**options):
    model, _, tokens, _ = foreign()
    return record(model, {"input_ids": tokens}, **options)
"""
OURS = """

def ours(**options):
    from kempnerforge_jax.parity import record
    from tests.parity.test_foreign_bugs import foreign

    _, sizes, tokens, weights = foreign()
    return record(lambda w, t: llama(w, t, sizes), (tokens,), weights=weights, **options)
"""


@functools.cache
def original(dtype: str) -> Trace:
    model, _, tokens, _ = foreign()
    return of_torch.record(model, {"input_ids": tokens}, dtype=dtype)


def without_numbers(text: str) -> str:
    return re.sub(r"layers\.\d+", "layers.*", text)


def places(found: Comparison) -> list[set[str]]:
    """Of each tensor that differs, where it was made: one of these."""
    made = (made_in(row.name, (found.meta_a, found.meta_b)) for row in found.failures)
    return [set(without_numbers(text).split(" or ")) for text in made]


def both_ways(a: Trace, b: Trace, feed_a: Any, feed_b: Any, names: Any) -> Iterator[Comparison]:
    """Comparisons with either side fed."""
    yield compare_functions(a, feed_b(refeed=a, names=names, deltas=3), names, common=True)
    yield compare_functions(feed_a(refeed=b, names=names.inverse(), deltas=3), b, names, common=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", BACKWARD_BUGS, ids=lambda bug: bug.name)
def test_a_wrong_backward_pass_stands_alone_where_recorded_gradients_are_given(bug: Bug, dtype: str) -> None:
    model, sizes, tokens, weights = foreign()
    module, a = bug.planted(), original(dtype)
    b = port(module, dtype, backward=True)
    free = compare_functions(a, b, names_of(), common=True)
    assert free.first_forward is None
    assert free.first_backward is not None
    feed_a = functools.partial(of_torch.record, model, {"input_ids": tokens}, dtype=dtype)
    feed_b = functools.partial(
        of_jax.record, lambda w, t: module.llama(w, t, sizes), (tokens,), weights=weights, dtype=dtype
    )
    for found in both_ways(a, b, feed_a, feed_b, names_of()):
        assert found.failures
        assert {row.group for row in found.failures} <= {"cotangent", "gradient"}
        assert all(made & set(bug.sites) for made in places(found)), places(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", MIXTRAL_BUGS)
def test_a_wrong_backward_pass_of_experts_stands_alone(bug: str, dtype: str) -> None:
    model, sizes, tokens, weights = of_mixtral.foreign()
    old, new, wrong = MIXTRAL_BUGS[bug]
    module = with_change(mixtral_in_jax, old, new)
    feed_a = functools.partial(of_torch.record, model, {"input_ids": tokens}, dtype=dtype)
    feed_b = functools.partial(
        of_jax.record, lambda w, t: module.mixtral(w, t, sizes), (tokens,), weights=weights, dtype=dtype
    )
    names = mixtral_in_jax.names(sizes, eager=True)
    for found in both_ways(feed_a(deltas=False), feed_b(deltas=False), feed_a, feed_b, names):
        assert {without_numbers(row.name) for row in found.failures} == wrong


@pytest.mark.parametrize(("place", "bug"), [*enumerate(BACKWARD_BUGS)], ids=lambda value: getattr(value, "name", ""))
def test_the_command_finds_it_in_processes_of_their_own(place: int, bug: Bug, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS, encoding="utf-8")
    (tmp_path / "ours.py").write_text(bug.text() + OURS, encoding="utf-8")
    names_of().write(tmp_path / "names.toml")
    given = [str(tmp_path / name) for name in ("theirs.py:theirs", "ours.py:ours", "names.toml", "found.json")]
    options = ["--refeed", "--common", "--dtype", DTYPES[place % 2], "--map", given[2], "--json", given[3]]
    done = run_python("-m", "shared_config.cli", "compare", *given[:2], *options, timeout=3600)
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert wrong_in(found["own inputs"]), "the bug is there without recorded inputs, too"
    alone = found["recorded inputs"]
    said = [note for note in alone["notes"] if note.startswith("backward: made in ")]
    made = without_numbers(said[0].removeprefix("backward: made in ")).split(" or ")
    assert set(made) & set(bug.sites)
    assert {name.partition("/")[0] for name in wrong_in(alone)} <= {"cotangent", "gradient"}


def wrong_in(comparison: Mapping[str, Any]) -> list[str]:
    return [row["name"] for row in comparison["rows"] if row["status"] not in (EQUAL, WITHIN)]
