"""Small training jobs, their batches, and runs of them that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.contract.parameters import parameter_table
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import Checkpoint, TrainingState
from shared_config.interchange.toml import config_from_dict, config_to_toml
from shared_config.schema.job import JobConfig
from tests.oracle.optimizer import AdamWState, initial_state
from tests.oracle.training import StepOptions, parameters, training_step

ROOT = Path(__file__).parents[1]
IGNORED = -100

MODEL = {
    "dim": 24,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 37,
    "ffn_hidden_dim": 40,
    "max_seq_len": 32,
    "qk_norm": True,
    "init_std": 0.2,
}
EXPERTS = {
    "num_experts": 5,
    "moe_top_k": 2,
    "moe_frequency": 2,
    "moe_router": "sigmoid_topk",
    "moe_sequence_aux_loss_weight": 0.5,
    "moe_router_z_loss_weight": 0.01,
    "moe_packed_experts": True,
}
KILLED_RUN = """
import os, signal, sys
from kempnerforge_{backend}.training.train import Trainer, train
from shared_config.loader import load_config
step, moment = Trainer.step, int(sys.argv[2])
def killing(trainer, micro_batches):
    if trainer.updates == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, micro_batches)
Trainer.step = killing
train(load_config(sys.argv[1]))
"""


def tiny_job(model: Mapping[str, Any] | None = None, **sections: Any) -> JobConfig:
    """A float32 job that takes milliseconds per step; ``sections`` are merged into its own."""
    fields: dict[str, dict[str, Any]] = {
        "model": {**MODEL, **(model or {})},
        "train": {
            "batch_size": 3,
            "seq_len": 10,
            "max_steps": 12,
            "mixed_precision": "fp32",
            "compile_model": False,
            "grad_clip_norm": 0.5,
        },
        "optimizer": {"lr": 0.01, "weight_decay": 0.3},
        "scheduler": {"warmup_steps": 3},
        "eval": {"steps": 2},
    }
    for name, section in sections.items():
        fields[name] = {**fields.get(name, {}), **section}
    return config_from_dict(fields)


def draw_batch(job: JobConfig, seed: int, ignored: float = 0.2) -> dict[str, np.ndarray]:
    """A micro-batch of random ids; about a share ``ignored`` of the labels is -100."""
    rng = np.random.default_rng(seed)
    shape = (job.train.batch_size, job.train.seq_len)
    tokens, labels = (rng.integers(0, job.model.vocab_size, shape, dtype=np.int32) for _ in range(2))
    return {"tokens": tokens, "labels": np.where(rng.random(shape) < ignored, np.int32(IGNORED), labels)}


def joined(*batches: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One batch of all their rows."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def text_job(folder: Path, model: Mapping[str, Any] | None = None, **sections: Any) -> JobConfig:
    """A byte-level job on a small text, in ``folder`` / run."""
    text = folder / "text.txt"
    if not text.exists():
        words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and"], 900)
        text.write_text(" ".join(words))
    sections = {
        "data": {"path": str(text), "heldout_fraction": 0.2},
        "checkpoint": {"dir": str(folder / "run"), "interval": 3},
        **sections,
    }
    return tiny_job({"vocab_size": 260, "max_seq_len": 32, **(model or {})}, **sections)


def environment_of_killed() -> dict[str, str]:
    """Variables of a process that a test will kill: it writes nothing to the cache of compiled programs, for the kill
    could tear an entry, and torn entries stay.
    """
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def run_killed(job: JobConfig, backend: str, moment: int) -> None:
    """Start or go on with the job in a process of its own, killed (SIGKILL) at the start of step ``moment``."""
    config = Path(job.checkpoint.dir).with_suffix(".toml")
    config.write_text(config_to_toml(job))
    code = KILLED_RUN.format(backend=backend)
    done = subprocess.run(
        [sys.executable, "-c", code, str(config), str(moment)],
        env=environment_of_killed(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def last_checkpoint(job: JobConfig) -> Checkpoint:
    return checkpoint.load(job.checkpoint.dir)


def run_folder(path: Path, name: str) -> dict[str, Any]:
    """A checkpoint section with a folder of this name."""
    return {"dir": str(path / name), "interval": 3}


def assert_same_bits(state: TrainingState, truth: TrainingState) -> None:
    """Equal steps, names in equal order, equal bytes."""
    assert state.step == truth.step
    for values, truths in ((state.weights, truth.weights), (state.optimizer, truth.optimizer)):
        assert list(values) == list(truths)
        for name, value in values.items():
            assert value.tobytes() == truths[name].tobytes(), name


def oracle_steps(
    job: JobConfig, weights: Mapping[str, np.ndarray], batches: list[dict[str, np.ndarray]], rates: list[float]
) -> tuple[list[float], dict[str, np.ndarray], AdamWState]:
    """Total losses, weights and moments after one update per batch, in NumPy float64."""
    decayed = [name for name, spec in parameter_table(job.model).items() if spec.decay]
    values = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    state = initial_state(parameters(values))
    losses = []
    for batch, lr in zip(batches, rates, strict=True):
        options = StepOptions(
            lr=lr,
            betas=job.optimizer.betas,
            eps=job.optimizer.eps,
            weight_decay=job.optimizer.weight_decay,
            max_norm=job.train.grad_clip_norm,
        )
        loss, values, state = training_step(
            values, state, job.model, batch["tokens"], batch["labels"], options, decayed
        )
        losses.append(loss)
    return losses, values, state
