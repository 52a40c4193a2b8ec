"""What one of two processes does to the other where NCCL joins them: it fails, is killed or asked to stop.
To be run on two GPUs: JAX_PLATFORMS=cuda,cpu python -m pytest -n 0 -m gpu tests/distributed/test_nccl.py
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from kempnerforge_jax.distributed.processes import DEAD_AFTER
from shared_config.cli import main
from shared_config.interchange import checkpoint
from shared_config.interchange.toml import config_to_toml
from tests.distributed.test_failures import BROKEN, ended_by
from tests.distributed.test_killed_runs import KILLED, ROWS, STEPS, losses, run_unlucky
from tests.jobs import text_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WITHIN = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job in float32, and what one GPU does with it in torch."""
    folder = tmp_path_factory.mktemp("nccl")
    precise = {"mixed_precision": "fp32", "matmul_precision": "highest"}
    job = text_job(folder, train={"max_steps": STEPS, "grad_accum_steps": 4, **precise})
    (folder / "job.toml").write_text(config_to_toml(job))
    assert main(["train", str(folder / "job.toml"), "--backend=torch", "--device=cuda:0", "--quiet"]) == 0
    return folder


@pytest.mark.parametrize(
    ("event", "unlucky"), [("a stage", 1), ("whom the other does not hear", 0), ("before it joins", 1)]
)
def test_all_end_and_one_error_is_shown(event: str, unlucky: int, tmp_path: Path) -> None:
    assert ended_by(event, unlucky, tmp_path, "cuda") == ([2, 2], ["kempnerforge: " + "rank 1: " * unlucky + BROKEN])


@pytest.mark.parametrize(("backend", "unlucky"), [("torch", 0), ("torch", 1), ("jax", 1)])
def test_where_one_is_killed_the_other_ends_and_one_gpu_continues(
    backend: str, unlucky: int, folder: Path, tmp_path: Path
) -> None:
    run, began = tmp_path / "run", time.monotonic()
    ended = run_unlucky(folder, run, backend, KILLED, moment=3, unlucky=unlucky, device="cuda")
    assert ended[unlucky][0] == -signal.SIGKILL, ended
    assert ended[1 - unlucky][0] != 0
    assert time.monotonic() - began < 3 * DEAD_AFTER
    assert checkpoint.load(run).rows == 3 * ROWS
    for other in ("torch", "jax"):
        shutil.copytree(run, tmp_path / other)
        arguments = [f"--backend={other}", f"--output={tmp_path / other}", "--device=cuda:0", "--quiet"]
        assert main(["train", str(tmp_path / other), *arguments]) == 0
        assert losses(tmp_path / other) == pytest.approx(losses(folder / "run"), abs=WITHIN)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_where_one_is_asked_to_stop_both_do_after_the_same_step(backend: str, folder: Path, tmp_path: Path) -> None:
    event = "os.kill(os.getpid(), signal.SIGTERM)"
    ended = run_unlucky(folder, tmp_path / "run", backend, event, moment=2, unlucky=1, device="cuda")
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert [said.count("SIGTERM: stopped after step 3 of 8") for _, said in ended] == [1, 0]
    assert checkpoint.load(tmp_path / "run").parts.step == 3
