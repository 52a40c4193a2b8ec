"""What a model does is the same whatever device the caller's own tensors are made on (`torch.set_default_device`).

Where it is "meta", a tensor that is made without its device has no values, and the call fails.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kempnerforge_torch.model.generate import generate
from kempnerforge_torch.parity import record
from kempnerforge_torch.training.train import Trainer
from shared_config.loader import load_config
from shared_config.parity.images import pixels
from shared_config.schema.job import JobConfig
from tests.jobs import draw_batch

WRITERS = ("debug", "debug_moe", "debug_vlm_joint_decoder", "debug_vlm_cross_attention", "debug_vlm_mot")
PRESETS = (*WRITERS, "debug_vlm_moma")


def small(preset: str, *overrides: str) -> JobConfig:
    sizes = ("--model.n_layers=2", "--train.seq_len=12", "--train.batch_size=2", "--train.grad_accum_steps=1")
    return load_config(preset, [*sizes, *overrides])


def batch_of(job: JobConfig) -> dict[str, np.ndarray]:
    batch, images = draw_batch(job, 0), pixels(job, job.train.batch_size, 0)
    if images is None:
        return batch
    return {"input_ids": batch["tokens"], "labels": batch["labels"], "pixel_values": images.astype(np.float32)}


def written(model: Any, batch: dict[str, np.ndarray], count: int, compile: bool = False) -> Tensor:
    tokens = torch.from_numpy(batch["tokens" if "tokens" in batch else "input_ids"])
    images = batch.get("pixel_values")
    return generate(model, tokens, count, seed=0, pixel_values=images, compile=compile)


@pytest.mark.parametrize("preset", PRESETS)
def test_steps(preset: str) -> None:
    job = small(preset)
    batch, losses = batch_of(job), []
    for device in ("cpu", "meta"):
        trainer = Trainer(job, "cpu")
        with torch.device(device):
            losses.append([float(trainer.step([batch])["loss"]) for _ in range(2)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("preset", WRITERS)
@pytest.mark.parametrize("count", [0, 3])
def test_generation(preset: str, count: int) -> None:
    job = small(preset)
    model, batch = Trainer(job, "cpu").model, batch_of(job)
    expected = written(model, batch, count)
    with torch.device("meta"):
        found = written(model, batch, count)
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", ["debug", "debug_vlm_mot"])
def test_compiled(preset: str) -> None:
    """Which follows the caller's mode into each operation."""
    job = small(preset, "--train.compile_model=true")
    batch = batch_of(job)
    with torch.device("cpu"):
        trainer = Trainer(job, "cpu")
        assert np.isfinite(float(trainer.step([batch])["loss"]))
        compiled, plain = (written(trainer.model, batch, 3, on) for on in (True, False))
    assert torch.equal(compiled, plain)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_recordings_with_deltas() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.ones(3, 4)
    plain = record(model, (x,), deltas=3)
    with torch.device("meta"):
        found = record(model, (x,), deltas=3)
    assert plain.tensors.keys() == found.tensors.keys()
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)
    assert plain.meta.deltas == found.meta.deltas
