"""States of any source: names that wrappers add, tied and repeated tensors, dtypes of other libraries."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from shared_config.errors import UserError
from shared_config.interchange import weights
from shared_config.interchange.states import (
    check_tied,
    host_array,
    numpy_dtype,
    plain_name,
    plain_state,
    whole,
    without_repeats,
    without_unused,
)
from shared_config.interchange.tensors import TRACE, TensorFile, is_trace, read_tensors, write_tensors
from shared_config.interchange.weights import (
    WeightsError,
    check_tensors,
    entry_file,
    is_floating,
    load_weights,
    save_weights,
    weight_names,
)

ONE = np.ones(2, np.float32)


def test_wrappers_are_left_out_of_paths_and_not_of_names() -> None:
    assert plain_name("module.layers.0._orig_mod.norm") == "layers.0.norm"
    assert plain_name("_fsdp_wrapped_module.a._checkpoint_wrapped_module.b") == "a.b"
    assert plain_name("a.module") == "a"
    state = {"module._orig_mod.a": 1, "b._fsdp_wrapped_module.c": 2, "d.module": 3, "_checkpoint_wrapped_module.e": 4}
    assert plain_state(state) == {"a": 1, "b.c": 2, "d.module": 3, "e": 4}
    assert list(plain_state({"b": 1, "a": 2})) == ["b", "a"]
    with pytest.raises(UserError) as caught:
        plain_state({"a.b": 1, "a.module.b": 2})
    assert str(caught.value) == "the state holds 'a.b' and 'a.module.b', both of which name 'a.b'"


def test_nested_states_are_flat_and_variables_give_their_arrays() -> None:
    variable = SimpleNamespace(get_value=lambda: ONE, saved=True)
    table = SimpleNamespace(get_value=lambda: ONE, saved=False)
    state = {"a": {"b": {0: 1}, "c": variable}, ("d", 1): 2, "t": table, "e": {"t": table}}
    assert plain_state(state) == {"a.b.0": 1, "a.c": ONE, "d.1": 2}


def test_a_count_of_averages_is_known_by_what_is_beside_it() -> None:
    assert plain_state({"n_averaged": 3, "module.a": 1}) == {"a": 1}
    assert plain_state({"x.n_averaged": 3, "x.module.a": 1}) == {"x.a": 1}
    assert plain_state({"n_averaged": 3, "a": 1}) == {"n_averaged": 3, "a": 1}
    assert plain_state({"x.n_averaged": 3, "y.module.a": 1}) == {"x.n_averaged": 3, "y.a": 1}
    assert plain_state({"x.n_averaged": 3, "module.a": 1}) == {"x.n_averaged": 3, "a": 1}
    assert plain_state({"module.n_averaged": 3, "module.a": 1}) == {"n_averaged": 3, "a": 1}


def test_tensors_of_torch_keep_every_bit_whatever_their_layout() -> None:
    values = torch.arange(-6, 6, dtype=torch.float32).reshape(3, 4)
    kinds = {torch.float64: np.float64, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16,
             torch.int64: np.int64, torch.uint8: np.uint8, torch.bool: np.bool_, torch.float32: np.float32,
             torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}  # fmt: skip
    for theirs, ours in kinds.items():
        tensor = values.abs().to(theirs).T
        found = host_array("a", tensor)
        assert (found.dtype, found.shape) == (np.dtype(ours), (4, 3))
        assert np.array_equal(found.astype(np.float64), tensor.double().numpy())
        assert numpy_dtype(theirs) == np.dtype(ours)
    for dtype in (torch.float32, torch.bfloat16):
        assert host_array("a", values.to(dtype).requires_grad_()).tolist() == values.tolist()
    assert host_array("a", [1, 2]).tolist() == [1, 2]
    assert host_array("a", ONE) is ONE
    conjugate = torch.tensor([1 + 2j]).conj()
    assert host_array("a", conjugate).tolist() == [1 - 2j]


def test_what_holds_no_values_is_named() -> None:
    with pytest.raises(UserError, match=r"^tensor 'a.b' \(Tensor\) can't be converted to NumPy: [^\n]+$"):
        host_array("a.b", torch.empty(2, device="meta"))
    sharded = SimpleNamespace(full_tensor=lambda: ONE)
    assert whole(sharded) is ONE
    assert whole(ONE) is ONE
    assert host_array("a", sharded).tolist() == [1, 1]
    assert host_array("a", SimpleNamespace(get_value=lambda: sharded)).tolist() == [1, 1]


def test_dtypes_have_the_names_of_numpy_or_ml_dtypes() -> None:
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    assert numpy_dtype("float32") == np.float32
    assert numpy_dtype(np.dtype(np.int8)) == np.int8
    floating = {"float64": True, "float32": True, "float16": True, "bfloat16": True, "int32": False, "bool": False,
                "complex64": False, "nothing": False, "float8_e4m3fn": False}  # fmt: skip
    assert {name: is_floating(name) for name in floating} == floating
    assert is_floating(torch.bfloat16)
    assert not is_floating(torch.int64)


def test_tensors_of_the_same_memory_are_kept_once() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base, "tied": base.view(3, 4), "flat": base.view(12), "turned": base.T, "square": base[:3, :3],
        "turned square": base[:3, :3].T, "copy": base.clone(), "bits": base.view(torch.int32), "later": base[1:],
        "no rows": base[:0], "no rows too": base[:0], "one": base[:1, :1], "one again": base[:1, :1],
        "steps": SimpleNamespace(stride=lambda: ()), "steps too": SimpleNamespace(stride=lambda: ()),
        "pointer": SimpleNamespace(data_ptr=lambda: 5), "pointer too": SimpleNamespace(data_ptr=lambda: 5),
        "empty": torch.empty(0), "empty too": torch.empty(0), "array": ONE, "same array": ONE, "again": base,
        "meta": torch.empty(3, 4, device="meta"), "meta too": torch.empty(3, 4, device="meta"),
    }  # fmt: skip
    assert list(without_repeats(state)) == [name for name in state if name not in ("tied", "again", "one again")]


def test_a_norm_without_use_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    own = ["mot_norms.text.weight", "t.mot_norms.text.weight", "layers.0.norm.weight"]
    state = {"norm.weight": 1, "t.norm.bias": 2, "layers.0.norm.weight": 3, "other.norm.weight": 4, "t.norm.x": 5,
             "xnorm.weight": 6, "mot_norms.text.weight": 7}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        left = without_unused(state, own)
    assert list(left) == ["layers.0.norm.weight", "other.norm.weight", "t.norm.x", "xnorm.weight",
                          "mot_norms.text.weight"]  # fmt: skip
    said = "norm.weight, t.norm.bias: left out, as the model norms by modality (mot_norms)"
    assert [record.getMessage() for record in caplog.records] == [said]
    caplog.clear()
    kept = {"norm.weight": 1}
    assert without_unused(kept, ["norm.weight", "mot_norms.text.weight"]) == without_unused(kept, []) == kept
    assert caplog.records == []


def test_tied_names_with_different_values_are_refused() -> None:
    check_tied({"a": ONE, "b": ONE.copy()}, {"a": "b"})
    check_tied({"a": ONE}, {"a": "b"})
    check_tied({"a": np.array([np.nan])} | {"b": np.ones(1)}, {})
    nan = np.array([np.nan])
    check_tied({"a": nan, "b": nan}, {"a": "b"})
    check_tied({"c": ONE, "a": torch.ones(2), "b": ONE, "d": ONE * 2}, {"a": "b"})
    for other in (ONE * 2, torch.zeros(2), np.ones(3, np.float32)):
        with pytest.raises(UserError) as caught:
            check_tied({"c": ONE, "d": ONE, "a": other, "b": ONE}, {"c": "d", "a": "b"})
        assert str(caught.value) == "a: differs from b, to which the model ties it"


# Files of tensors


def test_metadata_and_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for metadata in ({"a": "b"}, MappingProxyType({"a": "b"}), {}, None):
        write_tensors(tmp_path / "a.safetensors", {"x": ONE}, metadata)
        assert TensorFile(tmp_path / "a.safetensors").metadata == (metadata or {})
        assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == stat.S_IMODE(
            (tmp_path / "plain").stat().st_mode
        )
    assert not is_trace(tmp_path / "a.safetensors")
    assert not is_trace(tmp_path / "plain")
    assert not is_trace(tmp_path)
    assert TRACE == "kempnerforge_trace"
    write_tensors(tmp_path / "a.safetensors", {"x": ONE}, {TRACE: "1"})
    assert is_trace(tmp_path / "a.safetensors")


def write_by_hand(path: Path, header: dict[str, Any], body: bytes) -> None:
    """The documented format: the length of the header in 8 bytes, little-endian, the header in JSON, the values."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_entries_are_in_the_order_of_the_values_and_end_where_they_say(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = {
        "second": {"dtype": "I16", "shape": [2, 1], "data_offsets": [4, 8]},
        "__metadata__": {"k": "v"},
        "zeroth": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "third": {"dtype": "U8", "shape": [0, 3], "data_offsets": [8, 8]},
    }
    write_by_hand(path, header, np.float32(1.5).tobytes() + np.array([3, -4], np.int16).tobytes())
    file = TensorFile(path)
    assert list(file.entries) == ["zeroth", "second", "third"]
    assert [entry.shape for entry in file.entries.values()] == [(), (2, 1), (0, 3)]
    assert file.metadata == {"k": "v"}
    read = read_tensors(path)
    assert (read["zeroth"].tolist(), read["second"].tolist(), read["third"].shape) == (1.5, [[3], [-4]], (0, 3))
    assert list(read_tensors(path, ["third", "zeroth"])) == ["third", "zeroth"]
    with pytest.raises(UserError) as caught:
        read_tensors(path, ["zeroth", "fourth"])
    assert str(caught.value) == f"{path}: has no tensor 'fourth'"
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder, where a safetensors file is needed"):
        TensorFile(tmp_path)


def test_aligned_values_are_mapped_and_others_copied(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": ONE})
    array = read_tensors(tmp_path / "a.safetensors")["x"]
    assert type(array) is np.ndarray
    base: Any = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    array[0] = 5
    assert read_tensors(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]


def test_a_file_that_is_not_there_is_no_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        TensorFile(tmp_path / "absent")
    assert str(caught.value) == f"{tmp_path}/absent: can't be read: No such file or directory"


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_by_hand(path, {"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
    names = "F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U64, U32, U16, U8, BOOL"
    with pytest.raises(UserError) as caught:
        TensorFile(path)
    assert str(caught.value) == f"{path}: tensor 'a' has dtype C64: must be one of {names}"


# Weights


def test_all_that_is_said_of_tensors_that_do_not_fit() -> None:
    table: dict[str, Any] = {name: SimpleNamespace(shape=(2,)) for name in ("a", "b", "c")}
    check_tensors({"c": ONE, "b": ONE.astype(ml_dtypes.bfloat16), "a": torch.ones(2)}, table)
    for other in (torch.ones(1, 2), np.ones((1, 2))):
        with pytest.raises(WeightsError) as caught:
            check_tensors({"a": ONE, "b": ONE, "c": other}, table)
        assert caught.value.problems == ("c: shape (1, 2), the model needs (2,)",)
    with pytest.raises(WeightsError) as caught:
        check_tensors({"x": ONE, "b": np.ones((1, 2), np.int8), "c": ONE}, table)
    assert caught.value.problems == (
        "a: missing, the model has it with shape (2,)",
        "b: shape (1, 2), the model needs (2,)",
        "b: dtype int8, the model needs floating-point values",
        "x: extra, the model has no such tensor",
    )
    assert str(caught.value) == "\n  ".join(["weights: 4 tensors do not fit:", *caught.value.problems])


@pytest.mark.parametrize(
    ("limit", "shards"),
    [(8, [["a"], ["b"], ["c"]]), (15, [["a"], ["b"], ["c"]]), (16, [["a", "b"], ["c"]]), (23, [["a", "b"], ["c"]]),
     (24, [["a", "b", "c"]]), (1, [["a"], ["b"], ["c"]])],
)  # fmt: skip
def test_shards_are_filled_to_their_limit(limit: int, shards: list[list[str]], tmp_path: Path) -> None:
    written = save_weights(tmp_path, dict.fromkeys("abc", ONE), max_shard_bytes=limit, metadata={"kind": "x"})
    files = [file for file in written if file.suffix == ".safetensors"]
    assert [list(TensorFile(file).entries) for file in files] == shards
    assert all(TensorFile(file).metadata == {"format": "pt", "names": "2", "kind": "x"} for file in files)
    if len(shards) == 1:
        assert written == [tmp_path / "model.safetensors"]
        return
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [file.name for file in written] == [*names, "model.safetensors.index.json"]
    assert json.loads(written[-1].read_text()) == {
        "metadata": {"format": "pt", "names": "2", "kind": "x", "total_size": 24},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    assert written[-1].read_text().startswith('{\n  "metadata": {\n')
    assert written[-1].read_text().endswith("}\n")
    assert weight_names(tmp_path) == weight_names(written[-1]) == ["a", "b", "c"]


def test_every_shard_is_filled_to_the_limit(tmp_path: Path) -> None:
    files = save_weights(tmp_path, dict.fromkeys("abcd", ONE), max_shard_bytes=16)[:-1]
    assert [list(TensorFile(file).entries) for file in files] == [["a", "b"], ["c", "d"]]


def test_an_empty_state_is_one_file(tmp_path: Path) -> None:
    assert save_weights(tmp_path, {}, max_shard_bytes=1) == [tmp_path / "model.safetensors"]
    assert load_weights(tmp_path) == {}


def test_a_file_is_never_sharded_and_nothing_beside_it_goes(tmp_path: Path) -> None:
    save_weights(tmp_path, {"a": ONE, "b": ONE}, max_shard_bytes=8)
    older = {file.name for file in tmp_path.iterdir()}
    path = tmp_path / "other.safetensors"
    assert save_weights(path, {"a": ONE, "b": ONE}, max_shard_bytes=1) == [path]
    assert {file.name for file in tmp_path.iterdir()} == {*older, "other.safetensors"}
    save_weights(tmp_path, {"a": ONE})
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "other.safetensors"}


def test_a_single_file_counts_before_an_index(tmp_path: Path) -> None:
    save_weights(tmp_path, {"a": ONE, "b": ONE}, max_shard_bytes=8)
    assert entry_file(tmp_path) == tmp_path / "model.safetensors.index.json"
    write_tensors(tmp_path / "model.safetensors", {"c": ONE})
    assert entry_file(tmp_path) == tmp_path / "model.safetensors"
    assert list(load_weights(tmp_path)) == ["c"]
    absent = tmp_path / "absent"
    assert entry_file(absent) == absent


def test_tied_tensors_are_written_under_their_first_name(tmp_path: Path) -> None:
    tied = torch.ones(2)
    save_weights(tmp_path / "a.safetensors", {"module.x": tied, "y": tied, "z": torch.ones(2)})
    assert sorted(TensorFile(tmp_path / "a.safetensors").entries) == ["x", "z"]


def test_files_of_two_versions_are_read_as_former(tmp_path: Path) -> None:
    """One shard without the mark of today's names is enough."""
    old, new = "cross_attention_layers.0.attention.q", "layers.0.mlp.gate"
    save_weights(tmp_path, {old: ONE, new: ONE}, max_shard_bytes=8)
    assert set(load_weights(tmp_path)) == {old, new}
    save_file({new: ONE}, tmp_path / "model-00002-of-00002.safetensors")
    assert set(load_weights(tmp_path)) == {"cross_attention_layers.0.attn.q", new}


NEEDED = (
    "needed are safetensors: a .safetensors file, or a folder with model.safetensors or model.safetensors.index.json "
    "(in transformers: model.save_pretrained(folder))"
)
ADAPTER = "holds an adapter (LoRA), which is merged into its base model first"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.safetensors", b"PK\3\4....", "is in a zip archive, as torch.save writes, which is not read"),
        ("a.bin", b"GGUF....", "is in the GGUF format of llama.cpp, which is not read"),
        ("a", b"\x89HDF\r\n", "is in HDF5, which is not read"),
        ("a.BIN", b"", "is in PyTorch's pickle format, which is not read"),
        ("a.npz", b"x", "is in NumPy's format, which is not read"),
        ("adapter_model.safetensors", b"x", ADAPTER),
        ("adapter_config.json", b"{}", ADAPTER),
    ],
)
def test_files_of_other_formats_are_told_by_start_and_name(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_weights(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: {said}; {NEEDED}"


def test_a_folder_without_weights_says_what_is_there(tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(UserError) as caught:
            load_weights(tmp_path)
        return str(caught.value)

    neither = f"{tmp_path}: holds no weights: neither model.safetensors nor model.safetensors.index.json"
    assert said() == f"{neither}; {NEEDED}"
    (tmp_path / "notes.txt").touch()
    assert said() == f"{neither}; {NEEDED}"
    (tmp_path / "b.PT").touch()
    assert said() == f"{neither}; there is b.PT (PyTorch's pickle format); {NEEDED}"
    for name in ("adapter_model.safetensors", "z.safetensors", "c.gguf"):
        (tmp_path / name).touch()
    assert said() == (
        f"{neither}; there are adapter_model.safetensors (an adapter, to be merged into its base model first), "
        f"b.PT (PyTorch's pickle format), c.gguf (the GGUF format of llama.cpp), z.safetensors (by another name); "
        f"{NEEDED}"
    )


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    save_weights(tmp_path, {"a": ONE, "b": ONE}, max_shard_bytes=8)
    index = tmp_path / "model.safetensors.index.json"
    first = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": first, "x": first, "y": first}}))
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path)
    assert str(caught.value) == f"{index}: 2 tensors do not fit:\n  x: not in {first}\n  y: not in {first}"
    index.write_text(json.dumps({"weight_map": {"b": "model-00002-of-00002.safetensors", "a": first}}))
    assert list(load_weights(tmp_path)) == ["b", "a"]
    for file in ("deep/a.safetensors", f"../{tmp_path.name}/{first}", f"{tmp_path}/{first}"):
        index.write_text(json.dumps({"weight_map": {"a": first, "b": file}}))
        with pytest.raises(UserError) as caught:
            load_weights(tmp_path)
        assert str(caught.value) == f"{index}: must name files of its own folder only"


def test_new_shards_never_take_the_names_of_those_they_replace(tmp_path: Path) -> None:
    state = {"a": ONE, "b": ONE}
    first = save_weights(tmp_path, state, max_shard_bytes=8)
    second = save_weights(tmp_path, state, max_shard_bytes=8)
    third = save_weights(tmp_path, {**state, "c": ONE}, max_shard_bytes=8)
    assert weights.SHARD.fullmatch(second[0].name)
    assert not {file.name for file in first[:-1]} & {file.name for file in second[:-1]}
    assert len({file.name.partition("-0000")[0] for file in second[:-1]}) == 1
    assert len(second[0].name) == len(first[0].name) + 9
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in third}
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"of a set that is torn")
    fourth = save_weights(tmp_path, state, max_shard_bytes=8)
    assert not {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} & {file.name for file in fourth}
