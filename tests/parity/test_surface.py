"""What users of the proof install and import: one framework is enough for one side, and every public name is typed."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from hypothesis import settings
from packaging.requirements import Requirement

import kempnerforge_jax.parity
import kempnerforge_torch.parity
import shared_config.parity
from tests.cli.processes import ROOT, run_python

nightly = pytest.mark.skipif(
    settings.get_current_profile_name() != "nightly", reason="takes seconds: HYPOTHESIS_PROFILE=nightly"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OWN = PROJECT["project"]["name"]
PACKAGES = ("kempnerforge_torch", "kempnerforge_jax", "shared_config")
SCRIPTS = {
    "torch": "import torch\nfrom kempnerforge_torch.parity import record\nfunction = torch.tanh",
    "jax": "import jax.numpy as jnp\nfrom kempnerforge_jax.parity import record\nfunction = jnp.tanh",
}
MADE = """
import numpy as np

def made(**options):
    return record(function, (np.linspace(-2, 2, 18, dtype=np.float32).reshape(2, 9),), **options)
"""


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What a distribution needs, with some extras."""
    if name == OWN:
        listed = [*PROJECT["project"]["dependencies"]]
        listed += [line for extra in extras for line in PROJECT["project"]["optional-dependencies"][extra]]
        yield from map(Requirement, listed)
        return
    for requirement in map(Requirement, requires(name) or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def installed_with(*extras: str) -> set[str]:
    """Every distribution that comes with this one and extras of it."""
    found, open_ones = set(), [(OWN, frozenset(extras))]
    while open_ones:
        name, own = open_ones.pop()
        if (name, own) in found:
            continue
        found.add((name, own))
        try:
            open_ones += [(normal(each.name), frozenset(each.extras)) for each in requirements(name, own)]
        except PackageNotFoundError:
            continue  # of another platform
    return {name for name, _ in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def blocked_without(*extras: str) -> tuple[str, ...]:
    """Modules that are installed here, and would not be with these extras alone."""
    known = installed_with(*extras)
    modules = packages_distributions().items()
    return tuple(module for module, owners in modules if known.isdisjoint(map(normal, owners)) and module[0] != "_")


def test_the_extra_brings_no_framework() -> None:
    known = installed_with("parity")
    assert {"numpy", "hypothesis", "pytest", "safetensors"} <= known
    assert known.isdisjoint({"torch", "jax", "flax", "optax", "transformers"})
    assert {"torch", "jax", "flax", "optax", "transformers"} <= {*blocked_without("parity")}
    assert "torch" in installed_with("parity", "torch") - installed_with("parity", "jax")


@nightly
def test_one_framework_is_enough_for_one_side_and_none_to_compare(tmp_path: Path) -> None:
    files = []
    for framework, text in SCRIPTS.items():
        (tmp_path / f"of_{framework}.py").write_text(text + MADE, encoding="utf-8")
        files.append(str(tmp_path / f"{framework}.safetensors"))
        model = f"{tmp_path / f'of_{framework}.py'}:made"
        blocked = blocked_without("parity", framework)
        assert {"torch", "jax"} - {*blocked} == {framework}
        done = run_python("-m", "shared_config.cli", "record", model, "--output", files[-1], blocked=blocked)
        assert done.returncode == 0, done.stderr
    arguments = ("-m", "shared_config.cli", "compare", *files, "--report", str(tmp_path / "page.html"))
    done = run_python(*arguments, blocked=blocked_without("parity"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "page.html").exists()


def public() -> Iterator[tuple[str, object]]:
    for module in (shared_config.parity, kempnerforge_torch.parity, kempnerforge_jax.parity):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)


def test_every_public_name_says_what_it_takes_and_gives() -> None:
    for name, value in public():
        own = [value] if inspect.isfunction(value) else [v for n, v in vars(value).items() if n[0] != "_"]
        for function in filter(inspect.isfunction, own):
            signature = inspect.signature(function)
            parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
            assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters), name
            assert signature.return_annotation is not inspect.Signature.empty, name


def test_type_checkers_see_the_names_that_are_there() -> None:
    """In installed packages, and of those that are imported late."""
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]
    tree = ast.parse(Path(shared_config.parity.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        str(node.module).removeprefix("shared_config.parity."): tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == dict(shared_config.parity.HOMES)
    assert kempnerforge_torch.parity.__all__ == kempnerforge_jax.parity.__all__
    assert {"record", "tap"} <= {*kempnerforge_torch.parity.__all__}
