"""Checks that the content of padding never matters where a run meets it: wrappers with an image and without, reading of
prompts, evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import wrapper_table
from shared_config.interchange.toml import config_from_dict
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    JointDecoderConfig,
    ModelConfig,
    MoTConfig,
    VisionEncoderConfig,
    VLMConfig,
)
from shared_config.schema.job import JobConfig
from tests.parity.vlm_checks import Side

VOCAB = 13
TIGHT = ModelConfig(
    dim=12, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=VOCAB, ffn_hidden_dim=10, max_seq_len=24,
    num_experts=3, moe_top_k=2, moe_capacity_factor=0.5,
)  # fmt: skip
ADAPTER, VISION = AdapterConfig(type="linear"), VisionEncoderConfig(type="random", feature_dim=6, num_tokens=2)
ARCHITECTURES: tuple[VLMConfig, ...] = (
    JointDecoderConfig(max_text_len=8),
    CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1),
    MoTConfig(max_text_len=8),
)
PIXELS = np.random.default_rng(8).uniform(-1, 1, (2, 3, 2, 2))
REAL = np.array([[False, True, True, False, False], [False, False, False, True, True]])
TEXTS = np.random.default_rng(1).integers(0, VOCAB, (2, *REAL.shape), np.int32)
PROMPTS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([6, 2])


def check_wrappers(backend: str) -> None:
    """Logits, losses and counts of every architecture, with an image and without."""
    side = Side(backend)
    for vlm in ARCHITECTURES:
        table = wrapper_table(TIGHT, vlm, ADAPTER, None, VISION.feature_dim)
        run = side.compiled(side.filled(table, side.module("model.vlm").build_vlm_wrapper, TIGHT, VISION, ADAPTER, vlm))
        for image in (PIXELS, None):
            truth, other = (
                outputs(side, run(side.array(image), side.array(ids), text_mask=side.array(REAL)))
                for ids in (TEXTS[0], np.where(REAL, *TEXTS))
            )
            for a, b in zip(truth, other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12, err_msg=f"{vlm.arch}, image {image is not None}")


def outputs(side: Side, output: Any) -> list[np.ndarray]:
    """Of a `TransformerOutput`: logits of what is real, losses and counts."""
    each = side.module("training.loss").router_stats(output.stats)
    counted = [side.numpy(part) for stats in each for part in (stats.aux_loss, stats.expert_counts, stats.dropped)]
    return [side.numpy(output.logits)[REAL], *counted]


def check_prompts(backend: str) -> None:
    """Of ragged prompts the experts are sent what is real, and all of it."""
    side = Side(backend)
    table = parameter_table(TIGHT)
    model = side.filled(table, side.module("model.transformer").Transformer, TIGHT)
    kind, sent = side.module("model.moe").MoEMLP, []
    forward = kind.forward

    def noting(layer: Any, x: Any, valid: Any = None, **options: Any) -> Any:
        sent.append(np.ones(x.shape[:2], bool) if valid is None else side.numpy(valid))
        return forward(layer, x, valid, **options)

    stream = side.module("model.generate").stream
    with mock.patch.object(kind, "forward", noting), unjitted(backend):
        list(stream(model, PROMPTS, 1, temperature=0, prompt_lengths=LENGTHS, prefill_chunk=2))
    *read, _ = sent
    np.testing.assert_array_equal(sum(part.sum(axis=1) for part in read), LENGTHS - 1)


def check_evaluation(backend: str) -> None:
    """The held-out loss of rows that end early, one of them before it starts."""
    side, config = Side(backend), job()
    train = side.module("training.train")
    dtype = torch.float64 if backend == "torch" else jax.numpy.float64
    trainer = train.Trainer(config, "cpu", dtype=dtype)
    real = np.array([[True] * 3 + [False] * 5, [False] * 8])
    texts = np.random.default_rng(1).integers(0, VOCAB, (2, *real.shape), np.int32)
    labels = np.where(real, 1, -100).astype(np.int32)
    losses = [
        float(trainer.evaluate([{"tokens": ids, "labels": labels, "text_mask": real}])["loss"])
        for ids in (texts[0], np.where(real, *texts))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-12)


def job() -> JobConfig:
    """Text, and experts with little room."""
    model = {name: getattr(TIGHT, name) for name in TIGHT.__dataclass_fields__}
    return config_from_dict({"model": model, "train": {"batch_size": 2, "seq_len": 8, "compile_model": False}})


def unjitted(backend: str) -> contextlib.AbstractContextManager[Any]:
    return jax.disable_jit() if backend == "jax" else torch.no_grad()


PADDING_CHECKS: Mapping[str, tuple[Callable[[str], None], ...]] = {
    "model.vlm": (check_wrappers,),
    "model.decode": (check_prompts,),
    "model.request": (check_prompts,),
    "training.train": (check_evaluation,),
    "training.objective": (check_evaluation,),
}
