"""`model.family`: read, kept and written; without one, the only family that expresses a config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.contract.function import differences
from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import job_table
from shared_config.errors import ConfigError
from shared_config.interchange import checkpoint
from shared_config.interchange.huggingface import load_huggingface, name_map, read_huggingface_config, save_huggingface
from shared_config.interchange.huggingface_config import config_from_huggingface, config_to_huggingface
from shared_config.interchange.huggingface_families import FAMILIES, Family
from shared_config.interchange.huggingface_family import families_of, family_of
from shared_config.interchange.source import read_config
from shared_config.interchange.toml import config_from_toml, config_to_dict, config_to_toml, section_of
from shared_config.interchange.vision import tower_of
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.loader import load_config, preset_names
from shared_config.schema.base import from_fields
from shared_config.schema.job import JobConfig
from shared_config.schema.model import FamilyName, ModelConfig, RopeScaling
from tests.interchange.families import configs_of

SMALL: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 19, "ffn_hidden_dim": 32}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_top_k": 2}
LLAMA_OR_MISTRAL = (
    "model.family = None: must be llama or mistral, each of which expresses this config; set it, as in "
    "--model.family llama"
)


def experts_of(family: Family) -> dict[str, Any]:
    """Fields of experts, where a family has them, and those that follow from others."""
    if family.experts is None:
        return {"embedding_scale": SMALL["dim"] ** 0.5} if family.scaled_embeddings else {}
    return {**EXPERTS, **({"moe_shared_experts": 1} if family.experts.shared else {})}


def small(**fields: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **fields})


def state_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return dict(initial_values(parameter_table(config), seed=1))


def written(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, as a file holds it."""
    return json.loads(json.dumps(config_to_huggingface(config)))


def said(config: ModelConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_to_huggingface(config)
    return list(caught.value.problems)


# Read and written


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_a_config_of_a_family_goes_there_and_back(name: str, data: st.DataObject) -> None:
    config = data.draw(configs_of(name))
    content = written(config)
    assert content["model_type"] == name
    assert from_fields(ModelConfig, config_from_huggingface(content)) == config
    assert written(from_fields(ModelConfig, config_from_huggingface(content))) == content


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_is_read_is_written_as_the_same_family(tmp_path: Path, name: str) -> None:
    """Through native weights, a training checkpoint, and the TOML of both."""
    family = FAMILIES[name]
    config = small(**{**family.fixed, **experts_of(family)}, family=name)
    save_huggingface(tmp_path / "theirs", state_of(config), config)
    assert read_huggingface_config(tmp_path / "theirs")["family"] == load_huggingface(tmp_path / "theirs")[0].family
    assert main(["convert", str(tmp_path / "theirs"), "--output", str(tmp_path / "native")]) == 0
    job = load_config(str(tmp_path / "native"))
    weights = load_weights(tmp_path / "native")
    state = checkpoint.TrainingState(step=1, weights=weights, optimizer={})
    fields = {"rows": 0, "fingerprint": "", "config": config_to_dict(job), "backend": "jax", "keep": 1}
    checkpoint.save(tmp_path / "run", state, **fields)
    assert (
        config_from_toml(config_to_toml(job)).model.family
        == section_of(read_config(tmp_path / "run"), "model")["family"]
        == name
    )
    for source in ("native", "run"):
        output = tmp_path / f"from_{source}"
        assert main(["convert", str(tmp_path / source), "--output", str(output)]) == 0
        assert json.loads((output / "config.json").read_text()) == written(config)
        there, back = load_weights(tmp_path / "theirs"), load_weights(output)
        assert back.keys() == there.keys()
        assert all(np.array_equal(back[name], values) for name, values in there.items())


def test_two_families_of_one_function_are_told_apart() -> None:
    llama, mistral = small(family="llama"), small(family="mistral")
    assert written(llama)["architectures"] == ["LlamaForCausalLM"]
    assert written(mistral)["architectures"] == ["MistralForCausalLM"]
    assert written(mistral)["sliding_window"] is None
    assert name_map(llama) == name_map(mistral) == name_map(small())
    assert differences(JobConfig(model=llama), JobConfig(model=mistral)) == []


def test_a_preset_says_its_family_where_it_has_one() -> None:
    families = {name: load_config(name).model.family for name in preset_names()}
    llamas = ("debug", "llama_125m", "llama_1b", "llama3_8b", "llama3_70b")
    assert {name: family for name, family in families.items() if family} == {
        **dict.fromkeys(llamas, "llama"),
        "qwen3_0_6b": "qwen3",
    }
    for name, family in families.items():
        if family:
            assert written(load_config(name).model)["model_type"] == family


# Named by nobody


def test_the_schema_names_the_families_that_exist() -> None:
    assert get_args(FamilyName) == tuple(FAMILIES)
    with pytest.raises(ConfigError, match=r"^family = 'gemma9': must be 'llama', 'mistral', 'mixtral', 'qwen2', "):
        ModelConfig(family="gemma9")  # pyright: ignore[reportArgumentType]


STRUCTURES = [
    ({}, ("llama", "mistral")),
    ({"attention_bias": True}, ("llama",)),
    ({"sliding_window": 8}, ("mistral",)),
    ({"qk_norm": True}, ("qwen3",)),
    ({"qk_norm": True, "sliding_window": 8, "attention_bias": True}, ("qwen3",)),
    ({"attention_bias": True, "attention_output_bias": False}, ("qwen2",)),
    ({"attention_bias": True, "attention_output_bias": False, "sliding_window": 8}, ("qwen2",)),
    ({"attention_output_bias": False}, ("llama", "mistral")),
    ({"mlp_bias": True}, ("llama",)),
    ({"qk_norm": True, "qk_norm_over": "width", "norm_placement": "after"}, ("olmo2",)),
    ({"logit_divisor": 8.0}, ("granite",)),
    ({"attention_pattern": ("full", "full_nope")}, ("smollm3",)),
    ({"qk_norm": True, "sliding_window": 8, "attention_pattern": ("window", "full")}, ("qwen3",)),
    ({"attention_scale": 8**-0.5}, ("llama", "mistral")),
    ({"attention_scale": 0.5, "mlp_bias": True}, ("granite",)),
    ({**EXPERTS, "moe_shared_experts": 1, "moe_shared_expert_gate": True, "moe_frequency": 2}, ("qwen2_moe",)),
    (EXPERTS, ("mixtral",)),
    ({**EXPERTS, "sliding_window": 8}, ("mixtral",)),
    ({**EXPERTS, "qk_norm": True, "moe_frequency": 2, "moe_norm_topk_prob": False}, ("qwen3_moe",)),
]


@pytest.mark.parametrize(("fields", "families"), STRUCTURES)
def test_without_a_name_it_is_the_only_family_that_expresses_the_config(
    fields: dict[str, Any], families: tuple[str, ...]
) -> None:
    config = small(**fields)
    assert families_of(config) == families
    for name in families:
        assert family_of(config.replace(family=name)) == name
    if len(families) == 1:
        assert written(config) == written(config.replace(family=families[0]))
    else:
        assert said(config) == [LLAMA_OR_MISTRAL]


def structures() -> Iterator[ModelConfig]:
    values = itertools.product((0, 4), (False, True), (None, 8), (False, True))
    for experts, qk_norm, window, bias in values:
        yield small(num_experts=experts, qk_norm=qk_norm, sliding_window=window, attention_bias=bias)
    for family in FAMILIES.values():
        yield small(**{**family.fixed, **experts_of(family)})


def test_families_that_express_one_config_name_its_tensors_alike() -> None:
    found = set()
    for config in structures():
        able = _able(config)
        assert len({tuple(name_map(config.replace(family=name)).items()) for name in able}) <= 1
        found |= set(able)
    assert found >= {name for name, family in FAMILIES.items() if not family.by_name}


def _able(config: ModelConfig) -> tuple[str, ...]:
    try:
        return families_of(config)
    except ConfigError:
        return ()


# Refused


NO_SETTING = "Hugging Face's {} no such setting: must be {}"
OTHERS = "model.family = {!r}: must be {} with all other settings as they are"
UNLIKE = ("window", "full_nope")
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"norm_placement": "both", "qk_norm": True}, [
        f"model.norm_placement = 'both': {NO_SETTING.format('qwen3 has', repr('before'))}",
    ]),
    ({"family": "olmo2", "residual_scale": 0.5}, [
        f"model.qk_norm = False: {NO_SETTING.format('olmo2 has', True)}",
        f"model.norm_placement = 'before': {NO_SETTING.format('olmo2 has', repr('after'))}",
        f"model.residual_scale = 0.5: {NO_SETTING.format('olmo2 has', 1.0)}", OTHERS.format("olmo2", "granite"),
    ]),
    ({"family": "qwen2_moe", **EXPERTS, "moe_shared_experts": 2, "qk_norm": True}, [
        f"model.qk_norm = True: {NO_SETTING.format('qwen2_moe has', False)}",
        f"model.moe_shared_expert_gate = False: {NO_SETTING.format('qwen2_moe has', True)}",
    ]),
    ({"family": "phi3", "attention_bias": True, "rope_scaling": RopeScaling(type="linear", factor=2.0)}, [
        f"model.attention_bias = True: {NO_SETTING.format('phi3 has', False)}",
        f"model.rope_scaling.type = 'linear': {NO_SETTING.format('phi3 has', repr('none'))}",
        OTHERS.format("phi3", "llama"),
    ]),
    ({"family": "mistral", "sliding_window": 8, "attention_pattern": UNLIKE}, [
        f"model.attention_pattern = {UNLIKE!r}: {NO_SETTING.format('mistral has', 'without _nope')}",
        f"model.attention_pattern = {UNLIKE!r}: {NO_SETTING.format('mistral has', 'the same for all layers')}",
        OTHERS.format("mistral", "smollm3"),
    ]),
    ({"family": "llama", "sliding_window": 8}, [
        f"model.sliding_window = 8: {NO_SETTING.format('llama has', None)}", OTHERS.format("llama", "mistral"),
    ]),
    ({"family": "mistral", "attention_bias": True}, [
        f"model.attention_bias = True: {NO_SETTING.format('mistral has', False)}", OTHERS.format("mistral", "llama"),
    ]),
    ({"family": "qwen3"}, [
        f"model.qk_norm = False: {NO_SETTING.format('qwen3 has', True)}", OTHERS.format("qwen3", "llama or mistral"),
    ]),
    ({"family": "mixtral"}, [
        f"model.num_experts = 0: {NO_SETTING.format('mixtral has', 'positive')}",
        OTHERS.format("mixtral", "llama or mistral"),
    ]),
    ({"family": "llama", "qk_norm": True, **EXPERTS}, [
        f"model.qk_norm = True: {NO_SETTING.format('llama has', False)}",
        f"model.num_experts = 4: {NO_SETTING.format('llama has', 0)}", OTHERS.format("llama", "qwen3_moe"),
    ]),
    ({"family": "llama", "activation": "gelu", "norm_type": "layernorm"}, [
        f"model.activation = 'gelu': {NO_SETTING.format('llama has', repr('silu'))}",
        f"model.norm_type = 'layernorm': {NO_SETTING.format('llama has', repr('rmsnorm'))}",
    ]),
    ({"activation": "gelu"}, [
        f"model.activation = 'gelu': {NO_SETTING.format('llama and mistral have', repr('silu'))}",
    ]),
    ({"sliding_window": 8, "attention_bias": True, "logit_divisor": 2.0}, [
        f"model.logit_divisor = 2.0: {NO_SETTING.format('llama and mistral and qwen2 have', 1.0)}",
        f"model.sliding_window = 8: {NO_SETTING.format('llama has', None)}",
        f"model.attention_bias = True: {NO_SETTING.format('mistral has', False)}",
        f"model.attention_output_bias = True: {NO_SETTING.format('qwen2 has', False)}",
    ]),
    ({**EXPERTS, "moe_router": "sigmoid_topk", "moe_frequency": 2}, [
        f"model.moe_router = 'sigmoid_topk': {NO_SETTING.format('mixtral has', repr('softmax_topk'))}",
        f"model.moe_frequency = 2: {NO_SETTING.format('mixtral has', 1)}",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "problems"), REFUSED)
def test_a_family_that_does_not_express_a_config_is_refused_by_each_setting(
    fields: dict[str, Any], problems: list[str]
) -> None:
    assert said(small(**fields)) == problems


# Files and checkpoints without the field


def native(folder: Path, text: str) -> Path:
    save_weights(folder, state_of(config_from_toml(text).model))
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return folder


def test_a_model_that_names_no_family_is_given_one_where_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config_to_toml(JobConfig(model=small()))
    assert "family" not in text
    source = native(tmp_path / "native", text)
    assert load_config(str(source)).model == small()
    command = ["convert", str(source), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err == f"kempnerforge: {LLAMA_OR_MISTRAL}\n"
    assert not (tmp_path / "out").exists()
    assert main([*command, "--model.family", "mistral"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"
    assert main([*command, "--to=native", "--model.family=none", f"--output={tmp_path / 'copy'}"]) == 0
    assert load_config(str(tmp_path / "copy")).model.family is None


def test_weights_that_were_converted_without_a_family_are_converted_again(tmp_path: Path) -> None:
    config = small(family="llama")
    save_huggingface(tmp_path / "theirs", state_of(config), config)
    command = ["convert", str(tmp_path / "theirs"), "--output", str(tmp_path / "native")]
    assert main(command) == 0
    file = tmp_path / "native" / "config.toml"
    former = file.read_text(encoding="utf-8").replace('family = "llama"\n', "")
    file.write_text(former, encoding="utf-8")
    assert load_config(str(tmp_path / "native")).model.family is None
    assert main(command) == 0
    assert load_config(str(tmp_path / "native")).model.family == "llama"


def test_without_the_tower_of_a_llava_a_model_that_sees_has_no_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = load_config("debug_vlm_joint_decoder", ["--vision_encoder.n_layers=1", "--model.n_layers=1"])
    save_weights(tmp_path / "native", dict(initial_values(job_table(job, tower_of(job)), seed=1)))
    (tmp_path / "native" / "config.toml").write_text(config_to_toml(job), encoding="utf-8")
    assert main(["convert", str(tmp_path / "native"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == ("kempnerforge: vision_encoder.type = 'vit': must be clip or siglip2\n")
