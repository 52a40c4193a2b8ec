"""The terms of a loss over micro-batches: what a batch gives to the model, and what a record says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.scan import layer_range


class Terms(NamedTuple):
    """What a micro-batch adds to a step's metrics.

    Attributes:
        loss: its share of the mean cross entropy.
        aux_loss, z_loss, entropy: its share of their means over micro-batches; the entropy also over routers.
        expert_counts: router -> (E,) choices; {} if dense.
    """

    loss: Any
    aux_loss: Any
    z_loss: Any
    entropy: Any
    expert_counts: dict[str, Any]


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a batch, without its labels, as the arguments of a model; a text model is told of padding as
    `ModalityContext` does.
    """
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    if "tokens" in inputs and "text_mask" in inputs:
        inputs["modality"] = ModalityContext(key_padding_mask=inputs.pop("text_mask"))
    return inputs


def expert_counts(stats: Mapping[int, Any]) -> dict[str, Any]:
    """The choices of each expert by router: "3" for layer 3, "3.image" where each modality has a router."""
    counts: dict[str, Any] = {}
    for layer, layer_stats in stats.items():
        routers = layer_stats if isinstance(layer_stats, dict) else {"": layer_stats}
        counts |= {f"{layer}.{name}".rstrip("."): router.expert_counts for name, router in routers.items()}
    return counts


def router_keys(path: str) -> list[str]:
    """The keys in `expert_counts` of a router by its path, "layers.3.mlp.router" or
    "layers.3.mlp.experts.image.router"; for stacked layers ("layers.0-3.mlp.router") of each. The model may lie within
    another.
    """
    layers, _, *modality, _ = path.partition("layers.")[2].split(".")
    return [".".join([str(layer), *modality[-1:]]) for layer in layer_range(layers)]


def taken_metric(taken: Any) -> dict[str, Any]:
    """For the loop: whether the update was taken."""
    return {} if taken is None else {"taken": taken}


def routing_metrics(total: Terms) -> dict[str, Any]:
    """For the record: losses of the routers and how evenly tokens went to experts; {} if dense."""
    if not total.expert_counts:
        return {}
    dead = sum((counts_E == 0).sum() for counts_E in total.expert_counts.values())
    losses = {"aux_loss": total.aux_loss, "z_loss": total.z_loss}
    return {**losses, "routing_entropy": total.entropy, "dead_experts": dead}
