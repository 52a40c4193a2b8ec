"""Hugging Face folders: names and settings both ways, refusals by name, and the function that transformers computes."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from shared_config.contract.parameters import parameter_table
from shared_config.contract.rope import attention_factor
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.huggingface import (
    from_huggingface,
    load_huggingface,
    name_map,
    save_huggingface,
    to_huggingface,
)
from shared_config.interchange.huggingface_config import config_from_huggingface, config_to_huggingface
from shared_config.interchange.huggingface_content import is_of_kind
from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.interchange.huggingface_keys import KINDS, NULLABLE, REFUSED, WITHOUT_EFFECT
from shared_config.interchange.huggingface_rope import ROPE_KINDS
from shared_config.interchange.weights import WeightsError, save_weights
from shared_config.parity.validation import validation_tokens, validation_weights
from shared_config.schema.base import from_fields
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.interchange.families import any_family, configs_of
from tests.interchange.theirs import CONFIG_CLASSES
from tests.oracle.transformer import transformer

SMALL: dict[str, Any] = {"dim": 20, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "vocab_size": 37}
SMALL |= {"ffn_hidden_dim": 48, "max_seq_len": 32}
EXPERTS = {"num_experts": 3, "moe_top_k": 2}

LAYER = {
    "layers.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
    "layers.0.attention.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    "layers.0.attention.k_proj.weight": "model.layers.0.self_attn.k_proj.weight",
    "layers.0.attention.v_proj.weight": "model.layers.0.self_attn.v_proj.weight",
    "layers.0.attention.o_proj.weight": "model.layers.0.self_attn.o_proj.weight",
    "layers.0.mlp_norm.weight": "model.layers.0.post_attention_layernorm.weight",
}
OUTER = {
    "token_embedding.embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output_head.proj.weight": "lm_head.weight",
}


def small(**fields: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **fields})


def state_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return validation_weights(parameter_table(config), seed=1)


@pytest.mark.parametrize(
    ("fields", "inner"),
    [
        ({}, {f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}),
        (
            {"qk_norm": True},
            {f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
            | {f"attention.{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"},
        ),
        (
            {"family": "phi3"},
            {f"mlp.{name}_proj.weight": "mlp.gate_up_proj.weight" for name in ("gate", "up")}
            | {"mlp.down_proj.weight": "mlp.down_proj.weight"}
            | {f"attention.{name}_proj.weight": "self_attn.qkv_proj.weight" for name in "qkv"},
        ),
        (
            EXPERTS,
            {"mlp.router.gate.weight": "block_sparse_moe.gate.weight"}
            | {
                f"mlp.experts.{e}.{name}_proj.weight": f"block_sparse_moe.experts.{e}.{foreign}.weight"
                for name, foreign in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
                for e in range(3)
            },
        ),
        (
            {**EXPERTS, "qk_norm": True},
            {"mlp.router.gate.weight": "mlp.gate.weight"}
            | {
                f"mlp.experts.{e}.{name}_proj.weight": f"mlp.experts.{e}.{name}_proj.weight"
                for name in ("gate", "up", "down")
                for e in range(3)
            }
            | {f"attention.{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"},
        ),
    ],
    ids=["llama", "qwen3", "phi3", "mixtral", "qwen3_moe"],
)
def test_every_tensor_has_the_name_that_hugging_face_gives_it(fields, inner):
    below = {f"layers.0.{name}": f"model.layers.0.{foreign}" for name, foreign in inner.items()}
    assert name_map(small(n_layers=1, **fields)) == OUTER | LAYER | below


@given(config=any_family)
def test_weights_go_there_and_back(config):
    state = state_of(config)
    foreign = to_huggingface(state, config)
    assert set(foreign) == set(name_map(config).values())
    back = from_huggingface(foreign, config)
    assert list(back) == list(state)
    assert all(np.array_equal(back[name], state[name]) for name in state)


@given(config=st.sampled_from(["mixtral", "qwen3_moe"]).flatmap(functools.partial(configs_of, moe_packed_experts=True)))
def test_packed_experts_are_the_transposes_of_the_unpacked(config):
    state = state_of(config)
    unpacked = from_huggingface(to_huggingface(state, config), config.replace(moe_packed_experts=False))
    for name in (name for name in state if name.endswith("_w")):
        module, _, packed = name.rpartition(".")
        for expert, matrix in enumerate(state[name]):
            projection = packed.replace("_w", "_proj")
            assert np.array_equal(unpacked[f"{module}.experts.{expert}.{projection}.weight"], matrix.T)


@given(config=any_family)
def test_settings_go_there_and_back(config):
    back = from_fields(ModelConfig, config_from_huggingface(json.loads(json.dumps(config_to_huggingface(config)))))
    assert parameter_table(back) == parameter_table(config.replace(moe_packed_experts=False))
    same = ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_seq_len", "init_std", "norm_eps"]
    same += ["rope_theta", "rope_scaling", "sliding_window", "attention_bias", "tie_embeddings", "qk_norm", "family"]
    if config.is_moe:
        same += ["num_experts", "moe_top_k", "moe_frequency", "moe_norm_topk_prob", "moe_aux_loss_weight"]
    assert {name: getattr(back, name) for name in same} == {name: getattr(config, name) for name in same}


FOLDERS: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "mixtral", **EXPERTS, "moe_packed_experts": True},
    {"family": "mistral", "tie_embeddings": True},
]


@pytest.mark.parametrize("fields", FOLDERS)
def test_a_folder_goes_there_and_back(tmp_path, fields):
    config = small(**fields)
    state = state_of(config)
    files = save_huggingface(tmp_path, state, config, max_shard_bytes=4000)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    assert len(files) > 3
    packed = {"moe_packed_experts": config.moe_packed_experts}
    read_config, read = load_huggingface(tmp_path, **packed)
    assert read_config.replace(moe_aux_loss_weight=0.5) == config.replace(moe_aux_loss_weight=0.5)
    assert all(np.array_equal(read[name], state[name]) for name in state)


def test_misfits_are_named_as_in_the_folder():
    config = small()
    foreign = to_huggingface(state_of(config), config)
    del foreign["model.layers.1.self_attn.q_proj.weight"]
    foreign["model.norm.weight"] = np.ones(3)
    foreign["model.layers.0.self_attn.q_proj.weight_scale"] = np.ones(3)
    with pytest.raises(WeightsError) as caught:
        from_huggingface(foreign, config)
    assert str(caught.value).startswith("Hugging Face weights: ")
    assert caught.value.problems == (
        "model.layers.1.self_attn.q_proj.weight: missing, the model has it with shape (24, 20)",
        "model.norm.weight: shape (3,), the model needs (20,)",
        "model.layers.0.self_attn.q_proj.weight_scale: extra, the model has no such tensor",
    )
    with pytest.raises(WeightsError, match=r"norm\.weight: missing"):
        to_huggingface({name: array for name, array in state_of(config).items() if name != "norm.weight"}, config)


def test_rotary_tables_and_a_tied_head_are_left_out():
    config = small(tie_embeddings=True)
    foreign = to_huggingface(state_of(config), config)
    assert "lm_head.weight" not in foreign
    extended = foreign | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3),
        "lm_head.weight": foreign["model.embed_tokens.weight"],
    }
    assert from_huggingface(extended, config).keys() == parameter_table(config).keys()
    extended["lm_head.weight"] = extended["lm_head.weight"] + 1
    with pytest.raises(WeightsError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        from_huggingface(extended, config)


def test_settings_that_no_architecture_expresses_are_all_named():
    config = small(**EXPERTS, activation="gelu", norm_type="layernorm", moe_router="sigmoid_topk")
    config = config.replace(moe_shared_experts=1, moe_capacity_factor=1.5, moe_routed_scaling=2.0, attention_bias=True)
    config = config.replace(moe_norm_topk_prob=False, moe_frequency=2)
    with pytest.raises(ConfigError) as caught:
        config_to_huggingface(config)
    named = {problem.split(" = ")[0].removeprefix("model.") for problem in caught.value.problems}
    assert named == {
        "activation",
        "norm_type",
        "moe_router",
        "moe_shared_experts",
        "moe_capacity_factor",
        "moe_routed_scaling",
        "moe_norm_topk_prob",
        "moe_frequency",
        "attention_bias",
    }


def foreign_config(model_type: str, **changes: Any) -> dict[str, Any]:
    content = {"model_type": model_type, "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48}
    content |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    content |= {"pad_token_id": None} if model_type in ("phi3", "smollm3") else {}
    if model_type in ("mixtral", "qwen3_moe", "qwen2_moe"):
        content |= {"shared_expert_intermediate_size": 64, "num_experts": 4} if model_type == "qwen2_moe" else {}
        content |= {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return content | changes


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma3", {}, f"model_type = 'gemma3': must be one of {', '.join(FAMILIES)}"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu': must be 'gelu_pytorch_tanh'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: must be False"),
        ("gemma3_text", {"query_pre_attn_scalar": 2.5}, "query_pre_attn_scalar = 2.5: must be a positive integer"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
        ("mistral", {"mlp_bias": True}, "mlp_bias = True: must be False"),
        ("llama", {"hidden_size": None}, "hidden_size = None: must be a number"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: must be None"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic': must be one of"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope factor = None: must be a number"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: must be 1.0"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: must be 1.0"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "rope truncate = False"),
        ("mistral", {"attention_bias": True}, "attention_bias = True: must be False"),
        ("llama", {"is_causal": False}, "is_causal = False: must be True"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries: must be num_hidden_layers = 2"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one setting for all layers"),
        ("llama", {"per_layer_config": {"0": {}}}, "per_layer_config = .*: must be None"),
        ("mixtral", {"intermediate_size": 50}, "width of an expert = 50: must be a multiple of 16"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts = None: must be a positive integer"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "must be the same for all layers"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "there is no sliding_window"),
        ("olmo3", {"sliding_window": None}, "there is no sliding_window"),
        ("olmo3", {"rope_parameters": {"rope_theta": 9.0}}, r"rope_theta = 9\.0: must be within full_attention or"),
        ("olmo3", {"rope_parameters": {"full_attention": 3}}, r"full_attention = 3: must be an object"),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            r"sliding_attention\.rope_type = 'linear': must be 'default'",
        ),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers = \[1\]: must be a 0 or 1 for each of 2 layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers = \[1, 2\]: must be a 0 or 1 for each of 2 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "must be full_attention or sliding_attention"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_type = 'longrope': must be one of default"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type = 'yarn': must be one of default"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75: must be 1.0"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window = True: must be False"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 50}, "shared_expert_intermediate_size = 50: must be a mult"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]: must be \[\]"),
        ("qwen3_moe", {"moe_intermediate_size": 50}, "width of an expert = 50"),
    ],
)
def test_what_a_config_can_not_express_is_refused_by_name(model_type, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_huggingface(foreign_config(model_type, **changes))


def test_both_spellings_of_rotary_settings_are_read():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    old = foreign_config("llama", rope_theta=500000, rope_scaling=scaling)
    new = foreign_config("llama", rope_parameters={"rope_theta": 500000.0, **scaling})
    fields = config_from_huggingface(old)
    assert fields == config_from_huggingface(new)
    config = from_fields(ModelConfig, fields)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(type="llama3", factor=8.0, original_max_seq_len=8192)


@pytest.mark.parametrize(
    ("given_factors", "expected"),
    [
        ({}, 0.1 * np.log(4.0) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * np.log(4.0) + 1) / (0.1 * np.log(4.0) + 1)),
    ],
)
def test_yarn_keeps_its_attention_factor(given_factors, expected):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **given_factors}
    config = from_fields(ModelConfig, config_from_huggingface(foreign_config("qwen3", rope_scaling=scaling)))
    assert attention_factor(config.rope_scaling) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("llama", {"sliding_window": 8}, None),
        ("mistral", {"sliding_window": 8}, 8),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {}, 4096),
        ("mistral", {"layer_types": ["full_attention"] * 2}, None),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}, 4096),
        ("mixtral", {}, None),
        ("qwen3", {"sliding_window": 8}, None),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True}, None),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 8),
        ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}, 8),
    ],
)
def test_a_window_is_read_where_it_acts(model_type, changes, window):
    assert config_from_huggingface(foreign_config(model_type, **changes))["sliding_window"] == window


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"model_type": "llama"}'])
def test_a_broken_config_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: "):
        load_huggingface(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
    save_weights(tmp_path, {"a": np.ones(3)})
    with pytest.raises(UserError, match=r"config\.json: can't be read: No such file"):
        load_huggingface(tmp_path)


LINEAR = {"type": "linear", "factor": 2.0}
CLASSES = {name: f"{one.architecture.removesuffix('ForCausalLM')}Config" for name, one in FAMILIES.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_transformers_is_decided_about(name):
    transformers = pytest.importorskip("transformers")
    config_class = CONFIG_CLASSES.get(name, CLASSES[name])
    fields = {field.name for field in dataclasses.fields(getattr(transformers, config_class))}
    decided = (KINDS.keys(), REFUSED, WITHOUT_EFFECT)
    assert fields - frozenset().union(*decided) == set()
    assert not KINDS.keys() & WITHOUT_EFFECT


@pytest.mark.parametrize("model_type", FAMILIES)
@given(key=st.sampled_from([*KINDS, "quantization_config", "attention_dropout"]), data=st.data())
def test_values_of_any_kind_are_read_or_named(model_type, key, data):
    """Never anything but a config or its problems, each naming a field."""
    leaf = st.one_of(st.none(), st.booleans(), st.integers(-2, 40), st.floats(), st.text(max_size=3))
    nested = st.dictionaries(st.sampled_from([*ROPE_KINDS, "rope_type", "type", "truncate"]), leaf, max_size=4)
    value = data.draw(st.one_of(leaf, st.lists(leaf, max_size=3), nested))
    problems: tuple[str, ...] = ()
    try:
        config = from_fields(ModelConfig, config_from_huggingface(foreign_config(model_type, **{key: value})))
    except ConfigError as error:
        problems = error.problems
    else:
        assert parameter_table(config)
    assert all(problem.split() for problem in problems)


@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize("value", [[], {}, "7", True, 1.5, None])
def test_a_value_of_the_wrong_type_is_one_problem(key, value):
    if (
        (value is None and key in NULLABLE - FAMILIES["qwen3_moe"].not_null)
        or is_of_kind(KINDS[key], value)
        or key == "hidden_act"
    ):
        return
    with pytest.raises(ConfigError) as caught:
        config_from_huggingface(foreign_config("qwen3_moe", **{key: value}))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{key} = {value!r}: must be ")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"attention_dropout": 0.1},
        {"attn_implementation": "eager", "pretraining_tp": 2, "use_cache": False},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}, "rope_theta": 40.0},
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 40.0},
        {"sliding_window": 3},
        {"sliding_window": 3, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2},
        {"num_key_value_heads": None, "rms_norm_eps": 1e-3},
        {"head_dim": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_settings_are_read_as_transformers_reads_them(tmp_path, monkeypatch, model_type, changes):
    """Logits of the folder in transformers; what is refused here is not compared."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    content = foreign_config(model_type, max_position_embeddings=32, **changes)
    try:
        config = from_fields(ModelConfig, config_from_huggingface(content))
    except ConfigError:
        refused = {"layer_types"} | ({"use_sliding_window"} if model_type == "qwen2_moe" else set())
        refused |= {"num_key_value_heads", "head_dim"} if model_type.startswith("gemma") else set()
        refused |= {"hidden_act"} if model_type == "gemma" else set()
        refused |= {"rope_scaling"} if model_type == "phi3" else set()
        refused |= {"rope_parameters"} if FAMILIES[model_type].rope_by_kind else set()
        assert None in changes.values() or refused & changes.keys()
        return
    state = {name: array.astype(np.float64) for name, array in state_of(config).items()}
    save_weights(tmp_path, to_huggingface(state, config))
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    if config.is_moe:
        model.set_experts_implementation("eager")
    tokens = validation_tokens(config.vocab_size, 2, 11, seed=1)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    expected = transformer(state, config, tokens).logits
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


ARCHITECTURES = {
    "llama": {"attention_bias": True, "family": "llama"},
    "llama-linear": {"rope_scaling": RopeScaling(type="linear", factor=2.0), "family": "llama"},
    "llama3": {"rope_scaling": RopeScaling(type="llama3", factor=8.0, original_max_seq_len=16), "family": "llama"},
    "llama-yarn": {
        "rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_seq_len=8),
        "head_dim": 16,
        "family": "llama",
    },
    "mistral": {"sliding_window": 3, "family": "mistral"},
    "mistral-no-window": {"family": "mistral"},
    "qwen3": {"qk_norm": True, "tie_embeddings": True, "norm_eps": 1e-2, "family": "qwen3"},
    "qwen3-window": {"qk_norm": True, "sliding_window": 3, "family": "qwen3"},
    "mixtral": {**EXPERTS, "family": "mixtral"},
    "olmo3": {
        "qk_norm": True,
        "qk_norm_over": "width",
        "norm_placement": "after",
        "sliding_window": 3,
        "family": "olmo3",
        "attention_pattern": ("window", "full"),
        "window_rope_theta": 50.0,
        "window_rope_scaled": False,
        "rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_seq_len=8),
    },
    "smollm3": {
        "sliding_window": 3,
        "attention_pattern": ("window", "full_nope"),
        "tie_embeddings": True,
        "family": "smollm3",
    },
    "qwen3_moe": {
        **EXPERTS,
        "qk_norm": True,
        "moe_norm_topk_prob": False,
        "moe_frequency": 2,
        "family": "qwen3_moe",
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_computes_the_same_function(tmp_path, monkeypatch, name):
    """Written here, run there; saved again there, read here: logits in float64 agree with the NumPy specification."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = small(**ARCHITECTURES[name])
    state = {name: array.astype(np.float64) for name, array in state_of(config).items()}
    tokens = validation_tokens(config.vocab_size, 2, 11, seed=1)
    save_huggingface(tmp_path / "ours", state, config, max_shard_bytes=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float64, attn_implementation="eager"
    )
    if config.is_moe:
        model.set_experts_implementation("eager")  # their grouped product has no float64
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    expected = transformer(state, config, tokens).logits
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()  # their softmax and tables are float32
    model.save_pretrained(tmp_path / "theirs")
    back_config, back = load_huggingface(tmp_path / "theirs")
    assert (back_config.family, type(model).__name__) == (config.family, FAMILIES[config.family or ""].architecture)
    assert parameter_table(back_config) == parameter_table(config)
    assert all(np.array_equal(back[name], state[name]) for name in state)
    assert np.array_equal(transformer(back, back_config, tokens).logits, expected)
