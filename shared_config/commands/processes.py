"""One process does a command: several would do the same thing, and write to the same files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shared_config.errors import UserError

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "JAX_NUM_PROCESSES")
"""Variables in which launchers (torchrun, mpirun, srun, a multi-process JAX) say how many processes there are. (The
SLURM_NTASKS of a batch script is what srun would start in it.)
"""


def require_one_process(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes.

    Raises:
        UserError: naming the variable that says so.
    """
    for name in SIZES:
        value = environment.get(name, "").strip()
        if value.isdecimal() and value.lstrip("0") not in ("", "1"):
            raise UserError(
                f"{name} = {value[:20]}: must be 1; parallel layouts are not supported, and each process would do the "
                "same work in the same files. Start the command once, without a launcher"
            )
