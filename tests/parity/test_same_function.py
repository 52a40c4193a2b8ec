"""Assertions, strategies, the plugin of pytest and planted bugs: what users of the proof have in their own tests."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

import shared_config.parity
from shared_config.errors import UserError
from shared_config.parity import DifferentError, assert_same_function, make_map, mutate, nest, read_map, read_trace
from shared_config.parity import strategies as draw
from shared_config.parity.plugin import keep

NIGHTLY = settings.get_current_profile_name() == "nightly"
nightly = pytest.mark.skipif(not NIGHTLY, reason="takes seconds: HYPOTHESIS_PROFILE=nightly")
ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)


def of_torch(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1) * torch.sigmoid(x)


def of_jax(x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x, -1) * jax.nn.sigmoid(x)


def wrong_in_jax(x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x, -1) * jax.nn.sigmoid(x) * 1.01


def of_numpy(x: np.ndarray) -> np.ndarray:
    grown = np.exp(x - x.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True) / (1 + np.exp(-x))


def test_functions_without_weights_are_the_same_in_every_pair_of_frameworks() -> None:
    functions: dict[str, Any] = {"torch": of_torch, "jax": of_jax, "numpy": of_numpy}
    for a, b in (("torch", "jax"), ("jax", "numpy"), ("numpy", "torch"))[: 3 if NIGHTLY else 1]:
        assert_same_function(functions[a], functions[b], (X,), frameworks=(a, b), dtypes=("float64",), backward=False)
    with pytest.raises(UserError, match="framework = 'mlx': must be one of torch, jax, numpy"):
        assert_same_function(of_torch, of_jax, (X,), frameworks=("torch", "mlx"))


def test_a_difference_says_what_where_and_why_and_is_kept(tmp_path: Path) -> None:
    with pytest.raises(DifferentError) as caught:
        assert_same_function(of_torch, wrong_in_jax, (X,), dtypes=("float32",), backward=False)
    said = str(caught.value)
    assert said.startswith("torch and jax are not the same function in float32")
    assert "cause: a constant factor: b is 1.01 times a" in said
    assert "scale of forward/output" in said
    error = DifferentError("", caught.value.a, caught.value.b, caught.value.comparison, make_map({"a": "b"}))
    folder = keep(tmp_path / "kept", error)
    assert {file.name for file in folder.iterdir()} == {"a.safetensors", "b.safetensors", "map.toml", "page.html"}
    assert list(read_trace(folder / "a.safetensors").tensors) == ["forward/output"]
    assert read_map(folder / "map.toml") == make_map({"a": "b"})
    assert "a constant factor" in (folder / "page.html").read_text()


PLUGGED = """
import numpy as np
from shared_config.parity import assert_same_function

def test_same():
    assert_same_function(np.tanh, np.tanh, (np.ones((3, 4), np.float32),), frameworks=("numpy", "numpy"))

def test_different():
    assert_same_function(np.tanh, np.sinh, (np.ones((3, 4), np.float32),), frameworks=("numpy", "numpy"))
"""


@nightly
def test_the_plugin_keeps_failing_pairs_and_says_how_far_correct_ones_are_apart(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PLUGGED)
    command = [sys.executable, "-m", "pytest", "-p", "shared_config.parity.plugin", "-p", "no:cacheprovider", "-rA"]
    command += ["--parity-keep", str(tmp_path / "kept"), "--derive-tolerance", "3", str(tmp_path / "test_it.py")]
    said = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert said.returncode == 1, said.stdout + said.stderr
    assert "1 failed, 1 passed" in said.stdout
    assert (tmp_path / "kept" / "test_it.py-test_different" / "page.html").exists()
    assert "kempnerforge compare a.safetensors b.safetensors" in said.stdout
    assert "3 pairs" in said.stdout
    assert "float32 forward: 1 tensors" in said.stdout


def test_the_public_surface_is_what_it_says() -> None:
    assert list(shared_config.parity.__all__) == sorted(shared_config.parity.__all__)
    for name in shared_config.parity.__all__:
        assert getattr(shared_config.parity, name).__doc__, name
    listed = {name for names in shared_config.parity.HOMES.values() for name in names}
    assert listed == set(shared_config.parity.__all__)
    text = shared_config.parity.__doc__ or ""
    assert all(
        f"`{name}`" in text for name in listed - {"DifferentError", "Proposal", "RunComparison", "Score", "Trace"}
    )
    code = "import sys, shared_config.parity; print([m for m in ('torch', 'jax', 'numpy') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
    with pytest.raises(AttributeError):
        _ = shared_config.parity.nothing


@given(st.data())
def test_strategies_draw_what_they_say(data: st.DataObject) -> None:
    heads, shape = data.draw(draw.heads()), data.draw(draw.shapes(3))
    assert divmod(heads.heads, heads.kv_heads) in [(1, 0), (2, 0), (3, 0)]
    assert heads.kv_heads in (1, 2, 3)
    assert heads.head_dim % 2 == 0
    assert len(set(shape)) == 3
    assert 2 <= min(shape) <= max(shape) <= 12
    length = data.draw(draw.lengths(edges=True))
    assert length in (*range(8, 25), *draw.EDGES)
    pieces = data.draw(draw.chunkings(length))
    assert sum(pieces) == length
    assert min(pieces) >= 1
    values, ties, tokens = (
        data.draw(each) for each in (draw.arrays(shape), draw.ties((16, 16)), draw.tokens(16, 16, 5))
    )
    np.testing.assert_array_equal(values.view(np.uint32) & 0xFFFF, 0)
    assert set(ties.flat) == {0, 1, 2}
    assert set(tokens.flat) == {0, 1, 2, 3, 4}
    masks, documents = data.draw(draw.masks(2, 8)), data.draw(draw.documents(2, 8))
    assert masks.shape == documents.shape == (2, 8)
    assert set(np.diff(documents, axis=1, prepend=0).flat) <= {0, 1}
    table = {"norm.weight": (9,), "norm.bias": (9,), "w": (40, 90), "b": (7,)}
    found = data.draw(draw.weights(table))
    assert {name: value.shape for name, value in found.items()} == table
    assert 0.5 <= found["norm.weight"].min() <= found["norm.weight"].max() <= 1.5
    assert abs(found["w"].std() * 90**0.5 - 1) < 0.1
    for bias in (found["b"], found["norm.bias"]):
        assert 0.1 <= np.abs(bias).min() < np.abs(bias).max() <= 1
    dtypes = [each.dtype.name for each in (values, ties, tokens, masks, documents, *found.values())]
    assert dtypes == ["float32", "float32", "int32", "bool", "int32", *["float32"] * 4]


def test_strategies_reach_the_cases_that_matter() -> None:
    assert not find(draw.masks(1, 4), lambda mask: not mask.any()).any()
    assert find(draw.lengths(edges=True), lambda length: length > 128) == 129
    assert find(draw.chunkings(4), lambda pieces: len(pieces) == 4) == (1, 1, 1, 1)
    assert find(draw.heads(), lambda heads: heads.heads == 9) == (9, 3, 4)
    assert find(draw.heads(), lambda heads: heads.head_dim == 10) == (1, 1, 10)
    assert sorted(find(draw.shapes(), lambda shape: max(shape) - min(shape) == 10)) == [2, 12]


def sums(tokens: np.ndarray) -> np.ndarray:
    return np.cumsum(tokens * 1.0, axis=1)


def start(batch: int) -> np.ndarray:
    return np.zeros((batch, 1))


def test_a_cache_is_the_full_function_however_it_is_fed() -> None:
    def append(cache: np.ndarray, tokens: np.ndarray) -> Any:
        outputs = cache + np.cumsum(tokens, axis=1)
        return outputs, outputs[:, -1:]

    def forgets(cache: np.ndarray, tokens: np.ndarray) -> Any:
        outputs = cache + np.cumsum(tokens, axis=1)
        return outputs, outputs[:, -1:] * (tokens.shape[1] != 3)

    def overwrites(cache: np.ndarray, tokens: np.ndarray) -> Any:
        outputs = cache + np.cumsum(tokens, axis=1)
        cache[:] = outputs[:, -1:]
        return outputs, cache

    few = settings(max_examples=15, stateful_step_count=8, phases=[Phase.generate], deadline=None)
    run_state_machine_as_test(draw.cache_machine(sums, start, append), settings=few)
    run_state_machine_as_test(
        draw.cache_machine(sums, start, overwrites, copy=lambda cache: cache.copy()), settings=few
    )
    for wrong in (forgets, overwrites):
        with pytest.raises(AssertionError, match=r"after \d+ tokens"):
            run_state_machine_as_test(draw.cache_machine(sums, start, wrong), settings=few)


@pytest.mark.parametrize("filled", range(7))
def test_a_cache_is_filled_and_not_given_more(filled: int) -> None:
    kept, given = [0], [0]

    def full(tokens: np.ndarray) -> np.ndarray:
        kept.append(tokens.shape[1])
        return sums(tokens)

    def append(cache: np.ndarray, tokens: np.ndarray) -> Any:
        cache = np.concatenate([cache, tokens], axis=1)
        given.append(cache.shape[1])
        return sums(cache)[:, -tokens.shape[1] :], cache

    machine: Any = draw.cache_machine(full, lambda batch: np.zeros((batch, 0)), append, longest=6)()
    tokens = np.ones((2, 5), np.int32)
    for count in [1] * filled:
        machine.append_some(tokens, count)
    machine.branch(tokens[:, :2])
    assert kept[-1] == filled
    assert given[-1] == (filled + 2 if filled + 2 <= 6 else filled)
    machine.append_some(tokens, 5)
    assert kept[-1] == given[-1] == min(filled + 5, 6)


def clipped(x: float, low: float = 0.0) -> float:
    if x < low:
        return low
    return x * 2


def endless(n: int) -> int:
    while n > 0:
        n -= 1
    return n


def divided(x: float, y: float) -> float:
    return x / y


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, n: int) -> int:
        self.count += n
        return self.count


def test_a_weak_test_lets_bugs_live_and_a_strong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared_config.parity.foreign.mutate.SHORTEST", 0.3)

    def weak() -> None:
        assert clipped(3.0) == 6

    def strong() -> None:
        assert [clipped(x) for x in (-1.0, 0.0, 1.0, 3.0)] == [0, 0, 2, 6]
        assert clipped(1.0, 2.0) == 2
        assert clipped(2.0, 2.0) == 4

    code = clipped.__code__
    found = mutate(clipped, weak, sample=None)
    assert 0 < found.share < 1
    assert any("x <= low" in survivor.after for survivor in found.survivors)
    better = mutate(clipped, strong, sample=None)
    assert better.planted == found.planted
    assert better.share == 1, better.survivors
    assert clipped.__code__ is code
    assert mutate(endless, lambda: endless(3) == 0 or 1 / 0, sample=None).killed["hang"] >= 1

    def counts() -> None:
        counter = Counter()
        assert (counter.add(2), counter.add(3)) == (2, 5)

    def raises() -> None:
        with pytest.raises(ZeroDivisionError):
            divided(3.0, 0.0)

    assert mutate(divided, raises, sample=None).killed["Failed"] >= 1
    assert mutate(Counter, counts, sample=None).share == 1
    assert mutate(Counter, counts, sample=None, only="add").planted < mutate(Counter, counts, sample=None).planted
    with pytest.raises(UserError, match="fails without a bug: ZeroDivisionError"):
        mutate(clipped, lambda: 1 / 0)
    with pytest.raises(UserError, match="must be a function, class or module"):
        mutate(len, weak)  # type: ignore[arg-type]


def doubled(x: jax.Array) -> jax.Array:
    return x * 2.0


def test_bugs_are_seen_in_compiled_functions() -> None:
    compiled = jax.jit(doubled)

    def check() -> None:
        assert float(compiled(jnp.full((), 3.0))) == 6

    assert mutate(doubled, check, sample=None).share == 1
    check()


@pytest.mark.parametrize(
    "line", ["import jax", "from jax import lax", "from flax import nnx", "import equinox", "import haiku"]
)
def test_a_file_that_names_any_library_of_jax_is_compiled_anew(line: str, tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text(f"{line}\n\n\ndef doubled(x):\n    return x * 2.0\n")
    module = ModuleType("small")
    exec(compile(file.read_text(), str(file), "exec"), vars(module))
    compiled = jax.jit(module.doubled)

    def check() -> None:
        assert float(compiled(jnp.full((), 3.0))) == 6

    assert mutate(module.doubled, check, sample=None).share == 1


def test_bugs_are_planted_in_any_thread() -> None:
    def check() -> None:
        assert divided(3.0, 2.0) == 1.5

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(mutate, divided, check, sample=None).result()
    assert found.killed == {"AssertionError": found.planted}


def test_trees_come_from_dotted_names() -> None:
    assert nest({"a.1.w": 1, "a.0.w": 2, "b": 3}) == {"a": [{"w": 2}, {"w": 1}], "b": 3}
    for flat, said in (
        ({"a": 1, "a.b": 2}, "tensor of its own"),
        ({"a.b": 2, "a": 1}, "part of other"),
        ({"a.1": 2}, "without gaps"),
    ):
        with pytest.raises(UserError, match=said):
            nest(flat)
