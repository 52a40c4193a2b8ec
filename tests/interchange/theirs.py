"""Small models of transformers' own classes, drawn: their configs, weights, and what they compute, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st

from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.interchange.weights import load_weights

VOCABULARY, POSITIONS = 37, 48

Choices = Mapping[str, tuple[Any, ...]]

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 60.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 50.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "rope_theta": 40.0}
DENSE: Choices = {
    "intermediate_size": (26, 40),
    "num_hidden_layers": (2, 3, 1),
    "rms_norm_eps": (1e-2, 1e-6),
    "tie_word_embeddings": (False, True),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 50.0}, LINEAR, LLAMA3, YARN),
}
WINDOW: Choices = {"sliding_window": (4, 3, None)}
EXPERTS: Choices = {"num_hidden_layers": (2, 3), "num_experts_per_tok": (2, 1, 3), "intermediate_size": (32, 48)}
QWEN2: Choices = {"use_sliding_window": (True, False), "sliding_window": (4, 3), "max_window_layers": (1, 0, 3)}
BIASES: Choices = {"attention_bias": (True, False)}
MLP_BIASES: Choices = {**BIASES, "mlp_bias": (True, False)}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
GRANITE: Choices = {
    "embedding_multiplier": (3.0, 0.5),
    "attention_multiplier": (0.3, 1),
    "residual_multiplier": (0.6,),
    "logits_scaling": (4.0, 7),
}
GEMMA: Choices = {
    "num_hidden_layers": (2, 3, 5), "sliding_window": (4, 3), "layer_types": (None, MIXED),
    "query_pre_attn_scalar": (3, 16),
}  # fmt: skip
BY_KIND = tuple(
    {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 90.0}}
    for full in (YARN, LINEAR, {"rope_type": "default", "rope_theta": 50.0})
)

OWN: Mapping[str, Choices] = {
    "llama": MLP_BIASES,
    "mistral": WINDOW,
    "mixtral": {**WINDOW, **EXPERTS, "num_local_experts": (4, 3)},
    "qwen2": QWEN2,
    "qwen3": {**BIASES, **QWEN2},
    "qwen3_moe": {
        **BIASES, **EXPERTS, "num_experts": (4, 3), "moe_intermediate_size": (16, 32), "norm_topk_prob": (True, False),
        "decoder_sparse_step": (1, 2), "use_sliding_window": (False,),
    },
    "olmo2": BIASES,
    "qwen2_moe": {
        **EXPERTS, "num_experts": (4, 3), "moe_intermediate_size": (16, 32), "norm_topk_prob": (True, False),
        "shared_expert_intermediate_size": (32, 64), "decoder_sparse_step": (1, 2), "qkv_bias": (True, False),
    },
    "phi3": {**WINDOW, "rope_parameters": ({"rope_type": "default", "rope_theta": 50.0},)},
    "granite": {**MLP_BIASES, **GRANITE},
    "smollm3": {
        **MLP_BIASES, "no_rope_layers": ([1, 0, 1], [0, 1, 1], None), "no_rope_layer_interval": (2, 4),
        "use_sliding_window": (True, False), "sliding_window": (4, 3), "layer_types": (None, MIXED),
    },
    "gemma": {**BIASES, "hidden_act": ("gelu_pytorch_tanh", "gelu")},
    "gemma2": {
        **BIASES, **GEMMA, "attn_logit_softcapping": (2.0, None), "final_logit_softcapping": (1.5, None),
    },
    "gemma3_text": {
        **BIASES, **GEMMA, "final_logit_softcapping": (None, 2.5),
        "num_hidden_layers": (7, 3), "rope_parameters": BY_KIND,
    },
    "olmo3": {
        **BIASES, "sliding_window": (4, 3), "layer_types": (MIXED, None), "num_hidden_layers": (2, 3, 5),
        "rope_parameters": BY_KIND,
    },
}  # fmt: skip
"""Keys of each family besides `DENSE`, and their values, the most telling first."""

CONFIG_CLASSES = {"gemma3_text": "Gemma3TextConfig"}
"""Where a family's is not called as its models are."""

WITH_HEAD_DIM = ("qwen3", "mixtral", "gemma", "gemma2", "gemma3_text")
"""Families whose class has another default of ``head_dim`` than follows, or whose YaRN needs to be told."""


@st.composite
def drawn_configs(draw: st.DrawFn, family: str) -> Any:
    """A config of transformers' class; keys are now and then left out."""
    kv_heads, group, head_dim = draw(st.sampled_from([(2, 2, 6), (1, 3, 4), (2, 1, 10), (3, 2, 4)]))
    heads = kv_heads * group
    own_width = draw(st.sampled_from([True, False]))
    fields: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    fields |= {"hidden_size": 24 if own_width else heads * head_dim} | ({"head_dim": head_dim} if own_width else {})
    fields |= {"hidden_size": 24, "head_dim": head_dim} if family in WITH_HEAD_DIM else {}
    for key, values in {**DENSE, **OWN[family]}.items():
        fields[key] = draw(st.sampled_from(values))
    if fields.get("layer_types"):
        told = fields.get("use_sliding_window", True)
        kinds = (fields["layer_types"] * 2)[: fields["num_hidden_layers"]]
        fields["layer_types"] = kinds if told else None
    fields |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # a row of padding has no gradient
    name = f"{FAMILIES[family].architecture.removesuffix('ForCausalLM')}Config"
    return getattr(transformers, CONFIG_CLASSES.get(family, name))(**fields)


def build(config: Any, seed: int) -> Any:
    """A model with weights in which nothing hides: fan-in matrices, norms that scale, biases that are not 0."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation") and "num_experts_per_tok" in config.to_dict():
        model.set_experts_implementation("eager")  # their grouped product has no float64
    rng = np.random.default_rng(seed)
    around = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                values = rng.standard_normal(parameter.shape) / np.sqrt(parameter.shape[-1])
            elif name.endswith("bias"):
                values = rng.uniform(-0.3, 0.3, parameter.shape)
            else:
                values = around + rng.uniform(-0.5, 0.5, parameter.shape)
            parameter.copy_(torch.from_numpy(values))
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    """The folder with the model."""
    model.save_pretrained(folder)
    return folder


def gradients(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Those that the parameters hold, by the names that files have; the parameters are gone then."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return load_weights(saved(model, folder))
