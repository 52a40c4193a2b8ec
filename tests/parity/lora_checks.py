"""Steps of low-rank adapters in both backends, against the NumPy oracle of the model whose weights hold them.

With W' = W + s B A, dB = s dW' A^T and dA = s B^T dW' (Hu et al. 2021, arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

import contextlib
import hashlib
import math

import jax
import numpy as np
import torch

from shared_config.contract.lora import adapter_table
from shared_config.contract.parameters import parameter_table
from shared_config.interchange.checkpoint import TrainingState
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig
from tests.oracle.optimizer import adamw_step, initial_state
from tests.oracle.training import loss_and_gradients
from tests.parity.backends import Jax, Torch
from tests.tolerance import assert_all_same_function, assert_same_function

Arrays = dict[str, np.ndarray]
TARGETS = ("*.attention.q_proj", "layers.*.attention.v_proj", "layers.1.mlp.down_proj")
LENGTH = 9
SIDES: dict[str, Torch] = {"torch": Torch(), "jax": Jax()}


def job(*overrides: str) -> JobConfig:
    """Two layers of unlike sizes, with adapters of scale 5 / 2."""
    model = {"dim": 12, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "ffn_hidden_dim": 20, "max_seq_len": 32}
    model |= {"head_dim": 4, "vocab_size": 31}
    train = {"seq_len": LENGTH, "batch_size": 2, "mixed_precision": "fp32", "grad_clip_norm": 0.0}
    train |= {"compile_model": "false", "seed": 3}
    optimizer = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.3}
    scheduler = {"name": "constant", "warmup_steps": 0}
    lora = {"rank": 2, "alpha": 5.0, "targets": list(TARGETS)}
    sections = {"model": model, "train": train, "optimizer": optimizer, "scheduler": scheduler, "lora": lora}
    flags = [f"--{name}.{field}={value}" for name, fields in sections.items() for field, value in fields.items()]
    return load_config("debug", [*flags, *overrides])


def drawn(config: JobConfig, seed: int = 0) -> Arrays:
    """Weights and adapters, none of them 0."""
    rng = np.random.default_rng(seed)
    table = parameter_table(config.model) | adapter_table(config)
    return {
        name: rng.standard_normal(spec.shape) / math.sqrt(spec.shape[-1]) + (spec.shape[-1:] == spec.shape)
        for name, spec in table.items()
    }


def merged(weights: Arrays, scale: float) -> Arrays:
    """The weights of the model without adapters."""
    whole = {name: value for name, value in weights.items() if "lora" not in name}
    for name in whole:
        module = name.removesuffix(".weight")
        if f"{module}.lora_a" in weights:
            whole[name] = whole[name] + scale * weights[f"{module}.lora_b"] @ weights[f"{module}.lora_a"]
    return whole


def batches(config: JobConfig) -> list[Arrays]:
    """Two micro-batches, with labels that do not count."""
    tokens = np.random.default_rng(7).integers(0, config.model.vocab_size, (2, 2, LENGTH + 1)).astype(np.int32)
    labels = tokens[:, :, 1:].copy()
    labels[0, 1, 4:] = -100
    return [{"tokens": tokens[i, :, :-1], "labels": labels[i]} for i in range(2)]


def check_adapters(backend: str) -> None:
    """The loss, the gradients, as first moments, and two steps of AdamW; the model's own weights stay, bit by bit, and
    nothing is kept of them.
    """
    config = job()
    weights, given = drawn(config), batches(config)
    assert config.lora is not None
    scale = 5.0 / 2
    with jax.enable_x64(True) if backend == "jax" else contextlib.nullcontext():
        dtype = torch.float64 if backend == "torch" else jax.numpy.float64
        trainer = SIDES[backend].module("training.train").Trainer(config, "cpu", dtype=dtype)
        trainer.load_state(TrainingState(0, weights, {}))
        steps = [(float(trainer.step(given)["loss"]), trainer.state()) for _ in range(2)]
    adapters = {name: value for name, value in weights.items() if "lora" in name}
    tokens, labels = (np.concatenate([batch[name] for batch in given]) for name in ("tokens", "labels"))
    state = initial_state(adapters)
    for loss, found in steps:
        expected, gradients = adapter_gradients({**weights, **adapters}, config, tokens, labels, scale)
        assert_same_function(np.asarray(loss), np.asarray(expected), "loss", 1e-11)
        optimizer = config.optimizer
        adapters, state = adamw_step(
            adapters, gradients, state, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
            weight_decay=optimizer.weight_decay, decayed=adapters,
        )  # fmt: skip
        kept = {f"m.{name}": value for name, value in state.m.items()} | {f"v.{name}": v for name, v in state.v.items()}
        counts = {f"t.{name}" for name in adapters}
        assert set(found.optimizer) == {*kept, *counts}
        assert_all_same_function({name: found.optimizer[name] for name in kept}, kept, 1e-9)
        assert_all_same_function({name: found.weights[name] for name in adapters}, adapters, 1e-9)
        for name, value in weights.items():
            assert name in adapters or np.array_equal(found.weights[name], value), f"{name}: is not frozen"


def adapter_gradients(
    weights: Arrays, config: JobConfig, tokens: np.ndarray, labels: np.ndarray, scale: float
) -> tuple[float, Arrays]:
    """The loss, and the gradients of the adapters."""
    loss, whole = loss_and_gradients(merged(weights, scale), config.model, tokens, labels)
    found: Arrays = {}
    for name in weights:
        if name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            dw_OI = whole[f"{module}.weight"]
            found[name] = scale * weights[f"{module}.lora_b"].T @ dw_OI
            found[f"{module}.lora_b"] = scale * dw_OI @ weights[name].T
    return float(loss), {name: found[name] for name in weights if name in found}


def check_start(backend: str) -> None:
    """A run begins with the function of its weights: A is drawn from the seed, by the matrix's name, and B is 0."""
    config = job()
    base = {name: value.astype(np.float32) for name, value in drawn(config).items() if "lora" not in name}
    trainer = SIDES[backend].module("training.train").Trainer(config, "cpu")
    built = trainer.state().weights
    trainer.load_state(TrainingState(0, base, {}))
    state = trainer.state().weights
    for name, spec in adapter_table(config).items():
        digest = _digest(f"3:{name}")
        normal = np.random.Generator(np.random.Philox(key=digest)).standard_normal(spec.shape, dtype=np.float32)
        start = normal * np.float32(1 / math.sqrt(spec.shape[1])) if name.endswith("a") else np.zeros(spec.shape)
        np.testing.assert_array_equal(state[name], start, err_msg=name)
        np.testing.assert_array_equal(built[name], start, err_msg=name)
    loss = float(trainer.evaluate(batches(config))["loss"])
    tokens, labels = (np.concatenate([batch[name] for batch in batches(config)]) for name in ("tokens", "labels"))
    wide = {name: value.astype(np.float64) for name, value in base.items()}
    np.testing.assert_allclose(loss, float(loss_and_gradients(wide, config.model, tokens, labels)[0]), rtol=1e-5)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
