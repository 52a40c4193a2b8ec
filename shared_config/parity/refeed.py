"""Feeds each layer of a run what another run recorded instead of its own input, so that a wrong layer can't make others
look wrong.

Parts of a model in the order of execution, from the embedding and the vision encoder over the layers to the final norm
and the head, record their own output and pass on what the other run recorded in its place. The loss is that of the
recorded logits and the recorded losses of routers. There is no gradient: a recorded input is a constant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from shared_config.contract.routing import RouterId, map_routers, router_ids
from shared_config.errors import UserError
from shared_config.parity.align import differences_of_origin, fed_hash
from shared_config.parity.selection import RefedFields
from shared_config.parity.traces import FORWARD, ROUTES, ROUTING, Summary, Trace, TraceMeta
from shared_config.schema.job import JobConfig

FED = re.compile(
    r"vision_encoder|adapter"
    r"|(transformer\.)?(token_embedding|norm|output_head|layers\.\d+|cross_attention_layers\.\d+|mot_norms\.[^.]+)"
)
"""Paths of modules whose recorded outputs are passed on."""

ROUTER_LOSSES = ("aux_loss", "z_loss")


class NamedStats(Protocol):
    """A named tuple: the stats of one router."""

    def _asdict(self) -> dict[str, Any]: ...
    def _replace(self, **changes: Any) -> Self: ...


Stats = TypeVar("Stats", bound=NamedStats)


@dataclass(frozen=True)
class Refeed:
    """Recorded values that take the place of computed ones.

    Attributes:
        outputs: module -> its output.
        losses: names of the losses of routers, without the group, -> values.
        meta: `TraceMeta.refed`.
    """

    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    losses: Mapping[str, np.ndarray] = field(default_factory=dict)
    meta: RefedFields = field(default_factory=RefedFields)


def refeed_from(other: Trace, origin: TraceMeta, config: JobConfig) -> Refeed:
    """What a trace has to feed to a run of the same config, seed and inputs.

    Args:
        origin: of that run.

    Raises:
        UserError: naming every difference of the two runs; or if the trace lacks what is needed.
    """
    problems = list(differences_of_origin(origin, other.meta))
    if problems:
        raise UserError("\n  ".join(["refeed: this run and the other trace are not of the same run:", *problems]))
    if other.meta.refed:
        raise UserError("refeed: the other trace was itself given recorded inputs; one of a plain run is needed")
    names = [name for name in other.tensors if FED.fullmatch(name.removeprefix(f"{FORWARD}/"))]
    if not names:
        raise UserError(f"refeed: the other trace holds no output of a layer, as {FORWARD}/layers.0")
    for name in names:
        if isinstance(other.tensors[name], Summary):
            raise UserError(f"refeed: {name}: the other trace holds a summary; tensors are needed, without --summary")
    outputs = {name.removeprefix(f"{FORWARD}/"): np.asarray(other.tensors[name]) for name in names}
    return Refeed(outputs, _router_losses(other), _meta(other, outputs, config))


def routes_from(other: Trace, origin: TraceMeta, config: JobConfig) -> dict[str, np.ndarray]:
    """The tokens that experts of a trace chose: path of their router -> (C, E).

    Args:
        origin: of the run that is to take the same ones.

    Raises:
        UserError: no such experts, a trace of another run, or one without routes.
    """
    if config.vlm is None or not config.experts_choose:
        raise UserError("routes: only experts that choose tokens can be given some, those of vlm.arch = 'moma'")
    problems = list(differences_of_origin(origin, other.meta))
    if problems:
        raise UserError("\n  ".join(["routes: this run and the other trace are not of the same run:", *problems]))
    routes: dict[str, np.ndarray] = {}
    found: set[RouterId] = set()
    for name, tensor in other.tensors.items():
        path = name.removeprefix(f"{ROUTING}/").removesuffix(ROUTES)
        if name == f"{ROUTING}/{path}{ROUTES}" and isinstance(tensor, np.ndarray):
            routes[path] = tensor
            found.update(router_ids(path))
    for layer in range(config.model.n_layers):
        for router in (RouterId(layer, modality) for modality in config.vlm.modalities):
            if router not in found:
                raise UserError(
                    f"routes: the other trace lacks what router {router} chose, {ROUTING}/...{ROUTES}; "
                    "one of a whole run is needed"
                )
    for router, tokens_CE in routes.items():
        if tokens_CE.dtype.kind not in "iu" or (tokens_CE.size and tokens_CE.min() < 0):
            raise UserError(f"routes: {ROUTING}/{router}{ROUTES} is {tokens_CE.dtype}: must be indices, 0 or more")
    return routes


def with_losses(
    stats: Mapping[int, Stats | dict[str, Stats]], losses: Mapping[str, object], prefix: str
) -> dict[int, Stats | dict[str, Stats]]:
    """Stats of routers, nested by layer and maybe modality, with recorded losses in place of the computed ones.

    Args:
        prefix: what the names of the transformer's modules start with.
    """

    def recorded(router: RouterId, own: Stats) -> Stats:
        names = {loss: router.named(loss, prefix) for loss in ROUTER_LOSSES}
        return own._replace(**{loss: losses[name] for loss, name in names.items() if name in losses})

    return map_routers(recorded, stats)


def _router_losses(other: Trace) -> dict[str, np.ndarray]:
    found = {name: tensor for name, tensor in other.tensors.items() if name.startswith(f"{ROUTING}/")}
    return {
        name.removeprefix(f"{ROUTING}/"): np.asarray(tensor)
        for name, tensor in found.items()
        if name.endswith(ROUTER_LOSSES) and not isinstance(tensor, Summary)
    }


def _meta(other: Trace, outputs: Mapping[str, np.ndarray], config: JobConfig) -> RefedFields:
    path = "" if config.vlm is None else "transformer."
    layers = [f"{path}layers.{layer}" for layer in range(config.model.n_layers)]
    modules = list(outputs)
    return {
        "backend": other.meta.backend,
        "device": other.meta.device,
        "dtype": other.meta.dtype,
        "modules": modules,
        "own": [layer for layer in layers if layer not in outputs],
        "hash": fed_hash(other, modules),
    }
