"""Wherever a path is taken, its text is as good as a `Path`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared_config.contract.parameters import parameter_table
from shared_config.interchange import checkpoint, files, outputs, reading, run_layout, source, tensors, weights
from shared_config.interchange.activations import ActivationWriter, read_activations, write_activations
from shared_config.interchange.huggingface import load_huggingface, read_huggingface_config, save_huggingface
from shared_config.interchange.text_weights import load_text_weights
from shared_config.loader import load_config
from tests.oracle.weights import draw

CONFIG = load_config("debug", ["--model.dim=16", "--model.n_layers=1", "--model.ffn_hidden_dim=24"])
ONE = np.ones(2, np.float32)


def test_runs(tmp_path: Path) -> None:
    run, step = str(tmp_path / "run"), str(tmp_path / "run" / "step_00000001")
    state = checkpoint.TrainingState(1, {"w": ONE}, {})
    for _ in range(2):
        assert checkpoint.save(run, state, keep=1) == Path(step)
    assert checkpoint.load(run).path == checkpoint.load(step).path == run_layout.latest(run) == Path(step)
    assert checkpoint.read_config(run) == {}
    assert checkpoint.is_checkpoint(run)
    assert source.kind_of(run) == source.kind_of(step) == "checkpoint"
    assert source.find_config(run) is None
    run_layout.clean(run)
    full = iter([OSError(28, "No space left on device")])

    def write() -> int:
        for error in full:
            raise error
        return 3

    assert run_layout.with_room(run, 1, write) == 3
    outputs.claim_run_folder(run)
    run_layout.prune(run, 0)
    assert run_layout.latest(run) is None
    outputs.forget_run(run)


def test_weights(tmp_path: Path) -> None:
    folder, file = str(tmp_path / "folder"), str(tmp_path / "a.safetensors")
    assert weights.save_weights(file, {"a": ONE}) == [Path(file)]
    assert weights.entry_file(file) == Path(file)
    assert weights.save_weights(folder, {"a": ONE, "b": ONE}, max_shard_bytes=8)[-1].parent == Path(folder)
    for path, names in ((file, ["a"]), (folder, ["a", "b"])):
        assert list(weights.load_weights(path)) == weights.weight_names(path) == names
    tensors.write_tensors(file, {"c": ONE})
    assert list(tensors.read_tensors(file)) == list(tensors.TensorFile(file).entries) == ["c"]
    assert not tensors.is_trace(file)


def test_files(tmp_path: Path) -> None:
    file, folder = str(tmp_path / "a.json"), str(tmp_path / "deep" / "folder")
    with files.written_aside(file) as aside:
        aside.write_text("{}")
    assert files.regular_target(file) == Path(file)
    assert files.make_folder(folder) == files.folder_target(folder) == Path(folder)
    assert reading.check_regular(file) == 2
    assert reading.read_bytes(file, 2) == b"{}"
    assert reading.read_text(file, 2) == "{}"
    assert reading.read_json(file) == {}
    assert outputs.writable_folder(folder) == outputs.claim_record_folder(folder, frozenset()) == Path(folder)
    outputs.refuse_overlap(folder, file)
    outputs.refuse_overwriting(file, folder, None)


def test_activations(tmp_path: Path) -> None:
    file = str(tmp_path / "a.npz")
    with ActivationWriter(file) as writer:
        writer.append({"a": ONE})
    assert read_activations(file)["a"].tolist() == [1, 1]
    write_activations(str(tmp_path / "b"), {"b": ONE})
    assert list(read_activations(str(tmp_path / "b.npz"))) == ["b"]


def test_models(tmp_path: Path) -> None:
    state = draw({name: spec.shape for name, spec in parameter_table(CONFIG.model).items()}, 1)
    folder = str(tmp_path / "foreign")
    assert save_huggingface(folder, state, CONFIG.model)[-1] == tmp_path / "foreign" / "config.json"
    assert load_huggingface(folder)[1].keys() == load_text_weights(folder, CONFIG.model).keys() == state.keys()
    assert read_huggingface_config(folder)["dim"] == 16
    assert source.read_model(folder).path == tmp_path / "foreign"
    assert source.read_config(folder).keys() == {"model", "optimizer", "scheduler", "train"}
    native = str(tmp_path / "native")
    assert outputs.claim_folder(native, "native", CONFIG, source=folder) == Path(native)
