"""One function five times, a module of PyTorch, NNX and Linen and a function of JAX and NumPy: all recordings agree."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from hypothesis import given, settings
from jax.ad_checkpoint import checkpoint_name
from torch import Tensor, nn

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.errors import UserError
from shared_config.parity import Trace, compare_functions, make_map, read_trace, record, tap
from shared_config.parity.foreign.recorder import FINE, is_exact
from shared_config.parity.foreign.site import site_of

NIGHTLY = settings.get_current_profile_name() == "nightly"
nightly = pytest.mark.skipif(not NIGHTLY, reason="takes seconds: HYPOTHESIS_PROFILE=nightly")
RNG = np.random.default_rng(3)
X = RNG.standard_normal((4, 9, 6)).astype(np.float32)
WEIGHTS = {
    "first": {
        "weight": RNG.standard_normal((6, 10)).astype(np.float32),
        "bias": RNG.standard_normal(10).astype(np.float32),
    },
    "second": {
        "weight": RNG.standard_normal((10, 7)).astype(np.float32),
        "bias": RNG.standard_normal(7).astype(np.float32),
    },
}
FLAT = {f"{name}.{part}": value for name, own in WEIGHTS.items() for part, value in own.items()}
FROM_TORCH = make_map({"*.weight": ("*.weight", "transpose")})


class TorchMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class NnxLinear(nnx.Module):
    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        self.weight, self.bias = nnx.Param(jnp.asarray(weight)), nnx.Param(jnp.asarray(bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...] + self.bias[...]


class NnxMLP(nnx.Module):
    def __init__(self) -> None:
        self.first, self.second = (NnxLinear(**WEIGHTS[name]) for name in ("first", "second"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(7, name="second")(jnp.tanh(linen.Dense(10, name="first")(x)))


def in_jax(weights: Any, x: jax.Array) -> jax.Array:
    hidden = of_jax.tap("first", x @ weights["first"]["weight"] + weights["first"]["bias"])
    hidden = of_jax.tap("second@in", jnp.tanh(hidden))
    return of_jax.tap("second", hidden @ weights["second"]["weight"] + weights["second"]["bias"])


def in_numpy(weights: Any, x: np.ndarray) -> np.ndarray:
    hidden = tap("first", x @ weights["first"]["weight"] + weights["first"]["bias"])
    return tap("second", np.tanh(hidden) @ weights["second"]["weight"] + weights["second"]["bias"])


def torch_mlp() -> TorchMLP:
    model = TorchMLP()
    model.load_state_dict({name: torch.from_numpy(value.T.copy()) for name, value in FLAT.items()})
    return model


def recorded(kind: str, **options: Any) -> Trace:
    if kind == "torch":
        return of_torch.record(torch_mlp(), (X,), **options)
    if kind == "nnx":
        return of_jax.record(NnxMLP(), (X,), **options)
    if kind == "linen":
        flax = {name: {"kernel": own["weight"], "bias": own["bias"]} for name, own in WEIGHTS.items()}
        return of_jax.record(LinenMLP(), (X,), weights={"params": flax}, **options)
    if kind == "jax":
        return of_jax.record(in_jax, (X,), weights=WEIGHTS, **options)
    return record(
        in_numpy, (X,), weights=WEIGHTS, **{k: v for k, v in options.items() if k in ("dtype", "only", "deltas")}
    )


@pytest.mark.parametrize(
    "kind", [pytest.param("nnx", marks=nightly), pytest.param("linen", marks=nightly), "jax", "numpy"]
)
def test_every_kind_of_function_is_recorded_as_the_same(kind: str) -> None:
    names = make_map({"*.weight": ("*.kernel", "transpose")}) if kind == "linen" else FROM_TORCH
    for dtype in ("float64", "bfloat16") if NIGHTLY else ("float32",):
        a, b = recorded("torch", dtype=dtype), recorded(kind, dtype=dtype, deltas=False)
        found = compare_functions(a, b, names, common=True)
        assert found.equal, found.failures
        counts = {group: len(rows) for group, rows in found.groups.items()}
        own = 3 if kind == "numpy" else 4
        assert counts.pop("forward") == own
        assert counts == ({} if kind == "numpy" else {"cotangent": own, "gradient": 5, "loss": 1})
        assert all(row.delta for row in found.rows if row.name != "cotangent/output")
    assert a.meta.extra["exact"] is True


def test_what_only_one_side_has_is_a_difference_unless_it_is_left_out() -> None:
    def untapped(weights: Any, x: jax.Array) -> jax.Array:
        hidden = of_jax.tap("first", x @ weights["first"]["weight"] + weights["first"]["bias"])
        return of_jax.tap("second", jnp.tanh(hidden) @ weights["second"]["weight"] + weights["second"]["bias"])

    a = recorded("torch", dtype="float32")
    b = of_jax.record(untapped, (X,), weights=WEIGHTS, dtype="float32", deltas=False)
    found = compare_functions(a, b, FROM_TORCH)
    assert [row.name for row in found.failures] == ["forward/second@in", "cotangent/second@in"]
    assert "--common" in found.notes[0]
    found = compare_functions(a, b, FROM_TORCH, common=True)
    assert found.equal
    assert found.notes == ("only torch has forward/second@in, cotangent/second@in",)
    with pytest.raises(UserError, match="other values"):
        compare_functions(a, of_torch.record(torch_mlp(), (X + 1,), deltas=False))


@pytest.mark.parametrize("steps", [0, pytest.param(3, marks=nightly)])
def test_a_step_of_any_optimiser_and_a_short_run(steps: int) -> None:
    batches = [(X * (1 + n),) for n in range(steps)]
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    square = lambda output: (output * output).mean()  # noqa: E731
    a = recorded("torch", dtype="float64", loss=square, optimizer=adamw, batches=batches)
    same = optax.adamw(1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)
    b = recorded("jax", dtype="float64", loss=square, optimizer=same, batches=batches, deltas=False)
    found = compare_functions(a, b, FROM_TORCH)
    assert found.equal, found.failures
    assert len(found.groups["updated"]) == 4
    assert ("losses" in found.groups) == bool(steps)
    assert not np.allclose(a.array("updated/first.weight"), FLAT["first.weight"].T, atol=1e-3)
    other = optax.adamw(1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.11)
    wrong = recorded("jax", dtype="float64", loss=square, optimizer=other, batches=batches, deltas=False)
    assert {row.group for row in compare_functions(a, wrong, FROM_TORCH).failures} >= {"updated"}


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Answer:
    logits: Any
    hidden: Any = None
    choices: Any = None


class Branches(nn.Module):
    """Containers of every kind, a module that is called twice, and choices."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.router, self.pick = nn.Linear(6, 6, bias=False), Routes(), Picks()

    def forward(self, x: Tensor, *, scale: float, extra: Any = None) -> Answer:
        assert extra == {"none": None, "word": "kept"}
        pair = self.pick({"pair": Pair(self.once(x), [self.once(x * scale)])})
        logits, choices = self.router(pair["pair"].left + pair["pair"].right[0])
        return Answer(logits, hidden=(pair["pair"].left, None), choices=choices)


class Routes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.argmax(-1)


class Picks(nn.Module):
    def forward(self, given: dict[str, Pair]) -> dict[str, Pair]:
        return {name: Pair(pair.left + 1, [part - 1 for part in pair.right]) for name, pair in given.items()}


def test_containers_repeated_calls_and_integers() -> None:
    arguments = {"x": torch.from_numpy(X), "scale": 0.5, "extra": {"none": None, "word": "kept"}}
    trace = of_torch.record(Branches(), arguments, dtype="float32")
    forward = [name.partition("/")[2] for name in trace.tensors if name.startswith(("forward/", "routing/"))]
    assert forward == [
        "once@0", "once@in", "once@1", "pick.pair.left", "pick.pair.right.0", "router@in", "router.0",
        "router.1.indices", "output.logits", "output.hidden.0", "output.choices.indices",
    ]  # fmt: skip
    assert trace.tensors["routing/router.1.indices"].dtype == np.int64
    assert set(trace.meta.deltas["float32"]) == set(trace.tensors)
    assert site_of("forward/once@in") == "the function itself"
    assert site_of("forward/pick.pair@in.left") == "pick"
    assert site_of("cotangent/pick.pair.left") == "pick.pair.left"
    assert site_of("gradient/once.weight") == "once"


@jax.custom_vjp
def tripled(x: jax.Array) -> jax.Array:
    return of_jax.tap("within", x * 3)


tripled.defvjp(lambda x: (tripled(x), None), lambda _, g: (g * 3,))


def scanned(weights: Any, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return checkpoint_name(jnp.tanh(x @ w), "layer"), jnp.sum(x)

    x, sums = jax.lax.scan(layer, x, weights["w"], reverse=True)
    x = jax.jit(lambda x: of_jax.tap("jitted", {"y": x + 1}))(x)["y"]
    branch = jax.lax.cond(x.sum() > 0, lambda x: of_jax.tap("unseen", x), lambda x: -x, x)
    return tripled(branch) + sums.sum()


def mean_square(y: Any) -> jax.Array:
    return jnp.mean(y * y)


def test_names_are_seen_within_scans_jitted_and_rematerialised_parts_and_change_nothing() -> None:
    weights = {"w": RNG.standard_normal((3, 6, 6)).astype(np.float32)}
    trace = of_jax.record(scanned, (X,), weights=weights, deltas=2, loss=mean_square)
    forward = [name for name in trace.tensors if name.startswith("forward/")]
    assert forward == [f"forward/{name}" for name in ("layer@0", "layer@1", "layer@2", "jitted", "within", "output")]
    loss = lambda w, x: jnp.mean(scanned(w, x) ** 2)  # noqa: E731
    plain, gradient = jax.jit(jax.value_and_grad(loss))(weights, jnp.asarray(X))
    np.testing.assert_allclose(trace.array("loss"), plain, rtol=1e-6)
    np.testing.assert_allclose(trace.array("gradient/w"), gradient["w"], rtol=1e-4, atol=1e-6)
    expected = jax.grad(lambda s: jnp.mean((tripled(s) + 0.0) ** 2))(jnp.asarray(trace.array("forward/jitted")))
    assert trace.array("cotangent/jitted").shape == expected.shape


def wrapped(kind: str) -> nn.Module:
    if kind == "compiled":
        return torch.compile(torch_mlp(), backend="eager")  # type: ignore[return-value]
    if kind == "compiled part":
        model = torch_mlp()
        model.first = torch.compile(model.first, backend="eager")  # type: ignore[assignment]
        return model
    return nn.DataParallel(torch_mlp())


@pytest.mark.parametrize("kind", [pytest.param("compiled", marks=nightly), "compiled part", "parallel"])
def test_wrapped_modules_have_plain_names_and_stay_as_they_are(kind: str) -> None:
    model = wrapped(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = of_torch.record(model, (X,), dtype=None, deltas=False)
    plain = recorded("torch", deltas=2)
    assert list(found.tensors) == list(plain.tensors)
    assert compare_functions(plain, found).equal
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_patterns_statistics_and_files_of_their_own(tmp_path: Path) -> None:
    whole = recorded("torch", dtype="float32", deltas=2)
    some = recorded("torch", dtype="float32", deltas=False, only=["first*", "gradient/*.bias"])
    assert list(some.tensors) == [
        "forward/first", "loss", "cotangent/first", "gradient/first.weight", "gradient/first.bias",
        "gradient/second.bias",
    ]  # fmt: skip
    assert compare_functions(whole, some, common=True).equal
    few = recorded("torch", dtype="float32", deltas=False, above=500)
    assert compare_functions(whole, few).equal
    assert sum(not isinstance(tensor, np.ndarray) for tensor in few.tensors.values()) > 5
    path = tmp_path / "trace.safetensors"
    for chunks in (1000, 500):
        recorded("torch", dtype="float32", deltas=False, path=path, chunks=chunks)
        files = list((tmp_path / "trace.safetensors.chunks").iterdir())
        large = [
            tensor for tensor in whole.tensors.values() if isinstance(tensor, np.ndarray) and tensor.nbytes > chunks
        ]
        assert len(files) == len(large)
    read = read_trace(path)
    assert list(read.tensors) == list(whole.tensors)
    for name, tensor in read.tensors.items():
        np.testing.assert_array_equal(tensor, whole.array(name))
    files[0].unlink()
    with pytest.raises(UserError, match="chunks"):
        read_trace(path)


@pytest.mark.parametrize("cast", ["float", "to", "type"])
def test_casts_to_float32_are_casts_to_float64_where_deltas_are_measured(cast: str) -> None:
    def wide(x: Tensor) -> Tensor:
        return torch.tanh(x.float() if cast == "float" else getattr(x, cast)(torch.float32)).to(x.dtype)

    trace = of_torch.record(wide, (torch.from_numpy(X),), dtype="bfloat16", backward=False, deltas=1)
    assert trace.meta.extra["exact"] is True


def test_the_delta_of_an_update_is_that_of_the_step() -> None:
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
    trace = recorded("torch", dtype="float32", optimizer=adamw, deltas=2)
    sizes = {name: float(np.sqrt(np.mean(np.square(FLAT[name])))) for name in FLAT}
    for name, size in sizes.items():
        assert trace.meta.deltas["float32"][f"updated/{name}"] < 0.1 * 2.0**-24 * size


def test_choices_are_fed_as_well_so_that_what_uses_them_stands_alone() -> None:
    def taken(choose: Any, wrap: Any) -> Callable[..., Any]:
        return lambda x: wrap("taken", x * (wrap("choice", choose(x)) == 2))

    right = record(taken(lambda x: x.argmax(0), tap), (X,), dtype="float32")
    forward: dict[str, Any] = {"backward": False}
    kinds: tuple[tuple[Any, Any, dict[str, Any]], ...]
    kinds = (record, tap, {}), (of_torch.record, of_torch.tap, forward), (of_jax.record, of_jax.tap, forward)
    for recorder, own, options in kinds:
        wrong = taken(lambda x: x.argmin(0), own)
        free = recorder(wrong, (X,), dtype="float32", deltas=False, **options)
        assert {row.name for row in compare_functions(right, free).failures} > {
            "routing/choice.indices",
            "forward/taken",
        }
        alone = compare_functions(right, recorder(wrong, (X,), dtype="float32", refeed=right, deltas=2))
        assert [row.name for row in alone.failures] == ["routing/choice.indices"]


def test_what_rounding_gives_another_shape_has_no_delta_and_all_else_has_one() -> None:
    edges = np.linspace(0.5, 1.5, 11, dtype=ml_dtypes.bfloat16).astype(np.float32)

    def split(x: np.ndarray) -> np.ndarray:
        for place, edge in enumerate(edges):
            if (x >= edge).any():
                tap(f"kept.{place}", x[x >= edge])
        return tap("all", x * 2)

    trace = record(split, (edges,), dtype="bfloat16", deltas=6)
    assert len(trace.tensors) == len(edges) + 2
    assert trace.meta.deltas["bfloat16"].keys() == {"forward/all", "forward/output"}
    assert trace.meta.parts["bfloat16"].keys() <= {"forward/all", "forward/output"}


def narrow(x: Tensor) -> Tensor:
    """Whose numbers pass through NumPy as float32, where nothing widens them."""
    return x.new_tensor(np.tanh(x.detach().numpy().astype(np.float32)).tolist())


def test_a_function_that_can_not_compute_in_float64_is_said_to_and_the_other_deltas_are_used() -> None:
    a = of_torch.record(narrow, (torch.from_numpy(X),), dtype="float32", backward=False)
    b = of_jax.record(jnp.tanh, (X,), dtype="float32", backward=False)
    assert (a.meta.extra["exact"], b.meta.extra["exact"]) == (False, True)
    found = compare_functions(a, b)
    assert found.equal
    assert any("does not compute in float64" in note and "other side" in note for note in found.notes)


class Restless(nn.Linear):
    """A module that halves its weight at each call."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(input)


@pytest.mark.parametrize("deltas", [0, 2])
@pytest.mark.parametrize("optimizer", [None, functools.partial(torch.optim.SGD, lr=0.1)])
@pytest.mark.parametrize("given", [False, True])
def test_weights_stay_as_they_are_where_a_module_or_a_step_changes_its_own(
    deltas: int, optimizer: Any, given: bool
) -> None:
    model = Restless(6, 3)
    before = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    values = {name: value.copy() for name, value in before.items()}
    trace = of_torch.record(model, (X,), deltas=deltas, optimizer=optimizer, weights=values if given else None)
    for name, value in model.named_parameters():
        np.testing.assert_array_equal(value.detach().numpy(), before[name])
        np.testing.assert_array_equal(values[name], before[name])
    halved = X @ before["weight"].T / 2 + before["bias"]
    np.testing.assert_allclose(trace.array("forward/output"), halved, rtol=1e-5, atol=1e-5)
    if deltas:
        same = of_torch.record(model, (X,), deltas=deltas, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
        assert trace.meta.deltas["float32"]["forward/output"] == same.meta.deltas["float32"]["forward/output"]


class Noting(nn.Linear):
    """Notes what it is given in containers of every kind, two of which are one."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.shapes: list[int] = []
        self.same, self.by_name = self.shapes, dict[str, int]()
        self.kinds, self.ordered = set[str](), OrderedDict[str, int]()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert self.same is self.shapes
        self.shapes.append(x.ndim)
        self.by_name["x"] = self.ordered["x"] = len(self.same)
        self.kinds.add("x")
        return super().forward(x)


def test_what_a_module_notes_as_it_is_recorded_is_not_noted_in_it() -> None:
    model = Noting()
    of_torch.record(nn.Sequential(model), (X,), deltas=False)
    assert not any((model.shapes, model.by_name, model.kinds, model.ordered))


def test_weights_are_taken_by_name_and_others_are_refused() -> None:
    twice = {name: value.T * 2 for name, value in FLAT.items()}
    trace = of_torch.record(torch_mlp(), (X,), weights=twice, deltas=False)
    assert not np.allclose(trace.array("forward/first"), recorded("torch", deltas=False).array("forward/first"))
    with pytest.raises(UserError, match=r"second\.bias: missing"):
        of_torch.record(torch_mlp(), (X,), weights={n: v for n, v in twice.items() if n != "second.bias"})
    with pytest.raises(UserError, match=r"first\.bias: shape"):
        of_jax.record(NnxMLP(), (X,), weights={**FLAT, "first.bias": np.zeros(3, np.float32)})


@pytest.mark.parametrize("module", [of_torch, of_jax])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float8"}, "dtype = 'float8': must be one of float64"),
        ({"above": -1}, "above = -1"),
        ({"batches": [(X,)]}, "a run needs an optimizer"),
        ({"chunks": 0, "path": "x"}, "chunks = 0"),
    ],
)
def test_what_can_not_be_asked_is_refused(module: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    function: Callable[..., Any] = torch_mlp() if module is of_torch else NnxMLP()
    if "path" in options:
        options = {**options, "path": tmp_path / "x"}
    with pytest.raises(UserError, match=said):
        module.record(function, (X,), **options)
    assert not list(tmp_path.iterdir())


@settings(max_examples=6)
@given(
    letter=st.sampled_from("xyz"), place=st.integers(0, 5), section=st.sampled_from(["weights", "activations"]),
    backend=st.sampled_from([of_torch, of_jax]),
)  # fmt: skip
def test_what_a_map_names_and_nothing_has_is_said(letter: str, place: int, section: str, backend: Any) -> None:
    """A pattern with a letter too many; those that fit are not mentioned, nor any of a trace of parts."""

    def function(weights: Any, x: Any, rows: Any) -> Any:
        return backend.tap("second", backend.tap("first", x[rows] @ weights["matrix"]) * 2)

    inputs = np.ones((2, 3), np.float32), np.array([1, 0])
    record = functools.partial(backend.record, function, inputs, deltas=1)
    weights = {"matrix": np.eye(3, dtype=np.float32)}
    trace = record(weights=weights)
    right = {
        "weights": {"matrix": "matrix", "input.1": "input.1"},
        "activations": {"first": "first", "seco*": "seco*", "output": "output"},
    }
    assert not any("map" in note for note in compare_functions(trace, trace, make_map(**right)).notes)
    wrong = "matrix"[:place] + letter + "matrix"[place:]
    names = make_map(**{**right, section: {**right[section], wrong: "other"}})
    assert f"map: a has nothing that {wrong} names" in compare_functions(trace, trace, names).notes
    some = record(weights=weights, only=["first"])
    assert not any("map" in note for note in compare_functions(some, some, names).notes)


def test_what_rounds_on_its_way_forward_is_not_exact() -> None:
    """Moves of weights by little and by more show it; what gradients do, says nothing."""
    x, noise = RNG.standard_normal((2, 50))

    def moved(size: float, dtype: type[np.floating[Any]]) -> dict[str, np.ndarray]:
        y = ((x * (1 + size * noise)) ** 2).astype(dtype).astype(np.float64)
        return {"forward/y": y, "gradient/w": RNG.standard_normal(50)}

    for dtype, exact in ((np.float64, True), (np.float32, False)):
        truth, fine, coarse = (moved(size, dtype) for size in (0, FINE, 2.0**-24))
        assert is_exact(truth, fine, coarse, 2.0**-24) == exact
