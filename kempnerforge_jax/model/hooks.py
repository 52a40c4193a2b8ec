"""Activations by the dotted path of the module that put them out ("layers.0.attention.q_proj", "norm")."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from kempnerforge_jax.model.module import Module, named_modules, observing


def activation_names(model: nnx.Module) -> list[str]:
    """Names that `capture` knows, in order of definition."""
    return [name for name, module in named_modules(model) if name and isinstance(module, Module)]


@contextlib.contextmanager
def capture(model: nnx.Module, names: Iterable[str] | None = None, *, detach: bool = False) -> Iterator[dict[str, Any]]:
    """Collect outputs of modules while the context is open. Works inside a trace, on the model that was merged there.

    Layers are run one by one meanwhile, whatever `Transformer.run` is told of scans and rematerialisation.

    Args:
        names: which; None for all. Of a tuple the first is taken, a dict is kept as it is.
        detach: stop gradients at the collected arrays.

    Yields:
        name -> output of the module's last call, in the order of calls. Modules that weren't called are absent.

    Raises:
        ValueError: an unknown name; lists what exists.
    """
    wanted = set(check_activation_names(activation_names(model), names))
    name_of = {id(module): name for name, module in named_modules(model) if name in wanted}
    activations: dict[str, Any] = {}

    def keep(module: Module, output: Any) -> None:
        name = name_of.get(id(module))
        if name is not None:
            first = first_output(output)
            activations[name] = jax.lax.stop_gradient(first) if detach else first

    with observing(keep):
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
