"""Hugging Face folders (config.json and safetensors) of Llama, Mistral, Mixtral, Qwen3 and Qwen3-MoE models.

The two sides name the same tensors differently; orientation (out, in) and the rotation of head halves are equal, so
values are never changed. Packed experts are the one exception: Hugging Face stores one (out, in) matrix per expert.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.contract.parameters import EMBEDDING, ParameterTable, aliases, parameter_table
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.files import PathLike, written_aside
from shared_config.interchange.reading import MAX_JSON_BYTES, parse_json, read_bytes
from shared_config.interchange.states import check_tied, host_array, plain_state
from shared_config.interchange.tokens import copy_tokenizer, special_ids
from shared_config.interchange.weights import WeightsError, check_tensors, load_weights, save_weights
from shared_config.schema.model import EXPERT_FFN_MULTIPLE, ModelConfig, RopeScaling

CONFIG = "config.json"
HEAD = "lm_head.weight"
ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""Tables that old checkpoints carry along; they follow from the config."""

PACKED = {"gate_w": "gate_proj", "up_w": "up_proj", "down_w": "down_proj"}
MODULES = {"token_embedding.embedding.": "model.embed_tokens.", "norm.": "model.norm.", "output_head.proj.": "lm_head."}
LAYER_MODULES = {
    "attention_norm.": "input_layernorm.",
    "attention.": "self_attn.",
    "mlp_norm.": "post_attention_layernorm.",
    "mlp.router.gate.": "mlp.gate.",
    "mlp.": "mlp.",
}
MIXTRAL_MODULES = LAYER_MODULES | {"mlp.router.gate.": "block_sparse_moe.gate.", "mlp.": "block_sparse_moe."}
MIXTRAL_PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class Family:
    """What one Hugging Face architecture can express beyond the common ground, and its defaults of absent keys."""

    architecture: str
    qk_norm: bool = False
    attention_bias: bool = False
    experts: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    head_dim: int | None = None
    kv_heads: int | None = None
    max_seq_len: int = 32768


FAMILIES = {
    "llama": Family("LlamaForCausalLM", attention_bias=True, max_seq_len=2048),
    "mistral": Family("MistralForCausalLM", kv_heads=8, max_seq_len=131072),
    "mixtral": Family(
        "MixtralForCausalLM", experts=True, norm_eps=1e-5, rope_theta=1e6, kv_heads=8, max_seq_len=131072
    ),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, attention_bias=True, head_dim=128, kv_heads=32),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, attention_bias=True, experts=True, kv_heads=4),
}


POSITIVE = "a positive integer"
KINDS = {
    "vocab_size": POSITIVE,
    "hidden_size": POSITIVE,
    "intermediate_size": POSITIVE,
    "num_hidden_layers": POSITIVE,
    "num_attention_heads": POSITIVE,
    "num_key_value_heads": POSITIVE,
    "head_dim": POSITIVE,
    "max_position_embeddings": POSITIVE,
    "initializer_range": "a number",
    "rms_norm_eps": "a number",
    "rope_theta": "a number",
    "rope_parameters": "an object",
    "rope_scaling": "an object",
    "original_max_position_embeddings": POSITIVE,
    "partial_rotary_factor": "a number",
    "sliding_window": POSITIVE,
    "use_sliding_window": "true or false",
    "max_window_layers": "an integer",
    "layer_types": "a list",
    "attention_bias": "true or false",
    "mlp_bias": "true or false",
    "tie_word_embeddings": "true or false",
    "hidden_act": "a string",
    "num_experts": POSITIVE,
    "num_local_experts": POSITIVE,
    "num_experts_per_tok": POSITIVE,
    "moe_intermediate_size": POSITIVE,
    "decoder_sparse_step": POSITIVE,
    "norm_topk_prob": "true or false",
    "router_aux_loss_coef": "a number",
    "mlp_only_layers": "a list",
    "is_causal": "true or false",
    "is_encoder_decoder": "true or false",
}
"""Keys that bear on the function, and the JSON values that they hold."""

ROPE_KINDS = {
    "rope_theta": "a number",
    "factor": "a number",
    "original_max_position_embeddings": POSITIVE,
    "low_freq_factor": "a number",
    "high_freq_factor": "a number",
    "beta_fast": "a number",
    "beta_slow": "a number",
    "attention_factor": "a number",
    "mscale": "a number",
    "mscale_all_dim": "a number",
    "partial_rotary_factor": "a number",
}
ROPE_DEFAULTED = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
ROPE_DEFAULTED += ("mscale", "mscale_all_dim", "partial_rotary_factor", "factor")
NULLABLE = frozenset(
    (
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
        "rope_scaling",
        "sliding_window",
        "layer_types",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "mlp_only_layers",
    )
)
NEVER_NULL = {
    "mistral": {"num_key_value_heads"},
    "mixtral": {"num_key_value_heads"},
    "qwen3": {"head_dim"},
    "qwen3_moe": {"num_key_value_heads", "head_dim"},
}
"""Keys of one family that may not be null, though others' may."""

REFUSED = frozenset(["quantization_config", "per_layer_config"])
"""Keys that are refused unless they are null."""

WITHOUT_EFFECT = frozenset(
    (
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_jitter_noise",
        "transformers_version",
        "use_cache",
    )
)
"""Fields of transformers' classes that change nothing in the logits of a model that is not being trained."""


def load_huggingface(folder: PathLike, **overrides: Any) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and weights (native names, memory-mapped) of a Hugging Face folder.

    Args:
        overrides: fields of `ModelConfig` that config.json doesn't decide, ``moe_packed_experts`` for one.
    """
    config = ModelConfig(**(read_huggingface_config(folder) | overrides))
    return config, from_huggingface(load_weights(folder), config)


def read_huggingface_config(folder: PathLike) -> dict[str, Any]:
    """Fields of `ModelConfig` from a folder's config.json.

    Raises:
        UserError: no such file, or no JSON.
        ConfigError: naming every key whose value a `ModelConfig` can't express.
    """
    path = Path(folder) / CONFIG
    text = read_bytes(path, MAX_JSON_BYTES)
    try:
        return config_from_huggingface(parse_json(text))
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}") from error


def save_huggingface(
    folder: PathLike, state: Mapping[str, Any], config: ModelConfig, tokenizer: Path | None = None, **options: Any
) -> list[Path]:
    """Write config.json and weights. Returns the files.

    Args:
        tokenizer: a folder whose tokenizer and special ids go along.
        options: those of `save_weights`.
    """
    ids = {} if tokenizer is None else special_ids(tokenizer)
    text = json.dumps(config_to_huggingface(config) | ids, indent=2) + "\n"
    files = save_weights(folder, to_huggingface(state, config), **options)
    files += [] if tokenizer is None else copy_tokenizer(tokenizer, Path(folder))
    path = Path(folder) / CONFIG
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return [*files, path]


# Weights


def from_huggingface(state: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The state under native names, in model order. Arrays are shared, except packed experts.

    Raises:
        ConfigError: if no Hugging Face architecture expresses the config.
        WeightsError: listing every missing, extra, misshapen or non-floating tensor by its Hugging Face name.
    """
    names = name_map(config)
    specs = _unpacked_table(config)
    state = {name: array for name, array in plain_state(state).items() if not name.endswith(ROTARY_BUFFER)}
    if config.tie_embeddings and HEAD in state:
        head = state.pop(HEAD)
        _check_tied(head, state.setdefault(names[EMBEDDING], head))
    check_tensors(state, {names[name]: spec for name, spec in specs.items()}, source="Hugging Face weights")
    unpacked = {name: state[foreign] for name, foreign in names.items()}
    return {name: unpacked[name] if name in unpacked else _pack(unpacked, name) for name in parameter_table(config)}


def to_huggingface(state: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The state (what `plain_state` accepts) under Hugging Face's names. Arrays are shared; packed experts become
    transposed views.

    Raises:
        ConfigError: if no Hugging Face architecture expresses the config.
        WeightsError: if the state isn't exactly what the config needs.
    """
    names = name_map(config)
    state = plain_state(state)
    tied = {alias: name for alias, name in aliases(config).items() if alias in state}
    check_tied(state, tied)
    state = {name: array for name, array in state.items() if name not in tied}
    check_tensors(state, parameter_table(config), source="native weights")
    return {foreign: state[name] if name in state else _unpack(state, name) for name, foreign in names.items()}


def name_map(config: ModelConfig) -> dict[str, str]:
    """Native name -> Hugging Face name of every tensor, in model order; experts stand one by one, packed or not."""
    family = family_of(config)
    return {name: _foreign_name(name, family) for name in _unpacked_table(config)}


def _unpacked_table(config: ModelConfig) -> ParameterTable:
    return parameter_table(config.replace(moe_packed_experts=False))


def _foreign_name(name: str, family: str) -> str:
    if not name.startswith("layers."):
        return _replaced(name, MODULES)
    _, layer, rest = name.split(".", 2)
    if family != "mixtral":
        return f"model.layers.{layer}.{_replaced(rest, LAYER_MODULES)}"
    parts = _replaced(rest, MIXTRAL_MODULES).split(".")
    return ".".join(["model.layers", layer, *(MIXTRAL_PROJECTIONS.get(part, part) for part in parts)])


def _replaced(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with the first matching prefix exchanged."""
    native = next(prefix for prefix in prefixes if name.startswith(prefix))
    return prefixes[native] + name.removeprefix(native)


def _pack(state: Mapping[str, Any], name: str) -> np.ndarray:
    """layers.0.mlp.gate_w (expert, in, out) from layers.0.mlp.experts.{e}.gate_proj.weight (out, in)."""
    module, _, packed = name.rpartition(".")
    experts = []
    while (expert := f"{module}.experts.{len(experts)}.{PACKED[packed]}.weight") in state:
        experts.append(host_array(expert, state[expert]).T)
    return np.stack(experts)


def _unpack(state: Mapping[str, Any], name: str) -> Any:
    """layers.0.mlp.experts.3.gate_proj.weight from layers.0.mlp.gate_w."""
    module, _, expert = name.partition(".experts.")
    number, projection, _ = expert.split(".")
    packed = next(packed for packed, unpacked in PACKED.items() if unpacked == projection)
    return state[f"{module}.{packed}"][int(number)].T


def _check_tied(head: Any, embedding: Any) -> None:
    if not np.array_equal(host_array(HEAD, head), host_array(EMBEDDING, embedding)):
        problem = f"{HEAD}: differs from model.embed_tokens.weight, though tie_word_embeddings is true"
        raise WeightsError("Hugging Face weights", [problem])


# Configs


def family_of(config: ModelConfig) -> str:
    """The ``model_type`` that expresses a config.

    Raises:
        ConfigError: naming every setting that none expresses.
    """
    if config.is_moe:
        family = "qwen3_moe" if config.qk_norm else "mixtral"
    elif config.qk_norm:
        family = "qwen3"
    else:
        family = "mistral" if config.sliding_window is not None else "llama"
    problems = list(_not_expressed(config, family))
    if problems:
        raise ConfigError(problems)
    return family


def _not_expressed(config: ModelConfig, family: str) -> Iterator[str]:
    fixed: dict[str, Any] = {"model_type": "transformer", "activation": "silu", "norm_type": "rmsnorm"}
    if config.is_moe:
        fixed |= {"moe_router": "softmax_topk", "moe_shared_experts": 0, "moe_capacity_factor": 0.0}
        fixed |= {"moe_routed_scaling": 1.0}
    if family == "mixtral":
        fixed |= {"moe_norm_topk_prob": True, "moe_frequency": 1}
    if not FAMILIES[family].attention_bias:
        fixed |= {"attention_bias": False}
    for field, needed in fixed.items():
        value = getattr(config, field)
        if value != needed:
            yield f"model.{field} = {value!r}: Hugging Face's {family} has no such setting: must be {needed!r}"


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ConfigError: naming every setting that no Hugging Face architecture expresses.
    """
    family = family_of(config)
    content: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.computed_ffn_hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_huggingface(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "llama":
        content |= {"mlp_bias": False}
    else:
        content |= {"sliding_window": config.sliding_window}
    if family.startswith("qwen3"):
        content |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return content | _experts_to_huggingface(config, family)


def _experts_to_huggingface(config: ModelConfig, family: str) -> dict[str, Any]:
    if not config.is_moe:
        return {}
    width = config.computed_expert_ffn_hidden_dim
    content = {"num_experts_per_tok": config.moe_top_k, "router_aux_loss_coef": config.moe_aux_loss_weight}
    if family == "mixtral":
        return content | {"num_local_experts": config.num_experts, "intermediate_size": width}
    return content | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": width,
        "decoder_sparse_step": config.moe_frequency,
        "mlp_only_layers": [],
        "norm_topk_prob": config.moe_norm_topk_prob,
    }


def _scaling_to_huggingface(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.type == "none":
        return None
    content: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.original_max_seq_len is not None:
        content |= {"original_max_position_embeddings": scaling.original_max_seq_len}
    if scaling.type == "llama3":
        content |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        content |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        content |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return content


def config_from_huggingface(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` from the content of config.json.

    Raises:
        ConfigError: naming every key whose value a `ModelConfig` can't express.
    """
    if not isinstance(content, Mapping) or content.get("model_type") not in tuple(FAMILIES):
        found = content.get("model_type") if isinstance(content, Mapping) else content
        raise ConfigError([f"model_type = {found!r}: must be one of {', '.join(FAMILIES)}"])
    problems = list(_wrong_kinds(content)) or [*_missing_keys(content), *_fixed_keys(content), *_uneven_layers(content)]
    if problems:
        raise ConfigError(problems)
    family = FAMILIES[content["model_type"]]
    heads = content["num_attention_heads"]
    fields = {
        "vocab_size": content["vocab_size"],
        "dim": content["hidden_size"],
        "n_layers": content["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": content.get("num_key_value_heads", family.kv_heads) or heads,
        "head_dim": content.get("head_dim", family.head_dim) or content["hidden_size"] // heads,
        "ffn_hidden_dim": content["intermediate_size"],
        "max_seq_len": content.get("max_position_embeddings", family.max_seq_len),
        "init_std": content.get("initializer_range", 0.02),
        "norm_type": "rmsnorm",
        "norm_eps": content.get("rms_norm_eps", family.norm_eps),
        "activation": "silu",
        "rope_theta": float(_rope(content).get("rope_theta", content.get("rope_theta", family.rope_theta))),
        "rope_scaling": _scaling_from_huggingface(content),
        "sliding_window": _window(content),
        "attention_bias": content.get("attention_bias", False),
        "tie_embeddings": content.get("tie_word_embeddings", False),
        "qk_norm": family.qk_norm,
    }
    return fields | (_experts_from_huggingface(content) if family.experts else {})


def _wrong_kinds(content: Mapping[str, Any]) -> Iterator[str]:
    """Keys whose values are not of the JSON type that they have to be."""
    nullable = NULLABLE - NEVER_NULL.get(content["model_type"], set())
    for key, kind in KINDS.items():
        if key not in content or (content[key] is None and key in nullable):
            continue
        if not is_of_kind(kind, content[key]):
            needed = "a number" if key in _required(content) else kind
            yield f"{key} = {content[key]!r}: must be {needed}"
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(content.get(name), Mapping):
            yield from _wrong_rope_kinds(name, content[name])
    layers = content.get("layer_types")
    if isinstance(layers, list) and not all(isinstance(kind, str) for kind in layers):
        yield f"layer_types = {layers!r}: must be a list of strings"


def _wrong_rope_kinds(name: str, rope: Mapping[str, Any]) -> Iterator[str]:
    for key, value in rope.items():
        if isinstance(value, Mapping):
            yield f"{name}.{key} = {value!r}: must be no object; one setting for all layers"
        elif (
            key in ROPE_KINDS
            and not (value is None and key in ROPE_DEFAULTED)
            and not is_of_kind(ROPE_KINDS[key], value)
        ):
            yield f"{name}.{key} = {value!r}: must be {ROPE_KINDS[key]}"


def is_of_kind(kind: str, value: Any) -> bool:
    """Whether a JSON value is what a description of `KINDS` says."""
    if kind == "true or false":
        return isinstance(value, bool)
    if kind in ("an object", "a list", "a string"):
        return isinstance(value, {"an object": Mapping, "a list": list, "a string": str}[kind])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "a number":
        return number and math.isfinite(value)
    return number and isinstance(value, int) and (kind != POSITIVE or value > 0)


def _required(content: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    needed = {"mixtral": ("num_experts_per_tok",), "qwen3_moe": ("num_experts_per_tok", "moe_intermediate_size")}
    return (*sizes, *needed.get(content["model_type"], ()))


def _missing_keys(content: Mapping[str, Any]) -> Iterator[str]:
    for key in _required(content):
        if not isinstance(content.get(key), int):
            yield f"{key} = {content.get(key)!r}: must be a number"
    if FAMILIES[content["model_type"]].experts and not isinstance(_num_experts(content), int):
        yield "num_experts = None: must be a number (or num_local_experts)"


def _fixed_keys(content: Mapping[str, Any]) -> Iterator[str]:
    """Keys that change what the model computes, with the one value that a `ModelConfig` expresses."""
    fixed: dict[str, Any] = {
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "mlp_only_layers": [],
        "is_causal": True,
        "is_encoder_decoder": False,
    }
    fixed |= dict.fromkeys(REFUSED)
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act = {content['hidden_act']!r}: must be 'silu', or 'swish', which is the same"
    if not FAMILIES[content["model_type"]].attention_bias:
        fixed |= {"attention_bias": False}
    for key, needed in fixed.items():
        if content.get(key) is not None and content[key] != needed:
            yield f"{key} = {content[key]!r}: must be {needed!r}"
    width = content.get("intermediate_size" if content["model_type"] == "mixtral" else "moe_intermediate_size")
    if FAMILIES[content["model_type"]].experts and isinstance(width, int) and width % EXPERT_FFN_MULTIPLE:
        yield f"width of an expert = {width}: must be a multiple of {EXPERT_FFN_MULTIPLE}"
    yield from _scaling_problems(_rope(content))


def _uneven_layers(content: Mapping[str, Any]) -> Iterator[str]:
    """A `ModelConfig` has one window for all layers."""
    kinds, window = _layer_kinds(content), _declared_window(content)
    if kinds is not None and len(kinds) != content.get("num_hidden_layers"):
        yield f"layer_types has {len(kinds)} entries: must be num_hidden_layers = {content.get('num_hidden_layers')}"
    elif kinds is not None and len(set(kinds)) > 1:
        yield f"layer_types = {kinds!r}: must be the same for all layers"
    elif kinds and kinds[0] not in ("full_attention", "sliding_attention"):
        yield f"layer_types = {kinds!r}: must be full_attention or sliding_attention"
    elif kinds and kinds[0] == "sliding_attention" and window is None:
        yield "layer_types: sliding_attention: must be full_attention, as there is no sliding_window"
    elif kinds and kinds[0] == "full_attention" and window and content["model_type"] in ("mixtral", "qwen3_moe"):
        yield f"layer_types: full_attention: must be sliding_attention, as sliding_window = {window}"
    elif kinds is None and content["model_type"] == "qwen3" and window:
        first = content.get("max_window_layers", 28)
        if 0 < first < content.get("num_hidden_layers", 0):
            yield f"max_window_layers = {first}: must be 0 (every layer has the window) or at least num_hidden_layers"


def _layer_kinds(content: Mapping[str, Any]) -> list[str] | None:
    kinds = content.get("layer_types")
    return None if kinds is None else ["full_attention" if kind == "attention" else kind for kind in kinds]


def _declared_window(content: Mapping[str, Any]) -> int | None:
    """The window of the layers that have one."""
    if content["model_type"] == "llama":
        return None
    if content["model_type"].startswith("qwen3") and not content.get("use_sliding_window", False):
        return None
    return content.get("sliding_window", 4096 if content["model_type"] != "mixtral" else None)


def _window(content: Mapping[str, Any]) -> int | None:
    """Mistral's layer_types are read as transformers does, which takes such a model for a Ministral."""
    kinds = _layer_kinds(content)
    if kinds is None and content["model_type"] == "qwen3":
        first = content.get("max_window_layers", 28)
        kinds = ["sliding_attention" if first <= 0 else "full_attention"]
    return None if kinds and kinds[0] == "full_attention" else _declared_window(content)


def _num_experts(content: Mapping[str, Any]) -> Any:
    return content.get("num_experts", content.get("num_local_experts"))


def _experts_from_huggingface(content: Mapping[str, Any]) -> dict[str, Any]:
    mixtral = content["model_type"] == "mixtral"
    return {
        "num_experts": _num_experts(content),
        "moe_top_k": content["num_experts_per_tok"],
        "moe_frequency": 1 if mixtral else content.get("decoder_sparse_step", 1),
        "moe_router": "softmax_topk",
        "moe_norm_topk_prob": True if mixtral else content.get("norm_topk_prob", False),
        "moe_aux_loss_weight": float(content.get("router_aux_loss_coef", 0.001)),
        "moe_expert_ffn_multiplier": (
            1.0 if mixtral else content["moe_intermediate_size"] / content["intermediate_size"]
        ),
    }


def _rope(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings under their old name, or their new one (transformers 5); where both stand, the old one counts."""
    return content.get("rope_scaling") or content.get("rope_parameters") or {}


def _scaling_problems(rope: Mapping[str, Any]) -> Iterator[str]:
    kinds = ("default", "linear", "llama3", "yarn")
    kind = _rope_type(rope)
    if kind not in kinds:
        yield f"rope_type = {kind!r}: must be one of {', '.join(kinds)}"
    elif kind != "default" and not isinstance(rope.get("factor"), int | float):
        yield f"rope factor = {rope.get('factor')!r}: must be a number"
    for name in ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ():
        if name not in rope:
            yield f"rope {name}: must be given with rope_type 'llama3'"
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        yield f"partial_rotary_factor = {rope['partial_rotary_factor']!r}: must be 1.0"
    if kind == "yarn" and rope.get("truncate", True) is not True:
        yield f"rope truncate = {rope['truncate']!r}: must be True"


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling_from_huggingface(content: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope(content)
    kind = _rope_type(rope)
    if kind == "default":
        return {"type": "none"}
    fields: dict[str, Any] = {"type": kind, "factor": float(rope["factor"])}
    if kind == "linear":
        return fields
    inner = rope.get("original_max_position_embeddings", content.get("max_position_embeddings"))
    fields |= {"original_max_seq_len": content.get("original_max_position_embeddings", inner)}
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return fields | {name: float(rope[name]) for name in names if name in rope}
    fields |= {name: float(rope[name]) for name in ("beta_fast", "beta_slow") if rope.get(name)}
    return fields | {"attention_factor": _yarn_attention_factor(rope)}


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float | None:
    """None for the factor of the paper, 0.1 ln(factor) + 1; DeepSeek's two scales give a ratio of such factors."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (numerator and denominator):
        return None
    growth = 0.1 * math.log(rope["factor"])
    return (numerator * growth + 1.0) / (denominator * growth + 1.0)
