"""``kempnerforge validate``: both backends, each in its own process, are shown to be the same function."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shared_config.commands.backends import require_backend, require_package
from shared_config.commands.common import (
    console,
    fitting_weights,
    folder_of,
    in_transformers,
    writable_file,
)
from shared_config.commands.layouts import USUAL, layouts_left_out, layouts_to_compare, on_one_device, without_layout
from shared_config.commands.processes import environment_of, living_pipe, reasons
from shared_config.commands.show import readable_bytes
from shared_config.commands.verdict import show_errors, show_findings, show_first_differences
from shared_config.contract.counts import count_parameters
from shared_config.contract.initialise import state_hash
from shared_config.errors import UserError
from shared_config.interchange.files import written_aside
from shared_config.interchange.outputs import claim_record_folder, forget_run
from shared_config.interchange.toml import config_to_toml
from shared_config.loader import load_config
from shared_config.parity import full_checks, layout_checks  # noqa: F401 (they register checks)
from shared_config.parity.checks import outcome
from shared_config.parity.dtypes import DTYPES, dtypes_of
from shared_config.parity.layouts import described
from shared_config.parity.plan import BACKENDS, LAYOUTS_STAGE, TRANSFORMERS, Finding, Plan
from shared_config.parity.report import write_report
from shared_config.parity.scenarios import PARTS, left_out, resume_folder
from shared_config.parity.shrink import shrink
from shared_config.parity.transformers_check import rows
from shared_config.schema.job import JobConfig

DIFFERENT = 1
BYTES_A_PARAMETER = 160
"""Peak of one process: masters, gradients, updates and moments in float64, and what the deltas are measured from."""
BYTES_A_RANK = 64
"""Of the same, of each further process of a layout: what it is given, and what it puts together."""
SMALL = 10_000_000
"""Models of fewer parameters are compiled quickly on a CPU: compilation is most of what JAX takes for `debug`."""
COMPILED_QUICKLY = "--xla_backend_optimization_level=0"
"""What JAX is told then, unless `XLA_FLAGS` says otherwise."""
MEMORY_INFO = Path("/proc/meminfo")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    loaded = load_config(options.config, overrides)
    config = shrink(loaded) if options.shrink else loaded
    layouts = layouts_to_compare(config, loaded.distributed, overrides, full=options.full, device=options.device)
    config, overrides = on_one_device(config), without_layout(overrides)
    config.validate()
    dtypes = read_dtypes(options.dtypes, config)
    report = None if options.report is None else writable_file(options.report)
    for backend in BACKENDS:
        require_backend(backend)
    refuse_too_large(config, options.config, max((layout.fewest_devices for layout in layouts), default=1))
    weights = None if options.shrink else folder_of(options.config)
    foreign = options.transformers and weights is not None and in_transformers(weights)
    if foreign:
        require_package(TRANSFORMERS, TRANSFORMERS, f"{weights} in {TRANSFORMERS} (or --no-transformers)")
    with tempfile.TemporaryDirectory(prefix="kempnerforge-") as scratch:
        plan = Plan(
            config,
            Path(scratch),
            dtypes,
            options.seed,
            options.steps,
            options.device,
            weights,
            "" if weights is None else state_hash(fitting_weights(weights, config, overrides)),
            overrides,
            options.full,
            layouts,
            foreign,
        )
        if options.keep:
            plan = dataclasses.replace(plan, folder=claim_record_folder(options.keep, plan.files()))
            forget(plan)
        began = time.monotonic()
        screen = console()
        with screen.status(f"{', '.join(plan.processes)} run side by side, each in its own process ..."):
            for stage in plan.stages:
                run_processes(plan, stage)
        findings = judge(plan)
        same = show(screen, plan, findings, time.monotonic() - began)
        if report is not None and plan.comparisons:
            write_report(report, plan.comparisons, findings, title=f"{options.config}: torch and jax")
    return 0 if same else DIFFERENT


def read_dtypes(text: str | None, config: JobConfig) -> tuple[str, ...]:
    """The dtypes asked for, float64 first, as it is the truth for the others.

    Raises:
        UserError: an unknown one, or one that the config doesn't have.
    """
    if text is None:
        return dtypes_of(config)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtypes = {text!r}: {name!r} must be one of {', '.join(DTYPES)}")
        if name not in dtypes_of(config):
            raise UserError(f"--dtypes = {text!r}: {name!r} needs --train.mixed_precision {name}")
    return tuple(name for name in DTYPES if name in names or name == "float64")


def refuse_too_large(config: JobConfig, name: str, devices: int = 1) -> None:
    """Refuse to build a model that the memory can't hold twice, several times over.

    Args:
        devices: of the largest layout.

    Raises:
        UserError: with the estimate, and the way around.
    """
    parameters = count_parameters(config.model, config.vlm)
    needed = parameters * (BYTES_A_PARAMETER * len(BACKENDS) + BYTES_A_RANK * (devices - 1))
    free = available_memory()
    if needed > free:
        raise UserError(
            f"{name}: {parameters:,} parameters in float64, gradients and updates included, in all processes need "
            f"about {readable_bytes(needed)} of memory; {readable_bytes(free)} are free. "
            "--shrink validates the same architecture with a few small layers"
        )


def available_memory() -> int:
    """Bytes that programs can still get; all there are where the system does not say."""
    if MEMORY_INFO.exists():
        for line in MEMORY_INFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forget(plan: Plan) -> None:
    """Remove what an earlier validation left in the folder of this one: an old trace would be taken for a new one, a
    training run would resume.

    Raises:
        UserError: a folder in the place of a training run is not one.
    """
    for backend in BACKENDS:
        for folder in (plan.run_folder(backend), *(resume_folder(plan.folder, backend, part) for part in range(PARTS))):
            forget_run(folder)
    for file in plan.traces():
        Path(os.path.realpath(file)).unlink(missing_ok=True)


def run_processes(plan: Plan, stage: int = 0) -> None:
    """Run the jobs of all checks of a stage, one process per backend, side by side.

    Raises:
        UserError: a process could not do its jobs; naming its backend, with its last output.
    """
    with written_aside(plan.config_file) as aside:
        aside.write_text(config_to_toml(plan.config), encoding="utf-8")
    processes: dict[str, subprocess.Popen[str]] = {}
    with living_pipe() as living:
        try:
            for backend in plan.processes:
                processes[backend] = _start(plan, stage, backend, living)
            said = {backend: process.communicate()[1] for backend, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
    failed = [
        f"{backend}: {line}"
        for backend, process in processes.items()
        if process.returncode != 0
        for line in reasons(said[backend], process.returncode)
    ]
    if failed:
        raise UserError("\n".join(["could not compare the backends, as not both ran:", *failed]))


def _start(plan: Plan, stage: int, backend: str, living: int) -> subprocess.Popen[str]:
    jobs = plan.jobs(backend, stage)
    file = plan.jobs_file(backend, stage)
    with written_aside(file) as aside:
        aside.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "shared_config.commands.worker", str(file)]
    return subprocess.Popen(
        command,
        env=_environment(plan, stage),
        stdin=living,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _environment(plan: Plan, stage: int) -> dict[str, str]:
    """Half of the cores for each process, only the devices that are asked for, and the code that runs here."""
    threads = max(1, (os.cpu_count() or 1) // len(plan.processes))
    chosen, own = {"OMP_NUM_THREADS": str(threads)}, {}
    if plan.device == "cpu":
        chosen["JAX_PLATFORMS"] = "cpu"
        if count_parameters(plan.config.model, plan.config.vlm) < SMALL:
            chosen["XLA_FLAGS"] = COMPILED_QUICKLY
    if stage == LAYOUTS_STAGE:
        flags = os.environ.get("XLA_FLAGS", chosen.get("XLA_FLAGS", ""))
        devices = f"--xla_force_host_platform_device_count={plan.devices}"
        own |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {devices}"}
    return environment_of(chosen, own)


def judge(plan: Plan) -> list[Finding]:
    """What the checks say about what the processes left behind."""
    return [finding for check in plan.checks for finding in check.judge(plan)]


def not_compared(plan: Plan) -> dict[str, str]:
    """What a full validation has, and this one of a config not; with the reason."""
    if not plan.full:
        return {}
    asked = any(layout not in USUAL for layout in plan.layouts)
    return left_out(plan.config) | ({} if asked else layouts_left_out(plan.config, plan.device))


def show(screen: Console, plan: Plan, findings: Sequence[Finding], seconds: float) -> bool:
    """Print the verdict; tell whether all is the same."""
    same = show_findings(screen, findings)
    if plan.foreign:
        show_errors(screen, rows(plan))
    for name, comparison in plan.comparisons.items():
        if not comparison.equal:
            screen.rule(name)
            show_first_differences(screen, comparison)
    for name, reason in not_compared(plan).items():
        screen.print(f"left out: {name}, {reason}", markup=False, highlight=False)
    for layout in plan.layouts:
        for backend in BACKENDS:
            if backend not in plan.backends_of(layout):
                screen.print(f"note: {backend} has no {described(layout)}, and took its steps on 1 device")
    parameters = count_parameters(plan.config.model, plan.config.vlm)
    screen.print(f"{outcome(findings)} ({parameters:,} parameters, {seconds:.0f} s)")
    return same
