"""Which of several processes this one is, as launchers tell it: torchrun, or srun of SLURM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shared_config.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
FIRST_PORT, PORTS = 20_000, 20_000


@dataclass(frozen=True)
class Launch:
    """A process among ``world_size`` that were started together.

    Attributes:
        rank: its number, from 0.
        local_rank: its number among those of its machine.
        address, port: where rank 0 waits for the others.
        launcher: "torchrun", whose own process waits there, or "srun".
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    launcher: str


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What a launcher says; None where this is the only process.

    Under SLURM the processes meet on the first machine of the step, on a port that the job's number gives, unless
    ``MASTER_ADDR`` and ``MASTER_PORT`` say otherwise.

    Raises:
        UserError: a part of what a launcher sets is missing or not a number.
    """
    if _size(environment, "WORLD_SIZE") > 1:
        return _torchrun(environment)
    return _slurm(environment) if _size(environment, "SLURM_STEP_NUM_TASKS") > 1 else None


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started several processes, of which this is one."""
    return _size(environment, "WORLD_SIZE") > 1 or _size(environment, "SLURM_STEP_NUM_TASKS") > 1


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process, even where what a launcher sets is incomplete; 0 without one."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        value = environment.get(rank, "")
        if _size(environment, size) > 1 and value.isdecimal():
            return int(value[:9])
    return 0


def _torchrun(environment: Mapping[str, str]) -> Launch:
    found = _all_of(TORCHRUN, environment)
    rank, size, local_rank = (_number(name, value) for name, value in zip(TORCHRUN[:3], found[:3], strict=True))
    return _checked(Launch(rank, size, local_rank, found[3], _number("MASTER_PORT", found[4]), "torchrun"))


def _slurm(environment: Mapping[str, str]) -> Launch:
    found = _all_of(SLURM, environment)
    rank, size, local_rank = (_number(name, value) for name, value in zip(SLURM[:3], found[:3], strict=True))
    address = environment.get("MASTER_ADDR") or first_host(found[3])
    port = environment.get("MASTER_PORT") or str(FIRST_PORT + _number("SLURM_JOB_ID", found[4]) % PORTS)
    return _checked(Launch(rank, size, local_rank, address, _number("MASTER_PORT", port), "srun"))


def first_host(nodes: str) -> str:
    """The first of a list of machines as SLURM writes it: "gpu[03-05,9],login" is gpu03."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


def _all_of(names: tuple[str, ...], environment: Mapping[str, str]) -> list[str]:
    missing = [name for name in names if not environment.get(name, "").strip()]
    if missing:
        raise UserError(
            f"{names[1]} = {environment[names[1]][:20]}: of several processes each needs {', '.join(missing)}, too; "
            "start them with torchrun, or with srun"
        )
    return [environment[name].strip() for name in names]


def _size(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "").strip()
    return int(value) if value.isdecimal() and len(value) < 10 else 1


def _number(name: str, value: str) -> int:
    if not value.isdecimal() or len(value) > 9:
        raise UserError(f"{name} = {value[:20]}: must be a number")
    return int(value)


def _checked(launch: Launch) -> Launch:
    if launch.rank >= launch.world_size:
        raise UserError(f"rank = {launch.rank}: must be below the number of processes, {launch.world_size}")
    return launch
