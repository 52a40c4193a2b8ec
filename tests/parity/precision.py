"""What a program computes in bfloat16 or float16, or in integers of 8 or 16 bits, operation by operation, and the rules
that say where it may.

Movement of narrow floats and what can't round (comparisons, extrema, signs) is free. All else that touches a narrow
number needs a rule: the kind of operation, the function of the backend that asks for it, and on how many of its lines.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PRODUCT, ROUNDING, SUM, ELEMENTWISE, ACCUMULATION = "product", "rounding", "sum", "elementwise", "accumulation"
INTEGER = "integer"
ANYWHERE = "anywhere"


class Operation(NamedTuple):
    """One narrow operation.

    Attributes:
        kind: a product of matrices, a rounding to a narrow type, a sum along an axis, one by elements,
            a loop that adds to what it carries, or anything that gives integers of 8 or 16 bits.
        name: of the primitive or operator.
        site: "model.norm:RMSNorm.forward", the innermost function of the backend; "" if there is none.
        line: of that function.
        shown: types, for the message.
    """

    kind: str
    name: str
    site: str
    line: int
    shown: str


@dataclass(frozen=True)
class Rule:
    """Sites, with the number of lines there, where operations of a kind may be narrow, and why.

    Attributes:
        names: the operations; () means all of the kind.
        backward: only in programs that differentiate.
    """

    kind: str
    why: str
    sites: dict[str, int]
    names: tuple[str, ...] = ()
    backward: bool = field(default=False, kw_only=True)

    def covers(self, operation: Operation) -> bool:
        return (
            operation.kind == self.kind
            and (operation.site in self.sites or ANYWHERE in self.sites)
            and (not self.names or operation.name in self.names)
        )


def violations(operations: Iterable[Operation], rules: Sequence[Rule], *, backward: bool) -> list[str]:
    """Narrow operations that no rule allows, or on more lines of a function than its rules say."""
    rules = [rule for rule in rules if backward or not rule.backward]
    found: set[str] = set()
    lines: dict[tuple[str, str], set[int]] = defaultdict(set)
    for operation in operations:
        covering = [rule for rule in rules if rule.covers(operation)]
        if not covering:
            found.add(
                f"{operation.kind} {operation.name} in {operation.site}, line {operation.line}: {operation.shown}"
            )
        elif all(ANYWHERE not in rule.sites for rule in covering):
            lines[operation.kind, operation.site].add(operation.line)
    for (kind, site), seen in lines.items():
        allowed = sum(rule.sites.get(site, 0) for rule in rules if rule.kind == kind)
        if len(seen) > allowed:
            found.add(f"{kind} in {site} on lines {sorted(seen)}, {allowed} allowed")
    return sorted(found)


def idle(operations: Iterable[Operation], rules: Sequence[Rule]) -> list[str]:
    """Sites of rules at which nothing was narrow."""
    operations = list(operations)
    return [
        f"{rule.kind} {site}: {rule.why}"
        for rule in rules
        for site in rule.sites
        if not any(rule.covers(operation) and site in (operation.site, ANYWHERE) for operation in operations)
    ]


def site_of(path: str, line: int, backend: str) -> str:
    """The function of the backend that has this line, "model.norm:RMSNorm.forward"."""
    module = path.rpartition(f"kempnerforge_{backend}/")[2].removesuffix(".py").replace("/", ".")
    return f"{module}:{_functions(path).get(line, '')}"


@functools.cache
def _functions(path: str) -> dict[int, str]:
    """Line -> qualified name of the innermost function."""
    named: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}".lstrip(".")
                if isinstance(child, ast.FunctionDef):
                    named.update(dict.fromkeys(range(child.lineno, (child.end_lineno or child.lineno) + 1), name))
            visit(child, name)

    visit(ast.parse(Path(path).read_text(encoding="utf-8")), "")
    return named
