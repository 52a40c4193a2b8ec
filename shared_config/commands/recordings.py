"""Models on the line of ``compare``, each recorded in a process of its own: no side needs the other's framework."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared_config.commands.processes import environment_of, failures_of
from shared_config.errors import UserError
from shared_config.parity.foreign.named import is_named
from shared_config.parity.traces import read_trace

OWN, GIVEN = "own inputs", "recorded inputs"
"""What modules are given: what those before them put out, or what the other side recorded."""


@contextmanager
def recordings(options: argparse.Namespace) -> Iterator[dict[str, tuple[Path, Path]]]:
    """Pairs of traces, where A or B is a model: what modules are given -> files of A and B, while the context is open.

    Of two models A measures the deltas of its own run; what is fed always measures its own.

    Raises:
        UserError: nothing to feed to; a model beside a folder; what a model can't do, in its words.
    """
    sides = {"a": options.a, "b": options.b}
    models = [side for side, text in sides.items() if is_named(text)]
    if not models:
        for name in ("refeed", "dtype"):
            if getattr(options, name):
                raise UserError(f"--{name}: is for models, as ours.py:ours; A and B are what was recorded before")
        yield {}
        return
    for text in sides.values():
        if Path(text).is_dir():
            raise UserError(f"{text}: is a folder; a model is compared with a trace, or with another model")
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder, f"{side}.safetensors") if side in models else Path(sides[side]) for side in sides}
        asked = [] if options.dtype is None else ["--dtype", options.dtype]
        for side in models:
            measured = side == "b" and _has_deltas(files["a"])
            mapped = _mapped(options, side) if side == "b" or "b" not in models else []
            _record(sides[side], files[side], [*asked, *mapped, *(["--no-deltas"] if measured else [])])
        pairs = {OWN if options.refeed else "": (files["a"], files["b"])}
        if options.refeed:
            fed, other = ("b", "a") if "b" in models else ("a", "b")
            asked += ["--refeed", str(files[other]), *_mapped(options, fed)]
            given = Path(folder, "fed.safetensors")
            _record(sides[fed], given, asked)
            pairs[GIVEN] = (given, files["b"]) if fed == "a" else (files["a"], given)
        yield pairs


def _mapped(options: argparse.Namespace, side: str) -> list[str]:
    """How a side is told the names and layouts of the other."""
    return [] if options.map is None else ["--map", options.map, *(["--inverse"] if side == "a" else [])]


def _has_deltas(file: Path) -> bool:
    """Whether a trace says how far rounding goes, and needs no help for it."""
    meta = read_trace(file).meta
    return bool(meta.deltas) and bool(meta.extra.get("exact", True))


def _record(model: str, output: Path, asked: Sequence[str]) -> None:
    """Record a model in a process of its own.

    Raises:
        UserError: it failed, with what it said.
    """
    jobs = output.with_suffix(".json")
    jobs.write_text(json.dumps([["record", model, "--output", str(output), *asked]]), encoding="utf-8")
    if said := failures_of("shared_config.commands.worker", [str(jobs)], environment_of({}, {})):
        raise UserError("\n".join(said))
