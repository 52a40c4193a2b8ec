"""Weights and the settings beside them: every command, every kind of weights, the same rule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from shared_config.cli import main
from shared_config.commands import validate
from shared_config.contract.initialise import initial_values, state_hash
from shared_config.contract.vision import job_table
from shared_config.interchange import checkpoint
from shared_config.interchange.huggingface import save_huggingface
from shared_config.interchange.source import find_config, read_model
from shared_config.interchange.toml import config_to_dict, config_to_toml
from shared_config.interchange.vision import tower_of
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.loader import load_config
from shared_config.parity.traces import read_trace
from shared_config.schema.job import JobConfig
from tests.cli.processes import in_this_process

BACKENDS = ("torch", "jax")
KINDS = ("native", "run", "huggingface")
TINY = ("--model.dim=16", "--model.n_layers=1", "--model.ffn_hidden_dim=24", "--model.max_seq_len=64")
SHORT = ("--train.seq_len=16", "--train.batch_size=2", "--train.max_steps=1", "--eval.steps=0", "--eval.interval=0")
CONFIG = load_config("debug", [*TINY, "--train.seq_len=16"])
CHANGED = {
    "model.rope_theta": "5000.0",
    "model.norm_eps": "0.001",
    "model.sliding_window": "3",
    "model.rope_scaling.type": "linear",
}


def draw(config: JobConfig = CONFIG, seed: int = 1) -> dict[str, np.ndarray]:
    return dict(initial_values(job_table(config, tower_of(config)), seed=seed))


def write(kind: str, folder: Path, config: JobConfig = CONFIG) -> Path:
    """A folder of a kind of weights, with what lies beside them."""
    weights = draw(config)
    if kind == "huggingface":
        save_huggingface(folder, weights, config.model)
    elif kind == "run":
        state = checkpoint.TrainingState(step=3, weights=weights, optimizer={})
        checkpoint.save(folder, state, config=config_to_dict(config), backend="torch")
    else:
        save_weights(folder, weights)
        (folder / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    return folder


def generate(source: str, *options: str, backend: str = "torch") -> int:
    own = ["--prompt", "ab", "--max-new-tokens", "3", "--temperature", "0", "--device", "cpu"]
    return main(["generate", source, "--backend", backend, *own, *options])


def using(command: str, config: str, weights: Path, output: Path, backend: str = "torch") -> list[str]:
    """A command line that reads weights for a config."""
    return {
        "generate": [
            "generate",
            config,
            "--backend",
            backend,
            "--prompt=ab",
            "--max-new-tokens=1",
            f"--weights={weights}",
        ],
        "trace": ["trace", config, "--backend", backend, f"--output={output}/t.safetensors", f"--weights={weights}"],
        "train": ["train", config, "--backend", backend, f"--output={output}/new", f"--checkpoint.load_path={weights}"],
        "convert": ["convert", str(weights), f"--config={config}", f"--output={output}/converted", "--to=native"],
    }[command]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["generate", "trace", "train", "convert"])
def test_settings_beside_the_weights_that_differ_are_listed_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    weights = write(kind, tmp_path / "weights")
    other = load_config("debug", [*TINY, *SHORT, *(f"--{name}={value}" for name, value in CHANGED.items())])
    (tmp_path / "other.toml").write_text(config_to_toml(other), encoding="utf-8")
    assert main(using(command, str(tmp_path / "other.toml"), weights, tmp_path)) == 2
    message = capsys.readouterr().err
    for field in CHANGED:
        assert f"{field} = " in message
    assert "model.rope_theta = 5000.0: is 10000.0 beside the weights" in message
    assert "init_std" not in message
    assert "batch_size" not in message
    assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["generate", "trace", "train", "convert"])
def test_what_the_command_line_sets_wins_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    weights = write(kind, tmp_path / "weights")
    line = using(command, "debug", weights, tmp_path)
    assert main([*line, *TINY, *SHORT, "--model.rope_theta=5000.0", "--model.sliding_window=3"]) == 0
    out, err = capsys.readouterr()
    assert "model.rope_theta = 5000.0, as the command line says, not 10000.0" in out + err
    assert "model.sliding_window = 3, as the command line says, not None" in out + err


def test_fields_that_keep_the_function_are_nobodys_business(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write("native", tmp_path / "weights")
    free = ["--model.init_std=0.5", "--model.max_seq_len=32", "--model.moe_aux_loss_weight=0.5"]
    assert generate("debug", f"--weights={weights}", *TINY, "--train.seq_len=16", *free) == 0
    assert "note" not in capsys.readouterr().err


def test_weights_without_a_config_beside_them_are_taken_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(tmp_path / "bare.safetensors", draw())
    assert generate("debug", f"--weights={tmp_path / 'bare.safetensors'}", *TINY, "--train.seq_len=16") == 0
    assert "has no config beside it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_spellings_of_the_same_function_are_equal(tmp_path: Path, kind: str) -> None:
    width = load_config(
        "debug", [*TINY, "--train.seq_len=16", "--model.ffn_hidden_dim=none"]
    ).model.computed_ffn_hidden_dim
    weights = write(kind, tmp_path / "weights", CONFIG.replace(model=CONFIG.model.replace(ffn_hidden_dim=width)))
    spelled = ["--model.ffn_hidden_dim=none", "--model.head_dim=4", "--model.moe_frequency=1", "--model.moe_top_k=1"]
    config = load_config("debug", [*TINY, "--train.seq_len=16", *spelled])
    assert read_model(weights, config, say=pytest.fail).found != config


# CONFIG is a folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_stands_for_its_config_and_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, backend: str
) -> None:
    folder = write(kind, tmp_path / "folder")
    assert generate(str(folder), backend=backend) == 0
    said = capsys.readouterr().out
    config = ["debug", f"--weights={folder}", *TINY, "--train.seq_len=16"]
    assert generate(*config, backend=backend) == 0
    assert capsys.readouterr().out == said
    trace = ["--backend", backend, "--no-deltas", "--device=cpu", "--tokens=1,2,3"]
    assert main(["trace", str(folder), *trace, f"--output={tmp_path / 't.safetensors'}"]) == 0
    assert read_trace(tmp_path / "t.safetensors").meta.weights_hash == state_hash(draw())


@pytest.mark.parametrize("kind", KINDS)
def test_show_and_validate_take_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(validate, "run_processes", in_this_process)
    folder = write(kind, tmp_path / "folder")
    assert main(["show", str(folder)]) == 0
    assert "dim = 16" in capsys.readouterr().out
    line = ["validate", str(folder), "--dtypes=float64", "--steps=0", f"--keep={tmp_path / 'kept'}", *SHORT]
    assert main(line) == 0
    assert read_trace(tmp_path / "kept" / "jax-float64.safetensors").meta.weights_hash == state_hash(draw())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["native", "huggingface"])
def test_training_starts_from_a_folder(tmp_path: Path, kind: str, backend: str) -> None:
    folder = write(kind, tmp_path / "folder")
    line = ["train", str(folder), "--backend", backend, f"--output={tmp_path / 'run'}", "--quiet", "--device=cpu"]
    assert (
        main([*line, *SHORT, "--optimizer.lr=1e-12", "--train.mixed_precision=fp32", "--train.compile_model=false"])
        == 0
    )
    state = checkpoint.load(tmp_path / "run").state
    for name, values in draw().items():
        np.testing.assert_allclose(state.weights[name], values, atol=1e-6)
    assert state.step == 1


def test_a_run_named_as_config_goes_on_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    line = ["train", "debug", "--backend=torch", "--device=cpu", f"--output={run}", *TINY, *SHORT]
    assert main(line) == 0
    run.rename(moved)
    assert main(["train", str(moved), "--backend=jax", "--device=cpu", "--train.max_steps=2"]) == 0
    assert "resuming at step 1" in capsys.readouterr().out
    assert checkpoint.load(moved).state.step == 2
    assert not run.exists()


def test_a_folder_without_a_config_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(tmp_path / "bare", draw())
    assert main(["show", str(tmp_path / "bare")]) == 2
    assert "has no config" in capsys.readouterr().err


@pytest.mark.parametrize("backend", BACKENDS)
def test_vision_language_models_and_runs_are_traced(tmp_path: Path, backend: str) -> None:
    options = ["--model.dim=16", "--model.ffn_hidden_dim=24", "--model.n_layers=2", "--vision_encoder.n_layers=1"]
    for kind, preset in (("native", "debug_vlm_mot"), ("run", "debug_vlm_joint_decoder")):
        config = load_config(preset, options)
        folder = write(kind, tmp_path / preset, config)
        output = tmp_path / f"{preset}.safetensors"
        line = ["trace", preset, "--backend", backend, "--no-deltas", "--device=cpu", f"--output={output}"]
        assert main([*line, f"--weights={folder}", *options]) == 0
        assert read_trace(output).meta.weights_hash == state_hash(draw(config))


# What is on disk


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_tensor_may_have_either_name_on_disk(tmp_path: Path, backend: str) -> None:
    config = load_config("debug", [*TINY, "--train.seq_len=16", "--model.tie_embeddings=true"])
    table = draw(config)
    for kind, own, alias in (
        ("huggingface", "model.embed_tokens.weight", "lm_head.weight"),
        ("native", "token_embedding.embedding.weight", "output_head.proj.weight"),
    ):
        folder = write(kind, tmp_path / kind, config)
        state = dict(load_weights(folder))
        state[alias] = np.array(state[own])
        save_weights(folder, state)
        assert state_hash(read_model(folder).weights) == state_hash(table)
        del state[own]
        save_weights(folder, state)
        assert state_hash(read_model(folder).weights) == state_hash(table)
        assert generate(str(folder), backend=backend) == 0
        state[own] = state[alias] + 1
        save_weights(folder, state)
        with pytest.raises(ValueError, match="differs from"):
            read_model(folder)


FOREIGN = {
    "pytorch_model.bin": b"PK\3\4" + bytes(60),
    "model.pt": b"\x80\2}q\0." + bytes(60),
    "model.gguf": b"GGUF" + bytes(60),
    "weights": b"GGUF" + bytes(60),
    "adapter_model.safetensors": b"\2\0\0\0\0\0\0\0{}",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("beside", ["config.json", None])
def test_weights_of_other_formats_say_what_is_there_and_what_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, beside: str | None
) -> None:
    folder = write("huggingface", tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(FOREIGN[name])
    if beside is None:
        (folder / "config.json").unlink()
    places = [folder / name] if name == "weights" else [folder / name, folder]
    for place in places:
        for command in ("generate", "trace", "train"):
            assert main([*using(command, "debug", place, tmp_path), *TINY, *SHORT]) == 2
            message = capsys.readouterr().err
            assert str(place) in message
            assert name in message
            assert "needed are safetensors" in message
    if beside is None:
        assert main(["convert", str(folder / name), f"--output={tmp_path / 'out'}"]) == 2
        assert "needed are safetensors" in capsys.readouterr().err


# Folders that are written


def snapshot(folder: Path) -> Mapping[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["native", "huggingface"])
def test_an_output_is_never_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, target: str
) -> None:
    source = write(kind, tmp_path / "up" / "source")
    before = snapshot(tmp_path)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up" / "file").symlink_to(source)
    outputs = [source, tmp_path / "link", source / "new", tmp_path / "link" / "new", tmp_path / "up", tmp_path]
    for output in [*outputs, source / ".." / "source", tmp_path / "up" / "file"]:
        assert main(["convert", str(source), f"--output={output}", f"--to={target}"]) == 2, output
        assert "give another folder" in capsys.readouterr().err
    assert {name: data for name, data in snapshot(tmp_path).items() if name in before} == before
    assert set(snapshot(source)) == {name.removeprefix("up/source/") for name in before}


@pytest.mark.parametrize("target", ["native", "huggingface"])
@pytest.mark.parametrize("there", ["notes", "native", "huggingface", "run", "mixed", "other config", "other command"])
def test_an_output_that_is_not_empty_and_not_ours_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str, target: str
) -> None:
    source, output = write("native", tmp_path / "source"), tmp_path / "out"
    convert = ["convert", str(source), f"--output={output}", f"--to={target}"]
    if there in KINDS:
        write(there, output)
    elif there == "notes":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    elif there == "other config":
        changed = load_config("debug", [*TINY, "--train.seq_len=16", "--model.norm_eps=0.5"])
        other = write("native", tmp_path / "other", changed)
        assert main(["convert", str(other), f"--output={output}", f"--to={target}"]) == 0
    else:
        assert main(convert) == 0
        own = output / ("config.json" if target == "native" else "config.toml")
        if there == "mixed":
            own.write_text(json.dumps({"model_type": "llama"}) if target == "native" else config_to_toml(CONFIG))
        else:
            save_weights(output, dict(load_weights(output)))
    before = snapshot(output)
    capsys.readouterr()
    assert main(convert) == 2
    assert "give a new or an empty folder" in capsys.readouterr().err
    assert snapshot(output) == before


@pytest.mark.parametrize("target", ["native", "huggingface"])
def test_what_the_same_command_wrote_may_be_written_again(tmp_path: Path, target: str) -> None:
    source, output = write("native", tmp_path / "source"), tmp_path / "out"
    convert = ["convert", str(source), f"--output={output}", f"--to={target}"]
    output.mkdir()
    assert main(convert) == 0
    names, first = set(snapshot(output)), state_hash(load_weights(output))
    (output / ("config.toml" if target == "native" else "config.json")).unlink()  # a command that was killed
    for _ in range(2):
        assert main(convert) == 0
        assert (set(snapshot(output)), state_hash(load_weights(output))) == (names, first)


@pytest.mark.parametrize("there", ["notes", "native", "huggingface", "weights beside a run"])
def test_training_does_not_write_among_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    output = tmp_path / "out"
    train = ["train", "debug", "--backend=torch", "--device=cpu", f"--output={output}", *TINY, *SHORT]
    if there in KINDS:
        write(there, output)
    elif there == "notes":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    else:
        assert main(train) == 0
        save_weights(output, draw())
    before = snapshot(output)
    assert main(train) == 2
    assert "is no training run" in capsys.readouterr().err
    assert snapshot(output) == before


def test_validate_keeps_its_files_in_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "run_processes", in_this_process)
    line = ["validate", "debug", "--dtypes=float64", "--steps=1", f"--keep={tmp_path / 'kept'}", *TINY, *SHORT]
    assert main(line) == 0
    assert main(line) == 0
    (tmp_path / "kept" / "model.safetensors").write_bytes(b"mine")
    assert main(line) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == b"mine"


def test_a_run_knows_its_config(tmp_path: Path) -> None:
    run = write("run", tmp_path / "run")
    for place in (run, run / "step_00000003", run / "step_00000003" / "weights.safetensors"):
        assert load_config(str(run)) == CONFIG
        assert find_config(place) == config_to_dict(CONFIG)
