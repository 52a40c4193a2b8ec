"""``kempnerforge compare``: two traces, tensor by tensor, and the first that diverges."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from shared_config.commands.common import console, writable_file
from shared_config.commands.verdict import show_findings, show_first_differences
from shared_config.errors import UserError
from shared_config.interchange.files import written_aside
from shared_config.interchange.outputs import refuse_overwriting
from shared_config.parity.checks import findings_of
from shared_config.parity.compare import compare_traces
from shared_config.parity.report import write_report
from shared_config.parity.traces import read_trace

HELP = "compare two traces and name the first tensor that diverges; exit status 0 only if none does"

DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument("a", metavar="A", help="a trace")
    parser.add_argument("b", metavar="B", help="a trace of the same config and seed")
    parser.add_argument("--truth", metavar="FILE", help="a float64 trace that both are measured against")
    parser.add_argument("--report", metavar="FILE", help="also write an HTML page")
    parser.add_argument("--json", metavar="FILE", help="also write every number as JSON")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    if overrides:
        raise UserError(f"{overrides[0]}: compare takes no config; the traces hold theirs")
    report, numbers = (None if path is None else writable_file(path) for path in (options.report, options.json))
    for output in filter(None, (report, numbers)):
        refuse_overwriting(output, options.a, options.b, options.truth)
    truth = None if options.truth is None else read_trace(options.truth)
    comparison = compare_traces(read_trace(options.a), read_trace(options.b), truth)
    screen = console()
    same = show_findings(screen, findings_of(comparison.dtype, comparison))
    show_first_differences(screen, comparison)
    if numbers is not None:
        _write(numbers, json.dumps(comparison.to_json(), indent=1))
    if report is not None:
        write_report(report, {comparison.dtype: comparison}, title=f"{comparison.label_a} and {comparison.label_b}")
    return 0 if same else DIFFERENT


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
