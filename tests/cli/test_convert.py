"""`kempnerforge convert`: there and back again, with and without a config beside the weights."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_config.cli import main
from shared_config.contract.initialise import initial_values, state_hash
from shared_config.contract.parameters import parameter_table
from shared_config.data.tokenizer import HuggingFaceTokenizer
from shared_config.interchange import checkpoint
from shared_config.interchange.huggingface import save_huggingface
from shared_config.interchange.tokens import NOT_READ
from shared_config.interchange.toml import config_to_dict, config_to_toml
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig
from tests.tokenizers import END, save, sentence_piece

TINY = ("--model.dim=16", "--model.n_layers=2", "--model.ffn_hidden_dim=24", "--model.vocab_size=19")


def draw(config: JobConfig) -> dict[str, np.ndarray]:
    return dict(initial_values(parameter_table(config.model), seed=1))


def convert(source: Path, output: Path, *options: str) -> int:
    return main(["convert", str(source), "--output", str(output), *options])


@pytest.mark.parametrize("tied", ["true", "false"])
def test_native_to_hugging_face_and_back(tmp_path: Path, tied: str) -> None:
    config = load_config("debug", [*TINY, f"--model.tie_embeddings={tied}"])
    weights = draw(config)
    save_weights(tmp_path / "native", weights)
    (tmp_path / "native" / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    assert convert(tmp_path / "native", tmp_path / "foreign") == 0
    assert (tmp_path / "foreign" / "config.json").exists()
    assert "model.layers.1.self_attn.q_proj.weight" in load_weights(tmp_path / "foreign")
    assert convert(tmp_path / "foreign", tmp_path / "again") == 0
    again = load_config(str(tmp_path / "again" / "config.toml")).model
    assert (again.dim, again.tie_embeddings, again.n_kv_heads) == (16, tied == "true", 2)
    assert state_hash(load_weights(tmp_path / "again")) == state_hash(weights)


def test_weights_alone_need_their_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("debug", TINY)
    save_weights(tmp_path / "weights.safetensors", draw(config))
    assert convert(tmp_path / "weights.safetensors", tmp_path / "out") == 2
    assert "--config" in capsys.readouterr().err
    assert convert(tmp_path / "weights.safetensors", tmp_path / "out", "--config", "debug", *TINY) == 0


def test_training_checkpoint_to_either_format(tmp_path: Path) -> None:
    config = load_config("debug", TINY)
    weights = draw(config)
    state = checkpoint.TrainingState(step=3, weights=weights, optimizer={})
    fields = {"rows": 0, "fingerprint": "", "config": config_to_dict(config), "backend": "torch", "keep": 1}
    checkpoint.save(tmp_path / "run", state, **fields)
    assert convert(tmp_path / "run", tmp_path / "native", "--to", "native") == 0
    assert state_hash(load_weights(tmp_path / "native")) == state_hash(weights)
    assert load_config(str(tmp_path / "native" / "config.toml")) == config
    assert convert(tmp_path / "run", tmp_path / "foreign") == 0
    assert (tmp_path / "foreign" / "config.json").exists()


def test_layout_of_experts_is_chosen_by_an_override(tmp_path: Path) -> None:
    overrides = ["--model.moe_router=softmax_topk", "--model.moe_sequence_aux_loss_weight=0"]
    overrides += ["--model.moe_expert_ffn_multiplier=1.0", "--model.moe_frequency=1"]
    config = load_config("debug_moe", [*TINY, *overrides, "--model.moe_packed_experts=false"])
    save_weights(tmp_path / "native", draw(config))
    (tmp_path / "native" / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    assert convert(tmp_path / "native", tmp_path / "foreign") == 0
    assert convert(tmp_path / "foreign", tmp_path / "packed", "--model.moe_packed_experts", "true") == 0
    assert "layers.0.mlp.gate_w" in load_weights(tmp_path / "packed")


def test_a_config_that_hugging_face_can_not_express(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("debug", [*TINY, "--model.norm_type=layernorm"])
    save_weights(tmp_path / "weights.safetensors", draw(config))
    options = ["--config", "debug", *TINY, "--model.norm_type=layernorm"]
    assert convert(tmp_path / "weights.safetensors", tmp_path / "out", *options) == 2
    assert "model.norm_type = 'layernorm'" in capsys.readouterr().err


SPECIAL = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}


def foreign_folder(folder: Path, tokenizer: bool = True) -> Path:
    """A Hugging Face model whose weights, tokenizer and two sources of special ids are there."""
    config = load_config("debug", [*TINY, "--model.vocab_size=600", "--model.max_seq_len=64", "--train.seq_len=16"])
    save_huggingface(folder, draw(config), config.model)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | SPECIAL | {"eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.5}))
    if tokenizer:
        save(folder, sentence_piece(), chat_template="{{ messages }}", pad_token="<unk>")
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": END}))
    return folder


@pytest.mark.parametrize("tokenizer", [True, False])
def test_what_belongs_to_tokens_goes_there_and_back(tmp_path: Path, tokenizer: bool) -> None:
    """Through native weights that have moved: tokenizer files, special ids and settings of generation are kept."""
    foreign = foreign_folder(tmp_path / "foreign", tokenizer)
    assert convert(foreign, tmp_path / "first") == 0
    shutil.move(tmp_path / "first", tmp_path / "native")
    config = load_config(str(tmp_path / "native" / "config.toml"))
    assert config.data.tokenizer == (str(tmp_path / "native" / "tokenizer") if tokenizer else "bytes")
    assert convert(tmp_path / "native", tmp_path / "back") == 0
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: content[key] for key in SPECIAL} == SPECIAL
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == SPECIAL | {"temperature": 0.5}
    kept = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    for name in kept if tokenizer else []:
        assert (tmp_path / "back" / name).read_bytes() == (foreign / name).read_bytes()


def test_a_training_run_keeps_its_tokenizer(tmp_path: Path) -> None:
    """A run from a converted folder, moved, converts to a folder that transformers reads with the same tokenizer."""
    foreign = foreign_folder(tmp_path / "foreign")
    assert convert(foreign, tmp_path / "native", "--train.seq_len=16") == 0
    flags = ["--backend=torch", "--device=cpu", "--quiet", f"--output={tmp_path / 'first'}", "--train.max_steps=1"]
    flags += ["--train.batch_size=1", "--train.compile_model=false", "--scheduler.warmup_steps=0", "--eval.steps=0"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello world " * 200)
    flags += [f"--data.path={tmp_path / 'text'}"]
    assert main(["train", str(tmp_path / "native" / "config.toml"), *flags]) == 0
    shutil.rmtree(tmp_path / "native")
    shutil.move(tmp_path / "first", tmp_path / "run")
    assert load_config(str(tmp_path / "run" / "config.toml")).data.tokenizer == str(tmp_path / "run" / "tokenizer")
    for name in ("run", "run/step_00000001"):
        output = tmp_path / f"back_{Path(name).name}"
        assert convert(tmp_path / name, output) == 0
        content = json.loads((output / "config.json").read_text())
        assert {key: content[key] for key in SPECIAL} == SPECIAL
        assert (output / "tokenizer.json").read_bytes() == (foreign / "tokenizer.json").read_bytes()


def test_ids_of_a_tokenizer_alone_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "tokenizer", sentence_piece())
    config = load_config("debug", [*TINY, "--model.vocab_size=600", f"--data.tokenizer={folder}"])
    save_weights(tmp_path / "native", draw(config))
    (tmp_path / "native" / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    assert convert(tmp_path / "native", tmp_path / "foreign") == 0
    content = json.loads((tmp_path / "foreign" / "config.json").read_text())
    assert {key: content[key] for key in SPECIAL} == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_generate_reads_the_tokenizer_and_stops_beside_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    module = importlib.import_module(f"kempnerforge_{backend}.model.generate")
    asked: list[Any] = []

    def stream(model: Any, prompts: Any, count: int, **options: Any) -> Any:
        asked.append((prompts, options["eos_token_id"]))
        return iter([np.array([id]) for id in tokenizer.encode("world").tolist()])

    monkeypatch.setattr(module, "stream", stream)
    foreign = foreign_folder(tmp_path / "foreign")
    tokenizer = HuggingFaceTokenizer(foreign)
    assert convert(foreign, tmp_path / "native") == 0
    capsys.readouterr()
    sizes = [*TINY, "--model.vocab_size=600", "--model.max_seq_len=64", "--train.seq_len=16"]
    for folder in (foreign, tmp_path / "native"):
        command = ["generate", "debug", f"--backend={backend}", "--prompt=hello", f"--weights={folder}", *sizes]
        assert main([*command, "--device=cpu"]) == 0
        assert capsys.readouterr().out == "hello world\n"
    assert asked == [([tokenizer.encode_prompt("hello")], (2, 7))] * 2


@pytest.mark.parametrize("name", NOT_READ)
def test_a_tokenizer_of_another_format_is_not_taken_for_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = foreign_folder(tmp_path / "source", tokenizer=False)
    (source / name).write_bytes(b"pieces")
    assert convert(source, tmp_path / "native") == 0
    assert f"holds {name}, which can't be read, and no tokenizer.json" in capsys.readouterr().err
    assert load_config(str(tmp_path / "native")).data.tokenizer == str(tmp_path / "native" / "tokenizer")
    assert (tmp_path / "native" / "tokenizer" / name).read_bytes() == b"pieces"
    for folder in (source, tmp_path / "native"):
        assert main(["generate", str(folder), "--prompt", "a", "--backend", "torch"]) == 2
        assert "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)" in capsys.readouterr().err
