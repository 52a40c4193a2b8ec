"""Whatever the packages offer says what it is, itself or by the method that it overrides."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("shared_config", "kempnerforge_torch", "kempnerforge_jax")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def classes_of(trees: list[ast.Module]) -> dict[str, list[ast.ClassDef]]:
    """The classes of each name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        found.setdefault(node.name, []).append(node)
    return found


def is_documented(method: str, cls: ast.ClassDef, classes: dict[str, list[ast.ClassDef]]) -> bool:
    """Whether a class documents a method, or one that it derives from does."""
    own = [node for node in cls.body if isinstance(node, Definition) and node.name == method]
    bases = [base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in cls.bases]
    return any(ast.get_docstring(node) for node in own) or any(
        is_documented(method, each, classes) for base in bases for each in classes.get(base, []) if each is not cls
    )


def undocumented(tree: ast.Module, classes: dict[str, list[ast.ClassDef]]) -> Iterator[str]:
    """Names of public classes, functions and methods without a docstring."""
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, Definition) or node.name.startswith("_") or _is_overload(node):
            continue
        if not ast.get_docstring(node):
            yield node.name
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(member, Definition) and not member.name.startswith("_"):
                assert isinstance(node, ast.ClassDef)
                if not is_documented(member.name, node, classes):
                    yield f"{node.name}.{member.name}"


def _is_overload(node: Definition) -> bool:
    """Whether it only lists types: the definition that follows says what it is."""
    return any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)


def missing(sources: dict[str, str]) -> list[str]:
    """``file: name`` of all that is undocumented in some sources."""
    trees = {path: ast.parse(source) for path, source in sources.items()}
    classes = classes_of(list(trees.values()))
    return [f"{path}: {name}" for path, tree in trees.items() for name in undocumented(tree, classes)]


def test_everything_public_is_documented() -> None:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert not missing({str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files})


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(): ...", ["f"]),
        ("class A:\n  'Said.'\n  def f(self): ...", ["A.f"]),
        ("class A:\n  'Said.'\n  def f(self): 'Said.'\nclass B(A):\n  'Said.'\n  def f(self): ...", []),
        ("class A:\n  'Said.'\n  def f(self): ...\nclass B(A):\n  'Said.'\n  def f(self): ...", ["A.f", "B.f"]),
        ("def _f(): ...\nclass _A: ...", []),
        ("@overload\ndef f(): ...\ndef f(): 'Said.'", []),
    ],
)
def test_what_is_not_documented_is_found(source: str, found: list[str]) -> None:
    assert missing({"a.py": f"'Said.'\n{source}"}) == [f"a.py: {name}" for name in found]
