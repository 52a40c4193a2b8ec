"""The terms of a loss over micro-batches: the model inputs of a batch, and the metrics of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Num, Shaped

from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.stats import LayerStats
from shared_config.contract.routing import RouterId, by_router


class Terms(NamedTuple):
    """What a micro-batch adds to a step's metrics.

    Attributes:
        loss: its share of the mean cross entropy.
        aux_loss, z_loss, entropy: its share of their means over micro-batches; the entropy also over routers.
        expert_counts: router -> (E,) assignments; {} if dense.
    """

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    entropy: Float[Array, ""]
    expert_counts: dict[RouterId, Num[Array, "_E"]]


def model_inputs(batch: Mapping[str, Shaped[Array, "..."]]) -> dict[str, Shaped[Array, "..."] | ModalityContext]:
    """The arrays of a batch, without its labels, as the arguments of a model; a text model gets padding as a
    `ModalityContext`.
    """
    inputs: dict[str, Array | ModalityContext] = {name: array for name, array in batch.items() if name != "labels"}
    if "tokens" in batch and "text_mask" in batch:
        del inputs["text_mask"]
        inputs["modality"] = ModalityContext(key_padding_mask=batch["text_mask"])
    return inputs


def expert_counts(stats: Mapping[int, LayerStats]) -> dict[RouterId, Num[Array, "_E"]]:
    """The assignments to each expert, by router."""
    return {router_id: router.expert_counts for router_id, router in by_router(stats).items()}


def taken_metric(taken: Bool[Array, ""] | None) -> dict[str, Bool[Array, ""]]:
    """For the loop: whether the update was taken."""
    return {} if taken is None else {"taken": taken}


def routing_metrics(total: Terms) -> dict[str, Num[Array, ""] | float]:
    """For the record: losses of the routers and how evenly tokens were distributed; {} if dense."""
    if not total.expert_counts:
        return {}
    dead = sum((counts_E == 0).sum() for counts_E in total.expert_counts.values())
    losses = {"aux_loss": total.aux_loss, "z_loss": total.z_loss}
    return {**losses, "routing_entropy": total.entropy, "dead_experts": dead}
