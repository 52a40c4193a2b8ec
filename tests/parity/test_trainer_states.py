"""Both trainers with their switches crossed pairwise: in float64 the same updates, losses, counts and evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch

from kempnerforge_jax.training.train import Trainer as JaxTrainer
from kempnerforge_torch.training.train import Trainer as TorchTrainer
from shared_config import load_config
from shared_config.schema import JobConfig
from tests.covering import Row, covered, covering, pairs
from tests.jobs import IGNORED
from tests.tolerance import assert_all_same_function

SMALL = (
    "--model.dim=12", "--model.n_layers=2", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.head_dim=4",
    "--model.vocab_size=19", "--model.ffn_hidden_dim=10", "--model.max_seq_len=32", "--model.init_std=0.2",
    "--train.batch_size=2", "--train.seq_len=8", "--train.mixed_precision=fp32", "--train.compile_model=false",
    "--optimizer.lr=0.01", "--optimizer.weight_decay=0.3", "--scheduler.warmup_steps=3", "--eval.steps=1",
)  # fmt: skip
VISION = (
    "--vlm.max_text_len=8", "--vision_encoder.type=random", "--vision_encoder.feature_dim=6",
    "--vision_encoder.num_tokens=3", "--vision_encoder.image_size=2", "--vision_encoder.n_layers=0",
    "--vision_encoder.n_heads=0", "--vision_encoder.patch_size=0", "--adapter.type=linear",
)  # fmt: skip
PRESETS = {"text": "debug", **{arch: f"debug_vlm_{arch}" for arch in ("cross_attention", "mot", "moma")}}
EXPERTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "balanced": {"num_experts": 3, "moe_top_k": 2, "moe_router": "sigmoid_topk", "moe_sequence_aux_loss_weight": 0.1},
    "limited": {"num_experts": 3, "moe_top_k": 1, "moe_capacity_factor": 0.6, "moe_gradient_scale": True},
}
SWITCHES: dict[str, tuple[Any, ...]] = {
    "arch": tuple(PRESETS),
    "experts": tuple(EXPERTS),
    "micro_batches": (1, 2),
    "documents": (False, True),
    "padding": (False, True),
    "tied": (False, True),
    "clip": (0.0, 0.1),
    "recomputed": ("none", "full", "narrow", "selective"),
    "scanned": (False, True),
    "frozen": (False, True),
}


def goes_together(row: Row) -> bool:
    """Whether a job takes these switches at once; each rule is of two of them, or follows from such."""
    arch = row.get("arch")
    if row.get("documents") and row.get("frozen"):
        return False
    if arch == "moma" and row.get("experts") not in (None, "dense"):
        return False
    return not (row.get("documents") and arch not in (None, "text")) and not (row.get("frozen") and arch == "text")


STATES = covering(SWITCHES, goes_together)


def test_every_pair_of_values_occurs() -> None:
    possible = [pair for pair in pairs(SWITCHES) if goes_together(dict(pair))]
    assert not [pair for pair in possible if not any(covered(row, [pair]) for row in STATES)]
    assert len(STATES) < 20


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def job_of(row: Row) -> JobConfig:
    model = {"tie_embeddings": row["tied"], "moe_frequency": 1, "num_experts": 0, **EXPERTS[row["experts"]]}
    options = [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in model.items()
    ]
    options += [f"--train.grad_clip_norm={row['clip']}", f"--train.activation_checkpointing={row['recomputed']}"]
    options += [f"--train.scan_layers={json.dumps(row['scanned'])}", f"--train.grad_accum_steps={row['micro_batches']}"]
    if row["arch"] != "text":
        frozen = '[{module = "adapter"}]' if row["frozen"] else "[]"
        options += [*VISION, f"--vlm.freeze={frozen}"]
    return load_config(PRESETS[row["arch"]], [*SMALL, *options])


def batch_of(job: JobConfig, row: Row, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (2, 8)
    ids, labels = (rng.integers(0, job.model.vocab_size, shape, dtype=np.int32) for _ in range(2))
    labels[rng.random(shape) < 0.1 + 0.2 * (seed % 3)] = IGNORED
    batch: dict[str, np.ndarray] = {"tokens" if job.vlm is None else "input_ids": ids, "labels": labels}
    if row["documents"]:
        batch["doc_ids"] = np.cumsum(rng.random(shape) < 0.3, axis=1).astype(np.int32)
    if row["padding"]:
        batch["text_mask"] = np.arange(8) < rng.integers(4, 9, (2, 1))
        batch["labels"] = np.where(batch["text_mask"], labels, np.int32(IGNORED))
    if job.vlm is not None:
        batch["pixel_values"] = rng.uniform(-1, 1, (2, 3, 2, 2)).astype(np.float32)
    return batch


def results(trainer: Any, job: JobConfig, row: Row) -> dict[str, Any]:
    """What two updates give, and an evaluation before, between and after them."""
    count = row["micro_batches"]
    batches = [batch_of(job, row, seed) for seed in range(2 * count + 1)]
    found = {"heldout": np.array(float(trainer.evaluate(batches[-1:])["loss"]))}
    for step in range(2):
        metrics = trainer.step(batches[step * count : (step + 1) * count])
        found |= {f"{name} {step}": np.array(float(value)) for name, value in metrics.items()}
        found[f"heldout {step}"] = np.array(float(trainer.evaluate(batches[-1:])["loss"]))
    state = trainer.state()
    return {**found, **state.weights, **{f"optimizer {name}": value for name, value in state.optimizer.items()}}


@pytest.mark.parametrize("place", range(len(STATES)))
def test_both_trainers_do_the_same(place: int) -> None:
    row = STATES[place]
    job = job_of(row)
    found = [
        results(trainer, job, row)
        for trainer in (TorchTrainer(job, "cpu", dtype=torch.float64), JaxTrainer(job, "cpu", dtype=jax.numpy.float64))
    ]
    assert {"loss 1", "grad_norm 1", "heldout 1"} <= found[0].keys()
    assert_all_same_function(*found, limit=1e-10, context=row)
