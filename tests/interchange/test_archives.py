"""Archives of activations as NumPy's documentation lays them out, and the samples that they are made from."""

from __future__ import annotations

import ast
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from shared_config.errors import UserError
from shared_config.interchange import activations
from shared_config.interchange.activations import (
    ActivationWriter,
    flattened,
    read_activations,
    token_batches,
    with_suffix,
    write_activations,
)

ARRAYS: dict[str, Any] = {
    "norm": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "half": {"text": np.array([1.5, -2.0], ml_dtypes.bfloat16), "image": np.ones((1, 0), np.float16)},
    "scalar": np.float64(3.5),
    "eighth": np.array([1.0, 2.0], ml_dtypes.float8_e4m3fn),
    "swapped": np.array([1, 2], ">i4"),
    "flags": np.array([True, False]),
    "none": np.zeros((0, 4), np.float32),
}


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    write_activations(tmp_path / "a", ARRAYS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    found = read_activations(tmp_path / "a.npz")
    expected = flattened(ARRAYS)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
    assert list(expected) == [
        "norm",
        "turned",
        "half/text",
        "half/image",
        "scalar",
        "eighth",
        "swapped",
        "flags",
        "none",
    ]


def test_an_archive_is_one_that_numpy_reads(tmp_path: Path) -> None:
    """Stored, not compressed; a .npy of format 2.0 for each array; types that NumPy lacks as integers, told beside."""
    write_activations(tmp_path / "a.npz", ARRAYS)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert set(loaded.files) == {*flattened(ARRAYS), "__dtypes__"}
        assert json.loads(str(loaded["__dtypes__"])) == {"half/text": "bfloat16", "eighth": "float8_e4m3fn"}
        assert (loaded["half/text"].dtype, loaded["eighth"].dtype) == (np.uint16, np.uint8)
        assert np.array_equal(loaded["turned"], ARRAYS["turned"])
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.comment == b"2"
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[:2] == ["norm.npy", "turned.npy"]
        content = archive.read("norm.npy")
    assert content[:8] == b"\x93NUMPY\x02\x00"
    header = content[12 : 12 + int.from_bytes(content[8:12], "little")].decode()
    assert ast.literal_eval(header) == {"descr": "<f4", "fortran_order": False, "shape": (2, 3)}
    assert np.load(io.BytesIO(content)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pieces_go_on_along_the_first_axis(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path / "a.npz") as writer:
        for count in (2, 0, 3):
            values = np.full((3, count), count, np.int16).T
            writer.append({"a": values, "b": {"text": values[:, :1].astype(ml_dtypes.bfloat16)}})
        writer.append({"late": np.ones(1)})
    found = read_activations(tmp_path / "a.npz")
    assert found["a"].tolist() == [[2] * 3] * 2 + [[3] * 3] * 3
    assert found["b/text"].astype(int).tolist() == [[2]] * 2 + [[3]] * 3
    assert found["late"].tolist() == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_pieces_are_kept_beside_the_file_until_it_is_whole(tmp_path: Path) -> None:
    with ActivationWriter(tmp_path / "a.npz") as writer:
        writer.append({"a": [1.0, 2.0]})
        aside, folder = sorted(tmp_path.iterdir())
        assert (aside.is_file(), folder.is_dir()) == (True, True)
        assert folder.name.startswith(f"{aside.name}.")
    assert read_activations(tmp_path / "a.npz")["a"].tolist() == [1, 2]
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        assert archive.infolist()[0].extract_version == 45, "an array may have more than 4 GiB"
        archive.comment = b"\xff"
    assert read_activations(tmp_path / "a.npz")["a"].tolist() == [1, 2]


def test_what_was_wrong_first_is_said(tmp_path: Path) -> None:
    def fail() -> None:
        with ActivationWriter(tmp_path / "a.npz") as writer:
            shutil.rmtree(writer._folder)
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_all_that_is_said_of_pieces_that_do_not_go_on(tmp_path: Path) -> None:
    needed = "all but the first axis must stay the same"
    with ActivationWriter(tmp_path / "a.npz") as writer:
        with pytest.raises(UserError) as caught:
            writer.append({"a": np.float32(1)})
        assert str(caught.value) == f"a: float32[] does not continue float32[0]; {needed}"
        writer.append({"a": np.zeros((2, 3), np.float32)})
        for other in (np.zeros((2, 4), np.float32), np.zeros((2, 3)), np.zeros(3, np.float32)):
            with pytest.raises(UserError) as caught:
                writer.append({"a": other})
            said = f"a: {other.dtype}{list(other.shape)} does not continue float32[2, 3]; {needed}"
            assert str(caught.value) == said
    assert read_activations(tmp_path / "a.npz")["a"].shape == (2, 3)


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with ActivationWriter(tmp_path / "a.npz") as writer:
            writer.append({"a": np.ones(3)})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"folder\.npz: is a folder"):
        write_activations(tmp_path / "folder.npz", {"a": np.ones(3)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations, "commit", full)
    with pytest.raises(UserError) as caught:
        write_activations(tmp_path / "a.npz", {"a": np.ones(3)})
    assert str(caught.value) == f"{tmp_path}/a.npz: can't be written: No space left on device"
    monkeypatch.setattr(activations, "make_aside", full)
    with pytest.raises(UserError) as caught:
        ActivationWriter(tmp_path / "a.npz")
    assert str(caught.value) == f"{tmp_path}/a.npz: can't be written: No space left on device"
    assert [file.name for file in tmp_path.iterdir()] == ["folder.npz"]


def test_names_end_as_numpy_lets_them_end() -> None:
    names = {"a": "a.npz", "a.npz": "a.npz", "a.b": "a.b.npz", "d/a.npy": "d/a.npy.npz", "x.npz.old": "x.npz.old.npz"}
    assert {name: str(with_suffix(name)) for name in names} == names
    assert isinstance(with_suffix("a.npz"), Path)


def test_files_that_are_none_of_ours_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for content in (b"", b"PK\3\4 and no more", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: can't be read as a file of activations: "):
            read_activations(path)
    np.savez(path, a=np.ones(2))
    with pytest.raises(UserError, match="can't be read as a file of activations: '__dtypes__'"):
        read_activations(path)
    np.savez(path, a=np.ones(2), __dtypes__=np.array("{"))
    with pytest.raises(UserError, match="can't be read as a file of activations: Expecting"):
        read_activations(path)
    np.savez(path, a=np.array([{}], object), __dtypes__=np.array("{}"))
    with pytest.raises(UserError, match="can't be read as a file of activations: Object arrays"):
        read_activations(path)
    with pytest.raises(UserError, match=r"absent\.npz: can't be read: No such file"):
        read_activations(tmp_path / "absent.npz")


# Samples


def batches(dataset: Any, size: int = 2, most: int | None = None, vocab: int = 10) -> list[tuple[Any, Any]]:
    made = list(token_batches(dataset, size, most, vocab))
    assert all(tokens.dtype == np.int32 and (mask is None or mask.dtype == bool) for tokens, mask in made)
    return [(tokens.tolist(), None if mask is None else mask.tolist()) for tokens, mask in made]


def said_of(dataset: Any, size: int = 2, most: int | None = None, vocab: int = 10) -> str:
    with pytest.raises(UserError) as caught:
        list(token_batches(dataset, size, most, vocab))
    return str(caught.value)


def test_samples_are_batched_in_their_order() -> None:
    samples = [np.array([place, 9], np.uint8) for place in range(5)]
    rows = [[place, 9] for place in range(5)]
    assert batches(samples) == [(rows[:2], None), (rows[2:4], None), (rows[4:], None)]
    assert batches(samples, 1)[3] == (rows[3:4], None)
    assert batches(samples, 5) == batches(samples, 6) == [(rows, None)]
    assert batches(samples, 2, 3) == [(rows[:2], None), (rows[2:3], None)]
    assert batches(samples, 2, 1) == [(rows[:1], None)]
    assert batches(iter(samples), 2, 9) == batches(samples)
    assert len(next(iter(token_batches(iter(lambda: [1, 2], None), 3, None, 10)))[0]) == 3, "no more than a batch"


def test_masks_are_those_of_samples_that_have_one() -> None:
    plain = {"input_ids": [1, 2], "other": 3}
    masked = {"tokens": [3, 4], "input_ids": [5, 6], "text_mask": [True, False], "attention_mask": [0, 0]}
    second = {"input_ids": [7, 8], "attention_mask": np.array([0, 1])}
    assert batches([plain, masked, second, [1, 1]], 2) == [
        ([[1, 2], [3, 4]], [[True, True], [True, False]]),
        ([[7, 8], [1, 1]], [[False, True], [True, True]]),
    ]
    assert batches([plain, plain, masked], 2)[0][1] is None


def test_all_that_is_said_of_samples() -> None:
    assert said_of([[1]], size=0) == "batch_size = 0: must be at least 1"
    assert said_of([[1]], most=0) == "max_samples = 0: must be at least 1, or None for all"
    assert said_of([]) == "dataset is empty: at least one sample is needed"
    assert said_of([[1], [2, 3]]) == "dataset has samples of 1 and of 2 tokens: all must be as long"
    assert said_of([[1], [2], [2, 3]]) == "dataset has samples of 1 and of 2 tokens: all must be as long"
    assert said_of([[1], {"b": 1, "a": 2}]) == "dataset[1] has ['a', 'b']: must have one of tokens, input_ids"
    assert said_of([[1], [1], [1.0]]) == "dataset[2] is float64[1]: must be token ids of one sequence"
    assert said_of([[[1]]]) == "dataset[0] is int64[1, 1]: must be token ids of one sequence"
    assert said_of([[0, 9], [3, 10, -1]]) == "dataset[1] holds 10: token ids must be in [0, 10)"
    assert said_of([[-1, 10]]) == "dataset[0] holds -1: token ids must be in [0, 10)"
    field = {"tokens": [1, 2], "text_mask": [1, 0, 1]}
    assert said_of([field]) == "dataset[0]['text_mask'] is int64[3]: must be 2 of 0 and 1"
    field = {"tokens": [1, 2], "attention_mask": [0, 2]}
    assert said_of([[1, 1], field]) == "dataset[1]['attention_mask'] is int64[2]: must be 2 of 0 and 1"
    assert said_of([[]]) == "dataset[0] is float64[0]: must be token ids of one sequence"
