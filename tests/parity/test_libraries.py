"""Modules of Equinox and Haiku, of NNX and Linen: recorded by path, and bugs planted in ports to them are found there.

With the real libraries where they are installed, as the extra for development has them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from hypothesis import settings

import kempnerforge_torch.parity as of_torch
from kempnerforge_jax.parity import record, tap
from shared_config.errors import UserError
from shared_config.parity import Map, Trace, assert_same_function, compare_functions, make_map, transfer
from shared_config.parity.foreign.named import recorded
from shared_config.parity.foreign.site import made_in, site_of
from tests.examples import small, small_in_torch

NIGHTLY = settings.get_current_profile_name() == "nightly"
nightly = pytest.mark.skipif(not NIGHTLY, reason="takes seconds: HYPOTHESIS_PROFILE=nightly")
LIBRARIES = ("equinox", "haiku")
X = np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32)


def port(library: str) -> tuple[ModuleType, Map]:
    """The small language model in a library, and the map from the names of PyTorch."""
    pytest.importorskip(library)
    module: Any = importlib.import_module(f"tests.examples.small_in_{library}")
    return module, getattr(module, "NAMES", Map())


theirs = functools.cache(small_in_torch.theirs)


@pytest.mark.parametrize("dtype", ["float32", *(["float64", "bfloat16", "float16"] if NIGHTLY else [])])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_port_is_the_same_by_the_paths_of_its_modules(library: str, dtype: str) -> None:
    module, names = port(library)
    a, b = theirs(dtype=dtype), module.ours(dtype=dtype, deltas=False)
    found = compare_functions(a, b, names, common=True)
    assert found.equal, found.failures
    counts = {group: len(rows) for group, rows in found.groups.items()}
    assert counts == {"forward": 24, "loss": 1, "cotangent": 24, "gradient": len(small.weights())}
    assert all(row.delta for row in found.rows if row.name != "cotangent/output")


@nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_step_of_a_port_and_its_statistics_are_the_same(library: str, dtype: str) -> None:
    module, names = port(library)
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    a = small_in_torch.theirs(dtype=dtype, optimizer=adamw)
    for above in (None, 0):
        same: Any = optax.adamw(1e-2, weight_decay=0.1)
        found = compare_functions(
            a, module.ours(dtype=dtype, optimizer=same, deltas=False, above=above), names, common=True
        )
        assert found.equal, found.failures
        assert len(found.groups["updated"]) == len(small.weights())
    decay = 0.3 if dtype == "float32" else 3.0  # of 2.5 roundoffs of a parameter in bfloat16, of which 4 are allowed
    other: Any = optax.adamw(1e-2, weight_decay=decay)
    wrong = compare_functions(a, module.ours(dtype=dtype, optimizer=other, deltas=False), names, common=True)
    assert {row.group for row in wrong.failures} == {"updated"}


@nightly
@pytest.mark.parametrize("library", LIBRARIES)
def test_patterns_select_activations_and_gradients(library: str) -> None:
    module, _ = port(library)
    patterns = ("*attention_norm", "gradient/*qkv*", "loss")
    whole, some = module.ours(deltas=1), module.ours(deltas=1, only=patterns[:2])
    kept = [name for name in whole.tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]
    assert list(some.tensors) == kept
    assert len(kept) == 9
    assert set(some.meta.deltas["float32"]) == set(some.tensors)
    assert compare_functions(whole, some, common=True).equal


BUGS = {
    "scale in equinox": ("equinox", "(D // HEADS) ** 0.5", "(D // HEADS)", "blocks.*.attention.out@in"),
    "mask in equinox": (
        "equinox",
        "jnp.ones((S, S), bool))",
        "jnp.ones((S, S), bool), 1)",
        "blocks.*.attention.out@in",
    ),
    "eps in equinox": ("equinox", "LayerNorm(WIDTH, eps=EPS) for", "LayerNorm(WIDTH, eps=0.1) for", "blocks.*_norm"),
    "activation in equinox": ("equinox", "jax.nn.silu, layers", "jnp.tanh, layers", "blocks.*.mlp.2"),
    "scale in haiku": ("haiku", "(D // HEADS) ** 0.5", "(D // HEADS)", "block_*.attention.out@in"),
    "norm left out in haiku": ("haiku", 'layer_norm("mlp_norm")(x)', "x", "block_*.linear"),
    "activation in haiku": ("haiku", "jax.nn.silu(self", "jnp.tanh(self", "block_*.linear_1"),
    "logits in haiku": ("haiku", 'layer_norm("norm")(x))', 'layer_norm("norm")(x)) * 1.1', "output"),
}
"""Library, text, what stands in its place, and a pattern of the names of what is wrong then, alone."""


def planted(library: str, old: str, new: str, folder: Path) -> Callable[..., Trace]:
    """The recording of a port with a bug."""
    module, _ = port(library)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1
    file = folder / f"{library}_with_a_bug.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    return lambda **options: recorded(f"{file}:ours", options)


@nightly
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_port_is_found_forward_and_alone_where_recorded_inputs_are_given(bug: str, tmp_path: Path) -> None:
    library, old, new, pattern = BUGS[bug]
    (_, names), wrong, right = port(library), planted(library, old, new, tmp_path), theirs(dtype="float32")
    free = compare_functions(right, wrong(dtype="float32", backward=False, deltas=False), names, common=True)
    alone = compare_functions(right, wrong(dtype="float32", refeed=right, names=names, deltas=3), names, common=True)
    assert alone.failures
    assert free.first_forward is not None
    assert free.first_forward.name == alone.failures[0].name or pattern == "output"
    forward = [row for row in alone.failures if row.group == "forward"]
    assert all(fnmatchcase(row.name, f"forward/{pattern}") for row in forward), forward
    sites = {site_of(row.name) for row in forward}
    for row in alone.failures:
        assert sites & set(made_in(row.name, (alone.meta_a, alone.meta_b)).split(" or ")), row


def layers_of(equinox: Any) -> tuple[type, type]:
    """Two classes of Equinox: a layer, and a stack of layers that is scanned over, with a last one, jitted."""

    class Layer(equinox.Module):
        first: Any
        second: Any

        def __init__(self, key: jax.Array) -> None:
            self.first, self.second = equinox.nn.Linear(6, 4, key=key), equinox.nn.Linear(4, 6, key=key)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.second(jnp.tanh(self.first(x)))

    class Stack(equinox.Module):
        layers: Any
        last: Any
        scale: float

        def __init__(self, key: jax.Array) -> None:
            self.layers = equinox.filter_vmap(Layer)(jax.random.split(key, 3))
            self.last, self.scale = Layer(key), 0.5

        @equinox.filter_jit
        def __call__(self, x: jax.Array) -> jax.Array:
            arrays, static = equinox.partition(self.layers, equinox.is_array)

            def step(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
                return jax.vmap(jax.vmap(equinox.combine(own, static)))(x), None

            return jax.vmap(jax.vmap(self.last))(jax.lax.scan(step, x, arrays)[0]) * self.scale

    return Layer, Stack


def test_modules_that_transformations_of_equinox_copy_keep_their_names() -> None:
    equinox = pytest.importorskip("equinox")
    _, cls = layers_of(equinox)
    model = cls(jax.random.key(0))
    trace = record(model, (X,), deltas=False, only=["*layers*", "*last*", "output"])
    forward = [name.partition("/")[2] for name in trace.tensors if name.startswith("forward/") and "@in" not in name]
    scanned = [f"layers{part}@{step}" for step in range(3) for part in (".first", ".second", "")]
    assert forward == [*scanned, "last.first", "last.second", "last", "output"]
    assert trace.array("forward/layers.first@1").shape == (2, 5, 4)
    assert trace.array("gradient/layers.first.weight").shape == (3, 4, 6)
    x = X
    for step in range(3):
        layer = jax.tree.map(lambda leaf, step=step: leaf[step], equinox.filter(model.layers, equinox.is_array))
        hidden = x @ np.asarray(layer.first.weight).T + np.asarray(layer.first.bias)
        np.testing.assert_allclose(trace.array(f"forward/layers.first@{step}"), hidden, rtol=1e-5, atol=1e-5)
        x = x + np.tanh(hidden) @ np.asarray(layer.second.weight).T + np.asarray(layer.second.bias)
        np.testing.assert_allclose(trace.array(f"forward/layers@{step}"), x, rtol=1e-5, atol=1e-5)
    assert vars(cls)["__call__"].__get__(None, cls) == cls.__call__
    wrapped = record(equinox.filter_jit(model), (X,), deltas=False)
    assert list(wrapped.tensors) == list(record(model, (X,), deltas=False).tensors)


class Stack(torch.nn.Module):
    """Layers of two products, and a head, in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": linear(6, 4), "down": linear(4, 6)}) for _ in "123"
        )
        self.head = linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            assert isinstance(layer, torch.nn.ModuleDict)
            x = x + layer["down"](torch.nn.functional.silu(layer["up"](x)))
        return self.head(x)


def linear(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs)


def scanned(haiku: Any, act: Callable[[jax.Array], jax.Array], name: str | None) -> Any:
    """The same in Haiku, a scan over stacked layers."""

    def layer(x: jax.Array) -> jax.Array:
        return x + haiku.Linear(6, name="down")(act(haiku.Linear(4, name="up")(x)))

    def function(x: jax.Array) -> jax.Array:
        return haiku.Linear(2, name="head")(haiku.layer_stack(3, name=name)(layer)(x))

    return haiku.without_apply_rng(haiku.transform(function))


@pytest.mark.parametrize("name", ["layers", pytest.param(None, marks=nightly)])
def test_layers_of_a_stack_of_haiku_are_those_of_a_list_of_modules(name: str | None) -> None:
    haiku = pytest.importorskip("haiku")
    stem = name or "__layer_stack_no_per_layer"
    kinds = {"weight": ("w", "transpose"), "bias": ("b",)}
    own = {f"layers.*.{part}": f"{stem}.{part}" for part in ("up", "down")}
    paths = {**own, "head": "head"}
    weights = {f"{a}.{kind}": (f"{b}.{new}", *ops) for a, b in paths.items() for kind, (new, *ops) in kinds.items()}
    names = make_map(weights, {a: f"{b}@*" for a, b in own.items()})
    model = Stack()
    moved = transfer(dict(model.named_parameters()), names)
    tree = {
        path.replace(".", "/"): {kind: moved[f"{path}.{kind}"] for kind in "wb"}
        for path in dict.fromkeys(paths.values())
    }
    a = of_torch.record(model, (X,))
    for refeed in (None, a):
        b = record(scanned(haiku, jax.nn.silu, name), (X,), weights=tree, refeed=refeed, names=names)
        found = compare_functions(a, b, names, common=True)
        assert found.equal, found.failures
        forward = [
            f"{part}@{step}{end}" for step in range(3) for part, end in (("up", ""), ("down", "@in"), ("down", ""))
        ]
        inputs = [f"up@{step}@in" for step in (1, 2)]
        assert {row.name for row in found.groups["forward"]} >= {f"forward/{stem}.{one}" for one in forward + inputs}
        assert {row.name for row in found.groups["gradient"]} >= {
            f"gradient/{stem}.{part}.{kind}" for part in ("up", "down") for kind in "wb"
        }
    bug = record(scanned(haiku, jnp.tanh, name), (X,), weights=tree, refeed=a, names=names)
    wrong = compare_functions(a, bug, names, common=True)
    assert wrong.first_forward is not None
    assert wrong.first_forward.name == f"forward/{stem}.down@0@in"
    assert {row.name for row in wrong.failures if row.group == "forward"} == {
        f"forward/{stem}.down@{step}@in" for step in range(3)
    }


def normed(haiku: Any) -> Any:
    """A function of Haiku with a state, and a key that nothing needs."""

    def function(x: jax.Array) -> jax.Array:
        return haiku.BatchNorm(True, True, 0.9)(haiku.nets.MLP([4, 3])(x), is_training=True)

    return haiku.transform_with_state(function)


@nightly
def test_functions_of_haiku_with_a_state_with_keys_and_without() -> None:
    haiku = pytest.importorskip("haiku")
    function = normed(haiku)
    params, state = function.init(jax.random.key(0), X)
    traces = [
        record(pair, (X,), weights={"params": params, "state": state}, deltas=False)
        for pair in (function, haiku.without_apply_rng(function))
    ]
    plain = haiku.transform(lambda x: haiku.nets.MLP([4, 3])(x))
    own = plain.init(jax.random.key(0), X)
    traces += [
        record(haiku.without_apply_rng(plain), (X,), weights=own, deltas=False),
        record(haiku.without_apply_rng(plain).apply, (X,), weights=own, deltas=False),
    ]
    linears = [f"forward/mlp.linear_{n}" for n in range(2)]
    assert list(traces[0].tensors) == list(traces[1].tensors) >= linears
    assert list(traces[2].tensors) == list(traces[3].tensors) >= linears
    assert "gradient/batch_norm.scale" in traces[0].tensors
    assert not any("average" in name for name in traces[0].tensors)
    for name in linears:
        np.testing.assert_array_equal(traces[0].array(name), traces[2].array(name))


def test_weights_that_a_function_of_haiku_can_not_have_are_refused() -> None:
    function = normed(pytest.importorskip("haiku"))
    with pytest.raises(UserError, match="weights: a function of Haiku needs its parameters"):
        record(function, (X,))
    with pytest.raises(UserError, match="weights = params: of a Haiku function with a state must be params, state"):
        record(function, (X,), weights={"params": {}})
    with pytest.raises(UserError, match=r"weights: a\.b: several have this name"):
        record(lambda w, x: x * w["a"]["b"], (X,), weights={"a/b": X, "a": {"b": X}})


class Transformed(nnx.Module):
    """Layers of NNX, one of them with the name of what variables hold, each within another transformation."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.value, self.shared = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.plain = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.stack = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(1), 3))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.plain:
            x = layer(x)
        x = nnx.remat(lambda layer, x: layer(x))(self.value, x)
        x = nnx.jit(lambda layer, x: layer(jnp.tanh(layer(x))))(self.shared, x)
        return nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)


def transformed_by_hand(weights: Any, x: jax.Array) -> jax.Array:
    """`Transformed` without any transformation."""

    def layer(name: str, x: jax.Array, place: Any = slice(None)) -> jax.Array:
        return tap(name, x @ weights[f"{name}.kernel"][place] + weights[f"{name}.bias"][place])

    x = layer("value", layer("plain.1", layer("plain.0", x)))
    x = layer("shared", jnp.tanh(layer("shared", x)))
    for place in range(3):
        x = jnp.tanh(layer("stack", x, place))
    return x


@pytest.mark.parametrize("dtype", ["float32", *(["float64", "bfloat16"] if NIGHTLY else [])])
def test_modules_that_transformations_of_nnx_copy_keep_their_names(dtype: str) -> None:
    model = Transformed()
    own = nnx.to_flat_state(nnx.state(model, nnx.Param))
    weights = {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in own}
    adamw: Any = optax.adamw(1e-2)
    b = record(transformed_by_hand, (X,), weights=weights, dtype=dtype, optimizer=adamw, deltas=3)
    for above in (None, 0):
        a = record(model, (X,), dtype=dtype, optimizer=adamw, deltas=False, above=above)
        found = compare_functions(a, b, common=True)
        assert found.equal, found.failures
        counts = {group: len(rows) for group, rows in found.groups.items()}
        assert counts == {"forward": 9, "loss": 1, "cotangent": 9, "gradient": 11, "updated": 10}


class Residual(linen.Module):
    """A layer of Linen, which is called twice."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = linen.Dense(6, name="layer")
        return x + layer(jnp.tanh(layer(x)))


def by_hand(weights: Any, x: jax.Array) -> jax.Array:
    first = tap("layer", x @ weights["layer"]["kernel"] + weights["layer"]["bias"])
    given = tap("layer@in", jnp.tanh(first))
    return x + tap("layer", given @ weights["layer"]["kernel"] + weights["layer"]["bias"])


def test_what_modules_of_linen_are_given_is_recorded() -> None:
    own = {"layer": {"kernel": np.eye(6, dtype=np.float32) * 0.7, "bias": np.arange(6, dtype=np.float32)}}
    a = record(Residual(), (X,), weights={"params": own}, deltas=False)
    b = record(by_hand, (X,), weights=own, deltas=2)
    assert list(a.tensors) == list(b.tensors)
    assert compare_functions(a, b).equal
    names = [name.partition("/")[2] for name in a.tensors if name.startswith("forward/")]
    assert names == ["layer@0", "layer@in", "layer@1", "output"]


@nightly
def test_a_module_of_equinox_takes_the_weights_of_an_assertion() -> None:
    port("equinox")
    from tests.examples.small_in_equinox import Small

    model, wrong = Small(jax.random.key(0)), {**small.weights(), "extra": X}
    assert_same_function(
        small_in_torch.Small(), model, (small.TOKENS,), weights=small.weights(), dtypes=("float32",), backward=False
    )
    with pytest.raises(UserError, match="extra: unread"):
        record(model, (small.TOKENS,), weights=wrong)
