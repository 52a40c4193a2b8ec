"""How `validate` and `compare` print what they found."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from shared_config.parity.checks import describe
from shared_config.parity.compare import Comparison
from shared_config.parity.plan import BACKENDS, TRANSFORMERS, Finding
from shared_config.parity.report import print_failures
from shared_config.parity.transformers_check import Row

COLUMNS = ("check", "compared", "tensors", "nearest to its limit", "relative error", "allowed", "verdict")


def show_errors(screen: Console, rows: Iterable[Row]) -> None:
    """Print how far each implementation is from the float64 of PyTorch, side by side."""
    sides = (*BACKENDS, TRANSFORMERS)
    table = Table("against torch in float64", "compared", "nearest to its limit", *sides, "allowed")
    for place in range(3, 4 + len(sides)):
        table.columns[place].justify = "right"
    for row in rows:
        numbers = [*(row.errors[side] for side in sides), row.limit]
        table.add_row(row.dtype, row.group, row.worst.removeprefix(f"{row.group}/"), *(f"{x:.1e}" for x in numbers))
    screen.print(table)


def show_first_differences(screen: Console, comparison: Comparison) -> None:
    """Print the tensors that differ, and which of them came first in the forward and in the backward pass."""
    print_failures(screen, comparison)
    for label, row in (("forward", comparison.first_forward), ("backward", comparison.first_backward)):
        if row is not None:
            screen.print(f"first to diverge, {label}: {describe(row, comparison)}", markup=False)
    for note in comparison.notes:
        screen.print(f"note: {note}", markup=False)


def show_findings(screen: Console, findings: Iterable[Finding]) -> bool:
    """Print the verdict as a table, and what a finding has to say that is not ok; tell whether all is the same."""
    findings = list(findings)
    table = Table(*COLUMNS)
    for name in ("tensors", "relative error", "allowed"):
        table.columns[COLUMNS.index(name)].justify = "right"
    for finding in findings:
        verdict = f"[{'green' if finding.ok else 'bold red'}]{finding.verdict}[/]"
        numbers = [f"{finding.error:.1e}", f"{finding.limit:.1e}"] if finding.worst else ["", ""]
        table.add_row(finding.check, finding.subject, str(finding.count), finding.worst, *numbers, verdict)
    screen.print(table)
    for finding in findings:
        if not finding.ok and finding.detail:
            screen.print(f"{finding.check}: {finding.detail}", markup=False)
    return all(finding.ok for finding in findings)
