"""The rooms of shared_config stand on floors: a room imports from its own and from those below, never from above."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("errors", "registry"),
    ("schema",),
    ("contract",),
    ("interchange",),
    ("loader",),
    ("data", "training"),
    ("evaluation",),
    ("parity",),
    ("bench", "curves"),
    ("commands", "cli"),
)
"""Rooms from the ground up; those of one floor don't know each other but in the order given here."""
HEIGHT = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
LATE = {("schema", "contract")}
"""`ModelConfig.num_params_estimate`, which is counted where the table of parameters is."""
MOST_LINES = 350
FRAMEWORKS = ("torch", "jax", "flax", "optax", "kempnerforge_torch", "kempnerforge_jax")

MODULES = sorted((ROOT / "shared_config").rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported within a function) of every import of a file, by whatever statement."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) in late) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in late) for alias in node.names)


def room_of(module: str) -> str:
    """The room of ``shared_config.<room>....``; of the package itself "", which only leads to rooms."""
    return ([*module.split("."), ""])[1]


def upward(file: Path) -> list[str]:
    own = room_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    if own == "__init__":
        return []
    found = []
    for module, late in imports(file):
        if module.split(".")[0] == "shared_config" and room_of(module) in HEIGHT:
            there = room_of(module)
            if there != own and HEIGHT[there] > HEIGHT[own] and not (late and (own, there) in LATE):
                found.append(f"{file.relative_to(ROOT)} imports {module}")
            if there != own and {own, there} == {"data", "training"}:
                found.append(f"{file.relative_to(ROOT)} imports {module}, of the same floor")
    return found


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in MODULES}
    assert rooms - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    assert not upward(file)
    assert not [module for module, _ in imports(file) if module.split(".")[0] in FRAMEWORKS]


def test_files_are_short_enough_to_be_read() -> None:
    packages = ("shared_config", "kempnerforge_torch", "kempnerforge_jax")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {file: count for file, count in lines.items() if count > MOST_LINES}


@pytest.mark.parametrize("package", ["shared_config", "kempnerforge_torch", "kempnerforge_jax"])
def test_what_is_asked_of_an_architecture_its_config_answers(package: str) -> None:
    """So that a new one needs no branch of its own elsewhere."""
    asked = re.compile(r"isinstance\([^()]*, \(?(MoT|MoMa|CrossAttention|JointDecoder)Config")
    files = (ROOT / package).rglob("*.py")
    assert not [str(file) for file in files if asked.search(file.read_text(encoding="utf-8"))]


BACKEND_FILES = sorted(
    file for backend in ("torch", "jax") for file in (ROOT / f"kempnerforge_{backend}").rglob("*.py")
)


@pytest.mark.parametrize("file", BACKEND_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_backend_imports_its_own_files_at_once_and_no_other_backend(file: Path) -> None:
    """So that whatever one file registers is there once another is imported."""
    own = file.relative_to(ROOT).parts[0]
    found = [(module, late) for module, late in imports(file) if module.split(".")[0].startswith("kempnerforge_")]
    assert not [module for module, late in found if late or module.split(".")[0] != own]
    assert "importlib" not in [module.split(".")[0] for module, _ in imports(file)]
    assert "TYPE_CHECKING" not in file.read_text(encoding="utf-8"), "a circle of imports, hidden"


@pytest.mark.parametrize(
    "line",
    [
        "from shared_config.commands import common",
        "from shared_config import loader",
        "import shared_config.data.text",
        "def late():\n    from shared_config.training import loop",
    ],
)
def test_an_arrow_upward_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_floors.ROOT", tmp_path)
    file = tmp_path / "shared_config" / "interchange" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"from shared_config.contract import rope\n{line}\n")
    assert len(upward(file)) == 1
