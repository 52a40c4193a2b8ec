"""The terms of a loss over micro-batches: the model inputs of a batch, and the metrics of a step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor

from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.stats import LayerStats
from shared_config.contract.routing import RouterId, by_router


class Terms(NamedTuple):
    """What a micro-batch adds to a step's metrics, without a graph.

    Attributes:
        loss: its share of the mean cross entropy.
        aux_loss, z_loss, entropy: its share of their means over micro-batches; the entropy also over routers.
        expert_counts: router -> (E,) assignments; {} if dense.
    """

    loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""] | float
    expert_counts: dict[RouterId, Num[Tensor, "_E"]]


def model_inputs(batch: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, Shaped[Tensor, "..."] | ModalityContext]:
    """The arrays of a batch, without its labels, as the arguments of a model; a text model gets padding as a
    `ModalityContext`.
    """
    inputs: dict[str, Tensor | ModalityContext] = {name: array for name, array in batch.items() if name != "labels"}
    if "tokens" in batch and "text_mask" in batch:
        del inputs["text_mask"]
        inputs["modality"] = ModalityContext(key_padding_mask=batch["text_mask"])
    return inputs


def expert_counts(stats: Mapping[int, LayerStats]) -> dict[RouterId, Num[Tensor, "_E"]]:
    """The assignments to each expert, by router."""
    return {router_id: router.expert_counts for router_id, router in by_router(stats).items()}


def summed(terms: Sequence[Terms]) -> Terms:
    """The terms of all micro-batches."""
    return functools.reduce(_added, terms)


def taken_metric(taken: Bool[Tensor, ""] | None) -> dict[str, Bool[Tensor, ""]]:
    """For the loop: whether the update was taken."""
    return {} if taken is None else {"taken": taken}


def routing_metrics(total: Terms) -> dict[str, Num[Tensor, ""] | float]:
    """For the record: losses of the routers and how evenly tokens were distributed; {} if dense."""
    if not total.expert_counts:
        return {}
    dead = sum((counts_E == 0).sum() for counts_E in total.expert_counts.values())
    losses = {"aux_loss": total.aux_loss, "z_loss": total.z_loss}
    return {**losses, "routing_entropy": total.entropy, "dead_experts": dead}


def _added(a: Terms, b: Terms) -> Terms:
    counts = {router: counts_E + b.expert_counts[router] for router, counts_E in a.expert_counts.items()}
    return Terms(a.loss + b.loss, a.aux_loss + b.aux_loss, a.z_loss + b.z_loss, a.entropy + b.entropy, counts)
