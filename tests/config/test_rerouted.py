"""A choice of experts that rounding made otherwise excuses what follows from it, and nothing else."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from shared_config.parity.compare import Comparison, compare_traces
from shared_config.parity.traces import Trace, TraceMeta

B, S, D, E = 3, 7, 5, 4
FIRST, SECOND = (f"routing/layers.{layer}.mlp.router.indices" for layer in (0, 1))
BEFORE, OUTPUT, LOGITS, WEIGHT = "forward/token_embedding", "forward/layers.0.mlp", "forward/head", "gradient/w"
NAMES = (BEFORE, FIRST, OUTPUT, "forward/layers.0", SECOND, "forward/layers.1.mlp", LOGITS, "loss/total", WEIGHT)
ROUNDING = 1e-3
PARTS = np.full(2 + B * S + B * D, ROUNDING)
"""Of an activation: its size and scale, and what rounding does to each row and column."""

places = st.tuples(st.integers(0, B - 1), st.integers(0, S - 1))


def traced(tensors: dict[str, Any], capacity: float = 0.0, explained: float = 0.0, has_parts: bool = True) -> Trace:
    """
    Args:
        explained: how many choices of the first router rounding the weights has changed.
    """
    deltas = dict.fromkeys(tensors, ROUNDING) | {FIRST: explained, SECOND: 0.0}
    parts = {name: PARTS for name in tensors if name.startswith("forward/") and has_parts}
    config = f"[model]\nnum_experts = {E}\nmoe_capacity_factor = {capacity}\n[optimizer]\nlr = 0.01\n"
    rounding: dict[str, Any] = {"deltas": {"bfloat16": deltas}, "parts": {"bfloat16": parts}}
    return Trace(tensors, TraceMeta("torch", "cpu", "bfloat16", 3, config=config, **rounding))


def right(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    routes = {name: np.argsort(rng.random((B * S, E)), axis=1)[:, :1] for name in (FIRST, SECOND)}
    activations = {name: rng.standard_normal((B, S, D)) for name in NAMES if name.startswith("forward/")}
    found = routes | activations | {"loss/total": np.array(2.0), WEIGHT: rng.standard_normal((6, D))}
    return {name: found[name] for name in NAMES}


def other_choice(tensors: dict[str, Any], name: str, place: tuple[int, int]) -> dict[str, Any]:
    routes = tensors[name].copy()
    routes[place[0] * S + place[1]] += 1
    return tensors | {name: routes % E}


def moved(tensors: dict[str, Any], name: str, place: Any, by: float) -> dict[str, Any]:
    array = tensors[name].copy()
    array[place] += by
    return tensors | {name: array}


def judged(a: dict[str, Any], b: dict[str, Any], **settings: Any) -> Comparison:
    return compare_traces(traced(a, **settings), traced(b, **settings))


@given(places, st.sampled_from([OUTPUT, "forward/layers.0", LOGITS]), st.integers(0, 99))
def test_the_token_and_those_after_it_may_be_anything(place: tuple[int, int], name: str, seed: int) -> None:
    a = right(seed)
    b = moved(other_choice(a, FIRST, place), name, (place[0], slice(place[1], None)), 1.0)
    assert judged(a, b).equal
    same_routes = judged(a, moved(a, name, (place[0], slice(place[1], None)), 1.0))
    assert [row.name for row in same_routes.failures] == [name]


@pytest.mark.parametrize("has_parts", [True, False])
@pytest.mark.parametrize("name", [BEFORE, OUTPUT, LOGITS])
@given(place=places, elsewhere=places, seed=st.integers(0, 99))
def test_other_tokens_are_judged_as_ever(
    place: tuple[int, int], elsewhere: tuple[int, int], name: str, has_parts: bool, seed: int
) -> None:
    a = right(seed)
    follows = place[0] == elsewhere[0] and place[1] <= elsewhere[1] and name != BEFORE
    found = judged(a, moved(other_choice(a, FIRST, place), name, elsewhere, 1.0), has_parts=has_parts)
    assert [row.name for row in found.failures] == ([] if follows else [name])


@given(places, st.integers(0, 99))
def test_later_routers_may_choose_otherwise_for_the_same_tokens_alone(place: tuple[int, int], seed: int) -> None:
    """However many these are; of others no more than the slack."""
    a = right(seed)
    b = other_choice(a, FIRST, place)
    after = [(place[0], position) for position in range(place[1], S)]
    rest = [(row, position) for row in range(B) for position in range(S) if (row, position) not in after]
    for tokens, equal in ((after, True), (rest[:2], True), (rest[:3], False), ([*after, *rest[:2]], True)):
        wrong = b
        for token in tokens:
            wrong = other_choice(wrong, SECOND, token)
        assert judged(a, wrong).equal == equal


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_excused(bad: float) -> None:
    a = right(0)
    found = judged(a, moved(other_choice(a, FIRST, (1, 2)), OUTPUT, (1, 4, 3), bad))
    assert [row.name for row in found.failures] == [OUTPUT]


@given(places, st.sampled_from([WEIGHT, "loss/total"]), st.integers(0, 99))
def test_sums_over_tokens_may_move_by_their_share(place: tuple[int, int], name: str, seed: int) -> None:
    """A mean by the share of the tokens, of its size; a gradient as random terms add up, of three times its size."""
    a, share = right(seed), (S - place[1]) / (B * S)
    size = float(np.sqrt(np.mean(np.square(a[name]))))
    limit = 3 * share**0.5 * size if name == WEIGHT else share * size
    b = other_choice(a, FIRST, place)
    assert judged(a, moved(b, name, ..., 0.9 * limit)).equal or name == WEIGHT
    assert [row.name for row in judged(a, moved(b, name, ..., 1.1 * limit)).failures] == [name]
    assert judged(a, a | {FIRST: b[FIRST], name: a[name] + 0.5 * limit * np.sign(a[name])}).equal


def test_where_a_choice_takes_the_place_of_others_any_token_may_be_reached() -> None:
    a = right(0)
    b = moved(other_choice(a, FIRST, (1, 2)), OUTPUT, (0, 0), 1.0)
    assert judged(a, b, capacity=1.25).equal
    assert not judged(a, b).equal
    assert not judged(a, a | {FIRST: b[FIRST], OUTPUT: 0 * a[OUTPUT]}, capacity=1.25).equal


def test_what_deltas_explain_is_judged_with_all_tokens() -> None:
    """They hold what follows from another choice already."""
    a = right(0)
    b = moved(other_choice(a, FIRST, (1, 2)), OUTPUT, (1, 2), 1.0)
    assert judged(a, b).equal
    assert [row.name for row in judged(a, b, explained=1.0).failures] == [OUTPUT]


def test_more_choices_than_rounding_makes_excuse_nothing() -> None:
    a = right(0)
    b = moved(a, OUTPUT, (1, 2), 1.0)
    for position in range(3):
        b = other_choice(b, FIRST, (1, position))
    assert [row.name for row in judged(a, b).failures] == [FIRST, OUTPUT]


def test_choices_that_deltas_explain_excuse_those_that_follow_but_no_others() -> None:
    a = right(0)
    b = other_choice(a, FIRST, (1, 2))
    for position in range(2, S):
        b = other_choice(b, SECOND, (1, position))
    b = moved(other_choice(b, SECOND, (0, 4)), LOGITS, (0, 5), 1.0)
    assert judged(a, b, explained=1.0).equal
    assert [row.name for row in judged(a, moved(b, LOGITS, (0, 3), 1.0), explained=1.0).failures] == [LOGITS]
