"""Hugging Face's config.json word by word: what is written for each family, and all that is said of what can't be
read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from shared_config.contract.parameters import parameter_table
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.huggingface import (
    from_huggingface,
    load_huggingface,
    read_huggingface_config,
    save_huggingface,
    to_huggingface,
)
from shared_config.interchange.huggingface_config import config_from_huggingface, config_to_huggingface
from shared_config.interchange.huggingface_families import FAMILIES, LACKING
from shared_config.interchange.weights import WeightsError
from shared_config.schema.base import from_fields
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.oracle.weights import draw

FIELDS: dict[str, Any] = {"dim": 20, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "vocab_size": 37}
FIELDS |= {"ffn_hidden_dim": 48, "max_seq_len": 77, "norm_eps": 0.125, "rope_theta": 123.0, "init_std": 0.75}
EXPERTS: dict[str, Any] = {"num_experts": 3, "moe_top_k": 2, "moe_aux_loss_weight": 0.25}
EXPERTS |= {"moe_expert_ffn_multiplier": 2 / 3}

COMMON = {
    "vocab_size": 37, "hidden_size": 20, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "hidden_act": "silu", "max_position_embeddings": 77,
    "initializer_range": 0.75, "rms_norm_eps": 0.125, "rope_theta": 123.0, "rope_scaling": None,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"attention_bias": True},
        {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": False},
    ),
    "mistral": ({"sliding_window": 5}, {"architectures": ["MistralForCausalLM"], "sliding_window": 5}),
    "mixtral": (
        {**EXPERTS, "sliding_window": 9},
        {
            "architectures": ["MixtralForCausalLM"], "sliding_window": 9, "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.25, "num_local_experts": 3, "intermediate_size": 32,
        },
    ),
    "qwen3": (
        {"qk_norm": True, "sliding_window": 5, "tie_embeddings": True},
        {
            "architectures": ["Qwen3ForCausalLM"], "sliding_window": 5, "use_sliding_window": True,
            "max_window_layers": 0, "tie_word_embeddings": True, "attention_bias": False,
        },
    ),
    "qwen3_moe": (
        {**EXPERTS, "qk_norm": True, "moe_frequency": 2, "moe_norm_topk_prob": False},
        {
            "architectures": ["Qwen3MoeForCausalLM"], "sliding_window": None, "use_sliding_window": False,
            "max_window_layers": 0, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.25, "num_experts": 3,
            "moe_intermediate_size": 32, "decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": False,
            "attention_bias": False,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", WRITTEN)
def test_every_key_that_is_written(family: str) -> None:
    fields, content = WRITTEN[family]
    config = ModelConfig(**{**FIELDS, **fields, "family": family})
    assert config_to_huggingface(config) == {**COMMON, "model_type": family, **content}


SCALINGS = [
    (RopeScaling(type="linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    (
        RopeScaling(
            type="llama3", factor=2.0, original_max_seq_len=16, low_freq_factor=1.5, high_freq_factor=5.0
        ),
        {
            "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
        },
    ),
    (
        RopeScaling(type="yarn", factor=2.0, original_max_seq_len=16, beta_fast=20.0, beta_slow=0.5),
        {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "beta_fast": 20.0,
            "beta_slow": 0.5,
        },
    ),
    (
        RopeScaling(type="yarn", factor=2.0, original_max_seq_len=16, attention_factor=1.25),
        {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
            "beta_slow": 1.0, "attention_factor": 1.25,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "written"), SCALINGS)
def test_a_scaling_is_written_and_read_back(scaling: RopeScaling, written: dict[str, Any]) -> None:
    content = config_to_huggingface(ModelConfig(**FIELDS, rope_scaling=scaling, family="llama"))
    assert content == {**COMMON, **WRITTEN["llama"][1], "model_type": "llama", "attention_bias": False} | {
        "rope_scaling": written
    }
    assert from_fields(ModelConfig, config_from_huggingface(content)).rope_scaling == scaling


def content_of(family: str, **changes: Any) -> dict[str, Any]:
    content = {"model_type": family, "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48}
    content |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    content |= {"max_position_embeddings": 64}
    if family in ("mixtral", "qwen3_moe"):
        content |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {**content, **changes}


def problems_of(content: Any) -> list[str]:
    try:
        from_fields(ModelConfig, config_from_huggingface(content))
    except ConfigError as error:
        return list(error.problems)
    return []


LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0}
QWEN = {"sliding_window": 7, "use_sliding_window": True}
SAID: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"vocab_size": 1.5, "rms_norm_eps": "x"}, [
        "vocab_size = 1.5: must be a number", "rms_norm_eps = 'x': must be a number",
    ]),
    ("llama", {"num_key_value_heads": 0}, ["num_key_value_heads = 0: must be a positive integer"]),
    ("llama", {"num_key_value_heads": 1}, []),
    ("llama", {"num_experts_per_tok": None}, ["num_experts_per_tok = None: must be a positive integer"]),
    ("mixtral", {"num_experts_per_tok": None}, ["num_experts_per_tok = None: must be a number"]),
    ("mixtral", {"moe_intermediate_size": None}, ["moe_intermediate_size = None: must be a positive integer"]),
    ("qwen3_moe", {"moe_intermediate_size": None}, ["moe_intermediate_size = None: must be a number"]),
    ("qwen3_moe", {"num_experts": "4"}, ["num_experts = '4': must be a positive integer"]),
    ("llama", {"num_experts": None}, ["num_experts = None: must be a positive integer"]),
    ("llama", {"max_window_layers": -1}, []),
    ("qwen3", {"max_window_layers": -1, **QWEN}, []),
    ("qwen3", {"max_window_layers": 0, **QWEN}, []),
    ("qwen3", {"max_window_layers": 1, **QWEN}, []),
    ("qwen3", {"max_window_layers": 2, **QWEN}, []),
    ("qwen3", {"num_hidden_layers": 28, **QWEN}, []),
    ("qwen3", {"max_window_layers": 1}, []),
    ("qwen3", {"max_window_layers": 1, "layer_types": ["sliding_attention"] * 2, **QWEN}, []),
    ("qwen3_moe", {"max_window_layers": 1, **QWEN}, []),
    ("mistral", {"max_window_layers": 1}, []),
    ("llama", {"max_window_layers": 1.0}, ["max_window_layers = 1.0: must be an integer"]),
    ("llama", {"rope_theta": float("inf")}, ["rope_theta = inf: must be a number"]),
    ("llama", {"rope_theta": True}, ["rope_theta = True: must be a number"]),
    ("llama", {"hidden_act": 3}, ["hidden_act = 3: must be a string"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act = 'gelu': must be 'silu', or 'swish', which is the same"]),
    ("llama", {"layer_types": 3}, ["layer_types = 3: must be a list"]),
    ("llama", {"layer_types": ["full_attention", 3]}, [
        "layer_types = ['full_attention', 3]: must be a list of strings",
    ]),
    ("llama", {"layer_types": ["attention"] * 2}, []),
    ("llama", {"layer_types": []}, ["layer_types has 0 entries: must be num_hidden_layers = 2"]),
    ("llama", {"layer_types": ["full_attention"] * 3}, ["layer_types has 3 entries: must be num_hidden_layers = 2"]),
    ("llama", {"layer_types": ["full_attention", "attention"]}, []),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, [
        "layer_types = ['full_attention', 'sliding_attention']: must be the same for all layers",
    ]),
    ("llama", {"layer_types": ["chunked"] * 2}, [
        "layer_types = ['chunked', 'chunked']: must be full_attention or sliding_attention",
    ]),
    ("llama", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 7}, [
        "layer_types: sliding_attention: must be full_attention, as there is no sliding_window",
    ]),
    ("mixtral", {"layer_types": ["full_attention"] * 2, "sliding_window": 7}, [
        "layer_types: full_attention: must be sliding_attention, as sliding_window = 7",
    ]),
    ("mixtral", {"layer_types": ["full_attention"] * 2}, []),
    ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": 7}, []),
    ("qwen3", {"layer_types": ["full_attention"] * 2, **QWEN}, []),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 2, **QWEN}, [
        "layer_types: full_attention: must be sliding_attention, as sliding_window = 7",
    ]),
    ("llama", {"rope_scaling": 3, "rope_parameters": "x"}, [
        "rope_parameters = 'x': must be an object", "rope_scaling = 3: must be an object",
    ]),
    ("llama", {"rope_scaling": {"full": {}}}, [
        "rope_scaling.full = {}: must be no object; one setting for all layers",
    ]),
    ("llama", {"rope_parameters": {"factor": "2", "beta_fast": True}}, [
        "rope_parameters.factor = '2': must be a number", "rope_parameters.beta_fast = True: must be a number",
    ]),
    ("llama", {"rope_scaling": {"rope_theta": None}}, ["rope_scaling.rope_theta = None: must be a number"]),
    ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, [
        "rope_scaling.low_freq_factor = None: must be a number",
    ]),
    ("llama", {"rope_scaling": {"rope_type": "x", "factor": "y"}}, ["rope_scaling.factor = 'y': must be a number"]),
    ("llama", {"rope_scaling": {"rope_type": "x"}}, ["rope_type = 'x': must be one of default, linear, llama3, yarn"]),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, ["rope factor = None: must be a number"]),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": None}}, ["rope factor = None: must be a number"]),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, []),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, []),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, [
        "rope low_freq_factor: must be given with rope_type 'llama3'",
        "rope high_freq_factor: must be given with rope_type 'llama3'",
    ]),
    ("llama", {"rope_scaling": {**YARN, "truncate": False, "partial_rotary_factor": 0.5}}, [
        "partial_rotary_factor = 0.5: must be 1.0", "rope truncate = False: must be True",
    ]),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "truncate": False}}, []),
    ("llama", {"rope_scaling": {**YARN, "truncate": True, "partial_rotary_factor": 1.0}}, []),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default"}}, []),
    ("mistral", {"mlp_bias": True, "partial_rotary_factor": 0.5, "is_causal": False, "is_encoder_decoder": True}, [
        "partial_rotary_factor = 0.5: must be 1.0", "is_causal = False: must be True",
        "is_encoder_decoder = True: must be False", "mlp_bias = True: must be False",
    ]),
    ("llama", {"mlp_only_layers": [0], "quantization_config": {}, "per_layer_config": {}}, [
        "mlp_only_layers = [0]: must be []", "per_layer_config = {}: must be None",
        "quantization_config = {}: must be None",
    ]),
    ("llama", {"quantization_config": None, "partial_rotary_factor": None, "mlp_only_layers": None}, []),
    ("mixtral", {"attention_bias": True}, ["attention_bias = True: must be False"]),
    ("qwen3_moe", {"attention_bias": True}, []),
    ("mixtral", {"intermediate_size": 47}, ["width of an expert = 47: must be a multiple of 16"]),
    ("mixtral", {"moe_intermediate_size": 31}, []),
    ("qwen3_moe", {"moe_intermediate_size": 31}, ["width of an expert = 31: must be a multiple of 16"]),
    ("qwen3_moe", {"intermediate_size": 47, "moe_intermediate_size": 47}, [
        "width of an expert = 47: must be a multiple of 16",
    ]),
    ("llama", {"intermediate_size": 47, "moe_intermediate_size": 47}, []),
    ("qwen2_moe", {"num_experts": 4, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, [
        "shared_expert_intermediate_size = None: must be a number",
    ]),
    ("qwen2_moe", {"num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 32}, ["num_experts = None: must be a number"]),
    ("gpt2", {}, [f"model_type = 'gpt2': must be one of {', '.join(FAMILIES)}"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "said"), SAID)
def test_all_that_is_said_of_settings(family: str, changes: dict[str, Any], said: list[str]) -> None:
    assert problems_of(content_of(family, **changes)) == said


def test_all_that_is_said_of_what_is_left_out() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    lacking = [f"{name} = None: must be a number" for name in sizes]
    for family, more in (("llama", ()), ("mistral", ()), ("qwen3", ())):
        assert problems_of({"model_type": family}) == [*lacking, *more]
    experts = "num_experts = None: must be a number (or num_local_experts)"
    per_token = "num_experts_per_tok = None: must be a number"
    assert problems_of({"model_type": "mixtral"}) == [*lacking, per_token, experts]
    width = "moe_intermediate_size = None: must be a number"
    assert problems_of({"model_type": "qwen3_moe"}) == [*lacking, per_token, width, experts]
    for content in ([1], "llama", None):
        said = [f"model_type = {content!r}: must be one of {', '.join(FAMILIES)}"]
        assert problems_of(content) == said


@pytest.mark.parametrize(
    "name", ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor"]
)
def test_null_means_left_out_for_rotary_keys_with_a_default(name: str) -> None:
    base = content_of("llama")
    one, other = ({**base, "rope_scaling": scaling} for scaling in (YARN, {**YARN, name: None}))
    configs = [from_fields(ModelConfig, config_from_huggingface(content)) for content in (one, other)]
    assert configs[0] == configs[1]
    assert problems_of({**base, "rope_scaling": {"rope_type": "default", "factor": None}}) == []


def test_the_first_length_of_a_scaling_is_found_where_it_is_given() -> None:
    """Beside the scaling, then within it, then the longest of the model itself."""
    read = lambda content: from_fields(ModelConfig, config_from_huggingface(content)).rope_scaling.original_max_seq_len  # noqa: E731
    base = content_of("llama", rope_scaling=dict(YARN))
    assert read(base) == 64
    base["rope_scaling"]["original_max_position_embeddings"] = 32
    assert read(base) == 32
    assert read({**base, "original_max_position_embeddings": 16}) == 16


@pytest.mark.parametrize(
    ("factors", "expected"),
    [({"mscale": 0.0, "mscale_all_dim": 1.0}, None), ({"mscale": 1.0, "mscale_all_dim": 0.0}, None),
     ({"mscale": 1.0}, None), ({"mscale_all_dim": 1.0}, None), ({"attention_factor": 0.5, "mscale": 2.0}, 0.5),
     ({"beta_fast": 0.0}, None)],
)  # fmt: skip
def test_scales_that_are_0_or_alone_count_for_nothing(factors: dict[str, float], expected: float | None) -> None:
    fields: dict[str, Any] = config_from_huggingface(content_of("llama", rope_scaling={**YARN, **factors}))
    assert fields["rope_scaling"].get("attention_factor") == expected
    assert "beta_fast" not in fields["rope_scaling"]


OTHER_FAMILIES = {
    "cohere": ["model_type = 'cohere'", "layer_norm_eps = 1e-05"],
    "gpt_oss": ["model_type = 'gpt_oss'", "swiglu_limit = 7.0"],
    "deepseek_v3": ["kv_lora_rank = 512", "n_group = 8", "first_k_dense_replace = 3"],
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_families_that_are_not_read_are_refused_with_what_they_have(family: str) -> None:
    """By keys that transformers' own configs have."""
    with pytest.raises(ConfigError) as caught:
        config_from_huggingface(transformers.AutoConfig.for_model(family).to_dict())
    first, *others = caught.value.problems
    assert first.startswith(f"model_type = {family!r}: must be one of llama, ")
    assert [line.partition(": no model here has ")[0] for line in others] == OTHER_FAMILIES[family]
    assert not set(LACKING) & set(FAMILIES)
    assert set(LACKING) == set(OTHER_FAMILIES)


PATTERNS = [
    (2, 1, ["full", "window"]),
    (5, 3, [*["full"] * 3, "window", "window"]),
    (29, None, [*["full"] * 28, "window"]),
]


@pytest.mark.parametrize(("layers", "first", "pattern"), PATTERNS)
def test_layers_from_the_first_with_a_window_on_have_it(layers: int, first: int | None, pattern: list[str]) -> None:
    told = {} if first is None else {"max_window_layers": first}
    fields: dict[str, Any] = config_from_huggingface(content_of("qwen3", num_hidden_layers=layers, **told, **QWEN))
    assert (fields["attention_pattern"], fields["sliding_window"]) == (tuple(pattern), 7)


@pytest.mark.parametrize(
    ("layers", "first", "window"),
    [(1, 0, 7), (1, -1, 7), (1, 1, None), (1, 2, None), (2, 0, 7), (2, 2, None), (2, 3, None)],
)
def test_layers_below_the_first_with_a_window_have_none(layers: int, first: int, window: int | None) -> None:
    content = content_of("qwen3", num_hidden_layers=layers, max_window_layers=first, **QWEN)
    assert config_from_huggingface(content)["sliding_window"] == window
    with_types = {**content, "layer_types": ["sliding_attention"] * layers}
    assert config_from_huggingface(with_types)["sliding_window"] == 7
    del content["max_window_layers"]
    assert config_from_huggingface(content)["sliding_window"] is None


def test_experts_are_counted_under_the_newer_name_first() -> None:
    both = content_of("qwen3_moe", num_experts=4, num_local_experts=6)
    assert config_from_huggingface(both)["num_experts"] == 4


def test_a_config_of_no_family_is_refused_with_what_is_needed() -> None:
    def said(**fields: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            config_to_huggingface(ModelConfig(**{**FIELDS, **fields}))
        return list(caught.value.problems)

    no_such = "Hugging Face's {} no such setting: must be {}"
    assert said(activation="gelu") == [
        f"model.activation = 'gelu': {no_such.format('llama and mistral have', repr('silu'))}"
    ]
    assert said(norm_type="layernorm", family="llama") == [
        f"model.norm_type = 'layernorm': {no_such.format('llama has', repr('rmsnorm'))}"
    ]
    assert said(attention_bias=True, sliding_window=4, logit_divisor=2.0) == [
        f"model.logit_divisor = 2.0: {no_such.format('llama and mistral and qwen2 have', 1.0)}",
        f"model.sliding_window = 4: {no_such.format('llama has', None)}",
        f"model.attention_bias = True: {no_such.format('mistral has', False)}",
        f"model.attention_output_bias = True: {no_such.format('qwen2 has', False)}",
    ]
    assert said(**EXPERTS, moe_shared_experts=2, moe_frequency=2, moe_norm_topk_prob=False, qk_norm=True) == [
        f"model.moe_shared_experts = 2: {no_such.format('qwen3_moe has', 0)}"
    ]
    assert said(**EXPERTS, moe_frequency=2, moe_norm_topk_prob=False) == [
        f"model.moe_norm_topk_prob = False: {no_such.format('mixtral has', True)}",
        f"model.moe_frequency = 2: {no_such.format('mixtral has', 1)}",
    ]
    assert said(**EXPERTS, moe_capacity_factor=1.5, moe_routed_scaling=2.0) == [
        f"model.moe_capacity_factor = 1.5: {no_such.format('mixtral has', 0.0)}",
        f"model.moe_routed_scaling = 2.0: {no_such.format('mixtral has', 1.0)}",
    ]


# Folders


def state_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return draw({name: spec.shape for name, spec in parameter_table(config).items()}, 5)


def test_a_tied_head_is_written_under_the_name_of_the_embedding() -> None:
    config = ModelConfig(**FIELDS, tie_embeddings=True)
    state = state_of(config)
    embedding = state["token_embedding.embedding.weight"]
    expected = to_huggingface(state, config)
    assert expected["model.embed_tokens.weight"] is embedding
    assert "lm_head.weight" not in expected
    for head in (embedding, embedding.copy()):
        found = to_huggingface({**state, "output_head.proj.weight": head}, config)
        assert list(found) == list(expected)
        assert found["model.embed_tokens.weight"] is embedding
    with pytest.raises(
        UserError, match=r"^output_head\.proj\.weight: differs from token_embedding\.embedding\.weight, to"
    ):
        to_huggingface({**state, "output_head.proj.weight": embedding + 1}, config)
    with pytest.raises(
        WeightsError, match=r"native weights: 1 tensors do not fit:\n  output_head\.proj\.weight: missing"
    ):
        to_huggingface(state, config.replace(tie_embeddings=False))


def test_a_tied_head_alone_is_the_embedding() -> None:
    config = ModelConfig(**FIELDS, tie_embeddings=True)
    there = to_huggingface(state_of(config), config)
    there["lm_head.weight"] = there.pop("model.embed_tokens.weight")
    assert from_huggingface(there, config)["token_embedding.embedding.weight"] is there["lm_head.weight"]
    with pytest.raises(WeightsError) as caught:
        from_huggingface({**there, "model.embed_tokens.weight": there["lm_head.weight"] * 2}, config)
    assert str(caught.value) == (
        "Hugging Face weights: 1 tensors do not fit:\n  lm_head.weight: differs from model.embed_tokens.weight, though "
        "tie_word_embeddings is true"
    )
    untied = config.replace(tie_embeddings=False)
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight: missing"):
        from_huggingface(there, untied)


def test_names_of_wrappers_are_left_out_on_either_side() -> None:
    config = ModelConfig(**FIELDS)
    state = state_of(config)
    there = to_huggingface({f"module.{name}": value for name, value in state.items()}, config)
    assert there.keys() == to_huggingface(state, config).keys()
    assert (
        from_huggingface({f"_orig_mod.{name}": value for name, value in there.items()}, config).keys() == state.keys()
    )
    with pytest.raises(WeightsError, match=r"^Hugging Face weights: 1 tensors do not fit:\n  extra: extra, the model"):
        from_huggingface({**there, "extra": np.ones(1)}, config)


def test_experts_are_packed_in_their_order_also_beyond_ten() -> None:
    config = ModelConfig(**{**FIELDS, **EXPERTS, "num_experts": 12}, moe_packed_experts=True)
    state = state_of(config)
    there = to_huggingface(state, config)
    for native, foreign in (("gate_w", "w1"), ("up_w", "w3"), ("down_w", "w2")):
        for expert in range(12):
            found = there[f"model.layers.1.block_sparse_moe.experts.{expert}.{foreign}.weight"]
            assert np.array_equal(found, state[f"layers.1.mlp.{native}"][expert].T)
    back = from_huggingface(dict(reversed(there.items())), config)
    assert list(back) == list(state)
    assert all(np.array_equal(back[name], value) for name, value in state.items())


def test_a_folder_holds_config_tokenizer_and_ids(tmp_path: Path) -> None:
    config = ModelConfig(**FIELDS, family="llama")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 4}')
    files = save_huggingface(tmp_path / "out", state_of(config), config, tmp_path / "tokenizer")
    names = ["model.safetensors", "tokenizer.json", "generation_config.json", "config.json"]
    assert files == [tmp_path / "out" / name for name in names]
    text = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(text) == config_to_huggingface(config) | {"eos_token_id": 4}
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    alone = save_huggingface(tmp_path / "alone", state_of(config), config)
    assert [file.name for file in alone] == ["model.safetensors", "config.json"]
    assert load_huggingface(tmp_path / "alone", max_seq_len=5)[0].max_seq_len == 5


def test_the_file_of_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content_of("llama", partial_rotary_factor=0.5, is_causal=False)))
    with pytest.raises(ConfigError) as caught:
        read_huggingface_config(tmp_path)
    said = ("partial_rotary_factor = 0.5: must be 1.0", "is_causal = False: must be True")
    assert caught.value.problems == tuple(f"{file}: {problem}" for problem in said)
    file.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is no JSON: Expecting"):
        read_huggingface_config(tmp_path)
