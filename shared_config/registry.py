"""Builders by category and name. Each backend owns an instance; a config may use every name that was registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Builder = TypeVar("Builder", bound=Callable[..., Any])

_declared: dict[str, set[str]] = {
    "model": {"transformer"},
    "router": {"softmax_topk", "sigmoid_topk"},
    "vision_encoder": {"random", "siglip2", "clip", "vit"},
    "adapter": {"mlp_2layer", "linear", "avgpool", "attentional_pool"},
}


def declared_names(category: str) -> tuple[str, ...]:
    """Names a config may use in ``category``: the built-in ones and all that any backend registered."""
    return tuple(sorted(_declared.get(category, ())))


class Registry:
    """Maps (category, name) to a builder, e.g. ("norm", "rmsnorm") to the RMSNorm class."""

    def __init__(self) -> None:
        self._builders: dict[str, dict[str, Callable[..., Any]]] = {}

    def register(self, category: str, name: str) -> Callable[[Builder], Builder]:
        """Decorator that files a builder under ``category`` and ``name``.

        Raises:
            ValueError: if the name is taken.
        """

        def file(builder: Builder) -> Builder:
            builders = self._builders.setdefault(category, {})
            if name in builders:
                raise ValueError(f"{category} {name!r} is registered already, as {builders[name]!r}")
            builders[name] = builder
            _declared.setdefault(category, set()).add(name)
            return builder

        return file

    def get(self, category: str, name: str) -> Callable[..., Any]:
        """The builder of ``name``.

        Raises:
            KeyError: "Unknown <category>: ..." with the names that exist.
        """
        builders = self._builders.get(category, {})
        if name not in builders:
            raise KeyError(f"Unknown {category}: {name!r}; available: {', '.join(sorted(builders)) or 'none'}")
        return builders[name]

    def has(self, category: str, name: str) -> bool:
        """Whether ``name`` is registered in ``category``."""
        return name in self._builders.get(category, {})

    def names(self, category: str) -> tuple[str, ...]:
        """The registered names of a category, sorted."""
        return tuple(sorted(self._builders.get(category, {})))
