"""Models inside wrappers (`nnx.jit`, `jax.jit`, `functools.partial`, modules that hold another as ``module``).

Paths and names are plain (`shared_config.interchange.states.plain_name`): as if nothing were wrapped.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from flax import nnx

from kempnerforge_jax.model.module import Numbered, named_modules
from shared_config.interchange.states import WRAPPERS, plain_name

_Model = TypeVar("_Model")
_Unwrapped = TypeVar("_Unwrapped", bound=nnx.Module)


def unwrap(model: _Model) -> _Model:
    """The module inside the outermost wrappers; its parts stay wrapped."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def plain_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every module by its plain path, the root ("") first, in order of definition; wrappers are left out."""
    return {plain_name(path): module for path, module in named_modules(unwrap(model)) if _inner(module) is None}


def unwrapped(model: _Unwrapped) -> _Unwrapped:
    """The model as if nothing in it were wrapped, with the same variables; itself if nothing is."""
    model = unwrap(model)
    if all(_inner(module) is None for _, module in named_modules(model)):
        return model
    plain = copy.copy(model)
    entries = plain if isinstance(plain, Numbered) else vars(plain)
    for name, child in list(entries.items()):
        if isinstance(child, nnx.Module):
            entries[name] = unwrapped(child)
    return plain


def _inner(module: Any) -> Any:
    """What a wrapper holds; None for other modules and values."""
    if not isinstance(module, nnx.Module):
        return getattr(module, "__wrapped__", None) or getattr(module, "func", None)
    children = {name: child for name, child in vars(module).items() if isinstance(child, nnx.Module)}
    return next((child for name, child in children.items() if name in WRAPPERS), None) if len(children) == 1 else None
