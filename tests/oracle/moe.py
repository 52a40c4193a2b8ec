"""Mixture-of-experts feed-forward layer (Shazeer et al. 2017, arXiv:1701.06538), a token and an expert at a time.

Shapes: B batch, S sequence, T = B * S tokens, D model dim, F expert width, E experts, k choices of each token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tests.oracle.linear import Gradients, Weights, below, has, linear, linear_backward, submodule
from tests.oracle.mlp import Activations, mlp, mlp_backward, sigmoid
from tests.oracle.router import Routing, sigmoid_topk, sigmoid_topk_backward, softmax_topk, softmax_topk_backward


@dataclass(frozen=True)
class MoEOptions:
    """What a layer needs besides its weights; the fields of `ModelConfig` without their prefix."""

    top_k: int
    activation: str = "silu"
    router: str = "softmax_topk"
    capacity_factor: float = 0.0
    gradient_scale: bool = False
    sequence_aux_loss_weight: float = 0.0
    norm_topk_prob: bool = True
    routed_scaling: float = 1.0


@dataclass(frozen=True)
class MoESaved:
    """What backward needs.

    Attributes:
        kept_Tk: True where the chosen expert had room.
        expert_outputs_TkD: output of each computed choice, before its weight.
        expert_saved: per expert its tokens, their slots, its input and its activations.
        dropped: number of choices of valid tokens that found no room.
    """

    routing: Routing
    sequences_T: np.ndarray
    kept_Tk: np.ndarray
    expert_outputs_TkD: np.ndarray
    expert_saved: dict[int, tuple[np.ndarray, np.ndarray, Activations]]
    shared_saved: Activations
    dropped: int
    activations: dict[str, np.ndarray]


def moe(
    x_BSD: np.ndarray,
    weights: Weights,
    options: MoEOptions,
    valid_BS: np.ndarray | None = None,
    members_BS: np.ndarray | None = None,
) -> tuple[np.ndarray, MoESaved]:
    """y_t = sum over the choices j that found room of w_tj expert_{i_tj}(x_t), plus shared_expert(x_t).

    Args:
        weights: router.gate.weight, router.expert_bias (sigmoid), experts.{i}... or gate_w, up_w, down_w, and
            shared_expert..., and shared_expert_gate with or without which it is added as it is.
        valid_BS: False for padding, which is sent to no routed expert.
        members_BS: False for what is not among the layer's tokens, and has no part in anything.
    """
    batch, length, width = x_BSD.shape
    x_TD = x_BSD.reshape(-1, width)
    members_T = np.ones(len(x_TD), dtype=bool) if members_BS is None else members_BS.reshape(-1)
    valid_T = members_T if valid_BS is None else members_T & valid_BS.reshape(-1)
    sequences_T = np.repeat(np.arange(batch), length)
    routing = route(x_TD, submodule(weights, "router"), options, valid_T, sequences_T)

    experts = len(routing.counts_E)
    room = capacity(int(members_T.sum()), options.top_k, experts, options.capacity_factor)
    kept_Tk = find_room(routing.indices_Tk, valid_T, experts, room)
    outputs_TkD = np.zeros((*kept_Tk.shape, width), dtype=np.result_type(x_TD, *weights.values()))
    expert_saved: dict[int, tuple[np.ndarray, np.ndarray, Activations]] = {}
    for expert in range(experts):
        tokens, slots = np.nonzero(kept_Tk & (routing.indices_Tk == expert))
        outputs_TkD[tokens, slots], saved = mlp(x_TD[tokens], expert_weights(weights, expert), options.activation)
        expert_saved[expert] = (tokens, slots, saved)
    y_TD = np.sum(routing.weights_Tk[:, :, None] * outputs_TkD, axis=1)

    activations = {"router.gate": routing.logits_TE, "router": routing.weights_Tk}
    shared_saved: Activations = {}
    if has(weights, "shared_expert"):
        shared_TD, shared_saved = mlp(x_TD, submodule(weights, "shared_expert"), options.activation)
        activations |= below("shared_expert", shared_saved) | {"shared_expert": shared_TD}
        if has(weights, "shared_expert_gate"):
            activations["shared_expert_gate"] = linear(x_TD, weights, "shared_expert_gate")
            shared_TD = sigmoid(activations["shared_expert_gate"]) * shared_TD
        y_TD = y_TD + shared_TD
    dropped = int((valid_T[:, None] & ~kept_Tk).sum())
    return y_TD.reshape(x_BSD.shape), MoESaved(
        routing, sequences_T, kept_Tk, outputs_TkD, expert_saved, shared_saved, dropped, activations
    )


def route(
    x_TD: np.ndarray, weights: Weights, options: MoEOptions, valid_T: np.ndarray, sequences_T: np.ndarray
) -> Routing:
    common: dict[str, Any] = {
        "top_k": options.top_k,
        "normalise": options.norm_topk_prob,
        "scaling": options.routed_scaling,
    }
    if options.router == "softmax_topk":
        return softmax_topk(x_TD, weights, valid_T=valid_T, **common)
    if options.router == "sigmoid_topk":
        weight = options.sequence_aux_loss_weight
        return sigmoid_topk(
            x_TD, weights, valid_T=valid_T, sequences_T=sequences_T, sequence_aux_loss_weight=weight, **common
        )
    raise KeyError(f"Unknown router: {options.router!r}")


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int | None:
    """max(1, ceil(tokens k / E * factor)) in exact arithmetic on the factor's decimal digits; None (no limit) for
    factor 0. ``tokens`` counts padding too.
    """
    if factor == 0:
        return None
    return max(1, math.ceil(Fraction(tokens * top_k, experts) * Fraction(str(factor))))


def find_room(indices_Tk: np.ndarray, valid_T: np.ndarray, experts: int, room: int | None) -> np.ndarray:
    """(T, k) bool: all first choices are seated before any second choice, and within a choice tokens in order."""
    kept_Tk = np.zeros(indices_Tk.shape, dtype=bool)
    seated_E = np.zeros(experts, dtype=np.int64)
    for slot in range(indices_Tk.shape[1]):
        for token in np.flatnonzero(valid_T):
            expert = indices_Tk[token, slot]
            if room is None or seated_E[expert] < room:
                kept_Tk[token, slot] = True
                seated_E[expert] += 1
    return kept_Tk


def expert_weights(weights: Weights, expert: int) -> dict[str, np.ndarray]:
    """One expert's weights, (out, in) also where they are stored packed as (E, in, out)."""
    if "up_w" not in weights:
        return submodule(weights, f"experts.{expert}")
    return {f"{name}_proj.weight": weights[f"{name}_w"][expert].T for name in PACKED if f"{name}_w" in weights}


PACKED = ("gate", "up", "down")


def gradient_factors(counts_E: np.ndarray) -> np.ndarray:
    """mean count / count of each expert; 1 for an expert without tokens, whose gradient is 0 anyway."""
    return np.where(counts_E > 0, counts_E.mean() / np.maximum(counts_E, 1), 1.0)


def moe_backward(
    dy_BSD: np.ndarray,
    x_BSD: np.ndarray,
    saved: MoESaved,
    weights: Weights,
    options: MoEOptions,
    daux_loss: float = 0.0,
    dz_loss: float = 0.0,
) -> tuple[np.ndarray, Gradients]:
    """Gradients of the input and every weight. ``gradient_scale`` multiplies all that flows back through an expert."""
    x_TD, dy_TD = x_BSD.reshape(-1, x_BSD.shape[-1]), dy_BSD.reshape(-1, x_BSD.shape[-1])
    routing = saved.routing
    factors_E = gradient_factors(routing.counts_E) if options.gradient_scale else np.ones(len(routing.counts_E))

    dweights_Tk = np.einsum("TkD,TD->Tk", saved.expert_outputs_TkD, dy_TD)
    dx_TD, gradients = _route_backward(dweights_Tk, daux_loss, dz_loss, saved, submodule(weights, "router"), options)
    for expert, (tokens, slots, inner) in saved.expert_saved.items():
        doutput = factors_E[expert] * routing.weights_Tk[tokens, slots, None] * dy_TD[tokens]
        own = expert_weights(weights, expert)
        dx, expert_gradients = mlp_backward(doutput, x_TD[tokens], inner, own, options.activation)
        np.add.at(dx_TD, tokens, dx)
        _store_expert(gradients, expert, expert_gradients, weights)
    if has(weights, "shared_expert"):
        shared, dshared_TD = submodule(weights, "shared_expert"), dy_TD
        if has(weights, "shared_expert_gate"):
            gate_T1 = sigmoid(saved.activations["shared_expert_gate"])
            slope_T1 = gate_T1 * (1 - gate_T1) * np.sum(dy_TD * saved.activations["shared_expert"], -1, keepdims=True)
            dx, gate_gradients = linear_backward(slope_T1, x_TD, weights, "shared_expert_gate")
            dx_TD, gradients, dshared_TD = dx_TD + dx, gradients | gate_gradients, gate_T1 * dy_TD
        dx, shared_gradients = mlp_backward(dshared_TD, x_TD, saved.shared_saved, shared, options.activation)
        dx_TD = dx_TD + dx
        gradients |= below("shared_expert", shared_gradients)
    return dx_TD.reshape(x_BSD.shape), gradients


def _route_backward(
    dweights_Tk: np.ndarray, daux: float, dz: float, saved: MoESaved, weights: Weights, options: MoEOptions
) -> tuple[np.ndarray, Gradients]:
    common: dict[str, Any] = {"normalise": options.norm_topk_prob, "scaling": options.routed_scaling}
    if options.router == "softmax_topk":
        dx_TD, gradients = softmax_topk_backward(dweights_Tk, daux, dz, saved.routing, weights, **common)
    else:
        dx_TD, gradients = sigmoid_topk_backward(
            dweights_Tk,
            daux,
            dz,
            saved.routing,
            weights,
            sequences_T=saved.sequences_T,
            sequence_aux_loss_weight=options.sequence_aux_loss_weight,
            **common,
        )
    return dx_TD, below("router", gradients)


def _store_expert(gradients: Gradients, expert: int, own: Gradients, weights: Weights) -> None:
    """Put one expert's gradients under the names, and in the orientation, that its weights have."""
    if "up_w" not in weights:
        gradients |= below(f"experts.{expert}", own)
        return
    for name in PACKED:
        if f"{name}_proj.weight" in own:
            packed = gradients.setdefault(f"{name}_w", np.zeros_like(weights[f"{name}_w"]))
            packed[expert] = own[f"{name}_proj.weight"].T
