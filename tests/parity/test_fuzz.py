"""Any config is either refused, with field, value and reason, or builds in both backends and gives finite logits.

Fields are drawn nearly freely: mostly from values that some small model can have, now and then from values that no
field should take. ``HYPOTHESIS_PROFILE=nightly`` draws a thousand configs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, note, settings
from hypothesis import strategies as st

from kempnerforge_jax.model import state as jax_state
from kempnerforge_jax.model.transformer import Transformer as JaxTransformer
from kempnerforge_jax.model.vlm import build_vlm_wrapper as build_jax_wrapper
from kempnerforge_torch.model import state as torch_state
from kempnerforge_torch.model.transformer import Transformer as TorchTransformer
from kempnerforge_torch.model.vlm import build_vlm_wrapper as build_torch_wrapper
from shared_config.errors import ConfigError
from shared_config.loader import config_from_dict, config_from_toml, config_to_toml
from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig
from shared_config.schema.vlm import VLMConfig

NIGHTLY = settings.get_current_profile_name() == "nightly"
EXAMPLES = 1000 if NIGHTLY else 150
SEED = 3
IMAGE_SIDE = 8

odd_values = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2,
        3,
        0.5,
        -0.5,
        1e30,
        1e-30,
        math.nan,
        math.inf,
        "",
        "none",
        "silu",
        [],
        [1, 2],
        {},
        {"a": 1},
    ]
)
"""Values of which most fields can take a few at most."""

counts = st.integers(0, 5)
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {
        "dim": st.sampled_from([8, 12, 24, 36]),
        "n_layers": st.integers(1, 2),
        "n_heads": st.sampled_from([1, 2, 4, 6]),
        "n_kv_heads": st.sampled_from([None, 1, 2]),
        "head_dim": st.sampled_from([None, 2, 4, 6]),
        "vocab_size": st.sampled_from([1, 2, 11, 37]),
        "ffn_dim_multiplier": st.sampled_from([0.1, 1.0, 2.5]),
        "ffn_hidden_dim": st.sampled_from([None, 1, 8, 21]),
        "norm_type": st.sampled_from(["rmsnorm", "layernorm"]),
        "norm_eps": st.sampled_from([1e-5, 1e-30, 0.5, 1e30]),
        "activation": st.sampled_from(["silu", "gelu", "relu"]),
        "max_seq_len": st.sampled_from([1, 16, 24, 40]),
        "rope_theta": st.sampled_from([10000.0, 1.5, 1e30]),
        "rope_scaling": st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(["linear", "llama3", "yarn"]),
                "factor": st.sampled_from([1.0, 8.0, 1e30]),
                "original_max_seq_len": st.sampled_from([1, 8, 4096]),
                "low_freq_factor": st.sampled_from([1.0, 4.0, 1e-30]),
                "high_freq_factor": st.sampled_from([4.0, 1.0, 1e30]),
                "beta_fast": st.sampled_from([32.0, 1.0, 1e30]),
                "beta_slow": st.sampled_from([1.0, 32.0, 1e-30]),
                "attention_factor": st.sampled_from([None, 0.1, 2.0]),
            },
        ),
        "sliding_window": st.sampled_from([None, 1, 3, 100]),
        "attention_bias": st.booleans(),
        "tie_embeddings": st.booleans(),
        "qk_norm": st.booleans(),
        "init_std": st.sampled_from([0.02, 1e-30, 1.0, 10.0]),
        "model_type": st.sampled_from(["transformer"]),
        "sdpa_backend": st.sampled_from(["auto", "flash", "efficient", "cudnn", "math"]),
    },
    "experts": {
        "num_experts": st.integers(2, 4),
        "moe_top_k": st.integers(1, 3),
        "moe_frequency": st.integers(1, 2),
        "moe_router": st.sampled_from(["softmax_topk", "sigmoid_topk"]),
        "moe_shared_experts": st.integers(0, 2),
        "moe_aux_loss_weight": st.sampled_from([0.0, 0.01, 10.0]),
        "moe_capacity_factor": st.sampled_from([0.0, 1e-30, 0.5, 1.25, 1e30]),
        "moe_sequence_aux_loss_weight": st.sampled_from([0.0, 0.0, 0.1]),
        "moe_gradient_scale": st.booleans(),
        "moe_bias_schedule": st.sampled_from(["constant", "constant", "cosine_decay", "linear_warmup"]),
        "moe_packed_experts": st.booleans(),
        "moe_expert_ffn_multiplier": st.sampled_from([1e-30, 0.3, 1.0, 2.0]),
        "moe_router_z_loss_weight": st.sampled_from([0.0, 0.01]),
        "moe_norm_topk_prob": st.booleans(),
        "moe_routed_scaling": st.sampled_from([1.0, 2.5, 1e-30]),
    },
    "train": {
        "batch_size": st.integers(1, 3),
        "seq_len": st.sampled_from([1, 8, 16, 100]),
        "max_steps": st.integers(1, 10),
        "grad_accum_steps": st.integers(1, 3),
        "grad_clip_norm": st.sampled_from([0.0, 1.0]),
        "seed": st.sampled_from([0, 42, 2**40]),
        "mixed_precision": st.sampled_from(["fp32", "bf16"]),
        "matmul_precision": st.sampled_from(["highest", "high"]),
        "scan_layers": st.booleans(),
        "activation_checkpointing": st.sampled_from(["none", "full", "selective"]),
    },
    "optimizer": {
        "lr": st.sampled_from([1e-3, 1e-30]),
        "betas": st.sampled_from([[0.9, 0.95], [0.0, 0.0]]),
        "eps": st.sampled_from([1e-8, 0.5]),
    },
    "scheduler": {
        "name": st.sampled_from(["cosine", "linear", "constant"]),
        "warmup_steps": counts,
        "decay_steps": st.sampled_from([None, 1, 2000, 10000]),
        "min_lr_ratio": st.sampled_from([0.0, 0.1, 1.0]),
    },
    "data": {"heldout_fraction": st.sampled_from([0.05, 0.9]), "pack_documents": st.booleans()},
    "eval": {"interval": counts, "steps": counts},
    "distributed": {
        "dp_replicate": st.integers(1, 2),
        "dp_shard": st.sampled_from([-1, -1, 1, 2]),
        "tp": st.integers(1, 2),
        "pp": st.integers(1, 2),
        "ep": st.integers(1, 2),
    },
    "checkpoint": {"interval": counts, "keep_last_n": st.integers(1, 3)},
    "metrics": {"log_interval": st.integers(1, 3)},
    "profiling": {"start_step": counts, "end_step": counts},
}
ENCODERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "random": {
        "feature_dim": st.sampled_from([6, 8, 16]),
        "num_tokens": st.sampled_from([1, 4, 6]),
        "image_size": st.sampled_from([0, IMAGE_SIDE]),
    },
    "vit": {
        "feature_dim": st.sampled_from([8, 16]),
        "image_size": st.just(IMAGE_SIDE),
        "patch_size": st.sampled_from([2, 4, 8]),
        "n_layers": st.integers(0, 1),
        "n_heads": st.sampled_from([2, 4]),
    },
}
VISION: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "adapter": {
        "type": st.sampled_from(["mlp_2layer", "linear", "avgpool", "attentional_pool"]),
        "hidden_dim": st.sampled_from([0, 5]),
        "activation": st.sampled_from(["gelu", "silu", "relu"]),
        "pool_window": st.integers(1, 3),
        "pool_heads": st.sampled_from([1, 2, 16]),
    },
    "video": {
        "max_frames": st.sampled_from([2, 4]),
        "min_frames": st.integers(1, 2),
        "frame_size": st.just(IMAGE_SIDE),
    },
}
ARCHITECTURES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "joint_decoder": {},
    "cross_attention": {
        "cross_attention_every_n_layers": st.integers(1, 2),
        "cross_attention_n_heads": st.integers(0, 4),
        "cross_attention_n_kv_heads": st.integers(0, 3),
    },
    "mot": {
        "mot_modalities": st.sampled_from([["image", "text"], ["text", "image"]]),
        "mot_image_n_heads": st.sampled_from([0, 4]),
        "mot_image_n_kv_heads": st.integers(0, 3),
        "mot_warm_start_from_text": st.sampled_from([False]),
    },
    "moma": {
        "moma_experts_per_modality": st.sampled_from([{"image": 4, "text": 4}, {"image": 1, "text": 3}]),
        "moma_capacity_factor": st.sampled_from([0.0, 0.3, 1.0]),
        "moma_gumbel_noise": st.booleans(),
    },
}
COMMON = {"max_text_len": st.sampled_from([1, 4, 8, 100]), "freeze": st.sampled_from([[], [{"module": "adapter"}]])}
SMALL = {"dim": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 37, "ffn_hidden_dim": 20, "max_seq_len": 24}
"""What a model has where nothing else was drawn: the defaults are too large to be built here."""


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Nested fields of a job, and a number of devices."""
    model = {**SMALL, **draw(some_of(FIELDS["model"]))}
    if draw(st.booleans()):
        model |= {"num_experts": 3, **draw(some_of(FIELDS["experts"]))}
    job = {"model": model, "train": {"seq_len": min(8, model["max_seq_len"]), "compile_model": False}}
    for section in draw(st.lists(st.sampled_from(sorted(set(FIELDS) - {"model", "experts"})), max_size=2, unique=True)):
        job[section] = {**job.get(section, {}), **draw(some_of(FIELDS[section]))}
    if draw(st.booleans()):
        arch, encoder = draw(st.sampled_from(sorted(ARCHITECTURES))), draw(st.sampled_from(sorted(ENCODERS)))
        job["vlm"] = {"arch": arch, "max_text_len": 4, **draw(some_of({**COMMON, **ARCHITECTURES[arch]}))}
        job["vision_encoder"] = {"type": encoder, **draw(st.fixed_dictionaries(ENCODERS[encoder]))}
        job |= {name: {"frame_size": 8, **draw(some_of(VISION[name]))} for name in ["video"] if draw(st.booleans())}
        job |= {name: draw(some_of(VISION[name])) for name in ["adapter"] if draw(st.booleans())}
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        section = draw(st.sampled_from(sorted(job)))
        job[section][draw(st.sampled_from([*sorted(known_fields(section)), "unknown"]))] = draw(odd_values)
    return job, draw(st.sampled_from([1, 1, 1, 2]))


def some_of(fields: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Values of some of the fields."""
    return st.fixed_dictionaries({}, optional=dict(fields))


@given(drawn=jobs())
@settings(max_examples=EXAMPLES)
def test_a_config_is_refused_with_a_reason_or_runs_in_both_backends(drawn: tuple[dict[str, Any], int]) -> None:
    fields, world_size = drawn
    note(f"{fields}")
    try:
        job = config_from_dict(fields)
        job.validate(world_size)
    except ConfigError as error:
        assert_tells_what_is_wrong(error, fields)
        return
    assert config_from_toml(config_to_toml(job)) == job
    tokens = np.random.default_rng(0).integers(0, job.model.vocab_size, (2, text_length(job)), dtype=np.int32)
    pixels = pixels_for(job)
    for run in (run_torch, run_jax):
        logits = run(job, tokens, pixels)
        assert logits.shape == (*tokens.shape, job.model.vocab_size)
        assert np.isfinite(logits).all(), run.__name__


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
    if job.vlm is None:
        model = nnx.eval_shape(lambda: JaxTransformer(job.model, rngs=nnx.Rngs(0)))
    else:
        model = nnx.eval_shape(
            lambda: build_jax_wrapper(
                job.model, job.vision_encoder, job.adapter, job.vlm, frames_of(job), rngs=nnx.Rngs(0)
            )
        )
    model.init_weights_and_freqs(SEED)
    graphdef, params, buffers = jax_state.split(model)

    @jax.jit
    def run(params: Any, buffers: Any, tokens: Any, pixels: Any) -> Any:
        merged = jax_state.merge(graphdef, params, buffers)
        return (merged.run(tokens) if job.vlm is None else merged.run(pixels, tokens)).logits

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


def assert_tells_what_is_wrong(error: ConfigError, given: Mapping[str, Any]) -> None:
    """Each line is "field = value: reason", the field one of the schema and the value that which was given."""
    assert error.problems
    for line in error.problems:
        found = re.fullmatch(r"(?P<field>[\w.]+)(?: = (?P<value>.*?))?: (?P<reason>.{6,})", line, re.DOTALL)
        assert found, line
        assert is_field(found["field"].split("."), JobConfig), line
        assert found["value"] is not None or found["reason"].startswith("required"), line


def is_field(path: list[str], owner: Any) -> bool:
    """Whether a dotted path leads to a field; keys of mappings and places in lists are followed no further."""
    head, *rest = path
    if not (isinstance(owner, type) and issubclass(owner, Section)):
        return True
    names = known_fields_of(owner)
    return (head in names or head == "unknown") and (not rest or is_field(rest, section_of(owner, head)))


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
        assert_tells_what_is_wrong(ConfigError([line]), {})


def test_a_nested_field_is_found() -> None:
    for field in ("model.rope_scaling.factor", "vlm.mot_modalities.0", "optimizer.betas.1", "vlm.arch"):
        assert_tells_what_is_wrong(ConfigError([f"{field} = 3: must be another one"]), {})
