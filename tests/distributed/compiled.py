"""Steps compiled ahead of time, on devices that one process has: ``python -m tests.distributed.compiled FILE``.

FILE gets, as JSON, by case: whether the program is that of a trainer with arrays, and of the first what it costs. It is
a process of its own, since the number of a host's devices is fixed before the first array exists.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from shared_config.schema.job import JobConfig
from tests.distributed.layouts import DENSE, SIGMOID
from tests.jobs import draw_batch, joined, text_job

ROOT = Path(__file__).parents[2]
DEVICES = 4
JOBS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "dense": ({**DENSE, "tie_embeddings": False, "qk_norm": False, "attention_bias": False}, {}),
    "experts": (SIGMOID, {"ep": 2, "tp": 2}),
}


class LoweredError(Exception):
    """Raised in the place of running a step."""


def job_of(case: str, folder: Path) -> JobConfig:
    model, layout = JOBS[case]
    train = {"scan_layers": True, "grad_accum_steps": 2 if case == "experts" else 1}
    return text_job(folder, {**model, "n_layers": 3}, train=train, distributed=layout)


def run_devices(folder: Path) -> dict[str, Any]:
    """What a process with several devices finds."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", __name__, folder], cwd=ROOT, env=environment, check=True)
    return json.loads((folder / "found.json").read_text())


def lowered_step(job: JobConfig, devices: Any) -> tuple[str, int]:
    """The program of a trainer's first step, and the bytes that one device holds of what it is given."""
    import jax

    from kempnerforge_jax.training import train

    trainer = train.Trainer(job, devices)
    found: list[Any] = []

    def recording(*about: Any) -> Any:
        def call(*arguments: Any) -> Any:
            found.extend((compiled(*about).lower(*arguments).as_text(), arguments))
            raise LoweredError

        return call

    compiled = train.compiled_step
    rows = joined(*(draw_batch(job, seed) for seed in range(trainer.mesh.layout.data_ranks if trainer.mesh else 1)))
    with mock.patch.object(train, "compiled_step", recording), contextlib.suppress(LoweredError):
        trainer.step([rows] * job.train.grad_accum_steps)
    text, arguments = found
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)]
    return text, sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def main(folder: Path) -> None:
    import jax

    from kempnerforge_jax.distributed.ahead_of_time import compiled_program, traced_step

    found: dict[str, Any] = {}
    for case in JOBS:
        job = job_of(case, folder)
        traced = traced_step(job, jax.devices())
        text, held = lowered_step(job, jax.devices())
        found[case] = {"same": traced.lower().as_text() == text, "held": held}
        if case == "dense":
            found[case] |= compiled_program(traced, DEVICES, "cpu").to_json()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
