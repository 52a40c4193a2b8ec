"""How `validate` and `compare` print what they found."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from shared_config.checks import Finding

COLUMNS = ("check", "compared", "tensors", "nearest to its limit", "relative error", "allowed", "verdict")


def show_findings(screen: Console, findings: Iterable[Finding]) -> bool:
    """Print a table, and each difference in words below it; tell whether all is the same."""
    findings = list(findings)
    table = Table(*COLUMNS)
    for name in ("tensors", "relative error", "allowed"):
        table.columns[COLUMNS.index(name)].justify = "right"
    for finding in findings:
        verdict = "[green]same[/]" if finding.ok else "[bold red]DIFFERENT[/]"
        numbers = [f"{finding.error:.1e}", f"{finding.limit:.1e}"] if finding.worst else ["", ""]
        table.add_row(finding.check, finding.subject, str(finding.count), finding.worst, *numbers, verdict)
    screen.print(table)
    for finding in findings:
        if not finding.ok:
            screen.print(f"{finding.check}: {finding.detail}", markup=False)
    return all(finding.ok for finding in findings)
