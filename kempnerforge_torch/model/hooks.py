"""Activations by the dotted path of the module that put them out ("layers.0.attention.q_proj", "norm")."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def activation_names(model: nn.Module) -> list[str]:
    """Names that `capture` knows, in order of definition."""
    containers = (nn.ModuleDict, nn.ModuleList)
    return [name for name, module in model.named_modules() if name and not isinstance(module, containers)]


@contextlib.contextmanager
def capture(model: nn.Module, names: Iterable[str] | None = None, *, detach: bool = False) -> Iterator[dict[str, Any]]:
    """Collect outputs of modules while the context is open.

    Args:
        names: which; None for all. Of a tuple the first is taken, a dict is kept as it is.
        detach: cut the collected tensors from the graph; otherwise gradients flow through them.

    Yields:
        name -> output of the module's last call, in the order of calls. Modules that weren't called are absent.

    Raises:
        ValueError: an unknown name; lists what exists.
    """
    modules = dict(model.named_modules())
    activations: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        activations[name] = _detached(first_output(output)) if detach else first_output(output)

    with contextlib.ExitStack() as hooks:
        for name in check_activation_names(activation_names(model), names):
            handle = modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
            hooks.callback(handle.remove)
        yield activations


def first_output(output: Any) -> Any:
    """A tuple gives its first."""
    return output[0] if isinstance(output, tuple) else output


def check_activation_names(existing: list[str], names: Iterable[str] | None) -> list[str]:
    """The names asked for, or all.

    Raises:
        ValueError: an unknown name; lists close matches and what exists.
    """
    if names is None:
        return existing
    names = list(names)
    for name in names:
        if name not in existing:
            close = difflib.get_close_matches(name, existing)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"name = {name!r}: no such module{hint} Modules: {', '.join(existing)}")
    return names


def _detached(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: _detached(value) for key, value in output.items()}
    return output.detach() if isinstance(output, Tensor) else output
