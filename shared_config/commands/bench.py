"""``kempnerforge bench``: how near the work of a config comes to what the machine can do.

Everything is measured by processes of its own, one after another: the machine's limits first, in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared_config.bench.measure import Request
from shared_config.bench.page import write_page
from shared_config.bench.result import FOREIGN, OURS, Limits, Result, joined
from shared_config.bench.works import LIMITS, chosen_works, job_of
from shared_config.commands.backends import require_backend, require_package
from shared_config.commands.common import (
    console,
    load_job,
    writable_file,
)
from shared_config.commands.processes import environment_of, failures_of
from shared_config.commands.show import pairs, readable_bytes
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.files import written_aside
from shared_config.interchange.huggingface_config import config_to_huggingface
from shared_config.interchange.outputs import refuse_overwriting
from shared_config.schema.job import JobConfig

MEMORY_OF_JAX = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
"""Take memory of a GPU as it is needed, and nearly all; by itself JAX takes three quarters at once, and no more."""
FOREIGN_WORKS = ("train", "window", "decode")
"""What the models of transformers do too."""


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    config = load_job(options, overrides)
    works = chosen_works(options.what, config)
    numbers, report = (None if file is None else writable_file(file) for file in (options.json, options.report))
    for file, other in ((numbers, report), (report, numbers)):
        if file is not None:
            refuse_overwriting(file, options.config, other)
    require_backend(options.backend)
    foreign, notes = foreign_works(config, works) if options.against else ([], [])
    screen = console()
    results = []
    with tempfile.TemporaryDirectory(prefix="kempnerforge-") as scratch:
        for backend, request in requests_of(options, config, works, foreign):
            with screen.status(f"{request.work} ({request.of}) ..."):
                results.append(result_of(backend, request, Path(scratch)))
    found = joined([*results, Result(notes=tuple(notes))])
    show(screen, found)
    if numbers is not None:
        with written_aside(numbers) as aside:
            aside.write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    if report is not None:
        write_page(report, found, title=f"{options.config}: {options.backend}")
    return 0


def foreign_works(config: JobConfig, works: Sequence[str]) -> tuple[list[str], list[str]]:
    """The works that a model of transformers can do too, and a note about each that it could if it had such a model.

    Raises:
        UserError: a package is missing, or there is no such work.
    """
    require_backend("torch")
    require_package("transformers", "dev", "--against hf")
    if config.vlm is not None:
        raise UserError("--against hf: must be a text model (a config without [vlm])")
    able, notes = [], []
    for work in [work for work in works if work in FOREIGN_WORKS]:
        try:
            config_to_huggingface(job_of(work, config).model)
            able.append(work)
        except ConfigError as error:
            notes.append(f"transformers has no such model, {work}: {error.problems[0]}")
    if not able:
        among = ", ".join(FOREIGN_WORKS)
        raise UserError("\n".join(f"--against hf: {note}" for note in notes or [f"--what must have one of {among}"]))
    return able, notes


def requests_of(
    options: argparse.Namespace, config: JobConfig, works: Sequence[str], foreign: Collection[str]
) -> Iterator[tuple[str, Request]]:
    """What each process is asked for: limits, the works of the backend, and ``foreign`` ones beside them."""
    plain = Request(config, LIMITS, OURS, options.device, options.repeats, options.profile)
    yield options.backend, plain
    for work in works:
        yield options.backend, dataclasses.replace(plain, work=work)
        if work in foreign:
            yield "torch", dataclasses.replace(plain, work=work, of=FOREIGN)


def result_of(backend: str, request: Request, folder: Path) -> Result:
    """What a process of its own finds.

    Raises:
        UserError: it failed; with what it said.
    """
    asked, found = folder / "asked.json", folder / "found.json"
    asked.write_text(json.dumps(request.to_json()), encoding="utf-8")
    environment = environment_of(MEMORY_OF_JAX, platform_of(request))
    lines = failures_of("shared_config.commands.measure", [backend, str(asked), str(found)], environment)
    if lines:
        raise UserError("\n".join(f"{request.work}, {backend}: {line}" for line in lines))
    return Result.from_json(json.loads(found.read_text(encoding="utf-8")))


def platform_of(request: Request) -> dict[str, str]:
    """Keeps JAX from looking for accelerators that are not asked for."""
    return {"JAX_PLATFORMS": "cpu"} if request.device == "cpu" else {}


def show(screen: Console, found: Result) -> None:
    """Print what was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    screen.print(f"{found.device}; {versions}")
    if found.limits is not None:
        screen.print(limits_table(found.limits))
        if found.lines:
            screen.print(lines_table(found, found.limits))
    if found.memory:
        table = pairs("Memory of a training step")
        for part, number in found.memory.items():
            table.add_row(part, readable_bytes(number))
        screen.print(table)
    for work, shares in found.profiles.items():
        table = pairs(f"Time of kernels: {work}")
        for kind, share in shares.items():
            table.add_row(kind, f"{share:.1%}")
        screen.print(table)
    for note in found.notes:
        screen.print(f"note: {note}")


def limits_table(limits: Limits) -> Table:
    """What the machine reached."""
    table = pairs("What the machine reaches")
    product = f"{limits.product / 1e12:.4g} TFLOP/s, spread {limits.spread[0]:.1%}"
    table.add_row(f"product, {limits.size} x {limits.size}, {limits.dtype}", product)
    copy = f"{limits.copy / 1e9:.4g} GB/s, spread {limits.spread[1]:.1%}"
    table.add_row(f"copy of {readable_bytes(limits.copied)}, read and written", copy)
    return table


def lines_table(found: Result, limits: Limits) -> Table:
    """A row for each work."""
    table = Table(title="Work", title_justify="left")
    for name in (
        "work",
        "by",
        "median",
        "spread",
        "tokens/s",
        "share",
        "of the limit of",
        "peak memory",
        "compilation",
    ):
        table.add_column(name, justify="left" if name in ("work", "by", "of the limit of") else "right")
    for row in rows_of(found, limits):
        table.add_row(*row.values())
    return table


def rows_of(found: Result, limits: Limits) -> Iterator[Mapping[str, str]]:
    """What a row says, by column."""
    for line in found.lines:
        share = line.share(limits)
        yield {
            "work": line.work,
            "by": line.of,
            "median": f"{1e3 * line.timing.median:.4g} ms",
            "spread": f"{line.timing.spread:.1%}",
            "tokens/s": f"{line.tokens_per_second:,.0f}",
            "share": "" if share is None else f"{share:.1%}",
            "of": "" if share is None else "products" if line.flops is not None else "copies",
            "peak memory": "" if line.peak is None else readable_bytes(line.peak),
            "compilation": f"{line.timing.compilation:.1f} s",
        }
