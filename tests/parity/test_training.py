"""Training in both backends: the same updates, the same losses, and checkpoints that either goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kempnerforge_jax.training.train as jax_training
import kempnerforge_torch.training.train as torch_training
from shared_config.data import open_text_data
from shared_config.schema.job import JobConfig
from shared_config.training.metrics import read_metrics
from tests.jobs import EXPERTS, IGNORED, draw_batch, last_checkpoint, text_job, tiny_job
from tests.parity.head_checks import chunks_of
from tests.tolerance import assert_all_same_function

TRAINING = {"torch": torch_training, "jax": jax_training}
LOSS_TOLERANCE = 1e-5
CHOSEN_EXPERTS = EXPERTS | {
    "moe_router": "softmax_topk",
    "moe_sequence_aux_loss_weight": 0.0,
    "moe_packed_experts": False,
    "moe_capacity_factor": 0.8,
    "moe_gradient_scale": True,
    "moe_shared_experts": 1,
}


@pytest.mark.parametrize(
    "model", [{"tie_embeddings": True, "activation": "gelu", "sliding_window": 4, "logit_divisor": 3.0}, CHOSEN_EXPERTS]
)
def test_float64_steps_are_the_same(model: dict[str, Any]):
    """Two updates of two micro-batches each, documents in some, unequal numbers of labels; in JAX the logits of a few
    tokens at a time.
    """
    job = tiny_job(model)
    documents = np.repeat([[0, 1, 2]], 10, axis=1)[:, 10:20].repeat(3, axis=0).astype(np.int32)
    batches = [{**draw_batch(job, seed, 0.2 * seed), "doc_ids": documents} for seed in range(4)]
    results = []
    with jax.enable_x64(True):
        for trainer, rows in (
            (torch_training.Trainer(job, dtype=torch.float64), 10**6),
            (jax_training.Trainer(job, dtype=jnp.float64), 4),
        ):
            result: dict[str, Any] = {}
            with chunks_of(rows, job.model.vocab_size):
                for step in range(2):
                    metrics = trainer.step(batches[2 * step : 2 * step + 2])
                    result |= {f"{name} {step}": np.array(float(value)) for name, value in metrics.items()}
                result["heldout"] = np.array(float(trainer.evaluate(batches[:1])["loss"]))
            state = trainer.state()
            results.append({**result, **state.weights, **state.optimizer})
    assert_all_same_function(*results)


@pytest.mark.parametrize("backend", TRAINING)
def test_a_loss_is_a_mean_over_labels_however_few_they_are(backend: str) -> None:
    trainer, batch = TRAINING[backend].Trainer(tiny_job()), draw_batch(tiny_job(), 0)
    places = np.arange(batch["labels"].size).reshape(batch["labels"].shape)
    neither, first, second, both = (
        {**batch, "labels": np.where(np.isin(places, some), batch["labels"], IGNORED)}
        for some in ((), (4,), (17,), (4, 17))
    )
    held = [trainer.evaluate([each]) for each in (neither, first, second, both)]
    assert [each["tokens"] for each in held] == [0, 1, 1, 2]
    of_neither, of_first, of_second, of_both = (float(each["loss"]) for each in held)
    assert of_neither == 0
    assert of_both == pytest.approx((of_first + of_second) / 2, rel=1e-5)
    assert float(trainer.step([first, neither])["loss"]) == pytest.approx(of_first, rel=1e-5)


def test_losses_of_fifty_float32_steps_are_the_same(tmp_path: Path):
    job = text_job(tmp_path, train={"max_steps": 50, "grad_accum_steps": 2})
    losses = {backend: losses_of(job, backend) for backend in TRAINING}
    assert losses["torch"][-1] < losses["torch"][0] - 1
    np.testing.assert_allclose(losses["jax"], losses["torch"], rtol=LOSS_TOLERANCE, atol=0)


@pytest.mark.parametrize("first", TRAINING)
def test_a_checkpoint_goes_on_in_the_other_backend(first: str, tmp_path: Path):
    """Six steps, then six more in either backend from copies of the same folder."""
    half = text_job(tmp_path, train={"max_steps": 6}, scheduler={"decay_steps": 12})
    TRAINING[first].train(half)
    records = {}
    for backend in TRAINING:
        folder = tmp_path / f"on in {backend}"
        shutil.copytree(half.checkpoint.dir, folder)
        job = half.replace(train=half.train.replace(max_steps=12), checkpoint=half.checkpoint.replace(dir=str(folder)))
        summary = TRAINING[backend].train(job)
        assert (summary.resumed_from, summary.step) == (6, 12)
        assert last_checkpoint(job).backend == backend
        records[backend] = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records["jax"]] == list(range(1, 13))
    for name in ("loss", "grad_norm", "lr"):
        values = {backend: [record[name] for record in records[backend]] for backend in TRAINING}
        np.testing.assert_allclose(values["jax"], values["torch"], rtol=LOSS_TOLERANCE, atol=0, err_msg=name)
    assert records["jax"][-1]["heldout_loss"] == pytest.approx(records["torch"][-1]["heldout_loss"], rel=LOSS_TOLERANCE)


def losses_of(job: JobConfig, backend: str) -> list[float]:
    trainer, data = TRAINING[backend].Trainer(job), open_text_data(job)
    count = job.train.grad_accum_steps
    batches = [[data.batch(step * count + k) for k in range(count)] for step in range(job.train.max_steps)]
    return [float(trainer.step(micro_batches)["loss"]) for micro_batches in batches]
