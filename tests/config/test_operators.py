"""Which bugs the operators plant in a line: all of them, and no others."""

from __future__ import annotations

import pytest

from shared_config.parity.operators import mutations_of

PLANTED: dict[str, set[tuple[str, str]]] = {
    "for i in range(n): pass": {("off by one", "n - 1"), ("removed call", "n")},
    "for i in range(a, n): pass": {
        ("off by one", "n - 1"), ("removed call", "a"), ("swapped arguments", "range(n, a)"),
    },
    "for i in range(n, 3): pass": {("removed call", "n"), ("constant", "4"), ("constant", "2")},
    "x = -a": {("dropped sign", "a")},
    "x = not a": {("dropped sign", "a")},
    "x = a[i:j]": {("off by one", "i + 1"), ("off by one", "j + 1")},
    "x = a[i + k:]": {
        ("off by one", "(i + k) + 1"), ("arithmetic", " - "), ("dropped term", "i"), ("dropped term", "k"),
    },
    "x = a[1:-2]": {("constant", "2"), ("constant", "3"), ("constant", "1"), ("dropped sign", "2")},
    "x = a - b": {("arithmetic", " + "), ("dropped term", "a")},
    "x = a + b": {("arithmetic", " - "), ("dropped term", "a"), ("dropped term", "b")},
    "x = a / b": {("arithmetic", " * "), ("dropped term", "a")},
    "x = a // b": {("arithmetic", " * "), ("dropped term", "a")},
    "x = a % b": {("arithmetic", " // "), ("dropped term", "a")},
    "x = a & b": {("arithmetic", " | "), ("dropped term", "a"), ("dropped term", "b")},
    "x = a ** b": {("dropped term", "a")},
    "x = a @ b": {("dropped term", "a")},
    "x = a or b": {("dropped term", "(a)"), ("dropped term", "(b)")},
    "x = a and b and c": {("dropped term", f"({each})") for each in ("a and b", "a and c", "b and c")},
    "x = a < b": {("comparison", " <= ")},
    "x = a >= b": {("comparison", " > ")},
    "x = a == b": {("comparison", " != ")},
    "x = a is None": {("comparison", " is not ")},
    "x = a not in b": {("comparison", " in ")},
    "x = a < b < c": set(),
    "x = True": {("constant", "False")},
    "x = 0": {("constant", "1")},
    "x = 1": {("constant", "2")},
    "x = 3": {("constant", "2"), ("constant", "4")},
    "x = 0.5": {("constant", "1.0")},
    "x = 0.0": {("constant", "1.0")},
    "x = 'float32'": {("constant", "'bfloat16'")},
    "x = 'text'": set(),
    "x = np.float64": {("dtype", ".float32")},
    "x = np.int64": {("dtype", ".int32")},
    "np.float64 = x": set(),
    "x = f(a, b, k=c)": {("dropped argument", "f(a, b)"), ("removed call", "a"), ("swapped arguments", "f(b, a, k=c)")},
    "x = f(a, 1, name=c)": {("constant", "2"), ("removed call", "a")},
    "x = f(*a, b)": set(),
    "x = f(**k)": set(),
    "x = f()": set(),
    "x = a.f(b)": {("removed call", "a")},
    "x = np.f(b)": {("removed call", "b")},
    "x = Name(a, b)": {("swapped arguments", "Name(b, a)")},
    "x = isinstance(a, b)": set(),
    "x = np.sum(a)": {("removed call", "a"), ("sibling", "mean")},
    "x = a.min()": {("removed call", "a"), ("sibling", "max")},
    "x = any(a)": {("removed call", "a"), ("sibling", "all")},
    "if a: raise E": {("negated condition", "not a"), ("removed check", "False")},
    "if a: x = b": {("negated condition", "not a")},
    "while a: pass": {("negated condition", "not a")},
    "x = b if a else c": {("negated condition", "not a")},
    "x = [i for i in a if b]": {("negated condition", "not b")},
    "f(a)": {("removed call", "a"), ("removed call", "pass")},
    "x += a": {("removed update", "pass")},
    "x = x | a": {("arithmetic", " & "), ("dropped term", "x"), ("dropped term", "a"), ("removed update", "pass")},
    "x.y = x": set(),
    "assert a < b": set(),
    "raise f(a)": set(),
    "x = f'{a + b}'": set(),
    "x: f(a) = b": set(),
    "import a.b": set(),
    "if TYPE_CHECKING: x = a + b": set(),
}  # fmt: skip


@pytest.mark.parametrize("line", PLANTED)
def test_a_line_has_its_bugs(line: str) -> None:
    found = mutations_of("a.py", f"import numpy as np\n{line}\n".encode())
    assert {(each.operator, each.replacement) for each in found} == PLANTED[line]


def test_a_bug_belongs_to_the_outermost_function() -> None:
    source = """
LIMIT = a + b

class Layer:
    WIDTH = a * b

    def forward(self, x):
        def inner(y):
            return y % 3
        return inner(x)
"""
    functions = {"LIMIT": "", "WIDTH": "", "return y": "Layer.forward", "return i": "Layer.forward"}
    for each in mutations_of("a.py", source.encode()):
        assert each.function == next(name for start, name in functions.items() if each.before.startswith(start))


def test_places_are_of_bytes() -> None:
    """Letters of several bytes before an expression move it not."""
    source = "x = 'größe', a + b\n".encode()
    applied = {each.apply(source).decode() for each in mutations_of("a.py", source)}
    assert applied == {f"x = 'größe', {rest}\n" for rest in ("a - b", "a", "b")}
    assert {each.after for each in mutations_of("a.py", source)} == {f"x = 'größe', {r}" for r in ("a - b", "a", "b")}
