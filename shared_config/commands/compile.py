"""``kempnerforge compile``: the JAX training step, compiled for a slice of TPUs that needn't be present."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from shared_config.commands.backends import backend_module, require_backend, require_package
from shared_config.commands.common import console, writable_file
from shared_config.commands.show import pairs, readable_bytes
from shared_config.contract.programs import Program
from shared_config.contract.sharding import Layout, layout_of
from shared_config.contract.slices import Slice, parse_slice
from shared_config.interchange.files import written_aside
from shared_config.interchange.outputs import refuse_overwriting
from shared_config.loader import load_config

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
"""Lets libtpu compile beside others who use it, and keeps it from asking the cloud which TPU this machine has."""


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    topology = parse_slice(options.topology)
    config = load_config(options.config, overrides)
    layout = layout_of(config.distributed, topology.chips)
    numbers = None if options.json is None else writable_file(options.json)
    if numbers is not None:
        refuse_overwriting(numbers, options.config)
    require_backend("jax")
    require_package("libtpu", "tpu", "compile needs TPU's compiler")
    began = time.monotonic()
    with environment(ENVIRONMENT):
        program: Program = backend_module("jax", "distributed.ahead_of_time").compile_step(config, topology)
    seconds = time.monotonic() - began
    screen = console()
    screen.print(costs_of(program, topology, layout, seconds))
    screen.print(collectives_of(program))
    if numbers is not None:
        _write(numbers, report(program, topology, layout, seconds))
    return 0


def costs_of(program: Program, topology: Slice, layout: Layout, seconds: float) -> Table:
    """What a chip computes and holds."""
    table = pairs(f"A training step on {topology.name}, for each chip")
    table.add_row("chips", str(topology.chips))
    table.add_row("layout", ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(layout).items()))
    table.add_row("FLOPs of matrix products", f"{program.flops:.4g}")
    table.add_row("arguments: parameters, moments, a batch", readable_bytes(program.arguments))
    table.add_row("outputs in memory of their own", readable_bytes(program.outputs))
    table.add_row("temporaries", readable_bytes(program.temporaries))
    table.add_row("the program itself", readable_bytes(program.code))
    share = program.memory / topology.chip.memory
    table.add_row("total", f"{readable_bytes(program.memory)}, {share:.0%} of {readable_bytes(topology.chip.memory)}")
    if program.unknown_loops:
        table.add_row("loops of unknown trip count, counted as one iteration", str(program.unknown_loops))
    table.add_row("compiled in", f"{seconds:.0f} s")
    return table


def collectives_of(program: Program) -> Table:
    """How often a chip takes part in collectives of each kind, and with how many bytes."""
    table = Table("kind", "count", "bytes", title="Collectives of a step, for each chip", title_justify="left")
    for number in (1, 2):
        table.columns[number].justify = "right"
    for each in program.collectives:
        table.add_row(each.kind, f"{each.count:,}", readable_bytes(each.bytes))
    return table


def report(program: Program, topology: Slice, layout: Layout, seconds: float) -> dict[str, object]:
    """All numbers, as JSON has them."""
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "memory_of_a_chip": topology.chip.memory,
        "layout": dataclasses.asdict(layout),
        "seconds": round(seconds, 1),
        **program.to_json(),
    }


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these variables within the context."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _write(path: Path, numbers: Mapping[str, object]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
