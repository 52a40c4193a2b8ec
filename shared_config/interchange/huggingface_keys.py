"""The keys of Hugging Face's config.json: what they may hold, what a `ModelConfig` can express, how they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from shared_config.interchange.huggingface_families import EXPERT_SETTINGS, FAMILIES, SIZES, Family
from shared_config.schema.model import EXPERT_FFN_MULTIPLE

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
    "embedding_multiplier": "a number",
    "attention_multiplier": "a number",
    "residual_multiplier": "a number",
    "logits_scaling": "a number",
    "tie_word_embeddings": "true or false",
    "hidden_act": "a string",
    "num_experts": POSITIVE,
    "num_local_experts": POSITIVE,
    "num_experts_per_tok": POSITIVE,
    "moe_intermediate_size": POSITIVE,
    "shared_expert_intermediate_size": POSITIVE,
    "qkv_bias": "true or false",
    "decoder_sparse_step": POSITIVE,
    "norm_topk_prob": "true or false",
    "router_aux_loss_coef": "a number",
    "mlp_only_layers": "a list",
    "is_causal": "true or false",
    "is_encoder_decoder": "true or false",
}
"""Keys that affect the function, and the JSON values that they hold."""

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
"""Rotary keys for which null means what leaving them out means."""

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

REFUSED = frozenset(["quantization_config", "per_layer_config"])
"""Keys that are refused unless they are null."""

WITHOUT_EFFECT = frozenset(
    (
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "router_jitter_noise",
        "transformers_version",
        "use_cache",
    )
)
"""Fields of transformers' classes that change nothing in the logits of a model that is not being trained."""


def family_in(content: Mapping[str, object]) -> Family:
    """The family that the content names."""
    return FAMILIES[model_type(content)]


def model_type(content: Mapping[str, object]) -> str:
    """The name of the family."""
    name = content["model_type"]
    assert isinstance(name, str)
    return name


def number(fields: Mapping[str, object], key: str, default: float | None = None) -> float:
    """A number of fields in which `wrong_kinds` finds nothing; ``default`` where it is left out or null."""
    value = fields.get(key)
    value = default if value is None else value
    assert isinstance(value, int | float)
    return value


def wrong_kinds(content: Mapping[str, object]) -> Iterator[str]:
    """Keys whose values are not of the JSON type that they have to be."""
    nullable = NULLABLE - family_in(content).not_null
    unread = {"sliding_window"} if family_in(content).windows is None else set()
    for key, kind in KINDS.items():
        if key not in content or key in unread or (content[key] is None and key in nullable):
            continue
        if not is_of_kind(kind, content[key]):
            needed = "a number" if key in _required(content) else kind
            yield f"{key} = {content[key]!r}: must be {needed}"
    for name in ("rope_scaling", "rope_parameters"):
        rope = content.get(name)
        if isinstance(rope, Mapping):
            yield from _wrong_rope_kinds(name, rope)
    layers = content.get("layer_types")
    if isinstance(layers, list) and not all(isinstance(kind, str) for kind in layers):
        yield f"layer_types = {layers!r}: must be a list of strings"


def _wrong_rope_kinds(name: str, rope: Mapping[str, object]) -> Iterator[str]:
    for key, value in rope.items():
        if isinstance(value, Mapping):
            yield f"{name}.{key} = {value!r}: must be no object; one setting for all layers"
        elif (
            key in ROPE_KINDS
            and not (value is None and key in ROPE_DEFAULTED)
            and not is_of_kind(ROPE_KINDS[key], value)
        ):
            yield f"{name}.{key} = {value!r}: must be {ROPE_KINDS[key]}"


def is_of_kind(kind: str, value: object) -> bool:
    """Whether a JSON value is what a description of `KINDS` says."""
    if kind == "true or false":
        return isinstance(value, bool)
    if kind in ("an object", "a list", "a string"):
        return isinstance(value, {"an object": Mapping, "a list": list, "a string": str}[kind])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == "a number":
        return math.isfinite(value)
    return isinstance(value, int) and (kind != POSITIVE or value > 0)


def _required(content: Mapping[str, object]) -> tuple[str, ...]:
    experts = family_in(content).experts
    if experts is None:
        return tuple(SIZES)
    shared = () if experts.shared is None else (experts.shared,)
    return tuple(dict.fromkeys((*SIZES, next(iter(EXPERT_SETTINGS)), experts.width, *shared)))


def missing_keys(content: Mapping[str, object]) -> Iterator[str]:
    """A line for each size that the content lacks."""
    for key in _required(content):
        if not isinstance(content.get(key), int):
            yield f"{key} = {content.get(key)!r}: must be a number"
    experts = family_in(content).experts
    if experts is not None and not isinstance(num_experts(content), int):
        yield f"num_experts = None: must be a number{' (or num_local_experts)' if experts.either else ''}"


def fixed_keys(content: Mapping[str, object]) -> Iterator[str]:
    """Keys that change what the model computes, with the one value that a `ModelConfig` expresses."""
    fixed: dict[str, object] = {
        "partial_rotary_factor": 1.0,
        "mlp_only_layers": [],
        "is_causal": True,
        "is_encoder_decoder": False,
    }
    fixed |= {**dict.fromkeys(sorted(REFUSED)), **family_in(content).refused}
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act = {content['hidden_act']!r}: must be 'silu', or 'swish', which is the same"
    fixed |= {key: False for key in ("attention_bias", "mlp_bias") if key not in family_in(content).settings}
    for key, needed in fixed.items():
        if content.get(key) is not None and content[key] != needed:
            yield f"{key} = {content[key]!r}: must be {needed!r}"
    experts = family_in(content).experts
    width = None if experts is None else content.get(experts.width)
    if isinstance(width, int) and width % EXPERT_FFN_MULTIPLE:
        yield f"width of an expert = {width}: must be a multiple of {EXPERT_FFN_MULTIPLE}"
    shared = None if experts is None or experts.shared is None else content.get(experts.shared)
    if experts is not None and isinstance(shared, int) and isinstance(width, int) and shared % width:
        yield f"{experts.shared} = {shared}: must be a multiple of {experts.width} = {width}"
    yield from _scaling_problems(rope_settings(content), family_in(content).rope_types)


def uneven_layers(content: Mapping[str, object]) -> Iterator[str]:
    """A `ModelConfig` has one window for all layers."""
    kinds, window, windows = layer_kinds(content), declared_window(content), family_in(content).windows
    if kinds is not None and len(kinds) != content.get("num_hidden_layers"):
        yield f"layer_types has {len(kinds)} entries: must be num_hidden_layers = {content.get('num_hidden_layers')}"
    elif kinds is not None and len(set(kinds)) > 1:
        yield f"layer_types = {kinds!r}: must be the same for all layers"
    elif kinds and kinds[0] not in ("full_attention", "sliding_attention"):
        yield f"layer_types = {kinds!r}: must be full_attention or sliding_attention"
    elif kinds and kinds[0] == "sliding_attention" and window is None:
        yield "layer_types: sliding_attention: must be full_attention, as there is no sliding_window"
    elif kinds and kinds[0] == "full_attention" and window and windows and not windows.listed:
        yield f"layer_types: full_attention: must be sliding_attention, as sliding_window = {window}"
    elif kinds is None and window and windows and windows.from_layer:
        first = number(content, "max_window_layers", 28)
        if 0 < first < number(content, "num_hidden_layers", 0):
            yield f"max_window_layers = {first}: must be 0 (every layer has the window) or at least num_hidden_layers"


def layer_kinds(content: Mapping[str, object]) -> list[str] | None:
    """The attention of each layer; None where the content does not list it."""
    kinds = content.get("layer_types")
    if not isinstance(kinds, list):
        return None
    return ["full_attention" if kind == "attention" else kind for kind in kinds]


def declared_window(content: Mapping[str, object]) -> int | None:
    """The window of the layers that have one."""
    family = family_in(content)
    if family.windows is None or (family.windows.switch and not content.get("use_sliding_window", False)):
        return None
    window = content.get("sliding_window", family.default("sliding_window"))
    return window if isinstance(window, int) else None


def num_experts(content: Mapping[str, object]) -> object:
    """Number of experts, under whichever of its two names, where both are read."""
    experts = family_in(content).experts
    if experts is None or not experts.either:
        return content.get("num_experts")
    return content.get("num_experts", content.get("num_local_experts"))


def rope_settings(content: Mapping[str, object]) -> Mapping[str, object]:
    """Rotary settings under their old name, or their new one (transformers 5); where both stand, the old one counts."""
    rope = content.get("rope_scaling") or content.get("rope_parameters")
    return rope if isinstance(rope, Mapping) else {}


def _scaling_problems(rope: Mapping[str, object], kinds: tuple[str, ...]) -> Iterator[str]:
    kind = rope_type(rope)
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


def rope_type(rope: Mapping[str, object]) -> object:
    """The kind of rotary scaling, under its old or new name."""
    return rope.get("rope_type", rope.get("type", "default"))
