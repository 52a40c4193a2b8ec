"""A command runs in one process, unless several processes can share it: otherwise they would do the same thing and
write to the same files.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from shared_config.errors import UserError
from shared_config.training.launch import launch_of, launch_sizes

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
