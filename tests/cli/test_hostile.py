"""Command lines that nobody means well: exit status 0, 1 or 2, a short message that names the field, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.commands.line import LINE
from shared_config.contract.parameters import parameter_table
from shared_config.interchange.huggingface import save_huggingface
from shared_config.interchange.tensors import TensorFile, write_tensors
from shared_config.loader import load_config
from shared_config.parity.validation import validation_weights
from shared_config.schema.base import LARGEST, LARGEST_FLOAT
from tests.cli.test_bad_input import TINY

DIGITS = "9" * 5000
NESTED = "[" * 5000 + "]" * 5000
BACKENDS = ("torch", "jax")
VALUES = ("0", "-1", DIGITS, f"0x{'f' * 5000}", f"-{DIGITS}", "1e400", "nan", NESTED, '"\\u0000"', "{", "", " ", "true")
FIELDS = (
    *("model.dim", "model.n_layers", "model.norm_eps", "model.ffn_dim_multiplier", "model.rope_scaling.factor"),
    *("model.model_type", "train.seed", "train.seq_len", "optimizer.lr", "optimizer.betas", "data.path", "vlm.arch"),
    *(
        "data.tokenizer",
        "checkpoint.dir",
        "distributed.tp",
        "eval.steps",
        "model.moe_expert_ffn_multiplier",
    ),
)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Status and message of a command line, which keeps to the rules."""
    try:
        status = main(arguments)
    except SystemExit as error:  # --help
        status = int(error.code or 0)
    out, err = capsys.readouterr()
    assert status in (0, 1, 2), arguments
    assert "Traceback" not in out + err
    lines = err.splitlines()
    assert all(len(line) < LINE + 50 for line in lines)
    if status == 2:
        assert 0 < len(lines) < 20, err
        assert "could not go on" not in err, f"nobody checked {arguments}: {err}"
    return status, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status, message = outcome(capsys, *arguments)
    assert status == 2, arguments
    return message


def command(name: str, folder: Path, backend: str = "torch") -> tuple[str, ...]:
    """A command line of a tiny model that would run."""
    output, backends = ("--output", str(folder / "out")), ("--backend", backend)
    return {
        "show": ("show", "debug", *TINY),
        "train": ("train", "debug", *TINY, *backends, *output, "--quiet", "--train.max_steps=1"),
        "generate": ("generate", "debug", *TINY, *backends, "--prompt", "a", "--max-new-tokens=1"),
        "trace": ("trace", "debug", *TINY, *backends, *output, "--no-deltas"),
        "validate": ("validate", "debug", *TINY, "--keep", str(folder / "keep")),
    }[name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["train", "generate", "trace"])
@pytest.mark.parametrize(
    "device", ["", ":", "fpga", "meta", "cpu:x", "cpu:-1", "cpu:" + DIGITS, "cuda:9999", "xla", "CPU "]
)
def test_devices_that_do_not_exist(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, backend: str, device: str
) -> None:
    message = refused(capsys, *command(name, tmp_path, backend), f"--device={device}")
    assert "device = " in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", FIELDS)
def test_values_of_fields(capsys: pytest.CaptureFixture[str], field: str) -> None:
    for value in VALUES:
        status, message = outcome(capsys, "show", "debug", f"--{field}={value}")
        assert status == 0 or field.rpartition(".")[2] in message, (field, value[:20], message[:300])


@pytest.mark.parametrize("field", FIELDS)
def test_values_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, field: str) -> None:
    section, _, name = field.partition(".")
    file = tmp_path / "config.toml"
    for value in VALUES:
        file.write_text(f"[{section}]\n{name} = {value}\n", encoding="utf-8")
        outcome(capsys, "show", str(file))


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("show", "--world-size", ("0", "-1", DIGITS, str(LARGEST + 1), "x", "1.5", "")),
        ("trace", "--seed", ("-1", DIGITS, str(2**63), "x", "")),
        ("trace", "--layers", ("0-99999999999", DIGITS, f"0-{DIGITS}", "-1", "", ",", "٣")),
        ("trace", "--tokens", ("", ",", DIGITS, f"{2**63}", "-1", "1e3", "x.npy", ".npy")),
        ("trace", "--summary", ("-1", DIGITS, "x")),
        ("trace", "--only", ("", "[", "*" * 3)),
        ("generate", "--seed", ("-1", DIGITS, "x")),
        ("generate", "--top-k", ("-1", DIGITS, "x")),
        ("generate", "--top-p", ("-1", "nan", "inf", "2", "x")),
        ("generate", "--temperature", ("-1", "nan", "inf", "x")),
        ("generate", "--max-new-tokens", ("-1", DIGITS, str(LARGEST), "x")),
        ("validate", "--steps", ("-1", DIGITS, "x")),
        ("validate", "--seed", ("-1", DIGITS, "x")),
        ("validate", "--dtypes", ("", ",", "float8", "float64,")),
    ],
)
def test_values_of_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, option: str, values: tuple[str, ...]
) -> None:
    for value in values:
        status, message = outcome(capsys, *command(name, tmp_path), f"{option}={value}")
        known = option.removeprefix("--").replace("-", "_")
        assert status != 2 or option in message or known in message or known[:-1] in message, (
            value[:20],
            message[:300],
        )


@pytest.mark.parametrize("name", ["show", "train", "generate", "trace", "validate"])
@pytest.mark.parametrize("text", ["a\0b", "\udcff", "--\0", "--data.path=\udc80", "--device=\0", "--model.dim=\0"])
def test_arguments_that_are_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str) -> None:
    assert "must be UTF-8 text" in refused(capsys, *command(name, tmp_path), text)


@given(
    arguments=st.lists(
        st.text(max_size=8) | st.sampled_from(("show", "compare", "convert", "debug", "--", "-", "--x.y", "=")),
        max_size=5,
    )
)
def test_any_words(arguments: list[str]) -> None:
    assert main(["show", *arguments, "--no-such-option"]) == 2


@given(
    words=st.lists(
        st.sampled_from((*VALUES, "--", "--model", "--model.", "--.", "--model..dim", "--a.b=", "=")), max_size=4
    )
)
def test_any_overrides(words: list[str]) -> None:
    assert main(["show", "debug", *words]) in (0, 2)


META = {
    "backend": "torch",
    "device": "cpu",
    "dtype": "float64",
    "seed": 0,
    "config": "",
    "order": ["loss"],
    "summaries": {},
}


@pytest.mark.parametrize(
    "meta",
    [
        NESTED,
        "9" * 5000,
        "null",
        "[]",
        "{}",
        *(json.dumps({**META, name: value}) for name in META for value in (None, 3.5, [[]], {"a": 1}, "\0", True)),
        json.dumps({**META, "deltas": {"float32": {"loss": "x"}}}),
        json.dumps({**META, "deltas": {"float32": [1]}}),
        json.dumps({**META, "selection": {"layers": 3}}),
        json.dumps({**META, "selection": {"only": [1]}}),
        json.dumps({**META, "summaries": {"loss": {"shape": "abc"}}}),
        json.dumps({**META, "config": "x = " + NESTED}),
        json.dumps({**META, "extra": NESTED})[:-1],
    ],
)
def test_damaged_descriptions_of_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path, meta: str) -> None:
    file = tmp_path / "trace.safetensors"
    write_tensors(file, {"loss": np.zeros(())}, {"kempnerforge_trace": "1", "meta": meta})
    outcome(capsys, "compare", str(file), str(file), "--json", str(tmp_path / "numbers.json"))


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in one shard, with an index."""
    folder, model = tmp_path_factory.mktemp("folder"), load_config("debug", TINY).model
    save_huggingface(folder, validation_weights(parameter_table(model), 0), model)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = TensorFile(folder / "model-1.safetensors").entries
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def converted(capsys: pytest.CaptureFixture[str], folder: Path, output: Path, name: str, text: str) -> tuple[int, str]:
    """Status and message of converting the folder with another content of one file; nothing is left half written."""
    kept = (folder / name).read_bytes() if (folder / name).exists() else None
    try:
        (folder / name).write_text(text, encoding="utf-8")
        status, message = outcome(capsys, "convert", str(folder), "--output", str(output))
    finally:
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    assert output.exists() == (status == 0), message
    return status, message


@pytest.mark.parametrize("text", ["", "[", NESTED, "9" * 5000, "null", "[]", '{"a": ' + NESTED, "\0"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "generation_config.json"]
)
def test_damaged_json_of_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, huggingface_folder: Path, name: str, text: str
) -> None:
    status, message = converted(capsys, huggingface_folder, tmp_path / "out", name, text)
    assert status == 2
    assert name in message


@pytest.mark.parametrize("value", ["null", "3", "-1.5", '"x"', "[3]", '["x"]', "[[]]", "{}", '{"a": [1]}', "true"])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("tokenizer.json", key) for key in ("added_tokens", "model", "post_processor")),
        *(("tokenizer_config.json", key) for key in ("bos_token", "eos_token", "chat_template")),
        *(("generation_config.json", key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")),
        ("model.safetensors.index.json", "weight_map"),
    ],
)
def test_json_of_other_types(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, huggingface_folder: Path, name: str, key: str, value: str
) -> None:
    converted(capsys, huggingface_folder, tmp_path / "out", name, f'{{"{key}": {value}}}')


LARGE = ("optimizer.lr", "optimizer.weight_decay", "optimizer.eps", "train.grad_clip_norm", "model.norm_eps")


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_at_their_largest_are_numbers_in_both_backends(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, backend: str
) -> None:
    numbers = [f"--{field}={LARGEST_FLOAT}" for field in LARGE]
    status, message = outcome(capsys, *command("train", tmp_path, backend), *numbers, "--scheduler.warmup_steps=0")
    assert status == 0 or "not finite" in message or "is nan" in message or "is inf" in message
    for field in LARGE:
        assert field.rpartition(".")[2] in refused(capsys, "show", "debug", f"--{field}={10 * LARGEST_FLOAT}")


def test_what_nobody_expected_is_a_line_and_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> int:
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setattr("shared_config.commands.show.run", broken)
    assert main(["show", "debug"]) == 2
    message = "kempnerforge: could not go on: RuntimeError: the first line (--debug shows where)\n"
    assert capsys.readouterr().err == message
    assert main(["--debug", "show", "debug"]) == main(["show", "debug", "--debug"]) == 2
    assert capsys.readouterr().err.count("Traceback") == 2
