"""Training jobs in bfloat16 that have, taken together, every layer, mask and switch of a model; each with its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shared_config.contract.vision import TowerConfig
from shared_config.interchange.toml import config_from_dict
from shared_config.schema.job import JobConfig

ROWS, LENGTH, SIDE, FRAMES = 2, 9, 8, 2
TEXT = {"batch_size": ROWS, "seq_len": LENGTH, "compile_model": False, "mixed_precision": "bf16"}
MODEL = {
    "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 37, "ffn_hidden_dim": 40,
    "max_seq_len": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_top_k": 2, "moe_router_z_loss_weight": 0.1, "moe_aux_loss_weight": 0.1}
BALANCED = {
    **EXPERTS, "moe_router": "sigmoid_topk", "moe_shared_experts": 1, "moe_sequence_aux_loss_weight": 0.1,
    "moe_capacity_factor": 1.0, "moe_gradient_scale": True, "moe_shared_expert_gate": True, "moe_norm_topk_prob": False,
    "moe_routed_scaling": 1.5, "moe_bias_schedule": "cosine_decay",
}  # fmt: skip
NOISE = {"type": "random", "feature_dim": 12, "num_tokens": 9}
VIT = {"type": "vit", "image_size": SIDE, "patch_size": 2, "feature_dim": 12, "n_heads": 3, "n_layers": 1}
VIDEO = {"max_frames": FRAMES, "min_frames": 1, "frame_size": SIDE}

JOBS: dict[str, dict[str, Any]] = {
    "dense": {"model": {"qk_norm": True, "attention_bias": True, "attention_output_bias": False, "sliding_window": 4}},
    "dense, tied": {
        "model": {"norm_type": "layernorm", "activation": "gelu", "tie_embeddings": True},
        "train": {"scan_layers": True, "activation_checkpointing": "full", "on_nonfinite": "skip"},
    },
    "relu": {"model": {"activation": "relu"}, "train": {"activation_checkpointing": "selective"}},
    "capped": {
        "model": {
            "activation": "geglu_tanh", "attention_softcap": 5.0, "logit_softcap": 3.0, "norm_placement": "both",
            "embedding_scale": 4.9, "sliding_window": 4, "attention_pattern": ["window", "full"],
        },
        "train": {"logit_z_loss_weight": 0.1},
    },
    "scaled": {
        "model": {
            "residual_scale": 0.3, "logit_divisor": 4.0, "attention_scale": 0.3, "mlp_bias": True,
            "norm_placement": "after", "qk_norm": True, "qk_norm_over": "width",
        },
        "train": {"label_smoothing": 0.1},
    },
    "experts": {"model": {**EXPERTS, "moe_packed_experts": True}, "train": {"scan_layers": True}},
    "experts, balanced": {"model": {**BALANCED, "moe_frequency": 2}},
    "experts of gelu": {"model": {**EXPERTS, "activation": "gelu"}, "train": {"activation_checkpointing": "full"}},
    "experts of relu": {"model": {**EXPERTS, "activation": "relu"}},
    "joint_decoder": {"vision_encoder": VIT, "adapter": {"type": "mlp_2layer"}, "vlm": {"arch": "joint_decoder"}},
    "joint_decoder, frozen": {
        "vision_encoder": VIT,
        "adapter": {"type": "mlp_2layer", "activation": "silu"},
        "vlm": {"arch": "joint_decoder", "freeze": [{"module": "vision_encoder"}, {"module": "transformer"}]},
        "video": VIDEO,
    },
    "cross_attention": {
        "vision_encoder": VIT,
        "adapter": {"type": "attentional_pool", "pool_window": 2, "pool_heads": 3},
        "vlm": {"arch": "cross_attention", "cross_attention_every_n_layers": 1},
        "video": VIDEO,
    },
    "mot": {
        "model": {"qk_norm": True, "attention_bias": True, "num_experts": 3, "moe_frequency": 2},
        "vision_encoder": NOISE,
        "adapter": {"type": "avgpool", "pool_window": 2},
        "vlm": {"arch": "mot", "mot_image_n_kv_heads": 1},
        "video": VIDEO,
    },
    "moma": {
        "vision_encoder": NOISE,
        "adapter": {"type": "linear"},
        "vlm": {"arch": "moma", "moma_experts_per_modality": {"image": 2, "text": 3}},
    },
}  # fmt: skip
"""Sections by case, merged into those above."""

TOWERS = tuple(
    TowerConfig(
        image_size=7, patch_size=3, dim=12, n_layers=1, n_heads=3, ffn_hidden_dim=10, activation=activation,
        norm_eps=1e-5, class_token=True, pre_norm=True,
    )
    for activation in ("quick_gelu", "gelu_pytorch_tanh")
)  # fmt: skip
"""Towers with everything that those of the jobs have not."""


def job_of(case: str) -> JobConfig:
    sections = {"model": MODEL, "train": TEXT}
    changes = dict(JOBS[case])
    if "vlm" in changes:
        changes["vlm"] = {"freeze": [], "max_text_len": LENGTH, **changes["vlm"]}
    merged = {name: {**sections.get(name, {}), **changes.get(name, {})} for name in {**sections, **changes}}
    return config_from_dict(merged)


def batch_of(job: JobConfig) -> dict[str, np.ndarray]:
    """Rows that end early, documents, and clips that lack a frame."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, job.model.vocab_size, (ROWS, LENGTH), np.int32)
    real = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 3]])
    batch = {"labels": np.where(real, np.roll(tokens, -1, axis=1), np.int32(-100)), "text_mask": real}
    if job.vlm is None:
        documents = np.where(np.arange(LENGTH) < 4, 0, 1).astype(np.int32) * np.ones((ROWS, 1), np.int32)
        return {"tokens": tokens, "doc_ids": documents, **batch}
    shape = (ROWS, *((FRAMES,) if job.video is not None else ()), 3, SIDE, SIDE)
    frames = np.array([[True] * (FRAMES if job.video is not None else 1)] * ROWS)
    frames[0, -1] = job.video is None
    pixels = rng.uniform(-1, 1, shape).astype(np.float32)
    return {"input_ids": tokens, "pixel_values": pixels, "frame_mask": frames, **batch}


def plain(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same batch without masks and documents."""
    return {name: array for name, array in batch.items() if name not in ("doc_ids", "text_mask", "frame_mask")}
