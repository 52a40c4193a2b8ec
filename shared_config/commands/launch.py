"""``kempnerforge launch --slurm``: the batch script of a training run on several machines, printed.

Each task that srun starts is a process of the run: for PyTorch one per GPU, for JAX one per machine, with all its GPUs.
Tasks find each other by what SLURM tells them (`shared_config.training.launch`). Without torchrun between them, a
signal reaches each at once, and each has until the end of the allocation to write its checkpoint.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence

from shared_config.contract.sharding import layout_of, refusals, unsupported
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config
from shared_config.schema.base import shown

TIME = r"\d+(:[0-5]\d(:[0-5]\d)?)?|\d+-\d{1,2}(:[0-5]\d(:[0-5]\d)?)?"
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.,@:+-]*"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    check_layout(options, overrides)
    print(script(options, overrides), end="")
    return 0


def check_layout(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a layout that does not fit the GPUs, the model or the backend.
    """
    config = load_config(options.config, overrides)
    layout_of(config.distributed, options.nodes * options.gpus_per_node)
    if problems := [*refusals(config), *unsupported(config, options.backend, tower_of(config), "gpu")]:
        raise ConfigError(problems)


def script(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """The text of it.

    Raises:
        UserError: a value that SLURM or a shell could take for something else.
    """
    tasks = options.gpus_per_node if options.backend == "torch" else 1
    cores = options.cpus_per_gpu * options.gpus_per_node // tasks
    directives = {
        "job-name": checked("--job-name", options.job_name, NAME, "letters, digits and _.,@:+-"),
        "nodes": options.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": cores,
        "time": checked("--time", options.time, TIME, "MM, HH:MM, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"),
        "signal": f"TERM@{options.seconds_to_save}",
        "open-mode": "append",
    }
    for name in ("partition", "account"):
        if (value := getattr(options, name)) is not None:
            directives[name] = checked(f"--{name}", value, NAME, "letters, digits and _.,@:+-")
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{name}={value}" for name, value in directives.items())]
    lines += ["#SBATCH --requeue", "", "set -euo pipefail", f"export OMP_NUM_THREADS={min(cores, 8)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in map(variable, options.env)]
    given = [] if options.output is None else [f"--output={options.output}"]
    train = ["-m", "shared_config.cli", "train", options.config, f"--backend={options.backend}", *given, *overrides]
    command = shlex.join([options.python, *train])
    return "\n".join([*lines, "", f"srun --kill-on-bad-exit=1 --cpus-per-task={cores} {command}", ""])


def checked(option: str, value: str, allowed: str, example: str) -> str:
    """The value, if it is of a form.

    Raises:
        UserError: it isn't.
    """
    if not re.fullmatch(allowed, value, re.ASCII):
        raise UserError(f"{option} = {shown(value)}: must be {example}")
    return value


def variable(setting: str) -> tuple[str, str]:
    """Name and value of "NAME=VALUE".

    Raises:
        UserError: it has another form.
    """
    name, equals, value = setting.partition("=")
    if not equals or not re.fullmatch(VARIABLE, name, re.ASCII):
        raise UserError(f"--env = {shown(setting)}: must be NAME=VALUE, NAME of letters, digits and _")
    return name, value
