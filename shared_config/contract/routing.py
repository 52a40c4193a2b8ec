"""Which router is meant: by its layer and, where a layer has one for each, by its modality."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")
_PATH = re.compile(
    r"(?:.*\.)?layers\.(?P<layers>[^.]+)\.[^.]+(?:\.experts)?(?:\.(?:.+\.)?(?P<modality>[^.]+))?\.router"
)


class RouterId(NamedTuple):
    """A router of a model. As text "3" for layer 3, "3.image" where each modality has a router.

    Attributes:
        modality: "" for the one router of a layer.
    """

    layer: int
    modality: str = ""

    def __str__(self) -> str:
        return f"{self.layer}.{self.modality}" if self.modality else str(self.layer)

    def named(self, field: str, prefix: str = "") -> str:
        """The name of one of its stats in a trace: "layers.3.image.aux_loss".

        Args:
            prefix: what the names of the transformer's modules start with.
        """
        return f"{prefix}layers.{self}.{field}"


def router_place(path: str) -> tuple[str, str] | None:
    """The name of the layer, or of the stack of layers, and the modality of a router by its path: of
    "layers.3.mlp.router" ("3", ""), of "transformer.layers.3.mlp.experts.image.router" ("3", "image"). None for other
    modules.
    """
    found = _PATH.fullmatch(path)
    return None if found is None else (found["layers"], found["modality"] or "")


def router_ids(path: str, layers: Iterable[int] | None = None) -> list[RouterId]:
    """The routers at a path: one, or that of each of the stacked ``layers``; none at other modules' paths."""
    place = router_place(path)
    if place is None:
        return []
    return [RouterId(layer, place[1]) for layer in ([int(place[0])] if layers is None else layers)]


def by_router(nested: Mapping[int, Value | dict[str, Value]]) -> dict[RouterId, Value]:
    """Values by router, from layer -> value of its router, or layer -> modality -> value of its router."""
    found: dict[RouterId, Value] = {}
    for layer, own in nested.items():
        if isinstance(own, dict):
            found |= {RouterId(layer, modality): value for modality, value in own.items()}
        else:
            found[RouterId(layer)] = own
    return found


def map_routers(
    function: Callable[[RouterId, Value], Result], nested: Mapping[int, Value | dict[str, Value]]
) -> dict[int, Result | dict[str, Result]]:
    """``function`` of each router and its value, nested as the values are; see `by_router`."""
    found: dict[int, Result | dict[str, Result]] = {}
    for layer, own in nested.items():
        if isinstance(own, dict):
            found[layer] = {modality: function(RouterId(layer, modality), value) for modality, value in own.items()}
        else:
            found[layer] = function(RouterId(layer), own)
    return found
