"""Presets and TOML files load, overrides mean what they say, and configs survive the round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config import ConfigError, JobConfig, UserError, config_from_toml, config_to_toml, load_config, preset_names
from shared_config.loader import resolve_config
from shared_config.schema import MoMaConfig, MoTConfig

EXPECTED_PRESETS = {
    "debug", "debug_moe", "debug_vlm_joint_decoder", "debug_vlm_cross_attention", "debug_vlm_mot", "debug_vlm_moma",
    "llama_125m", "llama_1b", "llama3_8b", "llama3_70b", "qwen3_0_6b", "moe_small",
    "vlm_8b_joint_decoder", "vlm_8b_cross_attention", "vlm_8b_mot", "vlm_8b_moma",
}  # fmt: skip


def test_every_preset_exists() -> None:
    assert set(preset_names()) == EXPECTED_PRESETS


@pytest.mark.parametrize("name", sorted(EXPECTED_PRESETS))
def test_presets_load_and_survive_the_round_trip(name: str) -> None:
    config = load_config(name)
    again = config_from_toml(config_to_toml(config))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("llama_1b", 1_235_814_400),
        ("qwen3_0_6b", 596_049_920),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert load_config(name).model.num_params_estimate == parameters


def test_overrides_are_typed() -> None:
    config = load_config(
        "debug",
        ["--train.compile_model", "false", "--checkpoint.dir", "/x", "--model.dim=512", "--optimizer.betas=[0.8, 0.99]",
         "--model.n_kv_heads", "none", "--model.n_heads=8", "--model.rope_scaling.type=linear",
         "--model.rope_scaling.factor=2", "--distributed.dp_shard", "-1", "--data.path", "true"],
    )  # fmt: skip
    assert config.train.compile_model is False
    assert config.checkpoint.dir == "/x"
    assert config.data.path == "true"
    assert config.model.dim == 512
    assert config.optimizer.betas == (0.8, 0.99)
    assert (config.model.n_kv_heads, config.model.head_dim) == (8, 64)
    assert config.model.rope_scaling.factor == 2.0


def test_switching_the_architecture_switches_the_class() -> None:
    config = load_config("debug_vlm_moma", ["--vlm.mot_image_n_kv_heads=4", "--vlm.arch=mot"])
    assert isinstance(config.vlm, MoTConfig)
    assert config.vlm.mot_image_n_kv_heads == 4
    assert config.vlm.max_text_len == 64


def test_keys_of_a_mapping_can_be_overridden_one_by_one() -> None:
    config = load_config("debug_vlm_moma", ["--vlm.moma_experts_per_modality.text=3"])
    assert isinstance(config.vlm, MoMaConfig)
    assert dict(config.vlm.moma_experts_per_modality) == {"image": 2, "text": 3}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.dimm=3"], "--model.dimm: unknown key; did you mean dim?"),
        (["--modle.dim=3"], "--modle.dim: unknown key; did you mean model.dim?"),
        (["--model.dim=abc"], "model.dim = 'abc': must be a valid integer"),
        (["--model.dim=1.5"], "model.dim = 1.5: must be a valid integer"),
        (["--train.compile_model=yes"], "train.compile_model = 'yes': must be a valid boolean"),
        (["--train.compile_model=1"], "train.compile_model = 1: must be a valid boolean"),
        (["--model.dim"], "--model.dim: needs a value"),
        (["--model.dim", "--model.n_heads=2"], "--model.dim: needs a value"),
        (["dim=3"], "dim=3: unknown argument"),
        (["--model=3"], "--model=3: unknown argument"),
        (["--model.dim.x=3"], "--model.dim: is a value, not a section"),
        (["--vlm.max_text_len=3"], "vlm.arch: required"),
        (["--vlm.arch=fusion"], "vlm.arch = 'fusion': must be one of"),
        (["--model.dim=0", "--train.seq_len=-3"], "model.dim = 0: must be greater than 0\ntrain.seq_len = -3"),
    ],
)
def test_bad_overrides_are_named(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("debug", overrides)
    assert expected in str(caught.value)


def test_an_architecture_needs_a_section() -> None:
    with pytest.raises(ConfigError, match="vlm has no fields"):
        resolve_config({"vlm": 3}, ["--vlm.arch=mot"])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[model]\ndim = 64\nn_heads = 4\n[train]\nseq_len = 32\n", encoding="utf-8")
    assert load_config(str(path), ["--model.n_heads=2"]).model.head_dim == 32
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="can't be read"):
        load_config(str(path))
    with pytest.raises(UserError, match="can't be read"):
        load_config(str(tmp_path / "absent.toml"))
    with pytest.raises(UserError, match="did you mean debug"):
        load_config("debgu")


sections: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "model": st.fixed_dictionaries(
        {"dim": st.integers(1, 64).map(lambda half: 16 * half), "n_heads": st.sampled_from([1, 2, 4])},
        optional={
            "n_kv_heads": st.just(1),
            "norm_eps": st.floats(1e-12, 1.0),
            "rope_theta": st.floats(1.5, 1e9),
            "tie_embeddings": st.booleans(),
            "sliding_window": st.integers(1, 9),
            "rope_scaling": st.fixed_dictionaries({"type": st.just("linear"), "factor": st.floats(1.0, 64.0)}),
        },
    ),
    "optimizer": st.fixed_dictionaries({}, optional={"lr": st.floats(1e-9, 1.0), "betas": st.just([0.5, 0.75])}),
    "data": st.fixed_dictionaries({}, optional={"path": st.text(st.characters(exclude_categories=["Cs"]), max_size=9)}),
    "vision_encoder": st.just({"type": "random", "feature_dim": 8, "num_tokens": 16}),
    "vlm": st.one_of(
        st.fixed_dictionaries({"arch": st.sampled_from(["joint_decoder", "cross_attention", "mot"])}),
        st.fixed_dictionaries({"arch": st.just("moma"), "moma_experts_per_modality": st.just({"image": 3, "text": 5})}),
    ).map(lambda fields: {**fields, "freeze": [{"module": "adapter"}]}),
}


@given(st.fixed_dictionaries(sections))
def test_any_config_survives_the_round_trip(fields: dict[str, dict[str, Any]]) -> None:
    config = JobConfig(**{**fields, "model": {**fields["model"], "n_layers": 4}})  # type: ignore[arg-type]
    again = config_from_toml(config_to_toml(config))
    assert again == config
    wider = load_config_from(config, ["--model.n_heads=8"])
    assert wider.model.kv_heads == fields["model"].get("n_kv_heads", 8)


def load_config_from(config: JobConfig, overrides: list[str]) -> JobConfig:
    from shared_config.interchange.toml import config_from_dict, config_to_dict
    from shared_config.loader import apply_overrides, parse_overrides

    fields = config_to_dict(config)
    apply_overrides(fields, parse_overrides(overrides))
    return config_from_dict(fields)
