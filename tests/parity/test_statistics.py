"""Statistics of recordings: the same wherever they are computed, in one pass, and nothing whole leaves the device."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import kempnerforge_jax.parity as of_jax
import kempnerforge_jax.statistics as in_jax
import kempnerforge_torch.parity as of_torch
import kempnerforge_torch.statistics as in_torch
from kempnerforge_jax.moments_kernel import run_moments
from kempnerforge_torch.model.state import from_numpy
from kempnerforge_torch.model.transformer import Transformer
from shared_config.contract.parameters import parameter_table
from shared_config.loader import load_config
from shared_config.parity import Trace, compare_functions, make_map, moments_loop, summaries
from shared_config.parity.foreign.options import Options
from shared_config.parity.foreign.recorder import Store
from shared_config.parity.summaries import BLOCK, MOMENTS, PIECE, SCALARS, SKETCH_SIZE, SUMMED, Summary, summarize

DTYPES = ("float32", "float16", "float64", ml_dtypes.bfloat16)
ROWS_READ = SUMMED * SKETCH_SIZE
SIZES = (1, 1020, 1021, 5000, PIECE, PIECE + 1, PIECE + ROWS_READ, PIECE + ROWS_READ + 2000, 2 * PIECE + 1500)
SMALL_BYTES = 15 * 10**6
"""As README says."""
X = np.random.default_rng(2).standard_normal((30, 100)).astype(np.float32)
W = np.random.default_rng(3).standard_normal((100, 100)).astype(np.float32)


def drawn(size: int, dtype: Any, seed: int, gaps: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size) * 10.0 ** rng.integers(-3, 3)
    if gaps:
        places = rng.integers(0, size, 3)
        values[places] = rng.permutation([np.nan, np.inf, -np.inf])
    return values.astype(dtype)


def by_numpy() -> contextlib.AbstractContextManager[object]:
    """Context in which there is no compiled loop."""
    return mock.patch.object(summaries, "_loop", return_value=None)


@settings(max_examples=12)
@given(
    size=st.sampled_from(SIZES), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), gaps=st.booleans(),
)  # fmt: skip
def test_moments_are_the_same_on_every_device(size: int, dtype: Any, seed: int, gaps: bool) -> None:
    values = drawn(size, dtype, seed, gaps)
    expected = summaries.moments(values)
    with by_numpy():
        assert_same_moments(summaries.moments(values), expected, dtype)
    with jax.enable_x64(dtype == "float64"):
        array = jnp.asarray(values)
        found = [np.asarray(jax.jit(f)(array)).view(np.float64) for f in (in_jax.moments, in_jax.reduced)]
    for other in (in_torch.reduced(from_numpy(values)).numpy(), *found):
        assert_same_moments(other, expected, dtype)
    assert_same_moments(expected, np.concatenate([defined(values), expected[-1021:]]), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1, 1021, 5000, PIECE + 1])
def test_moments_by_the_kernel_of_jax(size: int, dtype: Any) -> None:
    """As XLA runs it; some have squares that 32 bits don't hold."""
    factors = [1.0] if dtype == "float16" else [1.0, 1e30, 1e-19]
    with jax.enable_x64(True):
        for gaps, factor in itertools.product((False, True), factors):
            values = (drawn(size, "float32", 7, gaps) * np.float32(factor)).astype(dtype)
            found = np.asarray(run_moments(jnp.asarray(values), interpret=True))
            assert_same_moments(found, summaries.moments(values), dtype)


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + PIECE + 1500, 2 * BLOCK + 9000])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("way", [contextlib.nullcontext, by_numpy])
def test_moments_of_several_blocks(size: int, gaps: bool, way: Callable[[], Any]) -> None:
    values = drawn(size, "float32", size, gaps)
    with way():
        found = summaries.moments(values)
    assert_same_moments(found, np.concatenate([defined(values), found[-1021:]]), "float32")


@pytest.mark.parametrize(
    ("dtype", "power"),
    [("float32", power) for power in (-100, -40, -24, -20, -16, -14, 0, 14, 16, 20, 37, 100)]
    + [("float64", power) for power in (-300, -160, -100, -16, 0, 16, 100, 160, 300)],
)
@settings(max_examples=6)
@given(
    size=st.one_of(st.integers(PIECE, PIECE + 3 * ROWS_READ), st.integers(PIECE, 3 * PIECE)),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["plain", "negative", "positive", "equal", "zeros", "one", "not a number", "infinite"]),
    offset=st.integers(0, 1),
    readonly=st.booleans(),
)
def test_the_compiled_loop_finds_what_numpy_finds(
    dtype: str, power: int, size: int, seed: int, kind: str, offset: int, readonly: bool
) -> None:
    """Whatever the values, where they begin in memory, and whether they may be written to."""
    values = values_of_kind(kind, size, seed)
    with np.errstate(over="ignore", under="ignore"):
        scaled = (values * 10.0**power).astype(dtype)
    memory = np.zeros(scaled.nbytes + 8, np.uint8)
    places = memory[offset : offset + scaled.nbytes].view(dtype)
    places[:] = scaled
    places.flags.writeable = not readonly
    found = summaries.moments(places)
    with by_numpy():
        expected = summaries.moments(scaled)
    assert_same_moments(found, expected, dtype)
    assert found[4] == np.isfinite(scaled).sum()


def values_of_kind(kind: str, size: int, seed: int) -> np.ndarray:
    """float64 of size about 1 (size,)."""
    rng = np.random.default_rng(seed)
    values, place = rng.standard_normal(size), rng.integers(size)
    match kind:
        case "positive":
            return np.abs(values)
        case "negative":
            return -np.abs(values)
        case "equal" | "zeros":
            return np.full(size, float(kind == "equal"))
        case "one":
            return np.where(np.arange(size) == place, 1.0, 0.0)
        case "not a number" | "infinite":
            values[place] = np.nan if kind == "not a number" else rng.choice([np.inf, -np.inf])
    return values


WITHOUT = """
import sys
if {blocked}:
    sys.modules["numba"] = None
import numpy as np
from shared_config.parity import summaries
print(summaries._loop() is not None)
print(summaries.moments(np.arange(100000, dtype=np.float32))[:5].tolist())
"""


@pytest.mark.parametrize(
    ("blocked", "disabled", "loop"), [(False, "0", True), (True, "0", False), (False, "1", False)]
)  # fmt: skip
def test_without_numba_or_its_compiler_numpy_finds_the_same(blocked: bool, disabled: str, loop: bool) -> None:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": disabled}
    program = WITHOUT.format(blocked=blocked)
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    known, found = ran.stdout.splitlines()
    assert known == str(loop)
    total, norm = 4999950000.0, np.sqrt(np.sum(np.arange(100000.0) ** 2))
    assert json.loads(found) == pytest.approx([0, 99999, total, norm, 100000], rel=2e-7)


def test_a_loop_that_can_not_be_kept_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(function: Any, **options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(function, **options)

    real = numba.njit
    monkeypatch.setattr(numba, "njit", nowhere)
    function = moments_loop.compiled(doubled)
    values = np.ones(3)
    function(values)
    assert values.tolist() == [2, 2, 2]
    assert function.nopython_signatures  # type: ignore[attr-defined]


def doubled(values: np.ndarray) -> None:
    """In place."""
    for place in range(values.size):
        values[place] *= 2


def test_the_compiled_loop_is_several_times_as_fast() -> None:
    """It is not where a processor's vectors aren't used, which no result tells."""
    values = -np.abs(drawn(4 * PIECE, "float32", 0, False))
    alone, together = [], []
    for _ in range(10):
        with by_numpy():
            alone.append(seconds_of(values))
        together.append(seconds_of(values))
    assert min(together) < min(alone) / 2


def seconds_of(values: np.ndarray) -> float:
    """Of the processor, in which the moments of values are found."""
    start = time.process_time()
    summaries.moments(values)
    return time.process_time() - start


def defined(values: np.ndarray) -> np.ndarray:
    """Moments by their definition, without where gaps are."""
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    norm = np.sqrt(np.sum(finite**2))
    scalars = finite.min(initial=np.inf), finite.max(initial=-np.inf), finite.sum(), norm, finite.size
    known, places = np.where(np.isfinite(wide), wide, 0), np.arange(values.size) % SKETCH_SIZE
    return np.concatenate([scalars, np.bincount(places, known * signs_of(values.size), SKETCH_SIZE)])


def assert_same_moments(found: np.ndarray, expected: np.ndarray, dtype: Any) -> None:
    """Up to a rounding of float32, or of float64, of the norm."""
    rounding = 1e-12 if dtype == "float64" else 2e-7
    np.testing.assert_array_equal(found[[0, 1, 4]], expected[[0, 1, 4]])
    np.testing.assert_allclose(found[[2, 3]], expected[[2, 3]], rtol=rounding, atol=4 * rounding * expected[3])
    assert np.linalg.norm(found[SCALARS:-1021] - expected[SCALARS:-1021]) <= rounding * expected[3]
    np.testing.assert_array_equal(found[-1021:], expected[-1021:])


def signs_of(size: int) -> np.ndarray:
    """The sign of each place."""
    first, times = summaries.starts(-(-size // PIECE))
    windows = [sign * summaries.signs()[start : start + PIECE] for start, sign in zip(first, times, strict=True)]
    return np.concatenate(windows)[:size]


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-200, "float64"), (1e200, "float64"), (1e-30, "float32"), (1e37, "float32")]
)
def test_moments_of_extreme_values(scale: float, dtype: str) -> None:
    values = (np.random.default_rng(0).standard_normal(30000) * scale).astype(dtype)
    expected = np.sqrt(np.mean(np.square(values.astype(np.float64) / scale))) * scale
    found = summarize(values)
    assert found.rms == pytest.approx(expected, rel=1e-12)
    assert np.linalg.norm(found.sketch / scale) == pytest.approx(expected / scale * 30000**0.5, rel=0.15)
    assert in_torch.reduced(torch.from_numpy(values))[3].item() / 30000**0.5 == pytest.approx(expected, rel=1e-12)


def test_a_sum_may_be_too_large() -> None:
    found = summarize(np.full(30000, 1e305))
    assert (found.mean, found.rms) == (np.inf, pytest.approx(1e305))


class Model(nn.Module):
    """Two matrices, of which the inner module's output is also that of the outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Linear(100, 100, bias=False))
        self.outer[0].weight.data = torch.from_numpy(W.copy())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.outer(x))


def in_jax_alone(weights: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(of_jax.tap("outer", x @ weights["w"]))


def statistics(backend: str) -> Trace:
    if backend == "torch":
        return of_torch.record(Model(), (X,), above=0, deltas=False)
    return of_jax.record(in_jax_alone, (X,), weights={"w": W.T}, above=0, deltas=False)


def test_a_tensor_is_read_once_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU tensor's statistics are taken of is its own memory, and one tensor of two modules is read once."""
    read: list[tuple[int, int]] = []
    plain = summaries.moments

    def counted(array: np.ndarray) -> np.ndarray:
        read.append((array.__array_interface__["data"][0], array.size))
        return plain(array)

    monkeypatch.setattr(summaries, "moments", counted)
    trace = statistics("torch")
    kept = [name for name, value in trace.tensors.items() if isinstance(value, Summary)]
    assert kept == [
        "forward/outer.0", "forward/outer", "forward/output", "cotangent/output", "cotangent/outer",
        "cotangent/outer.0", "gradient/outer.0.weight", "gradient/input.0",
    ]  # fmt: skip
    assert len(read) == len(kept) - 2
    assert trace.tensors["forward/outer"] is trace.tensors["forward/outer.0"]
    tensor = torch.ones(300)
    read.clear()
    in_torch.Keeper(Store(0))(tensor)
    assert read == [(tensor.data_ptr(), 300)]


def test_a_tensor_that_was_written_to_is_read_again() -> None:
    keep, tensor = in_torch.Keeper(Store(0)), torch.ones(9)
    before = keep(tensor)
    tensor.mul_(2)
    assert sizes(before, keep(tensor)) == [1.0, 2.0]


def sizes(*kept: in_torch.Kept) -> list[float]:
    """Root mean squares of what is summarised."""
    found = in_torch.fetched(dict(enumerate(kept))).values()
    return [value.rms for value in found if isinstance(value, Summary)]


def test_memory_that_another_tensor_gets_is_read_again() -> None:
    """Nothing is held for it: the address, shape and version may be the same."""
    keep, memory = in_torch.Keeper(Store(0)), np.ones(300, np.float32)
    before = keep(torch.from_numpy(memory))
    memory *= 2
    assert sizes(before, keep(torch.from_numpy(memory))) == [1.0, 2.0]


class Checkpointed(nn.Module):
    """One matrix, used in two parts that the backward pass computes again, each in a backward pass of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.inner = reentrant, Model()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_that_come_in_parts_are_summarised_whole(reentrant: bool) -> None:
    name = "gradient/inner.outer.0.weight"
    whole, kept = (of_torch.record(Checkpointed(reentrant), (X,), above=a, deltas=False).tensors for a in (None, 0))
    expected, found = summarize(np.asarray(whole[name])), kept[name]
    assert isinstance(found, Summary)
    assert found.rms == pytest.approx(expected.rms, rel=1e-6)
    np.testing.assert_allclose(found.sketch, expected.sketch, rtol=1e-4, atol=1e-5 * expected.rms)


def test_gradients_are_let_go_once_there_are_statistics_of_them() -> None:
    """No two of them are there at a time: a weight has none when that of the layer before it comes."""
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(3)))
    held: list[int] = []

    def count(*_: object) -> None:
        held.append(sum(leaf.grad is not None for leaf in leaves.values()))

    leaves = dict(model.named_parameters())
    found = in_torch.Keeper(Store(0)).let_go(leaves)
    for layer in model:
        layer.register_full_backward_hook(count)
    model(torch.from_numpy(X).requires_grad_()).sum().backward()
    assert list(found) == list(leaves)[::-1]
    assert max(held) <= 1
    assert not any(leaf.grad is not None for leaf in leaves.values())


def test_tensors_of_inference_mode_are_read_each_time() -> None:
    keep = in_torch.Keeper(Store(0))
    with torch.inference_mode():
        tensor = torch.ones(9)
        before = keep(tensor)
        after = keep(tensor.mul_(2))
    assert sizes(before, after) == [1.0, 2.0]


class Written(nn.Module):
    """A module's output is written to by the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(100, 100, bias=False), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * 2


@pytest.mark.parametrize("above", [None, 0])
def test_of_a_tensor_that_was_written_to_no_gradient_is_recorded(above: int | None) -> None:
    """That of the value that replaced it would be taken for its own."""
    names = of_torch.record(Written(), (X,), above=above, deltas=False).tensors
    assert {"forward/first", "forward/second", "cotangent/second", "gradient/first.weight"} <= set(names)
    assert "cotangent/first" not in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5000, PIECE + 1])
def test_moments_on_a_gpu(size: int, dtype: Any) -> None:
    values = drawn(size, dtype, 0, gaps=size > 3)
    expected = summaries.moments(values)
    with jax.enable_x64(dtype == "float64"), in_jax.compiling():
        in_jax_there = np.asarray(jax.jit(in_jax.moments)(jnp.asarray(values))).view(np.float64)
    for found in (in_torch.moments(from_numpy(values).cuda()).cpu().numpy(), in_jax_there):
        assert_same_moments(found, expected, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moments_of_several_devices_are_fetched() -> None:
    tensors = {device: torch.full((5,), 3.0, device=device) for device in ("cpu", "cuda")}
    pending = {name: in_torch.Pending(in_torch.moments(one), (5,), "float32") for name, one in tensors.items()}
    found = in_torch.fetched(pending)
    assert [value.rms for value in found.values() if isinstance(value, Summary)] == pytest.approx([3.0, 3.0])


def test_devices_wait_for_nothing_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values have all their moments computed; they go to the host once for each kind of result."""
    in_torch.reduced(torch.ones(1))  # what is kept of signs is a real tensor
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert in_torch.reduced(mode.from_tensor(torch.ones(5000))).shape == (MOMENTS,)
    expected = statistics("torch")

    stacked: list[int] = []
    stack = torch.stack
    monkeypatch.setattr(in_torch, "moments", in_torch.reduced)
    monkeypatch.setattr(torch, "stack", lambda rows, *args: stacked.append(len(rows)) or stack(rows, *args))
    found = statistics("torch")
    gradients, activations, cotangents = 2, 2, 2  # an activation of two modules is one
    assert [count for count in stacked if count not in (1, SCALARS)] == [gradients, activations, cotangents]
    for name, value in expected.tensors.items():
        other = found.tensors[name]
        if isinstance(value, Summary) and isinstance(other, Summary):
            np.testing.assert_allclose(other.sketch, value.sketch, rtol=1e-6, atol=1e-5 * value.rms)
    assert compare_functions(expected, found).equal


def test_nothing_whole_leaves_a_program_of_jax() -> None:
    engine = of_jax._Engine(in_jax_alone, (X,), {"w": W.T}, None, None, (), Options(above=0))
    engine.run("", engine.weights, engine.inputs, {}, None, Store(0))
    (program,) = engine._programs.values()
    weights, inputs = {"w": jnp.asarray(W)}, {"input.0": jnp.asarray(X)}
    outputs = jax.tree.leaves(jax.eval_shape(program._recorded, weights, inputs, {}, None))
    recorded = len(jax.tree.leaves(program.descriptions))
    assert recorded > 5
    assert {output.shape for output in outputs} == {(), (recorded, 2 * MOMENTS)}
    assert X.size + W.size > 2 * MOMENTS


def test_statistics_of_both_backends_are_compared() -> None:
    names = make_map({"outer.0.weight": ("w", "transpose")})
    whole = of_jax.record(in_jax_alone, (X,), weights={"w": W.T}, deltas=2)
    layout = {name: value for name, value in statistics("torch").tensors.items() if "weight" not in name}
    torch_side = dataclasses.replace(statistics("torch"), tensors=layout)
    for other in (whole, statistics("jax")):
        found = compare_functions(torch_side, dataclasses.replace(other, meta=whole.meta), names, common=True)
        assert found.equal, found.failures
        assert len(found.groups["forward"]) == 2


def test_statistics_of_a_model_of_32_layers_are_small(tmp_path: Path) -> None:
    """A sketch has one size, whatever the tensor's: a narrow model of llama3_8b's layers has a trace as large."""
    whole = load_config("llama3_8b").model
    narrow = whole.replace(dim=64, n_heads=4, n_kv_heads=2, vocab_size=64, ffn_hidden_dim=96, max_seq_len=16)
    names = parameter_table(narrow)
    assert list(names) == list(parameter_table(whole))
    model = Transformer(narrow)
    tokens = torch.zeros((1, 4), dtype=torch.long)
    path = tmp_path / "trace.safetensors"
    trace = of_torch.record(model, (tokens,), above=0, deltas=False, path=path)
    counts = {group: sum(name.startswith(f"{group}/") for name in trace.tensors) for group in ("forward", "gradient")}
    assert counts["gradient"] == len(names) == 291
    assert counts["forward"] > 32 * 10
    assert path.stat().st_size < SMALL_BYTES
    entry = 8 * 1021 + 700
    assert path.stat().st_size < entry * len(trace.tensors)


BUSY = """
import pathlib, threading, time
import numpy as np
from shared_config.parity import summaries

if {by_numpy}:
    summaries._loop = lambda: None

def of_others():
    ticks = {{task.name: task.joinpath("stat").read_text().rpartition(")")[2].split() for task in TASKS.iterdir()}}
    return sum(int(ticks[name][11]) for name in ticks if name != str(threading.get_native_id()))

TASKS = pathlib.Path("/proc/self/task")
values = np.ones(5 * summaries.BLOCK, np.float32)
summaries.moments(values)
time.sleep(0.3)
before = of_others()
for _ in range(20):
    summaries.moments(values)
print(len(list(TASKS.iterdir())), of_others() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) == 1, reason="reads what Linux says of threads on two cores"
)
@pytest.mark.parametrize("by_numpy", [False, True])
def test_moments_leave_other_cores_alone(by_numpy: bool) -> None:
    """On which the model runs: threads of a library of matrix products would wait for those of the framework."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    program = BUSY.format(by_numpy=by_numpy)
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    threads, ticks = map(int, ran.stdout.split())
    assert threads > 1
    assert ticks <= 1
