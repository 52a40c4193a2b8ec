"""Backends are imported when a command needs one, and only then."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from shared_config.errors import UserError
from shared_config.training.signals import ending_at_once

BACKENDS = {"torch": ("torch",), "jax": ("jax", "flax", "optax")}
"""Backend -> the packages it needs, in the order in which they are looked for."""


def require_backend(backend: str) -> None:
    """Check, without importing it, that a backend can be imported.

    Raises:
        UserError: a package is missing; the message names the extra that installs it.
    """
    for package in BACKENDS[backend]:
        require_package(package, backend, f"backend {backend}")


def require_package(package: str, extra: str, purpose: str) -> None:
    """Check, without importing it, that a package can be imported.

    Raises:
        UserError: it can't; the message names the extra that installs it.
    """
    if not _is_installed(package):
        raise UserError(f"{purpose}: the package {package} is not installed; pip install 'kempnerforge-twin[{extra}]'")


def backend_module(backend: str, name: str) -> ModuleType:
    """Import ``kempnerforge_<backend>.<name>``.

    Raises:
        UserError: as `require_backend`.
    """
    require_backend(backend)
    with ending_at_once():
        return importlib.import_module(f"kempnerforge_{backend}.{name}")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False
