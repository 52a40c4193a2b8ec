"""What is asked of a recording by patterns and files: what names nothing is refused, and nothing half written stays."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
import shared_config.interchange.tensors as written
from shared_config.errors import UserError
from shared_config.parity import Trace, read_trace, record, tap

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
BACKENDS = ("torch", "jax", "numpy")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)
        self.inner.weight.data = torch.from_numpy(W.T.copy())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.inner(x)))


def in_jax(weights: Any, x: jax.Array) -> jax.Array:
    for _ in range(2):
        x = of_jax.tap("inner", x @ weights["w"])
    return jax.numpy.tanh(x)


def in_numpy(weights: Any, x: np.ndarray) -> np.ndarray:
    for _ in range(2):
        x = tap("inner", x @ weights["w"])
    return np.tanh(x)


def recorded(backend: str, **options: Any) -> Trace:
    options = {"deltas": False, **options}
    if backend == "torch":
        return of_torch.record(Twice(), (X,), **options)
    if backend == "jax":
        return of_jax.record(in_jax, (X,), weights={"w": W}, **options)
    return record(in_numpy, (X,), weights={"w": W}, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("only", "said"),
    [
        (["outputs"], r"only = 'outputs': matches no tensor; did you mean 'output'"),
        (["output", "iner@*"], r"only = 'iner@\*': matches no tensor; did you mean 'inner@"),
        (["inner"], r"only = 'inner': matches no tensor; did you mean 'inner@"),
        (["inner@2"], r"only = 'inner@2': matches no tensor; did you mean 'inner@"),
        (["updated/*"], r"only = 'updated/\*': matches no tensor; names are as forward/"),
        ("output", r"only = 'output': must be a list of patterns, as \['output'\]"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(backend: str, only: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recorded(backend, only=only)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_patterns_choose_calls_gradients_and_the_loss(backend: str) -> None:
    whole = recorded(backend)
    for pattern, names in (
        ("inner@1", ["forward/inner@1", "cotangent/inner@1"]),
        ("cotangent/*", ["cotangent/output", "cotangent/inner@1", "cotangent/inner@0"]),
        ("gradient/*", ["gradient/inner.weight" if backend == "torch" else "gradient/w", "gradient/input.0"]),
        ("loss", []),
    ):
        found = recorded(backend, only=[pattern])
        assert [name for name in found.tensors if name != "loss"] == names
        for name in names:
            np.testing.assert_array_equal(found.array(name), whole.array(name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_need_a_path(backend: str) -> None:
    with pytest.raises(UserError, match=r"chunks = 10: needs path"):
        recorded(backend, chunks=10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_full_disk_leaves_what_was_there_before(
    backend: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none of the files of a recording, one, or all but that of the trace can be written."""
    save = written.save_file
    files: list[Path] = []

    def full(tensors: Any, path: Path, **given: Any) -> None:
        files.append(path)
        if len(files) > room:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **given)

    path, values = tmp_path / "a.safetensors", {"only": ["output", "inner*"], "dtype": "float32"}
    values |= {} if backend == "numpy" else {"backward": False}
    with monkeypatch.context() as patched:
        patched.setattr(written, "save_file", full)
        with pytest.raises(UserError, match="No space left on device"):
            recorded(backend, path=path, chunks=1, **values)
    assert len(files) == room + 1
    assert list(tmp_path.iterdir()) == []
    first = recorded(backend, path=path, chunks=1, **values)
    before = sorted(tmp_path.rglob("*"))
    assert len(before) == 2 + len(first.tensors)
    with monkeypatch.context() as patched:
        files.clear()
        patched.setattr(written, "save_file", full)
        with pytest.raises(UserError, match="No space left on device"):
            recorded(backend, path=path, chunks=1, **values)
    assert sorted(tmp_path.rglob("*")) == before
    for name, value in read_trace(path).tensors.items():
        np.testing.assert_array_equal(value, first.array(name))


def test_a_recording_without_large_tensors_removes_those_of_an_earlier_one(tmp_path: Path) -> None:
    path, folder = tmp_path / "a.safetensors", tmp_path / "a.safetensors.chunks"
    recorded("torch", path=path, chunks=1)
    (folder / "000000.safetensors").write_bytes(b"")
    others = {folder / name for name in ("weights.safetensors", "7.safetensors", "12345678-000000")}
    for other in others:
        other.write_text("kept")
    recorded("torch", path=path, chunks=10**6)
    assert set(folder.iterdir()) == others
    for other in others:
        other.unlink()
    recorded("torch", path=path, chunks=10**6)
    assert list(tmp_path.iterdir()) == [path]
    assert list(read_trace(path).tensors) == list(recorded("torch").tensors)
