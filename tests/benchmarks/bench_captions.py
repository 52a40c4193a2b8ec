"""What the debug_vlm presets learn, as they are: whether both backends take the same steps, and whether held-out
captions need their image. Prints one JSON line for each measurement.

    python -m tests.benchmarks.bench_captions --part steps        losses of the first 30 steps, backend against backend
    python -m tests.benchmarks.bench_captions --part captions     whole runs: loss of held-out captions with their own
                                                                  image and with another's, beside what a caption
                                                                  carries, which a model without the image can't know

Caption losses are nats of a whole caption, its end included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from shared_config import JobConfig, load_config
from shared_config.data import open_data
from shared_config.data.shapes import caption_entropy
from shared_config.interchange import checkpoint

ARCHS = ("joint_decoder", "cross_attention", "mot", "moma")
BACKENDS = ("torch", "jax")
STEPS = 30
AGREED = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--arch", choices=[*ARCHS, "all"], default="all")
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both", help="of the captions")
    parser.add_argument("--part", choices=["all", "steps", "captions"], default="all")
    options, overrides = parser.parse_known_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for arch in ARCHS if options.arch == "all" else [options.arch]:
        config = load_config(f"debug_vlm_{arch}", overrides)
        if options.part != "captions":
            report(arch=arch, **compare_steps(config))
        for backend in BACKENDS if options.backend == "both" else [options.backend]:
            if options.part != "steps":
                report(arch=arch, backend=backend, **measure_captions(config, backend))


def report(**numbers: Any) -> None:
    print(json.dumps({key: float(f"{n:.6g}") if isinstance(n, float) else n for key, n in numbers.items()}), flush=True)


def compare_steps(config: JobConfig) -> dict[str, Any]:
    """The largest relative difference between the backends' losses at any step."""
    data, losses = open_data(config), {}
    for backend in BACKENDS:
        trainer = new_trainer(config, backend)
        losses[backend] = np.array([float(trainer.step([data.batch(step)])["loss"]) for step in range(STEPS)])
    gaps = np.abs(losses["jax"] / losses["torch"] - 1)
    return {
        "steps": STEPS,
        "loss": [float(losses["torch"][0]), float(losses["torch"][-1])],
        "largest_difference": float(gaps.max()),
        "at_step": int(gaps.argmax()) + 1,
        "agree": bool(gaps.max() <= AGREED),
    }


def measure_captions(config: JobConfig, backend: str) -> dict[str, Any]:
    """Train as `kempnerforge train` does; then the loss of held-out captions."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = load_config_in(config, folder)
        summary = import_module(f"kempnerforge_{backend}.training.train").train(run, device="cpu")
        seconds = time.perf_counter() - started
        assert summary.checkpoint is not None
        trainer = new_trainer(run, backend)
        trainer.load_state(checkpoint.load(summary.checkpoint).state)
    heldout = open_data(config).heldout()
    captions = sum(len(batch["labels"]) for batch in heldout)
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in heldout) / captions
    own, other = (float(trainer.evaluate(batches)["loss"]) * tokens for batches in (heldout, shuffled(heldout)))
    return {
        "steps": config.train.max_steps,
        "seconds": seconds,
        "captions": captions,
        "heldout_loss": own,
        "with_other_images": other,
        "entropy_without_image": caption_entropy(),
        "heldout_loss_a_token": own / tokens,
    }


def new_trainer(config: JobConfig, backend: str) -> Any:
    return import_module(f"kempnerforge_{backend}.training.train").Trainer(config, "cpu")


def load_config_in(config: JobConfig, folder: str) -> JobConfig:
    return config.replace(checkpoint=config.checkpoint.replace(dir=folder))


def shuffled(batches: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Every caption beside another's image."""
    return [{**batch, "pixel_values": np.roll(batch["pixel_values"], 1, axis=0)} for batch in batches]


if __name__ == "__main__":
    main()
