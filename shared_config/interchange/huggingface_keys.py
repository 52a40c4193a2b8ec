"""The keys of Hugging Face's config.json: what they may hold, what a `ModelConfig` can express, how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shared_config.interchange.huggingface_content import POSITIVE, family_in, is_of_kind
from shared_config.interchange.huggingface_description import EXPERT_SETTINGS, SIZES
from shared_config.interchange.huggingface_rope import rope_problems, wrong_rope_kinds
from shared_config.schema.model import EXPERT_FFN_MULTIPLE

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
    "no_rope_layers": "a list",
    "no_rope_layer_interval": POSITIVE,
    "attention_bias": "true or false",
    "mlp_bias": "true or false",
    "embedding_multiplier": "a number",
    "attention_multiplier": "a number",
    "residual_multiplier": "a number",
    "logits_scaling": "a number",
    "tie_word_embeddings": "true or false",
    "hidden_act": "a string",
    "hidden_activation": "a string",
    "query_pre_attn_scalar": "a positive integer",
    "attn_logit_softcapping": "a number",
    "final_logit_softcapping": "a number",
    "use_bidirectional_attention": "true or false",
    "rope_local_base_freq": "a number",
    "sliding_window_pattern": POSITIVE,
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

NULLABLE = frozenset(
    (
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
        "rope_scaling",
        "sliding_window",
        "layer_types",
        "no_rope_layers",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
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
    yield from wrong_rope_kinds(content)
    layers = content.get("layer_types")
    if isinstance(layers, list) and not all(isinstance(kind, str) for kind in layers):
        yield f"layer_types = {layers!r}: must be a list of strings"


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
    key, (name, *others) = family_in(content).activation
    if content.get(key, name) not in (name, *others):
        same = "".join(f", or {other!r}, which is the same" for other in others)
        yield f"{key} = {content[key]!r}: must be {name!r}{same}"
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
    yield from rope_problems(content)


def num_experts(content: Mapping[str, object]) -> object:
    """Number of experts, under whichever of its two names, where both are read."""
    experts = family_in(content).experts
    if experts is None or not experts.either:
        return content.get("num_experts")
    return content.get("num_experts", content.get("num_local_experts"))
