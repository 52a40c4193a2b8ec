"""Weights on disk: what is read is what was written, wrong files are refused, a broken write breaks nothing."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors import safe_open

from shared_config.errors import UserError
from shared_config.interchange import tensors, weights
from shared_config.interchange.tensors import DTYPES, TensorFile, read_tensors, write_tensors
from shared_config.interchange.weights import WeightsError, load_weights, save_weights

STORED = [np.dtype(name) for name in ("float64", "float32", "float16", "int32", "int64", "bool")]
STORED.append(np.dtype(ml_dtypes.bfloat16))


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """An array of any stored dtype, 0-d and empty ones included, as a view that may be anything but contiguous."""
    dtype = draw(st.sampled_from(STORED))
    shape = draw(numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    bits = draw(numpy_strategies.arrays(np.uint8, (*shape, dtype.itemsize)))
    array = (bits % 2).astype(bool)[..., 0] if dtype.kind == "b" else np.ascontiguousarray(bits).view(dtype)[..., 0]
    view = draw(st.sampled_from(["plain", "transposed", "reversed", "every other", "broadcast"]))
    if view == "transposed":
        return array.T
    if view == "broadcast":
        return np.broadcast_to(array, (2, *array.shape))
    if view == "plain" or array.ndim == 0:
        return array
    return array[::-1] if view == "reversed" else array[..., ::2]


def states(max_size: int = 5) -> st.SearchStrategy[dict[str, np.ndarray]]:
    names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
    return st.dictionaries(names.filter(lambda name: name != "__metadata__"), arrays(), max_size=max_size)


def assert_same(read: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    assert read.keys() == written.keys()
    for name, array in written.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes(), name  # bit for bit, NaN payloads too


def example_state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layers.{i}.weight": rng.standard_normal((3, 4)).astype(np.float32).T for i in range(5)}


@dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]


def table_of(state: dict[str, np.ndarray]) -> dict[str, Spec]:
    return {name: Spec(array.shape) for name, array in state.items()}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Flushing to the platter can't be observed by a test and takes most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@settings(max_examples=150)
@given(state=states(), metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_a_file_gives_back_every_bit(tmp_path_factory, state, metadata):
    path = tmp_path_factory.mktemp("file") / "some.safetensors"
    write_tensors(path, state, metadata)
    assert_same(read_tensors(path), state)
    assert TensorFile(path).metadata == metadata
    assert names_in(path.parent) == {"some.safetensors"}


@settings(max_examples=80)
@given(state=states(max_size=8), max_shard_bytes=st.integers(1, 400))
def test_a_folder_gives_back_every_bit_however_it_is_sharded(tmp_path_factory, state, max_shard_bytes):
    folder = tmp_path_factory.mktemp("folder")
    files = save_weights(folder, state, max_shard_bytes=max_shard_bytes)
    assert_same(load_weights(folder), state)
    assert {file.name for file in files} == names_in(folder)
    for shard in (file for file in files if file.suffix == ".safetensors"):
        read = read_tensors(shard)
        assert read or len(files) == 1
        assert len(read) <= 1 or sum(array.nbytes for array in read.values()) <= max_shard_bytes


def test_the_index_is_laid_out_as_hugging_face_does(tmp_path):
    state = example_state()
    save_weights(tmp_path, state, max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 48
    assert index["weight_map"]["layers.0.weight"] == "model-00001-of-00003.safetensors"
    assert index["weight_map"]["layers.4.weight"] == "model-00003-of-00003.safetensors"
    with safe_open(tmp_path / "model-00002-of-00003.safetensors", framework="np") as shard:
        assert shard.metadata()["format"] == "pt"
        assert sorted(shard.keys()) == ["layers.2.weight", "layers.3.weight"]


def test_foreign_readers_agree_on_bfloat16(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16).T
    write_tensors(tmp_path / "a.safetensors", {"a": array})
    torch = pytest.importorskip("torch")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        read = file.get_tensor("a")
    assert read.dtype == torch.bfloat16
    assert np.array_equal(read.float().numpy(), array.astype(np.float32))


def test_big_endian_arrays_keep_their_values(tmp_path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"a": array})
    read = read_tensors(tmp_path / "a.safetensors")["a"]
    assert read.dtype == np.float32
    assert np.array_equal(read, array)


def test_reading_is_lazy_and_writing_to_what_was_read_leaves_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.ones(4), "b": np.ones((2, 3))})
    read = read_tensors(path, ["b"])
    assert list(read) == ["b"]
    base = read["b"]
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    read["b"][:] = 7.0
    assert np.array_equal(read_tensors(path)["b"], np.ones((2, 3)))


def test_an_array_read_outlives_the_replacement_of_its_file(tmp_path):
    save_weights(tmp_path, {"a": np.zeros(1000)})
    old = load_weights(tmp_path)["a"]
    save_weights(tmp_path, {"a": np.ones(1000)})
    assert not old.any()
    assert load_weights(tmp_path)["a"].all()


def test_unaligned_files_of_other_writers_can_be_read(tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                         "b": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]}}).encode()  # fmt: skip
    body = b"\x05" + np.array([1.5, -2.5]).tobytes()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
    read = read_tensors(tmp_path / "a.safetensors")
    assert read["a"].tolist() == [5]
    assert read["b"].tolist() == [1.5, -2.5]
    assert read["b"].flags.aligned


def test_every_dtype_named_is_one_the_library_writes(tmp_path):
    state = {name: np.ones((2, 3)).astype(dtype) for name, dtype in DTYPES.items()}
    write_tensors(tmp_path / "a.safetensors", state)
    assert_same(read_tensors(tmp_path / "a.safetensors"), state)
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert {name: file.get_slice(name).get_dtype() for name in state} == {name: name for name in state}


def test_a_dtype_without_a_place_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="'phase' has dtype complex128: must be one of float64"):
        write_tensors(tmp_path / "a.safetensors", {"phase": np.ones(2, complex)})
    assert names_in(tmp_path) == set()


def test_all_misfits_are_in_one_error(tmp_path):
    state = {**example_state(), "more": np.zeros(3), "layers.1.weight": np.zeros((4, 3), np.int32)}
    table = table_of(example_state())
    table["layers.0.weight"] = Spec((3, 4))
    table["norm.weight"] = Spec((4,))
    save_weights(tmp_path, state)
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path, table)
    assert caught.value.problems == (
        "layers.0.weight: shape (4, 3), the model needs (3, 4)",
        "layers.1.weight: dtype int32, the model needs floating-point values",
        "norm.weight: missing, the model has it with shape (4,)",
        "more: extra, the model has no such tensor",
    )
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_state_that_fits_comes_in_the_order_of_the_model(tmp_path):
    state = example_state()
    table = table_of(dict(reversed(state.items())))
    save_weights(tmp_path, state, max_shard_bytes=60)
    read = load_weights(tmp_path / "model.safetensors.index.json", table)
    assert list(read) == list(table)
    assert_same(read, state)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_weights(tmp_path, example_state())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors: can't be read as a safetensors file"):
        load_weights(tmp_path)


def test_files_that_are_no_weights_are_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("Dear diary, " * 10)
    with pytest.raises(UserError, match=r"notes\.txt: can't be read as a safetensors file"):
        load_weights(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"absent\.safetensors: can't be read.*No such file"):
        load_weights(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"holds no weights: neither model\.safetensors nor"):
        load_weights(tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"other": {}}', "\xff"])
def test_an_index_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"index\.json: is no index"):
        load_weights(tmp_path)


def test_an_index_reaches_only_its_own_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="files of its own folder only"):
        load_weights(tmp_path)


def test_shards_that_miss_what_the_index_promises(tmp_path):
    save_weights(tmp_path, example_state(), max_shard_bytes=100)
    write_tensors(tmp_path / "model-00002-of-00003.safetensors", {"layers.3.weight": np.zeros((4, 3))})
    with pytest.raises(WeightsError, match=r"layers\.2\.weight: not in model-00002-of-00003"):
        load_weights(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00003-of-00003\.safetensors: can't be read"):
        load_weights(tmp_path)


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file; the name of a folder is needed"):
        save_weights(tmp_path / "file", example_state())
    with pytest.raises(UserError, match=r"max_shard_bytes = 0: must be positive"):
        save_weights(tmp_path, example_state(), max_shard_bytes=0)


@pytest.mark.parametrize(("before", "after"), [(None, 100), (100, None), (100, 60), (100, 100), (None, None)])
def test_a_new_set_replaces_the_older_one(tmp_path, before, after):
    def save(state: dict[str, np.ndarray], max_shard_bytes: int | None) -> list[Path]:
        return save_weights(tmp_path, state, max_shard_bytes=max_shard_bytes or 10**6)

    (tmp_path / "tokenizer.json").write_text("{}")
    save({name: array + 1 for name, array in example_state().items()}, before)
    files = save(example_state(), after)
    assert_same(load_weights(tmp_path), example_state())
    assert names_in(tmp_path) == {"tokenizer.json", *(file.name for file in files)}


class Interrupted(BaseException):
    """Not an Exception: a killed process runs no except clauses."""


@pytest.mark.parametrize("max_shard_bytes", [10**6, 100])
@pytest.mark.parametrize("before", [None, 10**6, 100])
@pytest.mark.parametrize("step", ["save_file", "replace"])
@pytest.mark.parametrize("count", range(4))
def test_an_interrupted_write_leaves_the_older_set(tmp_path, monkeypatch, max_shard_bytes, before, step, count):
    """Whichever write or rename is the last: the folder reads as the older set, or as none if there was none."""
    older = {name: array + 1 for name, array in example_state().items()}
    if before:
        save_weights(tmp_path, older, max_shard_bytes=before)
    module, original = (tensors, tensors.save_file) if step == "save_file" else (os, os.replace)
    done = 0

    def fail_at_count(*args, **kwargs):
        nonlocal done
        final = step == "save_file" or str(args[1]).endswith((".safetensors", ".json"))
        if final and done == count:
            if step == "save_file":
                args[1].write_bytes(b"half a file")
            raise Interrupted
        done += final
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, fail_at_count)
        try:
            save_weights(tmp_path, example_state(), max_shard_bytes=max_shard_bytes)
        except Interrupted:
            expected = older
        else:
            expected = example_state()
    if expected is older and not before:
        assert not {weights.SINGLE, weights.INDEX} & names_in(tmp_path)
    else:
        assert_same(load_weights(tmp_path), expected)
    assert not [name for name in names_in(tmp_path) if name.endswith(".part")]
    files = save_weights(tmp_path, example_state(), max_shard_bytes=max_shard_bytes)
    assert_same(load_weights(tmp_path), example_state())
    assert names_in(tmp_path) == {file.name for file in files}
