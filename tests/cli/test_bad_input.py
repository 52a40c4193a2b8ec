"""What the user can mend: one clear message on stderr, exit status 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared_config.cli import main
from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import parameter_table
from shared_config.interchange.weights import save_weights
from shared_config.loader import load_config
from tests.cli.processes import run_python

TINY = (
    "--model.dim=16",
    "--model.n_layers=1",
    "--model.n_heads=2",
    "--model.n_kv_heads=1",
    "--model.ffn_hidden_dim=24",
    "--model.max_seq_len=16",
    "--train.seq_len=16",
)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command line that must be refused."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("kempnerforge: ") for line in lines), err
    return "\n".join(line.removeprefix("kempnerforge: ") for line in lines)


def trace(output: Path, *arguments: str) -> tuple[str, ...]:
    return ("trace", "debug", "--backend", "torch", "--output", str(output / "t.safetensors"), *TINY, *arguments)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'valdate'" in refused(capsys, "valdate", "debug")


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--shrnk" in refused(capsys, "validate", "debug", "--shrnk")


def test_unknown_preset_suggests_close_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean debug" in refused(capsys, "show", "debgu")


def test_missing_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "No such file" in refused(capsys, "show", str(tmp_path / "absent.toml"))


def test_broken_toml(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("[model\ndim = 3", encoding="utf-8")
    message = refused(capsys, "show", str(file))
    assert str(file) in message
    assert "not valid TOML" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--model.dimm=3", ["--model.dimm", "unknown key", "dim"]),
        ("--modle.dim=3", ["--modle.dim", "unknown key", "model"]),
        ("--model.dim=wide", ["model.dim", "'wide'", "integer"]),
        ("--model.dim=3.5", ["model.dim", "3.5", "integer"]),
        ("--model.dim=-4", ["model.dim", "-4", "greater than 0"]),
        ("--model.activation=tanh", ["model.activation", "'tanh'", "silu"]),
        ("--model.dim", ["--model.dim", "needs a value"]),
        ("--train.seq_len=300", ["train.seq_len = 300", "model.max_seq_len = 256"]),
    ],
)
def test_values_that_do_not_fit(capsys: pytest.CaptureFixture[str], override: str, words: list[str]) -> None:
    message = refused(capsys, "show", "debug", override)
    assert all(word in message for word in words), message


def test_all_wrong_fields_are_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "show", "debug", "--model.dim=-4", "--train.seed=x", "--optimizer.lr=0.0")
    assert len(message.splitlines()) == 3


def test_layout_that_does_not_fit_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "show", "debug", "--world-size", "6", "--distributed.tp", "4")
    assert "must equal the world size 6" in message


@pytest.mark.parametrize("command", ["validate", "train"])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_missing_backend_names_the_extra(command: str, backend: str, tmp_path: Path) -> None:
    options = ["--backend", backend, "--output", str(tmp_path)] if command == "train" else []
    result = run_python("-m", "shared_config.cli", command, "debug", *options, blocked=(backend,))
    assert result.returncode == 2
    assert result.stderr == (
        f"kempnerforge: backend {backend}: the package {backend} is not installed; "
        f"pip install 'kempnerforge-twin[{backend}]'\n"
    )


def test_truncated_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = _weights(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(capsys, *trace(tmp_path, "--weights", str(weights)))
    assert str(weights) in message
    assert "can't be read as a safetensors file" in message


def test_corrupt_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    assert str(weights) in refused(capsys, *trace(tmp_path, "--weights", str(weights)))


def test_weights_of_another_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, *trace(tmp_path, "--weights", str(_weights(tmp_path)), "--model.ffn_hidden_dim=32"))
    assert "layers.0.mlp.up_proj.weight: shape (24, 16), the model needs (32, 16)" in message
    assert "layers.0.mlp.down_proj.weight" in message


def test_absent_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "'nowhere'" in refused(capsys, *trace(tmp_path, "--weights", "nowhere"))


def test_output_below_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    below = tmp_path / "file" / "below"
    assert str(below) in refused(capsys, *trace(below))
    assert str(below) in refused(capsys, "train", "debug", "--backend", "torch", "--quiet", "--output", str(below))
    assert str(below) in refused(capsys, "validate", "debug", "--keep", str(below))


def test_output_that_is_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").mkdir()
    assert "is a folder" in refused(capsys, *trace(tmp_path))


@pytest.mark.parametrize("ids", ["1,2,260", "1,-1"])
def test_ids_outside_the_vocabulary(capsys: pytest.CaptureFixture[str], tmp_path: Path, ids: str) -> None:
    message = refused(capsys, *trace(tmp_path, f"--tokens={ids}"))
    assert ids.rpartition(",")[2] in message
    assert "must be in [0, 260)" in message


def test_sequence_too_long(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, *trace(tmp_path, "--tokens", ",".join(["7"] * 17)))
    assert "17 positions" in message
    assert "model.max_seq_len = 16" in message


@pytest.mark.parametrize("text", ["one,two", "1,,2", "absent.npy"])
def test_tokens_that_can_not_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    assert text in refused(capsys, *trace(tmp_path, "--tokens", text))


def test_tokens_of_another_shape_or_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "tokens.npy"
    np.save(file, np.zeros((2, 3)))
    assert "must be integers of shape (batch, sequence)" in refused(capsys, *trace(tmp_path, "--tokens", str(file)))


def test_data_outside_the_vocabulary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "data.npy"
    np.save(file, np.full(4000, 300, np.uint16))
    message = refused(
        capsys, "train", "debug", *TINY, "--backend", "torch", "--output", str(tmp_path), f"--data.path={file}"
    )
    assert "id 300 is outside the vocabulary" in message


def test_checkpoint_of_another_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(
        capsys,
        *("train", "debug", *TINY, "--backend", "torch", "--quiet", "--output", str(tmp_path / "run")),
        *(f"--checkpoint.load_path={_weights(tmp_path)}", "--model.ffn_hidden_dim=32"),
    )
    assert "layers.0.mlp.up_proj.weight" in message


def test_models_too_large_to_validate_are_refused_with_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "validate", "llama3_70b")
    assert "70,553,706,496 parameters" in message
    assert "TiB" in message
    assert "--shrink" in message


def test_unknown_dtype_of_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'float46' must be one of float64" in refused(capsys, "validate", "debug", "--dtypes=float32,float46")


def test_compare_needs_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = str(_weights(tmp_path))
    assert "no trace" in refused(capsys, "compare", weights, weights)
    assert "absent" in refused(capsys, "compare", "absent", weights)


@pytest.mark.parametrize("source", ["absent", "empty", "weights.safetensors"])
def test_convert_needs_a_model_and_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    _weights(tmp_path)
    message = refused(capsys, "convert", str(tmp_path / source), "--output", str(tmp_path / "out"))
    assert str(tmp_path / source) in message
    assert not (tmp_path / "out").exists()


def _weights(folder: Path) -> Path:
    """Weights that fit the tiny config."""
    config = load_config("debug", TINY)
    file = folder / "weights.safetensors"
    save_weights(file, dict(initial_values(parameter_table(config.model), seed=0)))
    return file
