"""Models inside wrappers (`torch.compile`, data parallelism, averaging, ...), around the whole or around parts.

Paths and names are plain (`shared_config.interchange.states.plain_name`): as if nothing were wrapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar, cast

from torch import nn

from shared_config.interchange.states import WRAPPERS, plain_name

_Module = TypeVar("_Module", bound=nn.Module)


def unwrap(model: _Module) -> _Module:
    """The module inside the outermost wrappers; its parts stay wrapped."""
    while (inner := _inner(model)) is not None:
        model = cast("_Module", inner)
    return model


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its plain path, the root ("") first, in order of definition; wrappers are left out."""
    return {plain_name(path): module for path, module in model.named_modules() if _inner(module) is None}


@contextlib.contextmanager
def unwrapped(model: _Module) -> Iterator[_Module]:
    """The model as if nothing in it were wrapped or compiled, while the context is open."""
    parents = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and _inner(child) is not None and _inner(parent) is None
    ]
    with uncompiled(model):
        try:
            for parent, name, child in parents:
                parent._modules[name] = unwrap(child)
            yield unwrap(model)
        finally:
            for parent, name, child in parents:
                parent._modules[name] = child


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled parts uncompiled while the context is open: compiled code ignores hooks that were added later."""
    with contextlib.ExitStack() as restoring:
        for module in list(model.modules()):
            if "_orig_mod" in module._modules and hasattr(module, "dynamo_ctx"):
                restoring.callback(module.__dict__.__setitem__, "forward", module.forward)
                module.__dict__["forward"] = unwrap(module).__call__
            elif module._compiled_call_impl is not None:
                restoring.callback(module.__dict__.__setitem__, "_compiled_call_impl", module._compiled_call_impl)
                module.__dict__["_compiled_call_impl"] = None
        yield


def is_observed(module: nn.Module) -> bool:
    """Whether hooks see, or may change, what a module or one within it puts out."""
    return any(each._forward_hooks for each in module.modules())


def _inner(module: object) -> nn.Module | None:
    """The module that a wrapper holds; None for other modules."""
    children = module._modules if isinstance(module, nn.Module) else {}
    return next((child for name, child in children.items() if name in WRAPPERS), None) if len(children) == 1 else None
