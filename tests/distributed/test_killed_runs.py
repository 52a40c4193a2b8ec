"""Runs of which one process is killed at a drawn moment, fails or is asked to stop: all end, what is left is whole, and
a run of any size of either backend continues with the same losses. By day `test_torch_runs` kills one.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from kempnerforge_jax.distributed.processes import DEAD_AFTER
from shared_config.cli import main
from shared_config.interchange import checkpoint
from shared_config.interchange.toml import config_to_toml
from tests.distributed.jax_processes import environments
from tests.jobs import environment_of_killed, text_job

pytestmark = pytest.mark.skipif(
    settings.get_current_profile_name() != "nightly", reason="minutes of runs: HYPOTHESIS_PROFILE=nightly"
)
STEPS, ROWS = 8, 12
WITHIN = {"torch": 1e-6, "jax": 1e-5}
UNLUCKY = """
import os, signal, sys
from kempnerforge_{backend}.training.train import Trainer
from shared_config.cli import main
step = Trainer.step
def unlucky(trainer, micro_batches):
    if trainer.updates == {moment} and os.environ[{rank!r}] == "{unlucky}":
        {event}
    return step(trainer, micro_batches)
Trainer.step = unlucky
sys.exit(main())
"""
RANK = {"torch": "RANK", "jax": "JAX_PROCESS_ID"}
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job, and what a single process of torch does with it: 12 rows for each step."""
    folder = tmp_path_factory.mktemp("killed")
    job = text_job(folder, train={"max_steps": STEPS, "grad_accum_steps": 4})
    (folder / "job.toml").write_text(config_to_toml(job))
    assert main(["train", str(folder / "job.toml"), "--backend=torch", "--device=cpu", "--quiet"]) == 0
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def environments_of(backend: str, processes: int, device: str = "cpu") -> Sequence[Mapping[str, str]]:
    """Variables of processes of torch as torchrun sets them, or of JAX with a device each."""
    found = environments(1, processes)
    if backend == "jax" and device != "cpu":
        platforms = {"JAX_PLATFORMS": f"{device},cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return [{**each, **platforms, "CUDA_VISIBLE_DEVICES": str(rank)} for rank, each in enumerate(found)]
    if backend == "jax":
        return found
    port = found[0]["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2]
    shared = {**environment_of_killed(), "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run_unlucky(
    folder: Path, run: Path, backend: str, event: str, *, moment: int, unlucky: int, device: str = "cpu"
) -> list[tuple[int, str]]:
    """The status and words of each of two processes. As they run, every checkpoint that can be seen is whole."""
    program = UNLUCKY.format(backend=backend, rank=RANK[backend], moment=moment, unlucky=unlucky, event=event)
    options = ["--checkpoint.interval=1", "--train.grad_accum_steps=2", f"--output={run}"]
    command = [sys.executable, "-c", program, "train", str(folder / "job.toml"), f"--backend={backend}", *options]
    started = [
        subprocess.Popen(
            [*command, f"--device={device}"], env=each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for each in environments_of(backend, 2, device)
    ]
    while any(process.poll() is None for process in started):
        for path in run.glob("step_*"):
            assert checkpoint.load(path).parts.step == int(path.name.removeprefix("step_"))
        time.sleep(0.2)
    return [(process.returncode, process.communicate()[0]) for process in started]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_where_one_is_killed_a_run_of_another_size_continues(backend: str, folder: Path, tmp_path: Path) -> None:
    moment, unlucky = random.randrange(1, STEPS), random.randrange(2)
    run = tmp_path / "run"
    began = time.monotonic()
    ended = run_unlucky(folder, run, backend, KILLED, moment=moment, unlucky=unlucky)
    assert ended[unlucky][0] == -signal.SIGKILL
    assert ended[1 - unlucky][0] != 0
    assert time.monotonic() - began < 3 * DEAD_AFTER
    reached = checkpoint.load(run)
    assert reached.parts.step == moment, f"process {unlucky} killed at {moment}"
    assert reached.rows == moment * ROWS
    for other in ("torch", "jax"):
        shutil.copytree(run, tmp_path / other)
        arguments = [f"--backend={other}", f"--output={tmp_path / other}", "--device=cpu", "--quiet"]
        assert main(["train", str(tmp_path / other), *arguments]) == 0
        within = WITHIN["torch" if other == backend == "torch" else "jax"]
        assert losses(tmp_path / other) == pytest.approx(losses(folder / "run"), abs=within), (moment, unlucky)


def test_where_one_of_two_is_killed_four_continue(folder: Path, tmp_path: Path) -> None:
    moment, unlucky = random.randrange(1, STEPS), random.randrange(2)
    run = tmp_path / "run"
    run_unlucky(folder, run, "torch", KILLED, moment=moment, unlucky=unlucky)
    command = [sys.executable, "-m", "shared_config.cli", "train", str(run), "--backend=torch", "--device=cpu"]
    four = [subprocess.Popen(command, env=each) for each in environments_of("torch", 4)]
    assert [process.wait(timeout=600) for process in four] == [0] * 4
    assert losses(run) == pytest.approx(losses(folder / "run"), abs=WITHIN["torch"]), (moment, unlucky)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("asked", [0, 1])
def test_where_one_is_asked_to_stop_all_do_after_the_same_step(
    backend: str, asked: int, folder: Path, tmp_path: Path
) -> None:
    event = "os.kill(os.getpid(), signal.SIGTERM)"
    ended = run_unlucky(folder, tmp_path / "run", backend, event, moment=2, unlucky=asked)
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2
    assert [said.count("SIGTERM: stopped after step 3 of 8") for _, said in ended] == [1, 0]
    assert checkpoint.load(tmp_path / "run").parts.step == 3
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("unlucky", [0, 1])
def test_where_one_fails_it_says_so_and_all_end(unlucky: int, folder: Path, tmp_path: Path) -> None:
    event = "raise OSError(5, 'broken', 'a file')"
    ended = run_unlucky(folder, tmp_path / "run", "jax", event, moment=2, unlucky=unlucky)
    assert ended[unlucky][0] == 2
    assert ended[1 - unlucky][0] != 0
    rank = "" if unlucky == 0 else "rank 1: "
    assert [said.count(f"kempnerforge: {rank}a file: broken") for _, said in ended] == [1 - unlucky, unlucky]
    assert checkpoint.load(tmp_path / "run").parts.step == 2
