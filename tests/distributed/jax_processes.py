"""What each of several processes of JAX finds that differs from one device: ``python -m tests.distributed.jax_processes
FOLDER``, for each of them.

FOLDER/asked holds cases and bugs; FOLDER/found gets what differs, as the processes see it. Each starts with all cases,
as joining and compiling cost more than they do.
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from shared_config.data import open_data
from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import whole_state
from shared_config.interchange.parts import Box, Parts, StateParts
from tests.distributed.health import OTHERS, RIGHT_OR_WRONG, said, says
from tests.distributed.jax_layouts import _joined, _rows, _trainer
from tests.distributed.layouts import MICRO_BATCHES, STEPS, Case, Found, _batches, _compare, _numbers, steps
from tests.jobs import text_job
from tests.mutants import Mutant, planted

ROOT = Path(__file__).parents[2]
PROCESSES = 2
SHAPES = {"rows": (8, 4), "columns": (8, 4), "grid": (8, 4), "copied": (3,), "layers.0-1.w": (2, 4, 6)}
WRITTEN = {"rows": ("a",), "columns": (None, "b"), "grid": ("b", "a"), "copied": (), "layers.0-1.w": (None, "a", "b")}
READ = {"rows": (None, "b"), "columns": (("a", "b"),), "grid": ("a",), "copied": (), "layers.0-1.w": (None, "b")}
HELD = 2 * (16 + 8 + 16 + 24) + 3
"""How many values the two devices of a process hold by `READ`; what all devices hold is read once."""

Check = Case | str
"""A case, or the name of one of `CHECKS`."""


def environments(devices: int, processes: int = PROCESSES) -> list[dict[str, str]]:
    """Variables of processes of JAX that meet on this machine, each with so many devices."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    shared = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    meeting = {"JAX_NUM_PROCESSES": str(processes), "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    return [{**os.environ, **shared, **meeting, "JAX_PROCESS_ID": str(rank)} for rank in range(processes)]


def run_jax_processes(
    folder: Path, devices: int, checks: Sequence[Check], mutants: Sequence[tuple[Mutant, Check]] = ()
) -> dict[str, list[str]]:
    """What differs in each check, and under each mutant."""
    (folder / "asked").write_bytes(pickle.dumps((list(checks), list(mutants))))
    command = [sys.executable, "-m", __name__, str(folder)]
    every = [{**each, "JAX_ENABLE_X64": "1"} for each in environments(devices)]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment) for environment in every]
    assert [process.wait(timeout=3000) for process in started] == [0] * PROCESSES
    return pickle.loads((folder / "found").read_bytes())


def values_of(name: str) -> np.ndarray:
    """What an array holds."""
    shape = SHAPES[name]
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(name)


def numbers(folder: Path) -> list[str]:
    """Whether the processes agree on what each of them gives."""
    own = importlib.import_module("kempnerforge_jax.distributed.processes").processes()
    found = [own.largest(number) for number in (own.rank, -own.rank, 15 * (own.rank == 0), 15 * (own.rank == 1))]
    found += own.largest_of([own.rank, 2**50 - own.rank])
    return [] if found == [PROCESSES - 1, 0, 15, 15, PROCESSES - 1, 2**50] else [f"the largest numbers are {found}"]


def rows(folder: Path) -> list[str]:
    """Whether a run gives each process the rows of its data ranks."""
    train = importlib.import_module("kempnerforge_jax.training.train")
    own = importlib.import_module("kempnerforge_jax.distributed.processes").processes()
    place = folder / str(own.rank)
    place.mkdir(parents=True)
    job = text_job(place)
    with patch.object(train, "run_training", lambda config, trainer, data, **_: (trainer, data)):
        trainer, data = train.train(job)
    ranks = trainer.ranks.count
    whole = open_data(job, world_size=ranks, together=ranks).batch(3)["tokens"]
    same = np.array_equal(data.batch(3)["tokens"], np.split(whole, own.count)[own.rank])
    return [] if same else ["other rows than those of its ranks"]


def parts(folder: Path) -> list[str]:
    """Whether arrays come back from a checkpoint that all write, into another layout, and no value is read twice."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    own_parts = importlib.import_module("kempnerforge_jax.distributed.states").own_parts
    stack = importlib.import_module("kempnerforge_jax.model.stack")
    like = importlib.import_module("kempnerforge_jax.model.state").like
    own = importlib.import_module("kempnerforge_jax.distributed.processes").processes()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:: jax.local_device_count() // 2]).reshape(2, 2), ("a", "b"))

    def lying(name: str, axes: tuple[object, ...]) -> jax.Array:
        values = values_of(name)
        return jax.make_array_from_callback(values.shape, NamedSharding(mesh, PartitionSpec(*axes)), values.__getitem__)

    try:
        held = own_parts({name: lying(name, axes) for name, axes in WRITTEN.items()})
        checkpoint.save(folder, StateParts(1, held, {}), processes=own)
    except UserError as error:
        return [str(error)]
    written = checkpoint.load(folder, processes=own).parts.weights
    read: list[int] = []
    real, lines = Parts.__getitem__, []

    def noted(tensor: Parts, box: Box) -> np.ndarray:
        found = real(tensor, box)
        read.append(found.size)
        return found

    with patch.object(Parts, "__getitem__", noted):
        stacked = stack.stack_layers(written, stack.stacks_of(SHAPES))
        for name, axes in READ.items():
            for shard in like(lying(name, axes) * 0, stacked[name]).addressable_shards:
                if not np.array_equal(np.asarray(shard.data), values_of(name)[shard.index]):
                    lines.append(f"{name}: other values in {shard.index}")
    return lines if sum(read) == HELD else [*lines, f"{sum(read)} values read"]


def health(folder: Path) -> list[str]:
    """Whether the check of devices tells what is wrong with the first one of the second process."""
    import jax

    module = importlib.import_module("kempnerforge_jax.distributed.health")
    own = importlib.import_module("kempnerforge_jax.distributed.processes").processes()
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    others = {number: f"cpu:{number - len(devices) // 2}" for number in range(len(devices) // 2, len(devices))}
    lines = []
    for what, (seconds, text) in RIGHT_OR_WRONG.items():
        own.largest(0)
        found = says(module.Bench(devices), what, seconds)
        expected = said(text, others) if own.is_main else OTHERS if text else ""
        lines += [] if found == expected else [f"{what}: {found!r}, not {expected!r}"]
    return lines


CHECKS: Mapping[str, Callable[[Path], list[str]]] = {
    "numbers": numbers,
    "rows": rows,
    "parts": parts,
    "health": health,
}


def on_one_device(case: Case) -> Found:
    """What the layout has to do, with the micro-batches of all ranks."""
    import jax

    trainer, rows = _trainer(case.job({}), jax.local_devices()[:1]), _rows(case, STEPS, 1)
    evaluated = _numbers(trainer.evaluate(rows[0]))
    return replace(steps(trainer, rows, lambda trainer: whole_state(trainer.parts())), evaluated=evaluated)


def _of_the_first(folder: Path, cases: Sequence[Case]) -> dict[str, Found]:
    """What one device does in each case, computed by the first process for all."""
    own, place = importlib.import_module("kempnerforge_jax.distributed.processes").processes(), folder / "truths"
    if own.is_main:
        place.write_bytes(pickle.dumps({case.key: on_one_device(case) for case in cases}))
    own.largest(0)
    return pickle.loads(place.read_bytes())


def differences(case: Case, truth: Found, folder: Path, count: int = STEPS) -> list[str]:
    """What differs from one device in the first steps, and once the state was written and read again."""
    import jax

    own = importlib.import_module("kempnerforge_jax.distributed.processes").processes()
    trainer = _trainer(case.job(case.layout), jax.devices())
    rows = _own_rows(case, trainer.ranks.own, count)
    evaluated = _numbers(trainer.evaluate(rows[0]))
    found = replace(steps(trainer, rows, _state), evaluated=evaluated)
    if not own.is_main:
        found = replace(found, states=truth.states[: len(found.states)])
    lines = _compare(found, truth)
    checkpoint.save(folder, trainer.parts(), processes=own)
    trainer.load_state(truth.states[0])
    trainer = _trainer(case.job(case.layout), jax.devices(), draws=False)
    trainer.load_state(checkpoint.load(folder, processes=own).parts)
    again = trainer.state()
    return [*lines, *(_other_bits(again, found.states[-1]) if own.is_main else [])]


def _state(trainer: Any) -> Any:
    return trainer.state()


def _other_bits(state: Any, truth: Any) -> list[str]:
    """Which tensors were not read as they were written."""
    pairs = [(state.weights, truth.weights), (state.optimizer, truth.optimizer)]
    return [
        f"{name}: other bits than those written"
        for found, true in pairs
        for name in true
        if found[name].tobytes() != true[name].tobytes()
    ]


def _own_rows(case: Case, ranks: range, count: int) -> list[list[dict[str, np.ndarray]]]:
    """The micro-batches of each step, with the rows of some of the data ranks."""
    data, shares = _batches(case.job({})), case.shares
    firsts = range(0, MICRO_BATCHES * shares * count, shares)
    every = [_joined([data(first + rank) for rank in ranks]) for first in firsts]
    return [every[step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES] for step in range(count)]


def _of_case(case: Case, truths: Mapping[str, Found], count: int, folder: Path) -> list[str]:
    return differences(case, truths[case.key], folder, count)


def main(folder: Path) -> None:
    """Do all that is asked."""
    from jax.experimental.multihost_utils import process_allgather

    from kempnerforge_jax.distributed.processes import joined

    checks, mutants = pickle.loads((folder / "asked").read_bytes())
    with joined(None):
        cases = {check.key: check for check in (*checks, *(check for _, check in mutants)) if isinstance(check, Case)}
        truths = _of_the_first(folder, list(cases.values()))
        place = iter(range(1000))

        def done(check: Check, count: int = STEPS) -> list[str]:
            own = folder / f"run_{next(place)}"
            one = CHECKS[check] if isinstance(check, str) else functools.partial(_of_case, check, truths, count)
            text = "\n".join(one(own)).encode()[:4000].ljust(4000)
            every = np.asarray(process_allgather(np.frombuffer(text, np.uint8)))
            return [line for each in every for line in each.tobytes().decode().strip().splitlines()]

        found = {str(check): done(check) for check in checks}
        for mutant, check in mutants:
            with planted(mutant, "jax"):
                found[str(mutant)] = done(check, count=1)
        if int(os.environ["JAX_PROCESS_ID"]) == 0:
            (folder / "found").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
