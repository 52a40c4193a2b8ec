"""Which fields of config sections some code reads, found in its syntax trees.

An attribute counts as the field of a section if what it is taken from is known to be that section: by an annotation, by
the constructor or function that it comes from, or as a field of another section. A container of sections stands for its
sections. A property or method of a section counts for the fields that it reads, once it is used itself.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig

FieldName = tuple[str, str]
"""Name of the class that declares a field, and its own."""
Read = tuple[tuple[str, str], str, str]
"""The member of a section that reads, ("", "") outside the schema; the section read; the attribute."""
CHECKS = frozenset({"problems", "problems_with", "image_problems", "idle", "resolved", "resolved_with", "derive"})
"""Methods of sections that look at values without acting on them."""


def section_classes() -> dict[str, type[Section]]:
    """All sections that a job can have, by class name."""
    found: dict[str, type[Section]] = {}

    def add(cls: type[Section]) -> None:
        if cls.__name__ not in found and cls.__module__.startswith("shared_config."):
            found[cls.__name__] = cls
            for subclass in cls.__subclasses__():
                add(subclass)

    for cls in Section.__subclasses__():
        add(cls)
    return found


def fields_of(cls: type[Section]) -> list[str]:
    """Names of the fields of a section."""
    return [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]


def declared_fields(sections: Mapping[str, type[Section]]) -> set[FieldName]:
    """All fields but those of a job that hold sections."""
    return {(_owner(cls, name), name) for cls in sections.values() if cls is not JobConfig for name in fields_of(cls)}


def _owner(cls: type[Section], name: str) -> str:
    """The class that declares a field first."""
    return [base for base in cls.__mro__ if name in getattr(base, "__dataclass_fields__", {})][-1].__name__


@dataclass
class Known:
    """What is known of the classes and functions of all code: names of types by attribute and by result."""

    sections: Mapping[str, type[Section]]
    classes: set[str] = field(default_factory=set)
    bases: dict[str, list[str]] = field(default_factory=dict)
    attributes: dict[tuple[str, str], str] = field(default_factory=dict)
    results: dict[tuple[str, str], str] = field(default_factory=dict)
    """(class or "", function) -> type; "" where functions of one name differ."""

    def snapshot(self) -> tuple[dict[str, list[str]], dict[tuple[str, str], str], dict[tuple[str, str], str]]:
        """All that a pass can add to."""
        return dict(self.bases), dict(self.attributes), dict(self.results)

    def annotated(self, annotation: ast.AST | None) -> str | None:
        """The first known class that an annotation names."""
        if annotation is None:
            return None
        for node in ast.walk(annotation):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = self.annotated(ast.parse(node.value, mode="eval")) if node.value.isidentifier() else None
            if name in self.sections or name in self.classes:
                return name
        return None

    def member(self, owner: str, name: str, table: Mapping[tuple[str, str], str]) -> str | None:
        """The type of a member of a class, of its bases, or of a section that derives from it."""
        derived = [cls.__name__ for cls in family(self.sections, owner)]
        for cls in (owner, *self.bases.get(owner, []), *derived):
            if (cls, name) in table:
                return table[cls, name] or None
        return None


def family(sections: Mapping[str, type[Section]], name: str) -> list[type[Section]]:
    """A section, its bases and what derives from it."""
    if name not in sections:
        return []
    cls = sections[name]
    return [other for other in sections.values() if issubclass(other, cls) or issubclass(cls, other)]


class Reader(ast.NodeVisitor):
    """Follows types through one module, adds to what is known, and collects what is read.

    Attributes:
        parameters: types that the functions of the module agree on, by name.
        reads: what is taken from sections.
    """

    def __init__(self, known: Known, parameters: Mapping[str, str]):
        self.known = known
        self.parameters = parameters
        self.scopes: list[dict[str, str | None]] = [{}]
        self.cls = ""
        self.function = ""
        self.reads: set[Read] = set()

    def type_of(self, node: ast.AST | None) -> str | None:
        known = self.known
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            return known.member(owner, node.attr, known.attributes) if owner else None
        if isinstance(node, ast.Call):
            return self._result(node.func)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body) or self.type_of(node.orelse)
        if isinstance(node, ast.BoolOp):
            return next(filter(None, map(self.type_of, node.values)), None)
        if isinstance(node, (ast.Subscript, ast.Starred, ast.NamedExpr)):
            return self.type_of(node.value)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return next(filter(None, map(self.type_of, node.elts)), None)
        return None

    def _result(self, called: ast.AST) -> str | None:
        if isinstance(called, ast.Name):
            is_class = called.id in self.known.sections or called.id in self.known.classes
            return called.id if is_class else self.known.results.get(("", called.id)) or None
        if not isinstance(called, ast.Attribute):
            return None
        owner = self.type_of(called.value)
        if owner is None:
            return self.known.results.get(("", called.attr)) or None
        if called.attr == "replace":
            return owner
        return self.known.member(owner, called.attr, self.known.results)

    def bind(self, target: ast.AST, value: ast.AST | None, found: str | None = None) -> None:
        """Let a target stand for the type of a value."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, part in zip(target.elts, value.elts, strict=True):
                self.bind(one, part)
            return
        found = found or self.type_of(value)
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = found
        elif isinstance(target, ast.Attribute) and self.type_of(target.value) == self.cls and self.cls and found:
            self.known.attributes.setdefault((self.cls, target.attr), found)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.cls = self.cls, node.name
        self.known.bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
        self.generic_visit(node)
        self.cls = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        inside = self.cls and not self.function
        result = self.known.annotated(node.returns)
        decorators = [getattr(item, "id", getattr(item, "attr", "")) for item in node.decorator_list]
        is_property = any(name.endswith("property") for name in decorators)
        key = (self.cls if inside else "", node.name)
        if is_property and result:
            self.known.attributes.setdefault(key, result)
        elif not is_property:
            agreed = self.known.results.setdefault(key, result or "")
            self.known.results[key] = agreed if agreed == (result or "") else ""
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        found = {argument.arg: self.known.annotated(argument.annotation) for argument in arguments}
        scope = dict(found)
        if inside and arguments and arguments[0].arg == "self":
            scope["self"] = self.cls
        outer, self.function = self.function, self.function or node.name
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()
        self.function = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Its parameters stand for what the functions of the module annotate under the same names."""
        names = {argument.arg for argument in node.args.args}
        self.scopes.append({name: self.parameters.get(name) for name in names})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)
            self.bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        found = self.known.annotated(node.annotation)
        if self.cls and not self.function and isinstance(node.target, ast.Name) and found:
            self.known.attributes.setdefault((self.cls, node.target.id), found)
        else:
            self.bind(node.target, node.value, found)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.bind(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.bind(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        self.bind(node.target, node.iter)
        for condition in node.ifs:
            self.visit(condition)

    def _visit_comprehended(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self.scopes.append({})
        for generator in node.generators:
            self.visit(generator)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(part)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehended

    def visit_withitem(self, node: ast.withitem) -> None:
        self.visit(node.context_expr)
        if node.optional_vars is not None:
            self.bind(node.optional_vars, node.context_expr)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.type_of(node.value)
        if isinstance(node.ctx, ast.Load) and owner is not None and owner in self.known.sections:
            inside = self.cls in self.known.sections
            self.reads.add(((self.cls, self.function) if inside else ("", ""), owner, node.attr))
        self.generic_visit(node)


def _parameter_types(known: Known, tree: ast.Module) -> dict[str, str]:
    """The types of parameters, by name, as far as all functions of a module agree on them."""
    found: dict[str, set[str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            found.setdefault(node.arg, set()).add(known.annotated(node.annotation))
    return {name: kind for name, kinds in found.items() for kind in kinds if len(kinds) == 1 and kind}


def fields_read(reads: Iterable[Read]) -> set[FieldName]:
    """Fields that code acts on, of all that code and schema take from sections."""
    sections = section_classes()
    reads = set(reads)
    used, found = {("", "")}, set()
    while True:
        now = {(owner, attribute) for reader, owner, attribute in reads if reader in used}
        found = {name for read in now for name in _fields_of(sections, *read)}
        members = {(cls.__name__, name) for owner, name in now if name not in CHECKS for cls in family(sections, owner)}
        if members <= used:
            return found
        used |= members


def attributes_read(sources: Mapping[str, str]) -> dict[str, set[Read]]:
    """All that is taken from sections, by the module that takes it.

    Args:
        sources: module -> source. Those of the schema come first: their properties and methods read fields for those
            who use them.
    """
    sections = section_classes()
    known = Known(sections)
    for name, cls in sections.items():
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if found := _section_in(sections, str(item.type)):
                known.attributes[name, item.name] = found
    trees = {module: _tree(source) for module, source in sources.items()}
    known.classes |= {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    parameters = {module: _parameter_types(known, tree) for module, tree in trees.items()}
    while True:
        before = known.snapshot()
        readers = {module: Reader(known, parameters[module]) for module in trees}
        for module, reader in readers.items():
            reader.visit(trees[module])
        if known.snapshot() == before:
            return {module: reader.reads for module, reader in readers.items()}


@functools.cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


def _section_in(sections: Mapping[str, type[Section]], annotation: str) -> str | None:
    """The section that an annotation names."""
    words = set(re.findall(r"\w+", annotation.replace("AnyVLMConfig", "VLMConfig")))
    return next((name for name in sections if name in words), None)


def _fields_of(sections: Mapping[str, type[Section]], owner: str, attribute: str) -> Iterator[FieldName]:
    for cls in family(sections, owner):
        if attribute in getattr(cls, "__dataclass_fields__", {}):
            yield _owner(cls, attribute), attribute
