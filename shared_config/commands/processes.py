"""A command runs in one process, unless several processes can share it: otherwise they would do the same thing and
write to the same files. The processes that a command starts itself end with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared_config.errors import UserError
from shared_config.training.launch import launch_of, launch_sizes

MESSAGE = "kempnerforge: "
"""Begins each line that a process says about what went wrong."""
PACKAGES = Path(__file__).parents[2]
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "JAX_NUM_PROCESSES")
"""Variables in which launchers (torchrun, mpirun, srun, a multi-process JAX) say how many processes there are. (The
SLURM_NTASKS of a batch script is what srun would start in it.)
"""


def world_size(backend: str, environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher has started to train together with a backend; 1 without a launcher.

    Raises:
        UserError: the backend can't train as those of this launcher; a part of what the launcher sets is missing.
    """
    launch = launch_of(environment, backend)
    require_one_process(environment, known=() if launch is None else launch_sizes(backend))
    return 1 if launch is None else launch.world_size


def require_one_process(environment: Mapping[str, str] = os.environ, known: Collection[str] = ()) -> None:
    """Refuse to run as one of several processes.

    Args:
        known: variables whose processes work together.

    Raises:
        UserError: naming the variable that says so.
    """
    for name in SIZES:
        value = environment.get(name, "").strip()
        if name not in known and value.isdecimal() and value.lstrip("0") not in ("", "1"):
            raise UserError(
                f"{name} = {value[:20]}: must be 1; each process would do the same work in the same files. Start the "
                "command once, without a launcher; with several processes there is train, started by torchrun or srun, "
                "that of JAX also by mpirun"
            )


def environment_of(
    defaults: Mapping[str, str], own: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Of a process that runs the code that runs here: ``defaults`` where nothing else is set, ``own`` in any case."""
    path = os.pathsep.join([str(PACKAGES), *filter(None, [environment.get("PYTHONPATH")])])
    return {**defaults, **environment, **own, "PYTHONPATH": path}


def reasons(said: str, status: int) -> list[str]:
    """Why a process failed: its messages, or else how it ended and its last line."""
    lines = [line for line in said.splitlines() if line.strip()]
    messages = [line.removeprefix(MESSAGE) for line in lines if line.startswith(MESSAGE)]
    if status == 2 and messages:
        return messages
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return [": ".join([f"the process {how}", *lines[-1:]])]


def failures_of(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Run a module in a process that ends with this one. Returns why it failed; nothing if it did not."""
    with living_pipe() as living:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            env=environment,
            stdin=living,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            said = process.communicate()[1]
        finally:
            process.kill()
    return reasons(said, process.returncode) if process.returncode else []


@contextmanager
def living_pipe() -> Iterator[int]:
    """The reading end of a pipe that nothing is written to, and that closes with this context or this process."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)
