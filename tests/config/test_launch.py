"""What launchers tell each of the processes that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared_config.commands.processes import world_size
from shared_config.errors import UserError
from shared_config.training.launch import Launch, first_host, launch_of, rank_of

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234567",
}


def test_torchrun_and_srun_are_understood() -> None:
    assert launch_of(TORCHRUN) == Launch(3, 4, 1, "one", 29500, "torchrun")
    assert launch_of(SLURM) == Launch(5, 8, 1, "gpu03", 34567, "srun")
    assert launch_of({**SLURM, "MASTER_ADDR": "two", "MASTER_PORT": "7"}) == Launch(5, 8, 1, "two", 7, "srun")
    assert launch_of(SLURM | TORCHRUN) == launch_of(TORCHRUN), "torchrun inside a step of SLURM"
    assert [rank_of(each) for each in (TORCHRUN, SLURM, {}, {"RANK": "3"}, {"WORLD_SIZE": "2"})] == [3, 5, 0, 0, 0]
    assert [world_size("torch", each) for each in (TORCHRUN, SLURM, {})] == [4, 8, 1]


@pytest.mark.parametrize(("size", "ends"), [("1", True), ("2", False)])
def test_one_of_several_processes_leaves_without_the_end_of_its_interpreter(size: str, ends: bool) -> None:
    script = (
        "import atexit, sys; from shared_config.cli import main\natexit.register(print, 'the end')\nsys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": size}
    command = [sys.executable, "-c", script, "show", "debug"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    assert ("the end" in done.stdout) == ends


@pytest.mark.parametrize("alone", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "many"}, {"SLURM_NTASKS": "8"}])
def test_one_process_has_no_launch(alone: dict[str, str]) -> None:
    assert launch_of(alone) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("one", "one"), ("a,b", "a"), ("gpu[03-05,9],x", "gpu03"), ("gpu[7,9]-ib,x", "gpu7-ib"), ("n[1-2]", "n1")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "WORLD_SIZE"])
def test_what_a_launcher_leaves_out_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"WORLD_SIZE = 4: of several processes each needs {name}, too"):
        launch_of({**TORCHRUN, name: ""})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "first"}, "RANK = first: must be a number"),
        ({"RANK": "4"}, "rank = 4: must be below the number of processes, 4"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT = -1: must be a number"),
    ],
)
def test_numbers_that_can_not_be(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        launch_of(TORCHRUN | changes)


def test_processes_that_know_nothing_of_each_other_are_refused() -> None:
    for backend, environment in (
        ("jax", TORCHRUN),
        ("torch", {"PMI_SIZE": "2"}),
        ("torch", TORCHRUN | {"PMI_SIZE": "4"}),
    ):
        with pytest.raises(UserError, match="must be 1; each process would do the same"):
            world_size(backend, environment)
