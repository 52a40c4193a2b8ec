"""Fields of blocks by which families of models differ: where they are refused, by name and value."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.function import differences
from shared_config.contract.sharding import refusals
from shared_config.errors import ConfigError
from shared_config.interchange.toml import config_from_dict
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig
from tests.strategies import attention_patterns

SIZES: dict[str, Any] = {"dim": 16, "n_layers": 4, "n_heads": 4, "vocab_size": 17, "ffn_hidden_dim": 16}
MIXED = ("window", "full")
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_top_k": 2}
OTHERS: dict[str, Any] = {
    "norm_placement": "both",
    "residual_scale": 0.5,
    "mlp_bias": True,
    "attention_output_bias": False,
    "attention_scale": 0.25,
    "qk_norm_over": "width",
    "attention_pattern": ("full_nope",),
    "window_rope_theta": 70.0,
    "window_rope_scaled": False,
    "attention_softcap": 2.0,
}
NEEDED = {"norm_placement": "'before'", "residual_scale": 1.0, "mlp_bias": False, "attention_output_bias": True}
NEEDED |= {"attention_scale": 0.5, "qk_norm_over": "'head'", "attention_pattern": ("full",)}
NEEDED |= {"window_rope_theta": 10000.0, "window_rope_scaled": True, "attention_softcap": None}


@pytest.mark.parametrize(
    ("arch", "refused"),
    [
        ("mot", [*OTHERS]),
        ("moma", ["norm_placement", "residual_scale", "mlp_bias"]),
        ("cross_attention", []),
        ("joint_decoder", []),
    ],
)
def test_architectures_with_layers_of_their_own_refuse_what_these_do_not_know(arch: str, refused: list[str]) -> None:
    vlm = VLMConfig.for_arch(arch)
    said = list(vlm.problems_with(ModelConfig(**SIZES, **OTHERS)))
    assert said == [
        f"model.{name} = {OTHERS[name]!r}: must be {NEEDED[name]} with vlm.arch {arch!r}"
        for name in vlm.plain_fields
        if name in refused
    ]
    assert set(vlm.plain_fields) == set(refused)
    assert list(vlm.problems_with(ModelConfig(**SIZES))) == []


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({**EXPERTS, "mlp_bias": True}, "mlp_bias = True: must be False with num_experts = 4"),
        (
            {**EXPERTS, "moe_shared_expert_gate": True},
            "moe_shared_expert_gate = True: must be False with moe_shared_experts = 0",
        ),
    ],
)
def test_what_mixtures_of_experts_do_not_have_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**SIZES, **fields)
    assert caught.value.problems == (problem,)
    assert ModelConfig(**{**SIZES, **fields, "num_experts": 0})


def test_a_norm_of_all_heads_is_on_one_device() -> None:
    def said(**fields: Any) -> list[str]:
        job = config_from_dict({"model": {**SIZES, **fields}, "distributed": {"tp": 2}, "train": {"seq_len": 8}})
        return refusals(job)

    assert said(qk_norm=True, qk_norm_over="width") == [
        "distributed.tp = 2: must be 1 for model.qk_norm_over = 'width'"
    ]
    assert said(qk_norm=True) == said(qk_norm_over="width") == []


@given(data=st.data(), n_layers=st.integers(1, 9), window=st.sampled_from([None, 3]))
def test_a_pattern_is_what_it_says_of_each_layer_however_it_is_spelled(
    data: st.DataObject, n_layers: int, window: int | None
) -> None:
    pattern = data.draw(attention_patterns(n_layers, window))
    config = ModelConfig(**{**SIZES, "n_layers": n_layers, "sliding_window": window, "attention_pattern": pattern})
    kinds = [pattern[layer % len(pattern)] for layer in range(n_layers)]
    assert config.layer_windows == tuple(window if kind.startswith("window") else None for kind in kinds)
    assert config.layer_rotates == tuple(not kind.endswith("_nope") for kind in kinds)
    assert config.window_counts == Counter(config.layer_windows)
    assert differences(JobConfig(model=config), JobConfig(model=config.replace(attention_pattern=kinds))) == []
    last = kinds[-1].removesuffix("_nope") if kinds[-1].endswith("_nope") else f"{kinds[-1]}_nope"
    other = config.replace(attention_pattern=[*kinds[:-1], last])
    assert differences(JobConfig(model=config), JobConfig(model=other)) != []


def test_counts_of_layers_take_no_time() -> None:
    config = ModelConfig(**{**SIZES, "n_layers": 2**60, "sliding_window": 3, "attention_pattern": ("window", "full")})
    assert config.window_counts == {3: 2**59, None: 2**59}
    assert config.function_fields()["attention_pattern"] == ("window", "full")


@pytest.mark.parametrize(
    ("fields", "changed", "differ"),
    [
        ({}, {"sliding_window": 3}, ["sliding_window"]),
        ({}, {"sliding_window": 3, "rope_theta": 7.0}, ["rope_theta", "sliding_window"]),
        ({"sliding_window": 3}, {"sliding_window": 4}, ["sliding_window"]),
        ({"sliding_window": 3}, {"sliding_window": 3, "rope_theta": 7.0}, ["rope_theta"]),
        ({"sliding_window": 3, "rope_theta": 7.0}, {"sliding_window": 3, "window_rope_theta": 7.0}, []),
        (
            {"attention_pattern": ("full", "full_nope")},
            {"sliding_window": 3, "attention_pattern": ("window", "window_nope")},
            ["sliding_window"],
        ),
        ({"sliding_window": 3}, {"sliding_window": 3, "attention_pattern": MIXED}, ["attention_pattern"]),
        (
            {"sliding_window": 3, "attention_pattern": MIXED},
            {"sliding_window": 3, "attention_pattern": MIXED, "rope_theta": 7.0},
            ["rope_theta"],
        ),
        (
            {"sliding_window": 3, "attention_pattern": MIXED},
            {"sliding_window": 3, "attention_pattern": MIXED, "window_rope_theta": 7.0},
            ["window_rope_theta"],
        ),
    ],
)
def test_models_differ_in_the_fields_that_were_set(
    fields: dict[str, Any], changed: dict[str, Any], differ: list[str]
) -> None:
    """Not in those that follow from them, which nobody would set beside them on a command line."""
    there, here = (JobConfig(model=ModelConfig(**SIZES, **each)) for each in (fields, changed))
    assert [difference.field.removeprefix("model.") for difference in differences(here, there)] == differ
