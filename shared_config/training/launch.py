"""Which of several processes this one is, as launchers tell it: torchrun, srun of SLURM, mpirun, variables of JAX."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from shared_config.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"
COORDINATOR = "JAX_COORDINATOR_ADDRESS"
EXPLICIT = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", COORDINATOR)
FIRST_PORT, PORTS = 20_000, 20_000

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Launch:
    """A process among ``world_size`` that were started together.

    Attributes:
        rank: its number, from 0.
        local_rank: its number among those of its machine.
        address, port: where rank 0 waits for the others; "" and 0 where JAX finds it.
        launcher: "torchrun", whose own process waits there, "srun", "mpirun", or "JAX" for its variables.
        shares_machine: whether another process runs on the same machine.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    launcher: str
    shares_machine: bool = False


def launch_of(environment: Environment = os.environ, backend: str = "torch") -> Launch | None:
    """What a launcher that a backend works with says; None where this is the only process.

    Under SLURM the processes meet on the first machine of the step, on a port that the job's number gives, unless
    ``MASTER_ADDR`` and ``MASTER_PORT`` say otherwise. Those of JAX meet at ``JAX_COORDINATOR_ADDRESS`` (host:port), if
    it is set, whatever started them.

    Raises:
        UserError: a part of what a launcher sets is missing or not a number.
    """
    launchers = (launcher for size, launcher in _LAUNCHERS[backend].items() if _size(environment, size) > 1)
    launcher = next(launchers, None)
    if launcher is None:
        return None
    launch = launcher(environment)
    if launch.rank >= launch.world_size:
        raise UserError(f"rank = {launch.rank}: must be below the number of processes, {launch.world_size}")
    return launch


def is_launched(environment: Environment = os.environ) -> bool:
    """Whether a launcher started several processes, of which this is one."""
    return any(_size(environment, size) > 1 for _, size in _NUMBERS)


def rank_of(environment: Environment = os.environ) -> int:
    """The number of this process, even where what a launcher sets is incomplete; 0 without one."""
    for rank, size in _NUMBERS:
        value = environment.get(rank, "")
        if _size(environment, size) > 1 and value.isdecimal():
            return int(value[:9])
    return 0


def launch_sizes(backend: str) -> tuple[str, ...]:
    """The variables in which launchers that a backend works with say how many processes there are."""
    return tuple(_LAUNCHERS[backend])


def first_host(nodes: str) -> str:
    """The first of a list of machines as SLURM writes it: "gpu[03-05,9],login" is gpu03."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


def _torchrun(environment: Environment) -> Launch:
    found = _all_of(TORCHRUN, environment)
    rank, size, local_rank = (_number(name, value) for name, value in zip(TORCHRUN[:3], found[:3], strict=True))
    port = _number("MASTER_PORT", found[4])
    return Launch(rank, size, local_rank, found[3], port, "torchrun", _size(environment, "LOCAL_WORLD_SIZE") > 1)


def _torchrun_of_jax(environment: Environment) -> Launch:
    """Where torchrun's own process waits no other can."""
    launch = _torchrun(environment)
    beside = FIRST_PORT + (launch.port + 1 - FIRST_PORT) % PORTS
    return _coordinated(environment, launch, launch.address, beside)


def _slurm(environment: Environment) -> Launch:
    found = _all_of(SLURM, environment)
    rank, size, local_rank = (_number(name, value) for name, value in zip(SLURM[:3], found[:3], strict=True))
    address = environment.get("MASTER_ADDR") or first_host(found[3])
    port = environment.get("MASTER_PORT") or str(FIRST_PORT + _number("SLURM_JOB_ID", found[4]) % PORTS)
    of_machines = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    shares = any(int(count[:9]) > 1 for count in of_machines)
    return Launch(rank, size, local_rank, address, _number("MASTER_PORT", port), "srun", shares)


def _slurm_of_jax(environment: Environment) -> Launch:
    launch = _slurm(environment)
    return _coordinated(environment, launch, launch.address, launch.port)


def _open_mpi(environment: Environment) -> Launch:
    found = _all_of(OPEN_MPI, environment)
    rank, size, local_rank = (_number(name, value) for name, value in zip(OPEN_MPI, found, strict=True))
    if OPEN_MPI_ADDRESS not in environment:
        _all_of((OPEN_MPI[0], OPEN_MPI[1], COORDINATOR), environment)
    shares = _size(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1
    return _coordinated(environment, Launch(rank, size, local_rank, "", 0, "mpirun", shares), "", 0)


def _explicit(environment: Environment) -> Launch:
    found = _all_of(EXPLICIT, environment)
    rank, size = (_number(name, value) for name, value in zip(EXPLICIT[:2], found[:2], strict=True))
    return _coordinated(environment, Launch(rank, size, 0, "", 0, "JAX"), "", 0)


def _coordinated(environment: Environment, launch: Launch, address: str, port: int) -> Launch:
    """The launch, with the processes meeting where a variable of JAX says, or else here."""
    given = environment.get(COORDINATOR, "").strip()
    if given:
        address, _, number = given.rpartition(":")
        if not address:
            raise UserError(f"{COORDINATOR} = {given[:80]}: must be host:port")
        port = _number(f"port of {COORDINATOR}", number)
    return replace(launch, address=address, port=port)


_LAUNCHERS: Mapping[str, Mapping[str, Callable[[Environment], Launch]]] = {
    "torch": {"WORLD_SIZE": _torchrun, "SLURM_STEP_NUM_TASKS": _slurm},
    "jax": {
        "JAX_NUM_PROCESSES": _explicit,
        "WORLD_SIZE": _torchrun_of_jax,
        "SLURM_STEP_NUM_TASKS": _slurm_of_jax,
        "OMPI_COMM_WORLD_SIZE": _open_mpi,
    },
}
"""Backend -> the variable in which a launcher says how many processes there are -> what to make of it."""

_NUMBERS = tuple(names[:2] for names in (EXPLICIT, TORCHRUN, SLURM, OPEN_MPI))
"""Variables of a process's number, and of the number of processes."""


def _all_of(names: tuple[str, ...], environment: Environment) -> list[str]:
    missing = [name for name in names if not environment.get(name, "").strip()]
    if missing:
        raise UserError(
            f"{names[1]} = {environment[names[1]][:20]}: of several processes each needs {', '.join(missing)}, too; "
            "start them with torchrun, or with srun"
        )
    return [environment[name].strip() for name in names]


def _size(environment: Environment, name: str) -> int:
    value = environment.get(name, "").strip()
    return int(value) if value.isdecimal() and len(value) < 10 else 1


def _number(name: str, value: str) -> int:
    if not value.isdecimal() or len(value) > 9:
        raise UserError(f"{name} = {value[:20]}: must be a number")
    return int(value)
