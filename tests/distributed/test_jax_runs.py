"""Runs of ``kempnerforge train --backend jax`` on several devices: the losses of one device, whichever layout a run was
started in and goes on with, and torch goes on from it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kempnerforge_jax.distributed.mesh import open_mesh
from shared_config.errors import ConfigError
from tests.distributed.speeds import check_speeds
from tests.jobs import tiny_job

ROOT = Path(__file__).parents[2]
JOB = ("--train.max_steps=6", "--eval.steps=2", "--eval.interval=1", "--scheduler.name=constant", "--model.dim=32",
       "--model.n_layers=2", "--model.n_heads=4", "--model.n_kv_heads=4", "--train.seq_len=24",
       "--metrics.peak_tflops=1")  # fmt: skip


def train(folder: Path, backend: str, devices: int, rows: int, *flags: str) -> "subprocess.CompletedProcess[str]":
    """A run with so many rows for each data rank."""
    given = os.environ.get("XLA_FLAGS", "")
    environment = {**os.environ, "XLA_FLAGS": f"{given} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "shared_config.cli", "train", "debug", "--backend", backend]
    options = [f"--checkpoint.dir={folder}", f"--train.batch_size={rows}", *JOB, *flags]
    return subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def losses(folder: Path) -> list[float]:
    """Those of all records, held-out ones too."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records for name in ("loss", "heldout_loss") if name in record]


def test_any_layout_and_backend_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    """And what it says of its speed is of all devices together."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert train(alone, "jax", 1, 4).returncode == 0
    for axis, devices, begun, steps in (("tp", 8, 0, 3), ("cp", 4, 3, 5)):
        done = train(spread, "jax", devices, 8 // devices, f"--distributed.{axis}=2", f"--train.max_steps={steps}")
        assert done.returncode == 0, done.stderr
        check_speeds(spread, done.stdout + done.stderr, devices, begun)
    assert train(spread, "torch", 1, 4).returncode == 0
    assert losses(spread) == pytest.approx(losses(alone), abs=1e-5)


def test_a_layout_that_does_not_fit_the_devices_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "jax", 4, 2, "--distributed.tp=3")
    assert done.returncode == 2
    assert (
        "distributed.dp_shard = -1: dp_replicate 1 * dp_shard 1 * cp 1 * tp 3 * pp 1 = 3 must equal the world size 4"
        in (" ".join(done.stderr.split()))
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("platform", "layout", "problem"),
    [
        ("cpu", {"pp": 2}, "distributed.pp = 2: must be 1 for backend jax"),
        ("gpu", {"tp": 2}, "distributed.tp = 2: must be 1 for backend jax on GPUs"),
        (
            "cpu",
            {"tp": 2, "dp_shard": 2},
            "dp_shard = 2: dp_replicate 1 * dp_shard 2 * cp 1 * tp 2 * pp 1 = 4",
        ),
    ],
)
def test_layouts_that_jax_has_not_are_refused(platform: str, layout: dict[str, int], problem: str) -> None:
    job = tiny_job({"n_heads": 4, "n_kv_heads": 4}, distributed=layout, train={"grad_accum_steps": 2})
    with pytest.raises(ConfigError, match=re.escape(problem)):
        open_mesh(job, [device_of(platform)] * 2)


def device_of(platform: str) -> Any:
    return SimpleNamespace(platform=platform)


def test_one_device_needs_no_mesh() -> None:
    assert open_mesh(tiny_job(), [device_of("cpu")]) is None
