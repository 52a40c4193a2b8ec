"""One training step of the language model: the loss, its gradient by hand-written backward, and the update."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_config.schema.model import ModelConfig
from tests.oracle.linear import Gradients, Scalar, Weights
from tests.oracle.loss import cross_entropy, cross_entropy_backward
from tests.oracle.optimizer import AdamWState, adamw_step, clip
from tests.oracle.transformer import Output, transformer, transformer_backward

BUFFERS = ("expert_bias", "expert_ema")


def training_loss(
    weights: Weights, config: ModelConfig, tokens: np.ndarray | None, labels: np.ndarray, **inputs: Any
) -> tuple[Scalar, Output]:
    """Cross entropy + moe_aux_loss_weight * aux + moe_router_z_loss_weight * z; ``inputs`` go to `transformer`."""
    out = transformer(weights, config, tokens, **inputs)
    loss = cross_entropy(out.logits, labels)
    loss = loss + config.moe_aux_loss_weight * out.aux_loss + config.moe_router_z_loss_weight * out.z_loss
    return loss, out


def loss_and_gradients(
    weights: Weights, config: ModelConfig, tokens: np.ndarray | None, labels: np.ndarray, **inputs: Any
) -> tuple[Scalar, Gradients]:
    """The loss and the gradient of every parameter that the loss depends on through its values."""
    loss, out = training_loss(weights, config, tokens, labels, **inputs)
    gradients = transformer_backward(
        cross_entropy_backward(1.0, out.logits, labels),
        out,
        weights,
        config,
        tokens,
        output_slice=inputs.get("output_slice"),
        daux_loss=config.moe_aux_loss_weight,
        dz_loss=config.moe_router_z_loss_weight,
    )
    return loss, gradients


@dataclass(frozen=True)
class StepOptions:
    """The hyper-parameters of one update."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float | None = None


def training_step(
    weights: Weights,
    state: AdamWState,
    config: ModelConfig,
    tokens: np.ndarray,
    labels: np.ndarray,
    options: StepOptions,
    decayed: Collection[str],
) -> tuple[float, dict[str, np.ndarray], AdamWState]:
    """Loss before the step, weights after it (buffers unchanged), and the new moments."""
    loss, gradients = loss_and_gradients(weights, config, tokens, labels)
    if options.max_norm is not None:
        gradients = clip(gradients, options.max_norm)
    new, state = adamw_step(
        parameters(weights),
        gradients,
        state,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        decayed=decayed,
    )
    return loss, {**weights, **new}, state


def parameters(weights: Weights) -> dict[str, np.ndarray]:
    """The weights that are trained: all but the balancing buffers."""
    return {name: value for name, value in weights.items() if not name.endswith(BUFFERS)}
