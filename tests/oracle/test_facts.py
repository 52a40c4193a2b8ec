"""Facts that both backends read from one table, stated a second time: parameters, presets, defaults, statistics."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shared_config.contract
import shared_config.interchange
from shared_config.contract.parameters import parameter_table
from shared_config.contract.rope import rope_tables
from shared_config.contract.specs import Constant, ParameterSpec, ParameterTable
from shared_config.contract.vision import TowerConfig, adapter_table, job_table, tower_table, vit_tower, wrapper_table
from shared_config.loader import load_config, preset_names
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig, RopeScaling
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.parameters import CONSTANT, NORMAL, Fact, adapter_facts, model_facts, tower_facts
from tests.oracle.position import rope_at
from tests.strategies import model_configs

TOWER = TowerConfig(
    image_size=12, patch_size=3, dim=20, n_layers=2, n_heads=4, ffn_hidden_dim=28, activation="gelu", norm_eps=1e-6
)
CLIP = {"class_token": True, "patch_bias": False, "pre_norm": True, "final_norm": False}


def fact_of(spec: ParameterSpec) -> Fact:
    if isinstance(spec.initializer, Constant):
        initial = (CONSTANT, spec.initializer.value)
    else:
        initial = (NORMAL, pytest.approx(spec.initializer.std, 1e-15))
    flags = {name: getattr(spec, name) for name in ("decay", "is_buffer", "full_precision", "residual")}
    return Fact(spec.shape, initial, spec.axes, **flags)


def assert_stated(table: ParameterTable, facts: dict[str, Fact], where: str = "") -> None:
    assert set(table) == set(facts), where
    for name, spec in table.items():
        assert fact_of(spec) == facts[name], f"{where} {name}"


# Parameters


@pytest.mark.parametrize("preset", preset_names())
def test_every_tensor_of_a_preset_is_as_stated(preset: str) -> None:
    config = load_config(preset)
    assert_stated(parameter_table(config.model, config.vlm), model_facts(config.model, config.vlm), preset)


image_settings = st.one_of(
    st.sampled_from([None, JointDecoderConfig()]),
    st.builds(
        CrossAttentionConfig,
        cross_attention_every_n_layers=st.just(1),
        cross_attention_n_heads=st.sampled_from([0, 4]),
        cross_attention_n_kv_heads=st.sampled_from([0, 1]),
        cross_attention_head_dim=st.sampled_from([0, 5]),
    ),
    st.builds(MoTConfig, mot_image_n_kv_heads=st.sampled_from([0, 1])),
    st.builds(MoMaConfig, moma_experts_per_modality=st.just({"image": 3, "text": 2})),
)


@given(data=st.data(), vlm=image_settings, experts=st.booleans())
def test_every_tensor_of_a_drawn_model_is_as_stated(data: st.DataObject, vlm: VLMConfig | None, experts: bool) -> None:
    experts = experts and not isinstance(vlm, MoMaConfig)
    plain = {} if vlm is None else {name: vars(ModelConfig)[name] for name in vlm.plain_fields}
    config = data.draw(model_configs(experts=experts, init_std=0.03, **plain))
    assert_stated(parameter_table(config, vlm), model_facts(config, vlm))


@pytest.mark.parametrize("kind", [{}, CLIP], ids=["siglip", "clip"])
def test_every_tensor_of_a_tower_is_as_stated(kind: dict[str, Any]) -> None:
    tower = TowerConfig(**{**vars(TOWER), **kind})
    assert_stated(tower_table(tower), tower_facts(tower))


def test_a_tower_to_be_trained_is_a_vit() -> None:
    """Dosovitskiy et al. 2021, table 1: an MLP four times as wide; exact GELU, and its code's epsilon of 1e-6."""
    encoder = VisionEncoderConfig(type="vit", image_size=32, patch_size=8, feature_dim=24, n_heads=3, n_layers=5)
    stated = {"image_size": 32, "patch_size": 8, "dim": 24, "n_layers": 5, "n_heads": 3, "ffn_hidden_dim": 96}
    stated |= {"activation": "gelu", "norm_eps": 1e-6, "class_token": False, "pre_norm": False}
    stated |= {"keep_class_token": False}
    assert dataclasses.asdict(vit_tower(encoder)) == {**stated, "patch_bias": True, "final_norm": True}
    assert vit_tower(encoder).num_tokens == 16


@pytest.mark.parametrize("kind", ["mlp_2layer", "linear", "avgpool", "attentional_pool"])
@pytest.mark.parametrize("hidden", [0, 36])
def test_every_tensor_of_an_adapter_is_as_stated(kind: str, hidden: int) -> None:
    config = AdapterConfig(type=kind, hidden_dim=hidden)
    assert_stated(adapter_table(config, 20, 28), adapter_facts(config, 20, 28))


def test_a_wrapper_holds_a_tower_an_adapter_and_the_language_model() -> None:
    model, vlm, adapter = ModelConfig(dim=28, n_layers=1, n_heads=2, vocab_size=11), MoTConfig(), AdapterConfig()
    parts = {"vision_encoder": tower_facts(TOWER), "adapter": adapter_facts(adapter, 20, 28)}
    parts["transformer"] = model_facts(model, vlm)
    stated = {f"{part}.{name}": fact for part, facts in parts.items() for name, fact in facts.items()}
    assert_stated(wrapper_table(model, vlm, adapter, TOWER, 20), stated)


def test_what_is_registered_undeclared_is_known_by_its_shapes() -> None:
    """Decay acts on matrices, also on those of several axes; entries of the table count before shapes."""
    config = load_config("debug")
    stated = parameter_table(config.model)
    shapes = {"scalar": (), "bias": (3,), "matrix": (3, 2), "kernel": (3, 2, 1), "norm.weight": (9,)}
    found = job_table(config, shapes=shapes)
    assert {name: found[name] for name in stated} == stated
    for name in set(shapes) - set(stated):
        fact = Fact(shapes[name], (CONSTANT, 0.0), (None,) * len(shapes[name]), decay=name in ("matrix", "kernel"))
        assert fact_of(found[name]) == fact, name
    assert job_table(config) == stated


# Rotary tables


@given(
    head_dim=st.sampled_from([2, 4, 10, 64]),
    theta=st.sampled_from([1.5, 50.0, 1e4, 1e6]),
    kind=st.sampled_from(["none", "linear", "llama3", "yarn"]),
    length=st.sampled_from([1, 8, 100, 4096, 10**6]),
    bands=st.sampled_from([(1.0, 4.0, 32.0, 1.0), (0.01, 300.0, 1000.0, 1e-4), (2.0, 2.5, 1.5, 1.0)]),
)
def test_rotary_tables_are_the_oracle_s(
    head_dim: int, theta: float, kind: Any, length: int, bands: tuple[float, float, float, float]
) -> None:
    """Also where a band lies outside the channels that there are."""
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    fields: dict[str, Any] = {"factor": 4.0, "original_max_seq_len": length, **dict(zip(names, bands, strict=True))}
    scaling = RopeScaling(type=kind, **(fields if kind != "none" else {}))
    cos, sin = rope_tables(head_dim, 9, theta, scaling)
    expected_cos, expected_sin = rope_at(np.arange(9), head_dim, theta, scaling)
    np.testing.assert_allclose(cos, expected_cos, rtol=0, atol=1e-13)
    np.testing.assert_allclose(sin, expected_sin, rtol=0, atol=1e-13)


def test_rotary_tables_have_the_paper_s_base() -> None:
    np.testing.assert_array_equal(rope_tables(8, 5)[0], rope_tables(8, 5, 10000.0)[0])


# What is agreed upon stays as it is


@pytest.mark.parametrize("package", [shared_config.contract, shared_config.interchange])
def test_values_that_are_agreed_upon_do_not_change(package: ModuleType) -> None:
    names = [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    classes = [found for name in names for found in vars(importlib.import_module(name)).values()]
    own: list[Any] = [found for found in classes if dataclasses.is_dataclass(found) and isinstance(found, type)]
    assert len(own) > 5
    assert {found.__name__ for found in own if not found.__dataclass_params__.frozen} <= {"TrainingState", "Checkpoint"}


def test_a_parameter_spec_is_plain_unless_said_otherwise() -> None:
    spec = ParameterSpec((2,), Constant(0.0), (None,))
    assert (spec.decay, spec.is_buffer, spec.full_precision, spec.residual) == (False,) * 4
