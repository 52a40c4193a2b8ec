"""Every small bug that the operators can plant in a source file.

A mutation replaces the text of one expression or statement. It is known by its file, its function and the line before
and after, so that edits elsewhere in the file leave it what it was.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
DTYPES = {"float32": "bfloat16", "float64": "float32", "bfloat16": "float32", "int64": "int32", "int32": "int16"}
SIBLINGS = {
    "min": "max", "any": "all", "zeros": "ones", "zeros_like": "ones_like", "floor": "ceil", "argmin": "argmax",
    "sum": "mean", "minimum": "maximum", "sqrt": "rsqrt", "sin": "cos", "startswith": "endswith", "amin": "amax",
    "float": "bfloat16", "double": "float", "tril": "triu", "cumsum": "cumprod", "clamp_min": "clamp_max",
}  # fmt: skip
SIBLINGS |= {
    second: first for first, second in SIBLINGS.items() if second not in ("mean", "bfloat16", "cumprod", "float")
}
UNTOUCHED_CALLS = {"isinstance", "issubclass", "cast", "getattr", "hasattr", "super", "TypeVar", "field", "dataclass"}
UNTOUCHED_KEYWORDS = {"strict", "frozen", "slots", "stacklevel", "encoding", "name", "help", "description"}
SIMPLE = (ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.Subscript)


@dataclass(frozen=True)
class Mutation:
    """One bug: bytes ``start`` to ``end`` of the file become ``replacement``.

    Attributes:
        function: qualified name of the outermost function or method, "" for code outside of one.
        before, after: the lines concerned, without indentation.
    """

    file: str
    function: str
    operator: str
    start: int
    end: int
    replacement: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """File, function, and the lines before and after."""
        return self.file, self.function, self.before, self.after

    def apply(self, source: bytes) -> bytes:
        """The file with the bug."""
        return source[: self.start] + self.replacement.encode() + source[self.end :]

    def is_change(self, source: bytes) -> bool:
        """Whether the file still parses, as another program."""
        try:
            return ast.dump(ast.parse(self.apply(source))) != ast.dump(ast.parse(source))
        except SyntaxError:
            return False


def mutations_of(file: str, source: bytes) -> list[Mutation]:
    """All mutations of a file, in the order of their places."""
    return list(dict.fromkeys(_Planter(file, source).everywhere()))


class _Planter:
    """Walks one file; knows where its lines begin and which names are modules."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source, self.tree = file, source, ast.parse(source)
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        imports = (node for node in ast.walk(self.tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
        self.modules = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}

    def everywhere(self) -> Iterator[Mutation]:
        yield from self._walk(self.tree, (), False)

    def _walk(self, node: ast.AST, scope: tuple[str, ...], inside: bool) -> Iterator[Mutation]:
        """Mutations below ``node``; ``inside`` a function, whose inner functions belong to it."""
        for child in _mutable_children(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = scope if inside else (*scope, child.name)
                yield from self._walk(child, names, inside or not isinstance(child, ast.ClassDef))
                continue
            for operator, place, text in self._edits(child):
                yield self._mutation(operator, place, text, ".".join(scope) if inside else "")
            yield from self._walk(child, scope, inside)

    def _mutation(self, operator: str, place: tuple[int, int], text: str, function: str) -> Mutation:
        start, end = place
        first = self.source.rfind(b"\n", 0, start) + 1
        last = self.source.find(b"\n", end)
        whole = lambda part: " ".join(part.decode().split())  # noqa: E731
        before = whole(self.source[first:last])
        after = whole(self.source[first:start] + text.encode() + self.source[end:last])
        return Mutation(self.file, function, operator, start, end, text, before, after)

    def place(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt | ast.keyword) -> str:
        start, end = self.place(node)
        text = self.source[start:end].decode()
        return text if isinstance(node, (*SIMPLE, ast.keyword, ast.Starred)) else f"({text})"

    def _edits(self, node: ast.AST) -> Iterator[tuple[str, tuple[int, int], str]]:
        """(operator, place, text) of each mutation of this one node."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self._symbol("comparison", node.left, node.comparators[0], COMPARISONS[type(node.ops[0])])
        elif isinstance(node, ast.BinOp):
            if type(node.op) in ARITHMETIC:
                yield from self._symbol("arithmetic", node.left, node.right, ARITHMETIC[type(node.op)])
            yield "dropped term", self.place(node), self.text(node.left)
            if isinstance(node.op, (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)):
                yield "dropped term", self.place(node), self.text(node.right)
        elif isinstance(node, ast.BoolOp):
            word = " and " if isinstance(node.op, ast.And) else " or "
            for dropped in node.values:
                rest = word.join(self.text(value) for value in node.values if value is not dropped)
                yield "dropped term", self.place(node), f"({rest})"
        elif isinstance(node, ast.UnaryOp):
            yield "dropped sign", self.place(node), self.text(node.operand)
        elif isinstance(node, ast.Constant):
            for text in _other_values(node.value):
                yield "constant", self.place(node), text
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in DTYPES:
            yield "dtype", (self.place(node.value)[1], self.place(node)[1]), f".{DTYPES[node.attr]}"
        elif isinstance(node, ast.Call):
            yield from self._calls(node)
        elif isinstance(node, ast.Slice):
            for bound in (node.lower, node.upper):
                if bound is not None and not isinstance(bound, (ast.Constant, ast.UnaryOp)):
                    yield "off by one", self.place(bound), f"{self.text(bound)} + 1"
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield "negated condition", self.place(node.test), f"not {self.text(node.test)}"
            if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
                yield "removed check", self.place(node.test), "False"
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield "negated condition", self.place(test), f"not {self.text(test)}"
        elif isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.YieldFrom)):
            yield "removed call", self.place(node), "pass"
        elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Assign) and _updates(node)):
            yield "removed update", self.place(node), "pass"

    def _symbol(
        self, operator: str, left: ast.expr, right: ast.expr, symbols: tuple[str, str]
    ) -> Iterator[tuple[str, tuple[int, int], str]]:
        """The operator between two operands replaced."""
        place = self.place(left)[1], self.place(right)[0]
        between = self.source[slice(*place)].decode()
        yield operator, place, between.replace(*symbols, 1)

    def _calls(self, node: ast.Call) -> Iterator[tuple[str, tuple[int, int], str]]:
        function, place = node.func, self.place(node)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in UNTOUCHED_CALLS:
            return
        if name in SIBLINGS:
            end = self.place(function)[1]
            yield "sibling", (end - len(name), end), SIBLINGS[name]
        first, *_ = [*node.args, None]
        if isinstance(function, ast.Attribute) and _root(function) not in self.modules:
            yield "removed call", place, self.text(function.value)
        elif first is not None and not isinstance(first, ast.Starred) and not name[:1].isupper():
            yield "removed call", place, self.text(first)
        arguments = [*node.args, *node.keywords]
        for index, (one, two) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if not isinstance(one, (ast.Constant, ast.Starred)) and not isinstance(two, (ast.Constant, ast.Starred)):
                swapped = [*arguments[:index], two, one, *arguments[index + 2 :]]
                yield "swapped arguments", place, self._call(function, swapped)
        for dropped in node.keywords:
            if dropped.arg is not None and dropped.arg not in UNTOUCHED_KEYWORDS:
                kept = [argument for argument in arguments if argument is not dropped]
                yield "dropped argument", place, self._call(function, kept)
        if name == "range" and not isinstance(node.args[-1], ast.Constant):
            yield "off by one", self.place(node.args[-1]), f"{self.text(node.args[-1])} - 1"

    def _call(self, function: ast.expr, arguments: list[ast.expr | ast.keyword]) -> str:
        return f"{self.text(function)}({', '.join(self.text(argument) for argument in arguments)})"


def _mutable_children(node: ast.AST) -> Iterator[ast.AST]:
    """Children that compute something: no annotations, decorators, messages of errors, assertions or text."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            skipped = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
            if isinstance(child, ast.AST) and not isinstance(child, skipped):
                if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                    continue
                if isinstance(child, ast.keyword) and child.arg in UNTOUCHED_KEYWORDS:
                    continue
                yield child


def _other_values(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1), *([str(value - 1)] if value > 1 else [])]
    if isinstance(value, float):
        return [repr(value * 2 or 1.0)]
    if isinstance(value, str) and value in DTYPES:
        return [repr(DTYPES[value])]
    return []


def _updates(node: ast.Assign) -> bool:
    """Whether a variable is computed anew from itself."""
    names = {target.id for target in node.targets if isinstance(target, ast.Name)}
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node.value))


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
