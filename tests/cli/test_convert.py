"""`kempnerforge convert`: there and back again, with and without a config beside the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared_config.cli import main
from shared_config.contract.initialise import initial_values, state_hash
from shared_config.contract.parameters import parameter_table
from shared_config.interchange import checkpoint
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.loader import config_to_dict, config_to_toml, load_config
from shared_config.schema.job import JobConfig

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
