"""Every tensor that differs, as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared_config.parity.compare import Comparison, Row
from shared_config.parity.report.plot import number

MOST = 25
DIGITS = {"float64": 17, "float32": 9, "float16": 5, "bfloat16": 5, "fp8": 5}
"""Decimal digits that tell any two numbers of a dtype apart."""


def print_failures(screen: Console, comparison: Comparison, most: int = MOST) -> None:
    """Print the tensors that differ, in execution order, the first ``most`` of them; nothing if all are the same."""
    failures = comparison.failures
    if not failures:
        return
    screen.print(failure_table(comparison, most))
    if len(failures) > most:
        screen.print(f"and {len(failures) - most} more", markup=False)


def failure_table(comparison: Comparison, most: int = MOST) -> Table:
    """A line for each tensor that differs: how, by how much, where, and the values there."""
    with_truth = comparison.meta_truth is not None
    columns = ["tensor", "status", "error / delta", "error / limit", "at", comparison.label_a, comparison.label_b]
    table = Table(*columns, *(["truth"] if with_truth else []))
    for column in table.columns[2:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"
    for row in comparison.failures[:most]:
        table.add_row(*(Text(text) for text in _cells(row, with_truth, DIGITS[comparison.dtype])))
    return table


def _cells(row: Row, with_truth: bool, digits: int) -> list[str]:
    position = "" if row.position is None else ",".join(str(i) for i in row.position)
    values = [row.value_a, row.value_b, *([row.value_truth] if with_truth else [])]
    shown = ["" if value is None else f"{value:.{digits}g}" for value in values]
    name = row.full_label if row.part is not None and row.part.share > 1 else row.name
    return [name, row.status, number(row.multiple), number(row.share), position, *shown]
