"""Files as other machines and later versions find them: names, keys, and the hashes that comparing traces relies on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from shared_config.interchange.checkpoint import TrainingState, save
from shared_config.interchange.tensors import TensorFile
from shared_config.interchange.weights import MAX_SHARD_BYTES, save_weights
from shared_config.parity.summaries import sketch, summarize

VALUES = np.array([1.5, -2.0, np.inf, np.nan, -np.inf, 0.25], np.float32)


def test_a_checkpoint_has_these_files_and_keys(tmp_path: Path) -> None:
    state = TrainingState(7, {"w": np.ones(2, np.float32)}, {"m.w": np.ones(2, np.float32)}, {"rng": [1]})
    path = save(tmp_path, state, rows=5, fingerprint="f", config={"model": {"dim": 8}}, backend="jax")
    assert path.name == "step_00000007"
    assert {file.name for file in path.iterdir()} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "index.json",
        "state.json",
    }
    fields = json.loads((path / "state.json").read_text())
    versions = fields.pop("versions")
    assert versions.keys() <= {"python", "numpy", "torch", "jax", "flax"}
    checksum = fields.pop("checksum")
    told = json.dumps({**fields, "versions": versions}, sort_keys=True).encode()
    assert checksum == hashlib.sha256(told).hexdigest()
    files = {}
    for name in ("weights.safetensors", "optimizer.safetensors", "index.json"):
        content = (path / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    stated = {"format": 3, "step": 7, "rows": 5, "fingerprint": "f", "config": {"model": {"dim": 8}}, "backend": "jax"}
    assert fields == {**stated, "extra": {"rng": [1]}, "files": files}


def test_weights_have_the_files_that_hugging_face_gives_them(tmp_path: Path) -> None:
    state = {"a": np.ones(4, np.float32), "b": np.ones(3, np.float32), "c": np.ones(1, np.float32)}
    save_weights(tmp_path / "one", state)
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    assert TensorFile(tmp_path / "one" / "model.safetensors").metadata["format"] == "pt"
    save_weights(tmp_path / "two", state, max_shard_bytes=16)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 32
    first, second = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))
    assert index["weight_map"] == {"a": first, "b": second, "c": second}
    assert MAX_SHARD_BYTES == 5 * 10**9  # transformers' "5GB"


def test_a_summary_holds_these_numbers() -> None:
    found = summarize(VALUES)
    told = b"float32 (6,)" + VALUES.tobytes()
    gaps = np.zeros(1021, "<u8")
    gaps[[2, 3, 4]] = (0x85EBCA77, 0x9E3779B1, 0xC2B2AE3D)  # +inf, NaN and -inf in the first row
    kinds = b"(6,)" + gaps.tobytes()
    assert (found.hash, found.nonfinite_hash) == tuple(hashlib.sha256(each).hexdigest() for each in (told, kinds))
    assert (found.minimum, found.maximum, found.nonfinite, found.size) == (-2.0, 1.5, 3, 6)
    assert found.mean == pytest.approx(-0.25 / 3)
    assert found.rms == pytest.approx(((1.5**2 + 2**2 + 0.25**2) / 3) ** 0.5)
    np.testing.assert_array_equal(found.sketch, sketch(np.where(np.isfinite(VALUES), VALUES, 0).astype(np.float64)))
    whole = summarize(np.array([3, 4], np.int32))
    assert whole.hash == hashlib.sha256(b"int64 (2,)" + np.array([3, 4], np.int64).tobytes()).hexdigest()
    assert (whole.nonfinite_hash, whole.sketch.size, summarize(np.zeros(0)).rms) == ("", 0, 0.0)
