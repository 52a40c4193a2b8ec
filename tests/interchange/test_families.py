"""Settings of each Hugging Face family, key by key, as transformers' own config classes read them: left out, at other
than their defaults, null, and in any combination.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from shared_config.contract.rope import attention_factor, inverse_frequencies
from shared_config.errors import ConfigError
from shared_config.interchange.huggingface import load_huggingface, to_huggingface
from shared_config.interchange.huggingface_config import config_from_huggingface, config_to_huggingface
from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.interchange.huggingface_keys import KINDS, REFUSED
from shared_config.interchange.preprocessor import read_preprocessor
from shared_config.interchange.vision import read_tower
from shared_config.interchange.weights import load_weights
from shared_config.parity.validation import validation_tokens
from shared_config.schema.base import from_fields
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.interchange.theirs import CONFIG_CLASSES
from tests.oracle.transformer import transformer

CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe", "olmo2": "Olmo2", "phi3": "Phi3", "granite": "Granite",
    "qwen2_moe": "Qwen2Moe", "smollm3": "SmolLM3", "olmo3": "Olmo3", "gemma": "Gemma", "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}  # fmt: skip
GEMMA: dict[str, Any] = {"norm_type": "rmsnorm_1p", "norm_placement": "both", "activation": "geglu_tanh"}
MEANT: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen2_moe": {"attention_output_bias": False, "moe_shared_expert_gate": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "olmo2": {"qk_norm": True, "qk_norm_over": "width", "norm_placement": "after"},
    "olmo3": {"qk_norm": True, "qk_norm_over": "width", "norm_placement": "after", "window_rope_scaled": False},
    "gemma": {"norm_type": "rmsnorm_1p", "activation": "geglu_tanh"},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "qk_norm": True, "window_rope_scaled": False},
}
"""What all models of a family compute, where that is not what Llamas do; from their modelling code."""
SIZES = {"vocab_size": 40, "hidden_size": 128, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 32}
NEEDED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen3_moe": {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32},
    "qwen2_moe": {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}
"""What has to be given: transformers' defaults of sizes are those of its first model, which nobody means."""

DEEP = ("smollm3", "olmo3", "gemma2", "gemma3_text")
"""Families whose layers differ by their place, of which 9 show all."""
MIXED = [*["full_attention"] * 3, *["sliding_attention"] * 5, "full_attention"]

OTHERS: dict[str, Any] = {
    "num_key_value_heads": (2, 16, None),
    "head_dim": (6, 10, None),
    "max_position_embeddings": (64,),
    "initializer_range": (0.5,),
    "rms_norm_eps": (0.25,),
    "rope_theta": (50.0, 300),
    "rope_parameters": ({"rope_theta": 70.0}, {"rope_theta": 90.0, "rope_type": "default"}, None),
    "rope_scaling": ({"type": "linear", "factor": 3.0}, {"rope_type": "default"}, None),
    "tie_word_embeddings": (True,),
    "attention_bias": (True,),
    "sliding_window": (7, None),
    "use_sliding_window": (True,),
    "max_window_layers": (0, 2, 5),
    "hidden_act": ("silu", "swish"),
    "decoder_sparse_step": (2,),
    "norm_topk_prob": (True,),
    "router_aux_loss_coef": (0.3,),
    "mlp_only_layers": ([], None),
    "partial_rotary_factor": (1.0,),
    "mlp_bias": (False, True),
    "embedding_multiplier": (12.0,),
    "attention_multiplier": (0.25,),
    "residual_multiplier": (0.5, 1),
    "logits_scaling": (8.0,),
    "qkv_bias": (False, True),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "query_pre_attn_scalar": (4, 144),
    "attn_logit_softcapping": (7.0, None),
    "final_logit_softcapping": (9.0, None),
    "use_bidirectional_attention": (False,),
    "rope_local_base_freq": (80.0,),
    "sliding_window_pattern": (3,),
}
"""Values other than the defaults; of what changes the function in ways that are refused, the one that is read."""

BY_KIND = (
    {"full_attention": {"rope_theta": 70.0}, "sliding_attention": {"rope_theta": 90.0, "rope_type": "default"}},
    {"full_attention": {"rope_type": "linear", "factor": 3.0}},
    {"sliding_attention": {"rope_type": "default"}},
    None,
)
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2": {"layer_types": (["full_attention", "sliding_attention"], ["full_attention"] * 2, None)},
    "qwen3": {"layer_types": (["full_attention", "sliding_attention"], ["full_attention"] * 2, None)},
    "smollm3": {
        "layer_types": (MIXED, ["full_attention"] * 9, None),
        "no_rope_layers": ([1, 0, 0] * 3, [1] * 12, None),
        "no_rope_layer_interval": (2, 3),
    },
    "olmo3": {"layer_types": (MIXED, ["full_attention"] * 9, None), "rope_parameters": BY_KIND},
    "gemma": {"hidden_act": ("gelu_pytorch_tanh", "gelu")},
    "gemma2": {"layer_types": (MIXED, ["full_attention"] * 9, None)},
    "gemma3_text": {"layer_types": (MIXED, ["full_attention"] * 9, None), "rope_parameters": BY_KIND},
}
"""Those of some families, in place of `OTHERS`."""

NOT_HERE = {
    "layer_types": "of a family that is read as another class where given; its logits are compared in test_huggingface",
    "is_causal": "refused unless true",
    "is_encoder_decoder": "refused unless false",
    "original_max_position_embeddings": "part of a scaling, below",
    "num_local_experts": "another name of num_experts, below",
}
families = pytest.mark.parametrize("family", FAMILIES)


def values_of(family: str, key: str) -> tuple[Any, ...]:
    return OF_FAMILY.get(family, {}).get(key, OTHERS.get(key, ()))


def content_of(family: str, **changes: Any) -> dict[str, Any]:
    deep = {"num_hidden_layers": 9} if family in DEEP else {}
    return {"model_type": family, **SIZES, **deep, **NEEDED.get(family, {}), **changes}


def theirs_of(content: dict[str, Any]) -> Any:
    fields = {name: value for name, value in content.items() if name != "model_type"}
    family = content["model_type"]
    name = CONFIG_CLASSES.get(family, f"{CLASSES[family]}Config")
    return getattr(transformers, name)(**json.loads(json.dumps(fields)))


def expected_of(family: str, theirs: Any) -> dict[str, Any]:
    """What transformers' modelling code reads from its config, by our names."""
    expected = {
        "vocab_size": theirs.vocab_size,
        "dim": theirs.hidden_size,
        "n_layers": theirs.num_hidden_layers,
        "n_heads": theirs.num_attention_heads,
        "n_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "ffn_hidden_dim": theirs.intermediate_size,
        "max_seq_len": theirs.max_position_embeddings,
        "init_std": theirs.initializer_range,
        "norm_type": "rmsnorm",
        "norm_eps": theirs.rms_norm_eps,
        "activation": "silu",
        "rope_theta": rope_of(theirs, "full_attention")["rope_theta"],
        "window_rope_theta": rope_of(theirs, "sliding_attention")["rope_theta"],
        "window_rope_scaled": True,
        "layer_windows": windows_of(family, theirs),
        "layer_rotates": rotated_of(theirs),
        "attention_bias": getattr(theirs, "qkv_bias", getattr(theirs, "attention_bias", False)),
        "attention_output_bias": True,
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        "tie_embeddings": theirs.tie_word_embeddings,
        "qk_norm": False,
        "qk_norm_over": "head",
        "norm_placement": "before",
        "embedding_scale": getattr(theirs, "embedding_multiplier", 1.0),
        "residual_scale": getattr(theirs, "residual_multiplier", 1.0),
        "logit_divisor": getattr(theirs, "logits_scaling", 1.0),
        "attention_softcap": getattr(theirs, "attn_logit_softcapping", None),
        "logit_softcap": getattr(theirs, "final_logit_softcapping", None),
        "model_type": "transformer",
        "family": family,
        "num_experts": 0,
    } | MEANT.get(family, {})
    expected["attention_scale"] = getattr(theirs, "attention_multiplier", expected["head_dim"] ** -0.5)
    if family.startswith("gemma"):
        scalar = getattr(theirs, "query_pre_attn_scalar", theirs.head_dim)
        expected |= {"attention_scale": scalar**-0.5, "embedding_scale": theirs.hidden_size**0.5}
    if family in NEEDED:
        expected |= {
            "num_experts": getattr(theirs, "num_experts", None) or theirs.num_local_experts,
            "moe_top_k": theirs.num_experts_per_tok,
            "moe_frequency": getattr(theirs, "decoder_sparse_step", 1),
            "moe_router": "softmax_topk",
            "moe_norm_topk_prob": getattr(theirs, "norm_topk_prob", True),  # Mixtral's always add up to 1
            "moe_aux_loss_weight": theirs.router_aux_loss_coef,
            "moe_shared_experts": getattr(theirs, "shared_expert_intermediate_size", 0) // 32,
            "moe_shared_expert_gate": family == "qwen2_moe",
            "moe_capacity_factor": 0.0,
            "moe_routed_scaling": 1.0,
            "computed_expert_ffn_hidden_dim": getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
        }
    return expected


def rope_of(theirs: Any, kind: str) -> dict[str, Any]:
    return theirs.rope_parameters.get(kind) or theirs.rope_parameters


def windows_of(family: str, theirs: Any) -> tuple[int | None, ...]:
    window = getattr(theirs, "sliding_window", None) if family not in ("llama", "qwen2_moe") else None
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rotated_of(theirs: Any) -> tuple[bool, ...]:
    rotated = getattr(theirs, "no_rope_layers", [1] * theirs.num_hidden_layers)
    return tuple(bool(one) for one in rotated[: theirs.num_hidden_layers])


def assert_read(content: dict[str, Any]) -> None:
    config, theirs = from_fields(ModelConfig, config_from_huggingface(content)), theirs_of(content)
    expected = expected_of(content["model_type"], theirs)
    assert {name: getattr(config, name) for name in expected} == expected
    assert_same_rotation(config, theirs, content["model_type"])


def assert_same_rotation(config: ModelConfig, theirs: Any, family: str) -> None:
    name = family.removesuffix("_text")
    modelling = getattr(getattr(transformers.models, name), f"modeling_{name}")
    rotary = getattr(modelling, f"{CLASSES[family]}RotaryEmbedding")(config=theirs)
    by_kind = {"": (config.rope_theta, config.rope_scaling)}
    if "full_attention" in theirs.rope_parameters:
        of_kind = {"full_attention_": by_kind[""], "sliding_attention_": config.window_rope}
        by_kind = {kind: own for kind, own in of_kind.items() if kind[:-1] in theirs.layer_types}
    for kind, (theta, scaling) in by_kind.items():
        found = inverse_frequencies(config.head_size, theta, scaling)
        np.testing.assert_allclose(found, getattr(rotary, f"{kind}inv_freq").numpy(), rtol=1e-5)
        assert attention_factor(scaling) == pytest.approx(getattr(rotary, f"{kind}attention_scaling"), rel=1e-12)


def keys_of(family: str) -> Iterator[str]:
    known = set(theirs_of(content_of(family)).to_dict()) | {"rope_theta", "rope_scaling"}
    yield from (key for key in KINDS if key in known and key not in content_of(family))


@families
def test_a_family_s_keys_left_out_mean_what_they_mean_there(family: str) -> None:
    assert_read(content_of(family))


@families
def test_every_key_is_compared_or_said_why_not(family: str) -> None:
    assert set(keys_of(family)) <= OTHERS.keys() | NOT_HERE.keys() | OF_FAMILY.get(family, {}).keys()
    assert not (OTHERS.keys() | NOT_HERE.keys()) & REFUSED


@families
def test_a_family_s_keys_are_read_one_by_one(family: str) -> None:
    read, refused = set(), set()
    for key in keys_of(family):
        for value in values_of(family, key):
            content = content_of(family, **{key: value})
            try:
                theirs_of(content)
            except Exception:  # their classes refuse some nulls
                with pytest.raises(ConfigError, match="rope_type" if family == "phi3" else key):
                    config_from_huggingface(content)
                refused.add(key)
                continue
            if (problems := problems_of(content)) and problems <= set(known_refusals(content)):
                refused.add(key)  # of what their class takes and their model does not
                continue
            assert_read(content)
            read.add(key)
    assert read | NOT_HERE.keys() | ({"use_sliding_window", "attn_logit_softcapping"} & refused) >= set(
        keys_of(family)
    ), refused


@families
@given(data=st.data())
def test_a_family_s_keys_are_read_in_any_combination(family: str, data: st.DataObject) -> None:
    values = {key: st.sampled_from(values_of(family, key)) for key in keys_of(family) if values_of(family, key)}
    given_keys = data.draw(st.fixed_dictionaries({}, optional=values))
    content = content_of(family, **given_keys)
    problems = problems_of(content)
    assert problems <= set(known_refusals(content))
    if not problems:
        assert_read(content)


def problems_of(content: dict[str, Any]) -> set[str]:
    try:
        config_from_huggingface(content)
    except ConfigError as error:
        return set(error.problems)
    return set()


def known_refusals(content: dict[str, Any]) -> Iterator[str]:
    """The only combinations of these values that are not read."""
    nulls = {
        "num_key_value_heads": ("mistral", "mixtral", "qwen3_moe", "qwen2_moe", "gemma", "gemma2", "gemma3_text"),
        "head_dim": ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    }
    for key, of in nulls.items():
        if content["model_type"] in of:
            yield f"{key} = None: must be a positive integer"
    if content["model_type"] == "qwen2_moe" and content.get("use_sliding_window"):
        yield "use_sliding_window = True: must be False"
    if content["model_type"] == "phi3":
        yield "rope_type = 'linear': must be one of default"
    if content["model_type"] == "gemma3_text":
        yield "attn_logit_softcapping = 7.0: must be None"
    if content["model_type"] in ("olmo3", "gemma3_text"):
        yield SCALES_NOTHING
    if content["model_type"] in ("qwen2", "qwen3", *DEEP):
        yield "layer_types: sliding_attention: must be full_attention, as there is no sliding_window"


SCALES_NOTHING = "rope_parameters.full_attention = None: must be given beside rope_scaling, which changes it"


@pytest.mark.parametrize("family", ["olmo3", "gemma3_text"])
@pytest.mark.parametrize("rope", [{"sliding_attention": {"rope_type": "default"}}, {"full_attention": None}])
def test_a_scaling_of_settings_that_are_not_there_is_refused_here_and_there(family: str, rope: dict[str, Any]) -> None:
    content = content_of(family, rope_parameters=rope, rope_scaling={"type": "linear", "factor": 3.0})
    with pytest.raises((KeyError, AttributeError)):
        theirs_of(content)
    assert problems_of(content) == {SCALES_NOTHING}
    assert not problems_of({**content, "rope_scaling": None})


@families
@pytest.mark.parametrize("key", [*SIZES, "num_experts_per_tok", "moe_intermediate_size"])
def test_sizes_have_to_be_given(family: str, key: str) -> None:
    content = content_of(family)
    if content.pop(key, None) is not None:
        with pytest.raises(ConfigError, match=f"{key} = None: must be a number"):
            config_from_huggingface(content)


def test_the_number_of_experts_has_two_names() -> None:
    for family, name in (("mixtral", "num_experts"), ("qwen3_moe", "num_local_experts")):
        content = content_of(family)
        content[name] = content.pop("num_experts", None) or content.pop("num_local_experts")
        assert config_from_huggingface(content)["num_experts"] == 4
        del content[name]
        with pytest.raises(ConfigError, match="num_experts = None: must be a number"):
            config_from_huggingface(content)


SCALINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "linear": ({}, {"original_max_position_embeddings": 8}),
    "llama3": (
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 16},
    ),
    "yarn": (
        {},
        {"beta_fast": 20.0, "beta_slow": 0.5},
        {"beta_fast": None, "beta_slow": None, "attention_factor": None},
        {"attention_factor": 1.5},
        {"mscale": 0.7, "mscale_all_dim": 0.4},
        {"mscale": 0.7},
        {"original_max_position_embeddings": 16},
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("theta", [None, 70.0])
def test_scalings_turn_as_they_do_there(family: str, kind: str, spelling: str, theta: float | None) -> None:
    for fields in SCALINGS[kind]:
        scaling = {"rope_type": kind, "factor": 4.0, **fields}
        scaling |= {"rope_theta": theta} if theta is not None and spelling == "rope_parameters" else {}
        content = content_of(family, head_dim=16, max_position_embeddings=128, **{spelling: scaling})
        content |= {"rope_theta": theta} if theta is not None and spelling == "rope_scaling" else {}
        assert_read(content)


def test_frequency_bands_have_to_be_given_as_they_have_there() -> None:
    for left_out in ("low_freq_factor", "high_freq_factor"):
        scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        del scaling[left_out]
        with pytest.raises(ConfigError, match=f"rope {left_out}: must be given"):
            config_from_huggingface(content_of("llama", rope_scaling=scaling))


# What is written


GEMMA_WRITTEN: dict[str, Any] = {**GEMMA, "embedding_scale": 20**0.5, "attention_scale": 144**-0.5, "sliding_window": 5}
GEMMA_WRITTEN |= {"attention_pattern": ("full", "window")}
WRITTEN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_experts": 3, "moe_aux_loss_weight": 0.25},
    "qwen2": {**MEANT["qwen2"], "sliding_window": 5, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "sliding_window": 5, "tie_embeddings": True},
    "olmo2": MEANT["olmo2"],
    "olmo3": {
        **MEANT["olmo3"],
        "sliding_window": 5,
        "attention_pattern": ("full", "window"),
        "window_rope_theta": 99.0,
        "rope_scaling": RopeScaling(type="yarn", factor=2.0, original_max_seq_len=16),
    },
    "smollm3": {"sliding_window": 5, "attention_pattern": ("window_nope", "full"), "attention_bias": True},
    "gemma": {**MEANT["gemma"], "embedding_scale": 20**0.5, "attention_bias": True, "tie_embeddings": True},
    "gemma2": {**GEMMA_WRITTEN, "attention_softcap": 7.0, "logit_softcap": 9.0},
    "gemma3_text": {**GEMMA_WRITTEN, **MEANT["gemma3_text"], "window_rope_theta": 99.0, "logit_softcap": 9.0},
    "phi3": {"sliding_window": 5, "tie_embeddings": True},
    "qwen2_moe": {
        **MEANT["qwen2_moe"],
        "attention_bias": True,
        "num_experts": 3,
        "moe_shared_experts": 2,
        "moe_frequency": 2,
        "moe_norm_topk_prob": False,
        "moe_expert_ffn_multiplier": 2 / 3,
    },
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_scale": 12.0,
        "attention_scale": 0.25,
        "residual_scale": 0.5,
        "logit_divisor": 8.0,
    },
    "qwen3_moe": {"qk_norm": True, "num_experts": 3, "moe_frequency": 2, "moe_norm_topk_prob": False},
}


@families
def test_what_is_written_is_read_there_as_it_was_meant(family: str) -> None:
    """No key is left to a default of the class: all values differ from all classes' defaults."""
    fields = {"dim": 20, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "vocab_size": 37}
    fields |= {"ffn_hidden_dim": 48, "max_seq_len": 77, "norm_eps": 0.125, "rope_theta": 123.0, "init_std": 0.75}
    config = ModelConfig(**{**fields, **WRITTEN[family], "family": family})
    content: dict[str, Any] = config_to_huggingface(config)
    assert content["architectures"] == [f"{CLASSES[family]}ForCausalLM"]
    assert hasattr(transformers, content["architectures"][0])
    theirs = theirs_of(content)
    expected = expected_of(family, theirs)
    assert {name: getattr(config, name) for name in expected} == expected
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, None, None)
    assert from_fields(ModelConfig, config_from_huggingface(content)).replace(moe_packed_experts=False) == config


# Square shapes, which no mistaken transpose betrays


@families
def test_square_matrices_of_their_models_compute_the_same_here(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    side = 16
    square = {"vocab_size": side, "hidden_size": side, "intermediate_size": side, "num_key_value_heads": 2}
    square |= {
        "pad_token_id": None,
        "num_attention_heads": 2,
        "head_dim": side // 2,
        "moe_intermediate_size": side,
        "initializer_range": 0.3,
    }
    square |= {"num_local_experts": side, "num_experts": side} if family in NEEDED else {}
    known = theirs_of(content_of(family)).to_dict().keys() | {"head_dim"}
    given_there = {name: value for name, value in square.items() if name in known}
    theirs = theirs_of(content_of(family, **given_there, max_position_embeddings=32))
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(theirs).double().eval()
    if family in NEEDED:
        model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    tokens = validation_tokens(side, 2, 9, seed=1)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    for packed in {False, family in NEEDED}:
        config, state = load_huggingface(tmp_path, moe_packed_experts=packed)
        found = transformer(state, config, tokens).logits
        assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max(), packed
        back = to_huggingface(state, config)
        files = load_weights(tmp_path)
        assert back.keys() == files.keys()
        assert all(np.array_equal(back[name], value) for name, value in files.items())


# Towers and pictures


@pytest.mark.parametrize(("kind", "name"), [("clip", "CLIP"), ("siglip2", "Siglip")])
def test_fields_of_a_tower_are_read_as_its_class_does(kind: str, name: str, tmp_path: Any) -> None:
    config_class = getattr(transformers, f"{name}VisionConfig")
    others = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6}
    others |= {"image_size": 40, "patch_size": 5, "hidden_act": "gelu", "layer_norm_eps": 0.5}
    without_one = ({key: value for key, value in others.items() if key != left_out} for left_out in others)
    for fields in ({}, others, *without_one):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": config_class.model_type, **fields}))
        tower, theirs = read_tower(tmp_path, kind), config_class(**fields)
        sizes = (tower.dim, tower.ffn_hidden_dim, tower.n_layers, tower.n_heads, tower.image_size, tower.patch_size)
        expected = (theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, theirs.num_attention_heads)
        assert sizes == (*expected, theirs.image_size, theirs.patch_size)
        assert (tower.activation, tower.norm_eps) == (theirs.hidden_act, theirs.layer_norm_eps)
        is_clip = kind == "clip"
        assert (tower.class_token, tower.pre_norm) == (is_clip, is_clip)
        assert (tower.patch_bias, tower.final_norm) == (not is_clip, not is_clip)


@pytest.mark.parametrize("kind", ["clip", "siglip2", "vit", "random"])
def test_pictures_without_settings_have_those_of_transformers_processors(kind: str) -> None:
    """Channel by channel, red first; what no processor belongs to takes SigLIP's."""
    pixels = read_preprocessor("", kind, 20)
    theirs = (CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil)()
    assert (pixels.mean, pixels.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert (pixels.scale, pixels.resample) == (theirs.rescale_factor, int(theirs.resample))
    assert (theirs.do_resize, theirs.do_rescale, theirs.do_normalize) == (True, True, True)
    crops = bool(getattr(theirs, "do_center_crop", False))
    assert (pixels.crop, pixels.shortest_edge, pixels.stretch) == (crops, 20 if crops else 0, not crops)
    if kind == "clip":
        assert (pixels.mean, pixels.std) == (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
        assert pixels.mean == (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP, clip.py
    else:
        assert (pixels.mean, pixels.std) == (tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD))
    red = np.zeros((1, 1, 1, 3), np.uint8)
    red[..., 0] = 255
    of_red, of_black = pixels.numbers(red).ravel(), pixels.numbers(np.zeros_like(red)).ravel()
    mean, std = np.array(pixels.mean), np.array(pixels.std)
    np.testing.assert_allclose(of_red, (np.array([1, 0, 0]) - mean) / std, rtol=1e-6)
    np.testing.assert_allclose(of_black, -mean / std, rtol=1e-6)
