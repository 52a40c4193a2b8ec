"""Which fields change the function of given weights: what the comparison of configs leaves out changes neither tensors
nor float64 logits nor what the model is shown, and what it counts changes one of them somewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kempnerforge_torch.model.build import build_model
from kempnerforge_torch.model.state import set_state
from shared_config.contract.function import differences
from shared_config.contract.vision import job_table
from shared_config.data.image_sources import Shapes
from shared_config.data.media import sample_times
from shared_config.errors import ConfigError
from shared_config.interchange.toml import config_from_dict, config_to_dict
from shared_config.interchange.vision import picture_format, tower_of
from shared_config.schema import AdapterConfig, ModelConfig, RopeScaling, VideoConfig, VisionEncoderConfig, VLMConfig
from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig
from tests.oracle.weights import draw

Fields = dict[str, Any]

DENSE: Fields = {
    "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 17, "ffn_hidden_dim": 10, "max_seq_len": 64
}  # fmt: skip
ROUTED: Fields = {**DENSE, "num_experts": 3, "moe_shared_experts": 1}
VIT: Fields = {"type": "vit", "image_size": 8, "patch_size": 2, "feature_dim": 8, "n_heads": 2, "n_layers": 1}
NOISE: Fields = {"type": "random", "feature_dim": 8, "num_tokens": 16, "image_size": 8}


def scaled(**scaling: Any) -> Fields:
    rope_scaling = {"factor": 4.0, "original_max_seq_len": 8, **scaling}
    return {
        "model": {
            **DENSE,
            "attention_bias": True,
            "qk_norm": True,
            "head_dim": 16,
            "rope_theta": 100.0,
            "rope_scaling": rope_scaling,
        }
    }


def seeing(vlm: Fields, encoder: Fields = VIT, model: Fields = DENSE, **sections: Any) -> Fields:
    return {"model": model, "vision_encoder": encoder, "vlm": {"max_text_len": 8, **vlm}, **sections}


BASES: dict[str, Fields] = {
    "dense": {"model": DENSE},
    "linear": scaled(type="linear"),
    "llama3": scaled(type="llama3"),
    "yarn": scaled(type="yarn", original_max_seq_len=64, beta_fast=8.0),
    "windows": {"model": {**DENSE, "n_layers": 2, "sliding_window": 4, "attention_pattern": ("full", "window")}},
    "scaled windows": {
        "model": {**scaled(type="linear")["model"], "sliding_window": 4, "attention_pattern": ("window", "full_nope")}
    },
    "softmax": {"model": ROUTED},
    "sigmoid": {"model": {**ROUTED, "moe_router": "sigmoid_topk", "moe_capacity_factor": 0.4}},
    "joint_decoder": seeing({"arch": "joint_decoder"}),
    "noise": seeing({"arch": "joint_decoder"}, NOISE, adapter={"type": "avgpool"}),
    "clips": seeing({"arch": "joint_decoder"}, video={"max_frames": 3, "min_frames": 2, "frame_size": 8}),
    "clips of noise": seeing(
        {"arch": "joint_decoder"},
        {"type": "random", "feature_dim": 8, "num_tokens": 4},
        video={"max_frames": 3, "min_frames": 2, "frame_size": 8},
    ),
    "cross_attention": seeing(
        {"arch": "cross_attention", "cross_attention_every_n_layers": 1}, adapter={"type": "avgpool"}
    ),
    "mot": seeing(
        {"arch": "mot", "mot_warm_start_path": "here"}, adapter={"type": "attentional_pool", "pool_heads": 2}
    ),
    "mot with experts": seeing({"arch": "mot"}, model=ROUTED, adapter={"type": "linear"}),
    "moma": seeing({"arch": "moma"}),
}
VALUES: dict[str, dict[str, list[Any]]] = {
    "model": {
        "dim": [24],
        "n_layers": [1, 3],
        "n_heads": [2, 8],
        "n_kv_heads": [None, 4, 1],
        "head_dim": [4, 6],
        "vocab_size": [19],
        "ffn_dim_multiplier": [2.0],
        "ffn_hidden_dim": [None, 12],
        "norm_type": ["layernorm", "rmsnorm_1p"],
        "norm_eps": [0.1],
        "activation": ["gelu", "relu", "geglu_tanh"],
        "attention_softcap": [0.5],
        "logit_softcap": [0.5],
        "max_seq_len": [80],
        "rope_theta": [50.0],
        "sliding_window": [1, 3],
        "window_rope_theta": [50.0],
        "window_rope_scaled": [False],
        "attention_pattern": [("full", "full_nope"), ("full_nope",)],
        "attention_bias": [True, False],
        "attention_output_bias": [False],
        "attention_scale": [0.5],
        "mlp_bias": [True],
        "qk_norm_over": ["width"],
        "norm_placement": ["after", "both"],
        "embedding_scale": [2.0],
        "residual_scale": [0.5],
        "logit_divisor": [4.0],
        "tie_embeddings": [True],
        "qk_norm": [True, False],
        "init_std": [0.5],
        "model_type": ["transformer"],
        "sdpa_backend": ["math"],
        "family": ["llama"],
        "num_experts": [0, 4],
        "moe_top_k": [1, 3],
        "moe_frequency": [2],
        "moe_router": ["softmax_topk", "sigmoid_topk"],
        "moe_shared_experts": [0, 2],
        "moe_shared_expert_gate": [True],
        "moe_aux_loss_weight": [1.0],
        "moe_capacity_factor": [0.1, 2.0],
        "moe_sequence_aux_loss_weight": [0.5],
        "moe_gradient_scale": [True],
        "moe_bias_schedule": ["cosine_decay"],
        "moe_packed_experts": [True],
        "moe_expert_ffn_multiplier": [3.0],
        "moe_router_z_loss_weight": [0.5],
        "moe_norm_topk_prob": [False],
        "moe_routed_scaling": [2.0],
    },
    "model.rope_scaling": {
        "type": ["none", "linear", "llama3", "yarn"],
        "factor": [8.0],
        "original_max_seq_len": [16],
        "low_freq_factor": [2.0],
        "high_freq_factor": [8.0],
        "beta_fast": [2.0],
        "beta_slow": [0.1],
        "attention_factor": [1.5],
    },
    "vlm": {
        "arch": ["joint_decoder", "cross_attention", "mot", "moma"],
        "max_text_len": [9],
        "image_token_id": [None, 5],
        "prefix_lm": [True],
        "freeze": [[], [{"module": "adapter"}]],
        "freeze_schedule": [[{"start_step": 3, "specs": []}]],
        "module_patterns": [{"vision_encoder": "vision_encoder.layers.*"}],
        "cross_attention_every_n_layers": [2],
        "cross_attention_n_heads": [4, 2],
        "cross_attention_n_kv_heads": [2, 1],
        "cross_attention_head_dim": [6],
        "mot_modalities": [["text", "image"]],
        "mot_image_n_heads": [4],
        "mot_image_n_kv_heads": [2, 1],
        "mot_warm_start_from_text": [True],
        "mot_warm_start_path": ["elsewhere"],
        "moma_modalities": [["text", "image"]],
        "moma_experts_per_modality": [{"image": 2, "text": 4}, {"text": 4, "image": 4}],
        "moma_capacity_factor": [0.25, 0.5],
        "moma_gumbel_noise": [False],
    },
    "vision_encoder": {
        "type": ["vit", "random"],
        "path": ["elsewhere"],
        "feature_dim": [12],
        "num_tokens": [16, 9],
        "image_size": [12],
        "patch_size": [4],
        "n_layers": [2],
        "n_heads": [4],
    },
    "adapter": {
        "type": ["mlp_2layer", "linear", "avgpool", "attentional_pool"],
        "hidden_dim": [16, 5],
        "activation": ["silu", "relu"],
        "pool_window": [4, 1],
        "pool_heads": [4],
    },
    "video": {
        "max_frames": [4],
        "min_frames": [3],
        "fps": [0.1],
        "frame_size": [12],
        "sampling_policy": ["random_segments"],
    },
}
SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "model.rope_scaling": RopeScaling,
    "vision_encoder": VisionEncoderConfig,
    "adapter": AdapterConfig,
    "video": VideoConfig,
}


def test_all_fields_are_varied() -> None:
    for section, cls in SECTIONS.items():
        assert set(VALUES[section]) == {item.name for item in dataclasses.fields(cls)} - {"rope_scaling"}  # type: ignore[arg-type]
    declared = {
        item.name
        for arch in VLMConfig.architectures()
        for item in dataclasses.fields(VLMConfig.class_for(arch))  # type: ignore[arg-type]
    }
    assert set(VALUES["vlm"]) == declared


@functools.cache
def outcome(job: JobConfig) -> tuple[Any, ...]:
    """Shapes of all tensors, logits of one set of weights, and what the model is shown."""
    shapes = {name: spec.shape for name, spec in job_table(job, tower_of(job)).items()}
    model: Any = build_model(without_warm_start(job)).double().eval()
    state = {name: draw({name: shape}, zlib.crc32(name.encode()))[name] for name, shape in shapes.items()}
    set_state(model, state)
    rng = np.random.default_rng(5)
    ids = torch.from_numpy(rng.integers(0, job.model.vocab_size, (2, 8)))
    with torch.no_grad():
        if job.vlm is None or job.vision_encoder is None:
            return shapes, model.run(ids, limit_capacity=False).logits
        pixels = picture_format(job.vision_encoder, job.video)
        frames = [Shapes(pixels.side, job.video).example(7, split).frames for split in ("train", "heldout")]
        shown = torch.from_numpy(pixels.numbers(frames[1])).double()
        shown = shown[:1] if job.video is None else shown[None]
        times = None if job.video is None else sample_times(0.0, 9.0, 90, job.video)
        logits = model.run(shown, ids[:1], limit_capacity=False).logits
        return shapes, logits, pixels, frames, times


def without_warm_start(job: JobConfig) -> JobConfig:
    """The job whose weights are given, and not taken from a folder."""
    if getattr(job.vlm, "mot_warm_start_from_text", False):
        assert job.vlm is not None
        return job.replace(vlm=job.vlm.replace(mot_warm_start_from_text=False))
    return job


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def variations(base: JobConfig) -> Iterator[tuple[str, JobConfig]]:
    """Jobs that differ from a base in one field, as far as such jobs exist."""
    for section, values in VALUES.items():
        for name, choices in values.items():
            for value in choices:
                fields = config_to_dict(base)
                place: Any = fields
                for part in section.split("."):
                    place = place.setdefault(part, {})
                if name == "arch":  # other architectures have other fields
                    place = fields["vlm"] = {"max_text_len": 8}
                place[name] = value
                try:
                    yield f"{section}.{name}", config_from_dict(fields)
                except ConfigError:
                    continue


@functools.cache
def found(name: str) -> list[tuple[str, bool, bool]]:
    """(field, whether the configs count as different, whether the outcome is another one) of all variations."""
    base = config_from_dict({"train": {"seq_len": 8}, **BASES[name]})
    return [
        (field, bool(differences(base, job)), not same(outcome(base), outcome(job)))
        for field, job in variations(base)
        if job != base
    ]


@pytest.mark.parametrize("base", BASES)
def test_fields_that_count_as_the_same_function_keep_it(base: str) -> None:
    cases = found(base)
    assert len(cases) > 30
    assert {field for field, counts, changes in cases if changes and not counts} == set()


def test_fields_are_varied_by_one_base_or_another() -> None:
    """But the kind of a model, of which there is one, and of an encoder, of which another needs other fields too."""
    fields = {f"{section}.{name}" for section, values in VALUES.items() for name in values}
    bases = [config_from_dict({"train": {"seq_len": 8}, **own}) for own in BASES.values()]
    unvaried = fields - {field for base in bases for field, job in variations(base) if job != base}
    assert unvaried == {"model.model_type", "vision_encoder.type"}


@pytest.mark.parametrize("base", BASES)
def test_fields_that_count_as_another_function_change_it(base: str) -> None:
    """But positions may be stretched by 1, and widths of experts are multiples of 16, whatever that of dense layers."""
    alike = {field for field, counts, changes in found(base) if counts and not changes}
    assert alike <= {"model.rope_scaling.type", "model.ffn_hidden_dim"}


def test_fields_that_count_as_another_function_change_it_somewhere() -> None:
    cases = [case for base in BASES for case in found(base)]
    counted = {field for field, counts, _ in cases if counts}
    assert counted == {field for field, counts, changes in cases if counts and changes}


def test_capacity_and_noise_of_training_keep_the_function_that_decoding_computes() -> None:
    kept = {field for base in BASES for field, counts, _ in found(base) if not counts}
    assert {"model.moe_capacity_factor", "vlm.moma_gumbel_noise"} <= kept
    counted = {field for base in BASES for field, counts, _ in found(base) if counts}
    assert {f"video.{name}" for name in VALUES["video"]} <= counted
