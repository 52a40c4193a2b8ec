"""The cases of `layouts` in JAX, on devices that one process has: ``python -m tests.distributed.jax_layouts FOLDER``.

FOLDER/asked holds cases and bugs; FOLDER/found gets what differs. It is a process of its own, since the number of a
host's devices is fixed before the first array exists.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.distributed.layouts import MICRO_BATCHES, STEPS, Case, Found, _compare, chunks_of_logits, steps
from tests.mutants import Mutant, planted

ROOT = Path(__file__).parents[2]


def run_devices(
    folder: Path, devices: int, cases: Sequence[Case], mutants: Sequence[tuple[Mutant, Case]] = ()
) -> dict[str, list[str]]:
    """What differs in each case, and in the first step under each mutant."""
    (folder / "asked").write_bytes(pickle.dumps((list(cases), list(mutants))))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", __name__, folder], cwd=ROOT, env=environment, check=True)
    return pickle.loads((folder / "found").read_bytes())


def differences(case: Case, truth: Found, count: int = STEPS) -> list[str]:
    """What differs from one device in the first steps, in which the rows of experts come in several blocks."""
    import jax

    trainer = _trainer(case.job(case.layout), jax.devices()[: case.ranks])
    case.prepare(trainer, state)
    several = patch.object(importlib.import_module("kempnerforge_jax.distributed.expert_parallel"), "ALIGNED", 1)
    with chunks_of_logits(), several:
        return _compare(steps(trainer, _rows(case, count, case.shares), state), truth)


def on_one_device(case: Case) -> Found:
    """What the layout has to do, with the micro-batches of all ranks."""
    import jax

    trainer = _trainer(case.job({}), jax.devices()[:1])
    case.prepare(trainer, state)
    return steps(trainer, _rows(case, STEPS, 1), state)


def state(trainer: Any) -> Any:
    """What a trainer holds, on the host."""
    return trainer.state()


def _rows(case: Case, count: int, together: int) -> list[list[dict[str, np.ndarray]]]:
    """The micro-batches of each step, as many ``together`` as data ranks share one."""
    data, number = case.batches(), MICRO_BATCHES * case.shares
    found = [[data(step * number + index) for index in range(number)] for step in range(count)]
    return [[_joined(batches[first : first + together]) for first in range(0, number, together)] for batches in found]


def _joined(batches: Sequence[Any]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _trainer(job: Any, devices: Any, **options: bool) -> Any:
    import jax.numpy as jnp

    from kempnerforge_jax.training.train import Trainer

    return Trainer(job, devices, dtype=jnp.float64, **options)


def main(folder: Path) -> None:
    cases, mutants = pickle.loads((folder / "asked").read_bytes())
    every = {case.key: case for case in (*cases, *(case for _, case in mutants))}
    truths = {key: on_one_device(case) for key, case in every.items()}
    found = {str(case): differences(case, truths[case.key]) for case in cases}
    for mutant, case in mutants:
        with planted(mutant, "jax"):
            found[str(mutant)] = differences(case, truths[case.key], count=1)
    (folder / "found").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
