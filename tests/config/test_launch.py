"""What launchers tell each of the processes that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kempnerforge_jax.distributed.processes import _own_gpus
from shared_config.commands.processes import world_size
from shared_config.errors import UserError
from shared_config.training.launch import Launch, first_host, is_launched, launch_of, rank_of

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234567",
}


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
EXPLICIT = {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "3", "JAX_COORDINATOR_ADDRESS": "[fe80::1]:77"}


def test_torchrun_and_srun_are_understood() -> None:
    assert launch_of(TORCHRUN) == Launch(3, 4, 1, "one", 29500, "torchrun")
    assert launch_of(SLURM) == Launch(5, 8, 1, "gpu03", 34567, "srun")
    assert launch_of({**SLURM, "MASTER_ADDR": "two", "MASTER_PORT": "7"}) == Launch(5, 8, 1, "two", 7, "srun")
    assert launch_of(SLURM | TORCHRUN) == launch_of(TORCHRUN), "torchrun inside a step of SLURM"
    assert [rank_of(each) for each in (TORCHRUN, SLURM, {}, {"RANK": "3"}, {"WORLD_SIZE": "2"})] == [3, 5, 0, 0, 0]
    assert [world_size("torch", each) for each in (TORCHRUN, SLURM, {})] == [4, 8, 1]
    assert [world_size("jax", each) for each in (TORCHRUN, SLURM, EXPLICIT, {})] == [4, 8, 3, 1]


def test_jax_has_launchers_of_its_own_and_a_place_to_meet() -> None:
    found = [launch_of(each, "jax") for each in (TORCHRUN, SLURM, EXPLICIT)]
    assert found == [
        Launch(3, 4, 1, "one", 29501, "torchrun"),
        Launch(5, 8, 1, "gpu03", 34567, "srun"),
        Launch(1, 3, 0, "[fe80::1]", 77, "JAX"),
    ]
    mpi = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}
    assert launch_of(mpi, "jax") == Launch(2, 4, 0, "", 0, "mpirun")
    meeting = {"JAX_COORDINATOR_ADDRESS": "there:9"}
    for each, rank in ((TORCHRUN, 3), (SLURM, 5), (OPEN_MPI, 2)):
        launch = launch_of({**each, **meeting}, "jax")
        assert launch is not None
        assert (launch.rank, launch.address, launch.port) == (rank, "there", 9)
    assert launch_of({**TORCHRUN, **EXPLICIT}, "jax") == launch_of(EXPLICIT, "jax")
    assert launch_of(EXPLICIT) is launch_of(OPEN_MPI) is launch_of(meeting, "jax") is None
    assert [rank_of(each) for each in (OPEN_MPI, EXPLICIT)] == [2, 1]
    assert all(map(is_launched, (TORCHRUN, SLURM, OPEN_MPI, EXPLICIT)))
    assert not is_launched(meeting)


@pytest.mark.parametrize("port", [1024, 20_000, 29_500, 39_999, 65_535])
def test_jax_waits_beside_torchrun(port: int) -> None:
    """Below the ports that systems give away from 32768 on, if it can, and never on torchrun's own."""
    launch = launch_of({**TORCHRUN, "MASTER_PORT": str(port)}, "jax")
    assert launch is not None
    assert launch.port != port
    assert 20_000 <= launch.port < 40_000


@pytest.mark.parametrize(
    ("variables", "shares"),
    [
        (TORCHRUN, False),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, False),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, True),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, False),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1,7"}, True),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, True),
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "a:1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        (EXPLICIT, False),
    ],
)
def test_processes_that_share_a_machine_are_known(variables: dict[str, str], shares: bool) -> None:
    launch = launch_of(variables, "jax")
    assert launch is not None
    assert launch.shares_machine == shares


@pytest.mark.parametrize(
    ("launch", "visible", "own"),
    [
        (Launch(5, 8, 1, "a", 1, "srun", True), None, [1]),
        (Launch(5, 8, 1, "a", 1, "srun", True), "4,5", [1]),
        (Launch(5, 8, 1, "a", 1, "srun", True), "5", None),
        (Launch(5, 8, 0, "a", 1, "srun", False), "4,5", None),
    ],
)
def test_processes_of_a_machine_take_its_gpus_in_turn(
    launch: Launch, visible: str | None, own: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _own_gpus(launch) == own
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0")
    assert _own_gpus(launch) is None


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


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({**OPEN_MPI}, "OMPI_COMM_WORLD_SIZE = 4: of several processes each needs JAX_COORDINATOR_ADDRESS, too"),
        ({**EXPLICIT, "JAX_PROCESS_ID": ""}, "JAX_NUM_PROCESSES = 3: of several processes each needs JAX_PROCESS_ID"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "3"}, "rank = 3: must be below the number of processes, 3"),
        ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS = here: must be host:port"),
        ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "here:"}, "port of JAX_COORDINATOR_ADDRESS = : must be a number"),
    ],
)
def test_what_jax_needs_of_a_launcher_is_named(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        launch_of(variables, "jax")


def test_processes_that_know_nothing_of_each_other_are_refused() -> None:
    for backend, environment in (
        ("jax", {"PMI_SIZE": "2"}),
        ("torch", EXPLICIT),
        ("torch", {"PMI_SIZE": "2"}),
        ("torch", TORCHRUN | {"PMI_SIZE": "4"}),
    ):
        with pytest.raises(UserError, match="must be 1; each process would do the same"):
            world_size(backend, environment)
