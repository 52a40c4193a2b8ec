"""Every preset and every default, stated a second time with its source; shapes also against transformers' models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shared_config.contract.counts import count_active_parameters, count_parameters
from shared_config.loader import load_config, preset_names
from shared_config.schema.freeze import FreezeSpec
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

LLAMA3: dict[str, Any] = {"vocab_size": 128256, "n_kv_heads": 8, "rope_theta": 500000.0}
"""arXiv:2407.21783, section 3.2: 128K tokens, 8 key/value heads, theta 500,000, contexts of 8,192 at first."""
LLAMA3_8B = {**LLAMA3, "dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_hidden_dim": 14336, "max_seq_len": 8192}
BYTES: dict[str, Any] = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 260}
BYTES |= {"ffn_hidden_dim": 352, "max_seq_len": 256}
LLAMA3_ROPE = {"type": "llama3", "factor": 32.0, "original_max_seq_len": 8192}
LLAMA3_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

MODELS: dict[str, dict[str, Any]] = {
    "debug": {**BYTES, "family": "llama"},
    "debug_moe": {
        **BYTES,
        "num_experts": 8,
        "moe_top_k": 2,
        "moe_frequency": 2,
        "moe_router": "sigmoid_topk",
        "moe_sequence_aux_loss_weight": 1.0,
        "moe_packed_experts": True,
        "moe_expert_ffn_multiplier": 0.5,
        "moe_router_z_loss_weight": 0.001,
    },
    "llama_125m": {
        "family": "llama",
        "dim": 768,
        "n_layers": 12,
        "n_heads": 12,
        "vocab_size": 32000,
        "max_seq_len": 2048,
    },
    "llama_1b": {
        **LLAMA3,
        "family": "llama",
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "head_dim": 64,
        "ffn_hidden_dim": 8192,
        "max_seq_len": 131072,
        "tie_embeddings": True,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama3_8b": {**LLAMA3_8B, "family": "llama"},
    "llama3_70b": {**LLAMA3_8B, "family": "llama", "dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_hidden_dim": 28672},
    "moe_small": {
        "dim": 1024,
        "n_layers": 8,
        "n_heads": 16,
        "n_kv_heads": 8,
        "vocab_size": 32000,
        "ffn_hidden_dim": 2816,
        "max_seq_len": 4096,
        "num_experts": 16,
        "moe_top_k": 2,
        "moe_router": "sigmoid_topk",
        "moe_packed_experts": True,
        "moe_router_z_loss_weight": 0.001,
    },
    "qwen3_0_6b": {
        "family": "qwen3",
        "dim": 1024,
        "n_layers": 28,
        "n_heads": 16,
        "n_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "ffn_hidden_dim": 3072,
        "max_seq_len": 40960,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "qk_norm": True,
        "tie_embeddings": True,
    },
}
"""Published shapes: arXiv:2407.21783, table 3; meta-llama/Llama-3.2-1B; arXiv:2505.09388, table 1, Qwen/Qwen3-0.6B."""

ARCHITECTURES = ("cross_attention", "joint_decoder", "moma", "mot")
MODELS |= {f"debug_vlm_{arch}": BYTES for arch in ARCHITECTURES}
MODELS |= {f"vlm_8b_{arch}": LLAMA3_8B for arch in ARCHITECTURES}

SIZES = {
    "debug": 804_992,
    "debug_moe": 1_618_048,
    "llama_125m": 134_105_856,
    "llama_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
}
"""Parameters; those of published models as their cards count them."""

SIGLIP2 = {"type": "siglip2", "path": "models/siglip2-so400m-patch14-384", "feature_dim": 1152, "num_tokens": 27 * 27}
VIT = {"type": "vit", "image_size": 32, "patch_size": 8, "feature_dim": 64, "n_heads": 4, "n_layers": 2}
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "debug_vlm_cross_attention": {"cross_attention_every_n_layers": 2},
    "debug_vlm_moma": {"moma_experts_per_modality": {"image": 2, "text": 4}},
}

BYTES_RUN = ("fp32", "none", False, False, 2e-3, 60, 300)
LARGE_RUN = ("bf16", "full", True, True, 3e-4, 2000, 100_000)
RUNS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("debug", "debug_moe"), (16, 128, *BYTES_RUN)),
    **{f"debug_vlm_{arch}": (16, 48, *BYTES_RUN) for arch in ARCHITECTURES},
    "llama_125m": (8, 2048, "bf16", "none", True, True, 6e-4, 2000, 100_000),
    "moe_small": (4, 2048, "bf16", "none", True, True, 4e-4, 2000, 100_000),
    "llama_1b": (4, 8192, "bf16", "selective", True, True, 3e-4, 2000, 100_000),
    "qwen3_0_6b": (4, 4096, "bf16", "selective", True, True, 5e-4, 2000, 100_000),
    "llama3_8b": (1, 8192, *LARGE_RUN),
    "llama3_70b": (1, 8192, "bf16", "full", True, True, 1.5e-4, 2000, 100_000),
    **{f"vlm_8b_{arch}": (1, 2048, "bf16", "full", True, True, 2e-5, 2000, 100_000) for arch in ARCHITECTURES},
}
"""Rows, positions, precision, recomputed activations, compiled, scanned, learning rate (Llama 3: table 3 of
arXiv:2407.21783; 125M: GPT-3's 6e-4, arXiv:2005.14165, table 2.1), warm-up, steps.
"""


def plain(section: Any) -> dict[str, Any]:
    """Fields as they read, nested sections as dicts."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {name: plain(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_is_as_stated(preset: str) -> None:
    config = load_config(preset)
    assert config.model == ModelConfig(**MODELS[preset])
    train, optimizer, scheduler = config.train, config.optimizer, config.scheduler
    switches = (train.mixed_precision, train.activation_checkpointing, train.compile_model, train.scan_layers)
    sizes = (train.batch_size, train.seq_len)
    assert (*sizes, *switches, optimizer.lr, scheduler.warmup_steps, train.max_steps) == RUNS[preset]
    small = preset.startswith("debug")
    assert (config.checkpoint.dir, config.checkpoint.interval) == (f"runs/{preset}", 100 if small else 1000)
    assert config.eval.interval == (100 if preset in ("debug", "debug_moe") else 0)
    defaults = JobConfig()
    assert train.replace(**fields_of(defaults.train, "batch_size", "seq_len", "max_steps", *SWITCHES)) == defaults.train
    assert optimizer.replace(lr=3e-4) == defaults.optimizer
    assert scheduler.replace(warmup_steps=2000) == defaults.scheduler
    for section in ("data", "distributed", "metrics", "profiling", "video"):
        assert getattr(config, section) == getattr(defaults, section)
    if preset in SIZES:
        assert count_parameters(config.model) == SIZES[preset]


SWITCHES = ("mixed_precision", "activation_checkpointing", "compile_model", "scan_layers")


def fields_of(section: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}


@pytest.mark.parametrize("preset", [name for name in preset_names() if "vlm" in name])
def test_the_images_of_a_preset_are_as_stated(preset: str) -> None:
    config = load_config(preset)
    arch = preset.removeprefix("debug_vlm_").removeprefix("vlm_8b_")
    small = preset.startswith("debug")
    fields = {"max_text_len": 64, "freeze": ()} if small else {"max_text_len": 2048}
    assert config.vlm == VLMConfig.for_arch(arch, **fields, **OWN_FIELDS.get(preset, {}))
    assert config.vision_encoder is not None
    assert config.adapter is not None
    assert {name: getattr(config.vision_encoder, name) for name in (VIT if small else SIGLIP2)} == (
        VIT if small else SIGLIP2
    )
    assert plain(config.adapter) == DEFAULTS["adapter"]


def test_active_parameters_are_those_of_two_experts() -> None:
    config = load_config("debug_moe").model
    expert = 3 * 128 * 176
    assert SIZES["debug_moe"] - count_active_parameters(config) == 2 * (8 - 2) * expert


@pytest.mark.parametrize("preset", ["llama_1b", "llama3_8b", "llama3_70b", "qwen3_0_6b"])
def test_a_published_shape_has_the_tensors_of_transformers_model(preset: str) -> None:
    """Built there from its own names of the sizes, on a device without storage."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    stated = MODELS[preset]
    family = "Qwen3" if preset.startswith("qwen") else "Llama"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=stated["dim"],
        num_hidden_layers=stated["n_layers"],
        num_attention_heads=stated["n_heads"],
        num_key_value_heads=stated["n_kv_heads"],
        head_dim=stated.get("head_dim"),
        intermediate_size=stated["ffn_hidden_dim"],
        vocab_size=stated["vocab_size"],
        tie_word_embeddings=stated.get("tie_embeddings", False),
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.tie_weights()
    assert sum(tensor.numel() for tensor in model.parameters()) == SIZES[preset]


# Defaults

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "head_dim": 128,
        "vocab_size": 32000,
        "ffn_dim_multiplier": 1.0,
        "ffn_hidden_dim": None,
        "norm_type": "rmsnorm",
        "norm_eps": 1e-5,
        "activation": "silu",
        "max_seq_len": 2048,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "attention_pattern": ("full",),
        "window_rope_theta": 10000.0,
        "window_rope_scaled": True,
        "attention_softcap": None,
        "logit_softcap": None,
        "rope_scaling": {
            "type": "none",
            "factor": 1.0,
            "original_max_seq_len": None,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": None,
        },
        "attention_bias": False,
        "tie_embeddings": False,
        "qk_norm": False,
        "init_std": 0.02,
        "model_type": "transformer",
        "sdpa_backend": "auto",
        "family": None,
        "num_experts": 0,
        "moe_top_k": 2,
        "moe_frequency": 1,
        "moe_router": "softmax_topk",
        "moe_shared_experts": 0,
        "moe_aux_loss_weight": 0.01,
        "moe_capacity_factor": 0.0,
        "moe_sequence_aux_loss_weight": 0.0,
        "moe_gradient_scale": False,
        "moe_bias_schedule": "constant",
        "moe_packed_experts": False,
        "moe_expert_ffn_multiplier": 1.0,
        "moe_router_z_loss_weight": 0.0,
        "moe_norm_topk_prob": True,
        "moe_routed_scaling": 1.0,
        "moe_shared_expert_gate": False,
        "attention_output_bias": True,
        "attention_scale": 128**-0.5,
        "mlp_bias": False,
        "qk_norm_over": "head",
        "norm_placement": "before",
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_divisor": 1.0,
    },
    "train": {
        "batch_size": 8,
        "seq_len": 2048,
        "max_steps": 100_000,
        "grad_accum_steps": 1,
        "grad_clip_norm": 1.0,
        "on_nonfinite": "stop",
        "max_skipped_steps": 10,
        "label_smoothing": 0.0,
        "logit_z_loss_weight": 0.0,
        "seed": 42,
        "health_check_seconds": 0,
        "mixed_precision": "bf16",
        "matmul_precision": "highest",
        "compile_model": True,
        "scan_layers": False,
        "activation_checkpointing": "none",
    },
    "optimizer": {
        "name": "adamw",
        "lr": 3e-4,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "momentum": 0.95,
        "nesterov": True,
        "newton_schulz_steps": 5,
        "ema_decay": 0.0,
    },
    "scheduler": {
        "name": "cosine",
        "warmup_steps": 2000,
        "decay_steps": None,
        "min_lr_ratio": 0.1,
        "stable_steps": None,
        "wsd_decay": "linear",
        "rex_alpha": 0.5,
        "final_weight_decay": None,
        "weight_decay_shape": "cosine",
    },
    "data": {
        "path": "",
        "tokenizer": "bytes",
        "eos_id": None,
        "token_dtype": None,
        "heldout_fraction": 0.05,
        "pack_documents": False,
        "text_field": "text",
        "follow_symlinks": False,
        "max_images": 1,
        "sources": (),
        "temperature": 1.0,
        "phases": (),
    },
    "eval": {"interval": 0, "steps": 8, "batch_size": None, "average": False, "sample_prompt": "", "sample_tokens": 64},
    "distributed": {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "pp": 1, "ep": 1},
    "checkpoint": {
        "dir": "runs/latest",
        "interval": 1000,
        "keep_last_n": 3,
        "milestone_interval": 0,
        "async_save": False,
        "load_path": "",
    },
    "metrics": {"log_interval": 1, "tensorboard": False, "wandb_project": "", "peak_tflops": None},
    "profiling": {"start_step": 0, "end_step": 0, "dir": "profile"},
    "adapter": {"type": "mlp_2layer", "hidden_dim": 0, "activation": "gelu", "pool_window": 2, "pool_heads": 16},
}
"""Sizes are Llama 7B's (arXiv:2302.13971), epsilon of the norm and AdamW's constants Llama 2's (arXiv:2307.09288,
section 2.1: betas 0.9 and 0.95, decay 0.1, clipping 1.0, 2,000 steps of warm-up, cosine to 10 %), YaRN's ramp that of
its paper (arXiv:2309.00071, section 3.2), the bands of Llama 3.1 those of its release, the weight of the balancing loss
Switch's (arXiv:2101.03961, section 2.2).
"""
SHARED_VLM: dict[str, Any] = {
    "max_text_len": 512,
    "freeze": (FreezeSpec("vision_encoder"),),
    "freeze_schedule": (),
}
PATTERNS = {name: f"{name}.*" for name in ("vision_encoder", "adapter", "transformer")}
OWN_PATTERNS: dict[str, dict[str, Any]] = {
    "joint_decoder": {},
    "cross_attention": {"cross_attention": "transformer.cross_attention_layers.*"},
    "mot": {"mot": ("transformer.layers.*", "transformer.mot_norms.*")},
    "moma": {"moma": "transformer.layers.*.mlp.experts.*"},
}
VLM_DEFAULTS: dict[str, dict[str, Any]] = {
    "joint_decoder": {"image_token_id": None, "prefix_lm": False},
    "cross_attention": {
        "cross_attention_every_n_layers": 4,
        "cross_attention_n_heads": 0,
        "cross_attention_n_kv_heads": 0,
        "cross_attention_head_dim": 0,
    },
    "mot": {
        "mot_modalities": ("image", "text"),
        "mot_image_n_heads": 0,
        "mot_image_n_kv_heads": 0,
        "mot_warm_start_from_text": False,
        "mot_warm_start_path": "",
    },
    "moma": {
        "moma_modalities": ("image", "text"),
        "moma_experts_per_modality": {"image": 4, "text": 4},
        "moma_capacity_factor": 0.0,
        "moma_gumbel_noise": True,
    },
}


@pytest.mark.parametrize("section", DEFAULTS)
def test_defaults_are_as_stated(section: str) -> None:
    found = JobConfig() if section != "adapter" else load_config("debug_vlm_mot")
    assert plain(getattr(found, section)) == DEFAULTS[section]


@pytest.mark.parametrize("arch", VLM_DEFAULTS)
def test_defaults_of_an_architecture_are_as_stated(arch: str) -> None:
    found = VLMConfig.for_arch(arch)
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    patterns = {**PATTERNS, **OWN_PATTERNS[arch]}
    assert values == {"arch": arch, **SHARED_VLM, "module_patterns": patterns, **VLM_DEFAULTS[arch]}
    assert FreezeSpec("adapter") == FreezeSpec("adapter", frozen=True)
