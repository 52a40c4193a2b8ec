"""What a recording says of gradients where recorded values and gradients are given: those of each part by itself, as
formulas give them, whatever is fed.

Shapes: N numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.parity import Trace, compare_functions, make_map
from shared_config.parity.foreign.options import target
from shared_config.parity.foreign.site import made_in
from shared_config.parity.traces import TraceMeta

N = 5
NAMES = ("twice@0", "middle", "twice@1", "output")
NIGHTLY = settings.get_current_profile_name() == "nightly"
BLANK = TraceMeta(backend="numpy", device="cpu", dtype="float64", seed=0, config="")
RECORD: dict[str, Any] = {"torch": of_torch.record, "jax": of_jax.record}


def chain(backend: str, split: Callable[..., Any], then: Callable[..., Any] = lambda b: b) -> Callable[..., Any]:
    """Parts that read what stands right before them and what does not, one of them twice under one name.

    Args:
        split: calls a part.
        then: of the value in the middle.
    """
    np_, tap = (torch, of_torch.tap) if backend == "torch" else (jnp, of_jax.tap)

    def function(weights: Any, x: Any) -> Any:
        a = tap("twice", np_.tanh(x * weights["first"]))
        sine = split(lambda a: np_.sin(then(tap("middle", a * weights["second"] + x))), a)
        return a * tap("twice", sine * weights["third"])

    return function


SPLITS: dict[str, tuple[Any, ...]] = {
    "torch": ("torch", lambda part, a: part(a)),
    "torch, computed again": ("torch", lambda part, a: checkpoint(part, a, use_reentrant=False)),
    "torch, computed again in place": ("torch", lambda part, a: checkpoint(part, a, use_reentrant=True)),
    "torch, written to": ("torch", lambda part, a: part(a), lambda b: b.add_(0.0)),
    "jax": ("jax", lambda part, a: part(a)),
    "jax, computed again": ("jax", lambda part, a: jax.checkpoint(part)(a)),
    "jax, jitted": ("jax", lambda part, a: jax.jit(part)(a)),
}


def formulas(w: Any, x: np.ndarray, value: Any, fed: Any) -> dict[str, np.ndarray]:
    """Gradients of the chain where values are given, and some gradients of them."""
    a, b, c, y = (value[name] for name in NAMES)
    found = {"cotangent/output": (y - target("output", y.shape, 0)) / y.size}
    of_y = fed.get("output", found["cotangent/output"])
    found["cotangent/twice@1"] = of_y * a
    of_c = fed.get("twice@1", found["cotangent/twice@1"])
    found["cotangent/middle"] = of_c * np.cos(b) * w["third"]
    of_b = fed.get("middle", found["cotangent/middle"])
    found["cotangent/twice@0"] = of_y * c + of_b * w["second"]
    of_a = fed.get("twice@0", found["cotangent/twice@0"]) * (1 - np.tanh(x * w["first"]) ** 2)
    found |= {"gradient/first": of_a * x, "gradient/second": of_b * a, "gradient/third": of_c * np.sin(b)}
    return found | {"gradient/input.0": of_a * w["first"] + of_b}


@pytest.mark.parametrize("way", SPLITS)
@settings(max_examples=50 if NIGHTLY else 3)
@given(st.sets(st.sampled_from(NAMES)), st.integers(0, 99))
def test_gradients_are_those_of_each_part_by_itself(way: str, known: set[str], seed: int) -> None:
    backend, *parts = SPLITS[way]
    in_place = way.endswith("in place")  # there is no graph inside, in the forward pass
    known = (known | {"twice@0"}) - {"middle"} if in_place else known
    unknown = {"cotangent/middle"} if in_place or way.endswith("written to") else set()
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(N) for name in ("first", "second", "third")}
    x = rng.standard_normal(N)
    value, fed = ({name: rng.standard_normal(N) for name in names} for names in (NAMES, sorted(known)))
    plain = Trace({f"forward/{name}": one for name, one in value.items()}, BLANK)
    other = dataclasses.replace(plain, tensors={**plain.tensors, **{f"cotangent/{n}": one for n, one in fed.items()}})
    found = RECORD[backend](chain(backend, *parts), (x,), weights=weights, deltas=False, refeed=other)
    if not known:
        assert not any(name.startswith(("cotangent", "gradient")) for name in found.tensors)
        return
    for name, right in formulas(weights, x, value, fed).items():
        if name not in unknown:
            np.testing.assert_allclose(found.array(name), right, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("backend", RECORD)
def test_a_gradient_is_made_in_all_that_takes_what_it_is_of(backend: str) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(N) for name in ("first", "second", "third")}
    function, x = chain(*SPLITS[backend]), rng.standard_normal(N)
    plain = RECORD[backend](function, (x,), weights=weights, deltas=False)
    fed = RECORD[backend](function, (x,), weights=weights, deltas=False, refeed=plain)
    wrong = RECORD[backend](function, (x,), weights={**weights, "third": 2 * weights["third"]}, refeed=plain)
    places = {
        "cotangent/twice@0": "middle or output",
        "cotangent/middle": "twice",
        "cotangent/twice@1": "output",
        "cotangent/output": "what takes output",
        "gradient/first": "twice",
        "gradient/third": "twice",
        "gradient/input.0": "twice or middle",
        "forward/middle": "middle",
    }
    for name, place in places.items():
        assert set(made_in(name, (plain.meta, fed.meta)).split(" or ")) == set(place.split(" or ")), name
    assert made_in("cotangent/middle", (plain.meta,)) == "what takes middle"
    names = make_map({"third": "last"}, {"middle": "centre"})
    moved = names.apply_to_trace(fed).meta
    assert made_in("cotangent/centre", (moved,)) == "twice"
    assert made_in("gradient/second", (moved,)) == "centre"
    assert made_in("gradient/last", (moved,)) == "twice"
    found = compare_functions(plain, wrong)
    assert [row.name for row in found.failures] == ["forward/twice@1", "cotangent/middle"]
    assert "backward: made in twice" in found.notes
    assert any("and the gradients of their outputs" in note for note in found.notes)


class Deep(nn.Module):
    """Two layers, computed again in the backward pass or not."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layers, self.again = nn.ModuleList(nn.Sequential(nn.Linear(N, N), nn.Tanh()) for _ in range(2)), again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return x


def test_modules_that_are_computed_again_are_given_the_same_values_again() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, N)).astype(np.float32)
    shapes = {name: tuple(one.shape) for name, one in Deep(False).named_parameters()}
    drawn = [{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for _ in range(2)]
    other = of_torch.record(Deep(False), (x,), weights=drawn[0], deltas=False)
    once, again = (
        of_torch.record(Deep(again), (x,), weights=drawn[1], deltas=False, refeed=other) for again in (False, True)
    )
    assert once.tensors.keys() == again.tensors.keys()
    assert any(name.startswith("gradient/layers.0") for name in once.tensors)
    for name in once.tensors:
        np.testing.assert_array_equal(again.array(name), once.array(name), err_msg=name)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_small_gradient_that_is_stopped_is_no_noise(stopped: bool) -> None:
    """Also where only the recording that stops it says how far rounding goes: its own never moves."""
    rng = np.random.default_rng(0)
    x, *drawn = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 6), (6, 4), (6, 4)))
    weights = {"large": drawn[0], "small": drawn[1]}

    def function(weights: Any, x: jax.Array, stopped: bool) -> jax.Array:
        small = jax.lax.stop_gradient(weights["small"]) if stopped else weights["small"]
        return x @ weights["large"] + 0.02 * (x @ small)

    a, b = (
        of_jax.record(
            functools.partial(function, stopped=stops), (x,), weights=weights, dtype="bfloat16", deltas=2 * measured
        )
        for stops, measured in ((False, False), (stopped, True))
    )
    assert [row.name for row in compare_functions(a, b).failures] == ["gradient/small"] * stopped
