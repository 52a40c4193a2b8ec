"""Public signatures say what they take and give: no `Any` in annotations of public functions, methods and fields."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parent.parent
PACKAGES = ("kempnerforge_torch", "kempnerforge_jax", "shared_config")
OUTPUT = "what a module puts out, an array or arrays by modality: its reader knows which"
EXCEPTIONS = {
    f"{package}/model/hooks.py: {name}": OUTPUT
    for package in ("kempnerforge_torch", "kempnerforge_jax")
    for name in ("capture", "ActivationStore.activations", "ActivationStore.get", "first_output")
} | {
    "kempnerforge_jax/model/module.py: Module.__call__": "what a subclass takes and gives, which says so itself",
    "kempnerforge_jax/model/module.py: Module.forward": "what a subclass takes and gives, which says so itself",
    "kempnerforge_jax/model/module.py: Module.kept": "what the module remembers: its reader knows which",
    **dict.fromkeys(
        (
            "shared_config/contract/bias_schedule.py: training_progress",
            "shared_config/contract/bias_schedule.py: schedule_factor",
        ),
        "a number, or an array of whichever namespace is given",
    ),
    "shared_config/contract/decoding.py: SamplingConfig.seed": "an integer, or what draws numbers in a backend",
    **dict.fromkeys(
        ("shared_config/registry.py: Registry.get", "shared_config/registry.py: Registry.builders"),
        "what a builder takes and makes is its category's: its caller knows which",
    ),
    **dict.fromkeys(
        (
            f"shared_config/parity/foreign/containers.py: {name}"
            for name in ("map_tensors", "tensors_in", "named_leaves")
        ),
        "containers and tensors of any framework",
    ),
    **dict.fromkeys(
        (f"shared_config/contract/schedule.py: Rates.{name}" for name in ("lr", "decay", "average")),
        "a number of the host, or a scalar of a device",
    ),
    **dict.fromkeys(
        (f"shared_config/commands/line.py: Parser.{name}" for name in ("__init__", "add_argument")),
        "what argparse takes",
    ),
    "kempnerforge_torch/training/groups.py: Group": "what torch calls a group, which it types so",
    **dict.fromkeys(
        (f"kempnerforge_jax/training/whole.py: WholeUpdate.{name}" for name in ("init", "update")),
        "the state of an optimiser: a named tuple of its own",
    ),
    "shared_config/training/metrics.py: read_metrics": "lines of JSON, as they were written",
}
"""``file: name`` of what takes or gives anything at all, with the reason."""


def untyped(tree: ast.Module) -> Iterator[str]:
    """Public functions, ``Class.method``, ``Class.field`` and names of types whose annotations say `Any`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                yield from (f"{node.name}.{name}" for name in _untyped(member))
                if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                    attributes = (each for each in ast.walk(member) if _sets_attribute(each))
                    yield from (f"{node.name}.{name}" for each in attributes for name in _untyped(each))
        else:
            yield from _untyped(node)


def _sets_attribute(node: ast.AST) -> TypeGuard[ast.AnnAssign]:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute)


def _untyped(node: ast.stmt) -> Iterator[str]:
    """The name that a statement defines, if it is public and its annotation, or the type that it names, says `Any`."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        args = node.args
        listed = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        said, name = [*(each.annotation for each in listed if each), node.returns], node.name
    elif isinstance(node, ast.AnnAssign):
        said, name = [node.annotation], getattr(node.target, "id", getattr(node.target, "attr", ""))
    elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp, ast.Name)):
        said, name = [node.value], getattr(node.targets[0], "id", "_")
    else:
        return
    if (not name.startswith("_") or name == "__init__" or name == "__call__") and any(map(_says_any, said)):
        yield name


def _says_any(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(
        (isinstance(part, ast.Name) and part.id == "Any")
        or (isinstance(part, ast.Constant) and "Any" in str(part.value))
        for part in ast.walk(annotation)
    )


def test_no_public_signature_says_any() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in untyped(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(EXCEPTIONS)


def test_an_any_is_seen() -> None:
    source = """
Alias = dict[str, Any]
_Own = Any
def f(x: int, *rest: Any) -> int: ...
def g(x: "list[Any]") -> int: ...
def fine(x: int) -> None: ...
def _private(x: Any) -> Any: ...
class C(NamedTuple):
    field: Any
    other: int
    def __init__(self, x: Any):
        self.attribute: list[Any] = []
        self._attribute: Any = 0
        local: Any = 0
    def method(self) -> Any: ...
    def _method(self) -> Any: ...
"""
    expected = ["Alias", "f", "g", "C.field", "C.__init__", "C.attribute", "C.method"]
    assert list(untyped(ast.parse(source))) == expected
