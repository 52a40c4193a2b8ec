"""Low-rank adapters of a model that sees images: in both backends the gradients are those of the formulas, from the
model whose weights hold the adapters; nothing else moves, whatever the freeze schedule thaws; and a run goes on in the
other backend.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import settings

from shared_config.contract.lora import adapter_table, beside_adapters, is_adapter, without_adapters
from shared_config.contract.vision import job_table
from shared_config.errors import ConfigError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig
from tests.parity.lora_checks import SIDES
from tests.tolerance import assert_all_same_function

NIGHTLY = settings.get_current_profile_name() == "nightly"
LENGTH, SCALE = 7, 5.0 / 2


def job(arch: str) -> JobConfig:
    fields: dict[str, Any] = {
        "model": {"dim": 12, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "head_dim": 4, "vocab_size": 31,
                  "ffn_hidden_dim": 20, "max_seq_len": 32},
        "vision_encoder": {"type": "vit", "image_size": 8, "patch_size": 4, "feature_dim": 6, "n_heads": 1,
                           "n_layers": 1},
        "vlm": {"arch": arch, "max_text_len": LENGTH, "freeze_schedule": [{"start_step": 1, "specs": []}]},
        "train": {"seq_len": LENGTH, "batch_size": 2, "mixed_precision": "fp32", "grad_clip_norm": 0.0,
                  "compile_model": False},
        "optimizer": {"lr": 0.02, "eps": 1e-3},
        "scheduler": {"name": "constant", "warmup_steps": 0},
        "lora": {"rank": 2, "alpha": 5.0, "targets": ["*.attention.q_proj", "layers.1.mlp.down_proj"]},
    }  # fmt: skip
    fields["vlm"] |= {"cross_attention_every_n_layers": 1} if arch == "cross_attention" else {}
    return JobConfig(**fields)


def batches(config: JobConfig) -> list[dict[str, np.ndarray]]:
    rng, found = np.random.default_rng(7), []
    for _ in range(2):
        ids = rng.integers(0, config.model.vocab_size, (2, LENGTH + 1)).astype(np.int32)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "pixel_values": rng.standard_normal((2, 3, 8, 8))}
        if config.vlm is not None and config.vlm.arch == "joint_decoder":
            batch["image_positions"] = np.array([3, 0], np.int32)
        found.append(batch)
    return found


@functools.cache
def drawn(arch: str) -> dict[str, np.ndarray]:
    """Weights and adapters, none of them 0."""
    config, rng = job(arch), np.random.default_rng(1)
    table = job_table(config, tower_of(config)) | adapter_table(config)
    return {
        name: rng.standard_normal(spec.shape) / math.sqrt(spec.shape[-1]) + (spec.shape[-1:] == spec.shape)
        for name, spec in table.items()
    }


def stepped(backend: str, config: JobConfig, *states: TrainingState) -> tuple[list[float], TrainingState]:
    """Losses of steps from a state, and the last state."""
    with jax.enable_x64(True) if backend == "jax" else contextlib.nullcontext():
        dtype = torch.float64 if backend == "torch" else jax.numpy.float64
        trainer = SIDES[backend].module("training.train").Trainer(config, "cpu", dtype=dtype)
        (state,) = states
        trainer.load_state(state)
        return [float(trainer.step(batches(config))["loss"])], trainer.state()


@functools.cache
def truth(arch: str) -> tuple[float, dict[str, np.ndarray]]:
    """The loss, and the first moments of the adapters, from those of the model whose weights hold the adapters."""
    config, weights = job(arch), drawn(arch)
    merged = {name: np.asarray(value) for name, value in without_adapters(weights, config.lora).items()}
    (loss,), state = stepped("torch", config.replace(lora=None), TrainingState(0, merged, {}))
    found = {}
    for name in weights:
        if name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            dw_OI, b_name = np.asarray(state.optimizer[f"m.{module}.weight"]), f"{module}.lora_b"
            found[name] = SCALE * weights[b_name].T @ dw_OI
            found[b_name] = SCALE * dw_OI @ weights[name].T
    return loss, found


@functools.cache
def first(backend: str, arch: str) -> tuple[list[float], TrainingState]:
    return stepped(backend, job(arch), TrainingState(0, drawn(arch), {}))


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("arch", ["joint_decoder", *["cross_attention"] * NIGHTLY])
def test_gradients_are_those_of_the_formulas(backend: str, arch: str) -> None:
    (loss,), state = first(backend, arch)
    expected, moments = truth(arch)
    assert loss == pytest.approx(expected, rel=1e-11)
    assert_all_same_function({name: np.asarray(state.optimizer[f"m.{name}"]) for name in moments}, moments, 1e-9)
    kinds = {name.partition(".")[2] for name in state.optimizer}
    assert kinds == set(moments)
    for name, value in drawn(arch).items():
        assert is_adapter(name) or np.array_equal(np.asarray(state.weights[name]), value), f"{name}: is not frozen"


def test_all_that_is_beside_adapters_is_frozen() -> None:
    plain = {"layers.0.attention.q_proj.weight", "norm.weight"}
    assert beside_adapters([*plain, "layers.0.attention.q_proj.lora_a", "norm.lora_b"]) == plain
    assert beside_adapters(plain) == frozenset()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_no_freeze_thaws_what_has_adapters(backend: str) -> None:
    side, config = SIDES[backend], job("joint_decoder")
    model, freeze = side.module("training.train").Trainer(config, "cpu").model, side.module("training.freeze")
    freeze.apply_freeze_specs(model, (), {})
    names = {name for name, spec in job_table(config, tower_of(config)).items() if not spec.is_buffer}
    assert freeze.frozen_parameters(model) == names


@pytest.mark.parametrize("backend", ["jax", *["torch"] * NIGHTLY])
def test_a_run_goes_on_in_the_other_backend(backend: str) -> None:
    """Where the schedule thaws all: adapters alone are trained nevertheless."""
    config, begun = job("joint_decoder"), first("torch", "joint_decoder")[1]
    (loss,), state = stepped(backend, config, begun)
    (expected,), wanted = stepped("torch", config, begun) if backend == "jax" else first_two()
    assert loss == pytest.approx(expected, rel=1e-9)
    assert_all_same_function(
        {name: np.asarray(value) for name, value in state.weights.items()},
        {name: np.asarray(value) for name, value in wanted.weights.items()},
        1e-9,
    )
    besides = beside_adapters(drawn("joint_decoder"))
    assert all(np.array_equal(np.asarray(state.weights[name]), drawn("joint_decoder")[name]) for name in besides)


def first_two() -> tuple[list[float], TrainingState]:
    """The second step of one that began in JAX."""
    return stepped("torch", job("joint_decoder"), first("jax", "joint_decoder")[1])


def test_architectures_with_matrices_of_each_modality_have_none() -> None:
    for arch in ("mot", "moma"):
        with pytest.raises(ConfigError, match=f"lora = .*must be absent with vlm.arch '{arch}'"):
            load_config(f"debug_vlm_{arch}", ["--lora.rank=2"])
