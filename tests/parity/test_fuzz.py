"""Any config is either refused, with field, value and reason, or builds in both backends and gives finite logits.

Fields are drawn nearly freely: mostly from values that some small model can have, now and then from values that no
field should take. ``HYPOTHESIS_PROFILE=nightly`` draws a thousand configs.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from kempnerforge_jax.model import state as jax_state
from kempnerforge_jax.model.transformer import Transformer as JaxTransformer
from kempnerforge_jax.model.vlm import build_vlm_wrapper as build_jax_wrapper
from kempnerforge_torch.model import state as torch_state
from kempnerforge_torch.model.transformer import Transformer as TorchTransformer
from kempnerforge_torch.model.vlm import build_vlm_wrapper as build_torch_wrapper
from shared_config.errors import ConfigError
from shared_config.interchange.toml import config_from_dict, config_from_toml, config_to_toml
from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig
from shared_config.schema.vlm import VLMConfig

NIGHTLY = settings.get_current_profile_name() == "nightly"
EXAMPLES = 1000 if NIGHTLY else 80
SEED = 3
IMAGE_SIDE = 8

Pools = dict[str, dict[str, Any]]
"""Section -> field -> values to choose from; a mapping is that of a section within."""

ODD_VALUES = [
    None, True, -1, 0, 1, 2, 3, 0.5, -0.5, 1e30, 1e-30, math.nan, math.inf, "", "none", "silu", [], [1, 2], {},
    {"a": 1},
]  # fmt: skip
"""Values of which most fields can take a few at most."""

COUNTS = [0, 1, 2, 3, 4, 5]
FIELDS: Pools = {
    "model": {
        "dim": [8, 12, 24, 36, 48],
        "n_layers": [1, 2],
        "n_heads": [1, 2, 4, 6],
        "n_kv_heads": [None, 1, 2],
        "head_dim": [None, 2, 4, 6],
        "vocab_size": [1, 2, 11, 37],
        "ffn_dim_multiplier": [0.1, 1.0, 2.5],
        "ffn_hidden_dim": [None, 1, 8, 21],
        "norm_type": ["rmsnorm", "layernorm", "rmsnorm_1p"],
        "norm_eps": [1e-5, 1e-30, 0.5, 1e30],
        "activation": ["silu", "gelu", "relu", "geglu_tanh"],
        "attention_softcap": [None, 1e-3, 50.0],
        "logit_softcap": [None, 1e-3, 30.0],
        "max_seq_len": [1, 16, 24, 40, 200],
        "rope_theta": [10000.0, 1.5, 1e30],
        "rope_scaling": {
            "type": ["linear", "llama3", "yarn"],
            "factor": [1.0, 8.0, 1e30],
            "original_max_seq_len": [1, 8, 4096],
            "low_freq_factor": [1.0, 4.0, 1e-30],
            "high_freq_factor": [4.0, 1.0, 1e30],
            "beta_fast": [32.0, 1.0, 1e30],
            "beta_slow": [1.0, 32.0, 1e-30],
            "attention_factor": [None, 0.1, 2.0],
        },
        "sliding_window": [None, 1, 3, 100],
        "attention_bias": [False, True],
        "attention_output_bias": [True, False],
        "attention_pattern": [None, ["full"], ["window"], ["full", "full_nope"], ["window", "full"], ["window_nope"]],
        "window_rope_theta": [None, 50.0, 1e30],
        "window_rope_scaled": [True, False],
        "attention_scale": [None, 0.5, 1e-30, 1.0],
        "mlp_bias": [False, False, True],
        "tie_embeddings": [False, True],
        "qk_norm": [False, True],
        "qk_norm_over": ["head", "width"],
        "norm_placement": ["before", "after", "both"],
        "embedding_scale": [1.0, 3.0, 1e-30],
        "residual_scale": [1.0, 0.5, 1e-30],
        "logit_divisor": [1.0, 8.0, 1e-3],
        "init_std": [0.02, 1e-30, 1.0, 10.0],
        "model_type": ["transformer"],
        "sdpa_backend": ["auto", "flash", "efficient", "cudnn", "math"],
        "family": [None, "llama", "mistral", "mixtral", "qwen3", "qwen3_moe"],
    },
    "experts": {
        "num_experts": [2, 3, 4],
        "moe_top_k": [1, 2, 3],
        "moe_frequency": [1, 2],
        "moe_router": ["softmax_topk", "sigmoid_topk"],
        "moe_shared_experts": [0, 1, 2],
        "moe_shared_expert_gate": [False, True],
        "moe_aux_loss_weight": [0.0, 0.01, 10.0],
        "moe_capacity_factor": [0.0, 1e-30, 0.5, 1.25, 1e30],
        "moe_sequence_aux_loss_weight": [0.0, 0.0, 0.1],
        "moe_gradient_scale": [False, True],
        "moe_bias_schedule": ["constant", "constant", "cosine_decay", "linear_warmup"],
        "moe_packed_experts": [False, True],
        "moe_expert_ffn_multiplier": [1e-30, 0.3, 1.0, 2.0],
        "moe_router_z_loss_weight": [0.0, 0.01],
        "moe_norm_topk_prob": [False, True],
        "moe_routed_scaling": [1.0, 2.5, 1e-30],
    },
    "train": {
        "batch_size": [1, 2, 3],
        "seq_len": [1, 8, 16, 100],
        "max_steps": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        "grad_accum_steps": [1, 2, 3],
        "grad_clip_norm": [0.0, 1.0],
        "seed": [0, 42, 2**40],
        "mixed_precision": ["fp32", "bf16"],
        "matmul_precision": ["highest", "high"],
        "scan_layers": [False, True],
        "activation_checkpointing": ["none", "full", "narrow", "selective"],
    },
    "optimizer": {
        "lr": [1e-3, 1e-30],
        "betas": [[0.9, 0.95], [0.0, 0.0]],
        "eps": [1e-8, 0.5],
    },
    "scheduler": {
        "name": ["cosine", "linear", "constant"],
        "warmup_steps": COUNTS,
        "decay_steps": [None, 1, 2000, 10000],
        "min_lr_ratio": [0.0, 0.1, 1.0],
    },
    "data": {"heldout_fraction": [0.05, 0.9], "pack_documents": [False, True]},
    "eval": {"interval": COUNTS, "steps": COUNTS},
    "distributed": {
        "dp_replicate": [1, 2],
        "dp_shard": [-1, -1, 1, 2],
        "cp": [1, 2],
        "tp": [1, 2],
        "pp": [1, 2],
        "ep": [1, 2],
    },
    "checkpoint": {"interval": COUNTS, "keep_last_n": [1, 2, 3]},
    "metrics": {"log_interval": [1, 2, 3]},
    "profiling": {"start_step": COUNTS, "end_step": COUNTS},
}
ENCODERS: Pools = {
    "random": {
        "feature_dim": [6, 8, 16],
        "num_tokens": [1, 4, 6],
        "image_size": [0, IMAGE_SIDE],
    },
    "vit": {
        "feature_dim": [8, 16],
        "image_size": [IMAGE_SIDE],
        "patch_size": [2, 4, 8],
        "n_layers": [0, 1],
        "n_heads": [2, 4],
    },
}
VISION: Pools = {
    "adapter": {
        "type": ["mlp_2layer", "linear", "avgpool", "attentional_pool"],
        "hidden_dim": [0, 5],
        "activation": ["gelu", "silu", "relu"],
        "pool_window": [1, 2, 3],
        "pool_heads": [1, 2, 16],
    },
    "video": {
        "max_frames": [2, 4],
        "min_frames": [1, 2],
        "sampling_policy": ["uniform", "random_segments"],
        "frame_size": [IMAGE_SIDE],
    },
}
ARCHITECTURES: Pools = {
    "joint_decoder": {},
    "cross_attention": {
        "cross_attention_every_n_layers": [1, 2],
        "cross_attention_n_heads": [0, 1, 2, 3, 4],
        "cross_attention_n_kv_heads": [0, 1, 2, 3],
        "cross_attention_head_dim": [0, 5],
    },
    "mot": {
        "mot_modalities": [["image", "text"], ["text", "image"]],
        "mot_image_n_heads": [0, 4],
        "mot_image_n_kv_heads": [0, 1, 2, 3],
        "mot_warm_start_from_text": [False],
    },
    "moma": {
        "moma_experts_per_modality": [{"image": 4, "text": 4}, {"image": 1, "text": 3}],
        "moma_capacity_factor": [0.0, 0.3, 1.0],
        "moma_gumbel_noise": [False, True],
    },
}
COMMON = {"max_text_len": [1, 2, 8, 100], "freeze": [[], [{"module": "adapter"}]]}
SMALL = {"dim": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 37, "ffn_hidden_dim": 20, "max_seq_len": 24}
"""What a model has where nothing else was drawn: the defaults are too large to be built here."""


def drawn_job(rng: random.Random) -> tuple[dict[str, Any], int]:
    """Nested fields of a job, and a number of devices."""
    model = {**SMALL, **some_of(rng, FIELDS["model"])}
    if "rope_scaling" in model:
        model["rope_scaling"] = {"type": "yarn", "original_max_seq_len": 8, **model["rope_scaling"]}
    if rng.random() < 0.4:
        model |= {"num_experts": 3, "moe_router": "sigmoid_topk", **some_of(rng, FIELDS["experts"])}
    job: dict[str, Any] = {"model": model, "train": {"seq_len": min(8, model["max_seq_len"]), "compile_model": False}}
    for section in rng.sample(sorted(set(FIELDS) - {"model", "experts"}), rng.choice([0, 0, 1, 2])):
        job[section] = {**job.get(section, {}), **some_of(rng, FIELDS[section])}
    if rng.random() < 0.5:
        arch, encoder = rng.choice(sorted(ARCHITECTURES)), rng.choice(sorted(ENCODERS))
        job["vlm"] = {"arch": arch, "max_text_len": 4, **some_of(rng, {**COMMON, **ARCHITECTURES[arch]})}
        job["vision_encoder"] = {"type": encoder, **some_of(rng, ENCODERS[encoder], share=1.0)}
        if rng.random() < 0.3:
            job["video"] = {"frame_size": IMAGE_SIDE, **some_of(rng, VISION["video"])}
        if rng.random() < 0.5:
            job["adapter"] = some_of(rng, VISION["adapter"])
    for _ in range(rng.choice([0, 0, 0, 0, 1, 2])):
        section = rng.choice(sorted(job))
        job[section][rng.choice([*sorted(known_fields(section)), "unknown"])] = rng.choice(ODD_VALUES)
    return job, rng.choice([1, 1, 1, 2])


def some_of(rng: random.Random, fields: Mapping[str, Any], share: float = 0.3) -> dict[str, Any]:
    """Values of a share of the fields."""
    chosen = {name: values for name, values in fields.items() if rng.random() < share}
    return {
        name: some_of(rng, values, 0.5) if isinstance(values, dict) else rng.choice(values)
        for name, values in chosen.items()
    }


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=EXAMPLES, phases=(Phase.reuse, Phase.generate))
def test_a_config_is_refused_with_a_reason_or_runs_in_both_backends(seed: int) -> None:
    """Configs come from seeds, so that they differ from one another in many fields; there is nothing to shrink."""
    fields, world_size = drawn_job(random.Random(seed))
    note(f"{fields}")
    assert_refused_or_runs(fields, world_size)


def assert_refused_or_runs(fields: Mapping[str, Any], world_size: int) -> bool:
    """Whether the config was accepted."""
    try:
        job = config_from_dict(fields)
        job.validate(world_size)
    except ConfigError as error:
        assert_tells_what_is_wrong(error)
        return False
    assert config_from_toml(config_to_toml(job)) == job
    tokens = np.random.default_rng(0).integers(0, job.model.vocab_size, (2, text_length(job)), dtype=np.int32)
    pixels = pixels_for(job)
    for run in (run_torch, run_jax):
        logits = run(job, tokens, pixels)
        assert logits.shape == (*tokens.shape, job.model.vocab_size)
        assert np.isfinite(logits).all(), run.__name__
    return True


def run_torch(job: JobConfig, tokens: np.ndarray, pixels: np.ndarray | None) -> np.ndarray:
    torch.manual_seed(SEED)
    with torch.no_grad():
        if job.vlm is None:
            model = TorchTransformer(job.model)
            return torch_state.to_numpy(model.run(torch.from_numpy(tokens)).logits)
        assert job.vision_encoder is not None
        wrapper = build_torch_wrapper(job.model, job.vision_encoder, job.adapter, job.vlm, frames_of(job))
        return torch_state.to_numpy(wrapper.run(torch.from_numpy(pixels), torch.from_numpy(tokens)).logits)


def run_jax(job: JobConfig, tokens: np.ndarray, pixels: np.ndarray | None) -> np.ndarray:
    """Under jit, built inside: what is drawn then is not compiled apart, shape by shape."""
    vlm, vision = job.vlm, job.vision_encoder
    if vlm is None or vision is None:
        model: Any = nnx.eval_shape(lambda: JaxTransformer(job.model, rngs=nnx.Rngs(0)))
    else:
        model = nnx.eval_shape(
            lambda: build_jax_wrapper(job.model, vision, job.adapter, vlm, frames_of(job), rngs=nnx.Rngs(0))
        )
    model.init_weights_and_freqs(SEED)
    graphdef, params, buffers = jax_state.split(model)

    @jax.jit
    def run(params: Any, buffers: Any, tokens: Any, pixels: Any) -> Any:
        merged = jax_state.merge(graphdef, params, buffers)
        return (merged.run(tokens) if vlm is None else merged.run(pixels, tokens)).logits

    return np.asarray(run(params, buffers, tokens, pixels))


def frames_of(job: JobConfig) -> int:
    return 1 if job.video is None else job.video.max_frames


def pixels_for(job: JobConfig) -> np.ndarray | None:
    if job.vlm is None or job.vision_encoder is None:
        return None
    side = job.vision_encoder.known_image_size or IMAGE_SIDE
    shape = (2, frames_of(job), 3, side, side)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def text_length(job: JobConfig) -> int:
    longest = job.model.max_seq_len if job.vlm is None else job.vlm.max_text_len
    return min(longest, 9)


# What a refusal must say


def assert_tells_what_is_wrong(error: ConfigError) -> None:
    """Each line is "field = value: reason", the field one of the schema and the value that which was given."""
    assert error.problems
    for line in error.problems:
        found = re.fullmatch(r"(?P<field>[\w.]+)(?: = (?P<value>.*?))?: (?P<reason>.{6,})", line, re.DOTALL)
        assert found, line
        *section, field = found["field"].split(".")
        assert is_field(section if line.endswith(": unknown key") else [*section, field], JobConfig), line
        assert found["value"] is not None or found["reason"].startswith("required"), line


def is_field(path: list[str], owner: Any) -> bool:
    """Whether a dotted path leads to a field; keys of mappings and places in lists are followed no further."""
    if not path or not (isinstance(owner, type) and issubclass(owner, Section)):
        return True
    head, *rest = path
    return head in known_fields_of(owner) and is_field(rest, section_of(owner, head))


def known_fields(section: str) -> set[str]:
    return known_fields_of(section_of(JobConfig, section))


def known_fields_of(owner: type[Section]) -> set[str]:
    """Field names; those of all architectures for the vlm section."""
    kinds = [VLMConfig.class_for(arch) for arch in VLMConfig.architectures()] if owner is VLMConfig else [owner]
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def section_of(owner: type[Section], name: str) -> Any:
    """The section class that a field holds, or None."""
    if name == "vlm":
        return VLMConfig
    hint = typing.get_type_hints(owner).get(name)
    kinds = [hint, *typing.get_args(hint)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


@pytest.mark.parametrize(
    "line",
    ["dim must be positive", "model.dim: must be positive", "model.dmi = 3: must be positive", "model.dim = 3: no"],
)
def test_a_refusal_without_field_value_or_reason_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        assert_tells_what_is_wrong(ConfigError([line]))


def test_a_nested_field_is_found() -> None:
    for field in ("model.rope_scaling.factor", "vlm.mot_modalities.0", "optimizer.betas.1", "vlm.arch"):
        assert_tells_what_is_wrong(ConfigError([f"{field} = 3: must be another one"]))
