"""Commands that write are one process, but for training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared_config.cli import main
from shared_config.commands import NAMES
from shared_config.commands.line import HARMLESS
from shared_config.commands.processes import SIZES, require_one_process
from shared_config.errors import UserError
from shared_config.training.launch import launch_sizes

ROOT = Path(__file__).parents[2]

LINES = {
    "train": ("debug", "--backend=torch", "--output=out"),
    "trace": ("debug", "--backend=torch", "--output=out"),
    "record": ("ours.py:ours", "--output=out"),
    "validate": ("debug",),
    "generate": ("debug", "--backend=torch", "--prompt=a"),
    "convert": ("source", "--output=out"),
    "compare": ("a", "b", "--report=out"),
    "prepare": ("a", "--tokenizer=bytes", "--output=out"),
    "chat": ("debug", "--backend=torch"),
    "eval": ("debug", "--backend=torch"),
    "show": ("debug",),
    "compile": ("debug", "--topology=v5e:2x2"),
    "bench": ("debug", "--backend=torch"),
    "launch": ("debug", "--backend=torch", "--slurm"),
    "report": ("run",),
    "completion": ("bash",),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("command", NAMES)
def test_one_of_several_processes_is_refused(
    tmp_path: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "2")
    for backend in ("torch", "jax"):
        status = main([command, *(part.replace("torch", backend) for part in LINES[command])])
        assert status == (0 if command in HARMLESS else 2)
        together = command == "train" and name in launch_sizes(backend)
        said = f"{name} = 2: {'of several processes each needs' if together else 'must be 1'}"
        assert (said in capsys.readouterr().err) == (status == 2)
        assert list(tmp_path.iterdir()) == []


def test_a_batch_script_that_could_start_several_processes_is_one() -> None:
    """What sbatch sets, and what srun adds for each process that it starts."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_JOB_NUM_NODES": "2"}
    require_one_process(batch)
    require_one_process({**batch, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS = 8"):
        require_one_process({**batch, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"})


JOINED = """
import os
import sys
from pathlib import Path
from tests.jobs import text_job
backend, rank, port, folder = sys.argv[1:]
if backend == "torch":
    import torch.distributed
    from kempnerforge_torch.training.train import train
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=int(rank), world_size=2)
else:
    import jax
    from kempnerforge_jax.training.train import train
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
train(text_job(Path(folder), train={"max_steps": 1}), device="cpu")
if backend == "jax":
    jax.distributed.shutdown()  # waits for the other, which dies of one that is gone
os._exit(0)  # threads of gloo can abort an interpreter that ends
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_processes_that_a_library_joined_train_once(tmp_path: Path, backend: str) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, backend, str(rank), str(port), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert [line["tokens"] for line in run_metrics(tmp_path / "run")] == [2 * 3 * 10]


def run_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", ["", "1", "0", "01", "no number"])
def test_one_process_is_let_through(value: str) -> None:
    require_one_process(dict.fromkeys(SIZES, value))
    with pytest.raises(UserError):
        require_one_process({"WORLD_SIZE": "16"})


@pytest.mark.parametrize("layout", ["--distributed.tp=2", "--distributed.dp_replicate=2", "--distributed.dp_shard=4"])
@pytest.mark.parametrize("command", ["train", "trace", "generate"])
def test_layouts_over_devices_are_refused(
    tmp_path: Path, command: str, layout: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, *LINES[command], layout]) == 2
    assert "distributed." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
