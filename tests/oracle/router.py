"""Routers of a mixture of experts, and the balancing bias (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

Shapes: T tokens, D model dim, E experts, k choices of each token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.oracle.linear import Gradients, Scalar, Weights, linear, linear_backward
from tests.oracle.mlp import sigmoid

SCORE_EPS = 1e-20


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        weights_Tk: what each chosen expert's output is multiplied by.
        indices_Tk: the chosen experts, best first.
        valid_T: padding tokens are False: they are sent nowhere and count nowhere.
        counts_E: number of valid tokens that chose each expert, before any capacity.
    """

    x_TD: np.ndarray
    logits_TE: np.ndarray
    scores_TE: np.ndarray
    weights_Tk: np.ndarray
    indices_Tk: np.ndarray
    valid_T: np.ndarray
    counts_E: np.ndarray
    aux_loss: Scalar
    z_loss: Scalar


def softmax_topk(
    x_TD: np.ndarray,
    weights: Weights,
    *,
    top_k: int,
    normalise: bool = True,
    scaling: float = 1.0,
    valid_T: np.ndarray | None = None,
) -> Routing:
    """Softmax over all experts, the k most probable, their probabilities renormalised, times ``scaling``.

    aux_loss = E sum_e f_e P_e (Fedus et al. 2022, arXiv:2101.03961): f_e the share of assignments, P_e the mean
    probability.
    """
    valid_T = np.ones(len(x_TD), dtype=bool) if valid_T is None else valid_T
    logits_TE = linear(x_TD, weights, "gate")
    probabilities_TE = softmax(logits_TE)
    indices_Tk = top_k_lowest_first(probabilities_TE, top_k)
    chosen_Tk = np.take_along_axis(probabilities_TE, indices_Tk, axis=-1)
    total_T1 = chosen_Tk.sum(axis=-1, keepdims=True) if normalise else 1.0
    return Routing(
        x_TD=x_TD,
        logits_TE=logits_TE,
        scores_TE=probabilities_TE,
        weights_Tk=scaling * chosen_Tk / total_T1,
        indices_Tk=indices_Tk,
        valid_T=valid_T,
        counts_E=count(indices_Tk[valid_T], probabilities_TE.shape[1]),
        aux_loss=balance_loss(probabilities_TE[valid_T], indices_Tk[valid_T]),
        z_loss=z_loss(logits_TE[valid_T]),
    )


def softmax_topk_backward(
    dweights_Tk: np.ndarray,
    daux_loss: float,
    dz_loss: float,
    routing: Routing,
    weights: Weights,
    *,
    normalise: bool = True,
    scaling: float = 1.0,
) -> tuple[np.ndarray, Gradients]:
    """The choice itself and the shares f_e are constants; all else has a gradient."""
    p = routing.scores_TE
    dp = _weights_backward(dweights_Tk, routing, normalise, scaling, eps=0.0)
    dp += daux_loss * _balance_loss_backward(routing, routing.valid_T)
    dlogits = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    dlogits += dz_loss * _z_loss_backward(routing)
    return linear_backward(dlogits, routing.x_TD, weights, "gate")


def sigmoid_topk(
    x_TD: np.ndarray,
    weights: Weights,
    *,
    top_k: int,
    normalise: bool = True,
    scaling: float = 1.0,
    valid_T: np.ndarray | None = None,
    sequences_T: np.ndarray | None = None,
    sequence_aux_loss_weight: float = 0.0,
) -> Routing:
    """Chosen by sigmoid(logits) + "expert_bias", weighted by the unbiased scores / (their sum + 1e-20), times
    ``scaling``.

    aux_loss is ``sequence_aux_loss_weight`` times the balance loss within each sequence, averaged over the sequences,
    on scores normalised to sum to 1. ``sequences_T`` is the sequence of each token; None means all are of one.
    """
    valid_T = np.ones(len(x_TD), dtype=bool) if valid_T is None else valid_T
    sequences_T = np.zeros(len(x_TD), dtype=np.int64) if sequences_T is None else sequences_T
    logits_TE = linear(x_TD, weights, "gate")
    scores_TE = sigmoid(logits_TE)
    indices_Tk = top_k_lowest_first(scores_TE + weights["expert_bias"], top_k)
    chosen_Tk = np.take_along_axis(scores_TE, indices_Tk, axis=-1)
    total_T1 = chosen_Tk.sum(axis=-1, keepdims=True) + SCORE_EPS if normalise else 1.0
    return Routing(
        x_TD=x_TD,
        logits_TE=logits_TE,
        scores_TE=scores_TE,
        weights_Tk=scaling * chosen_Tk / total_T1,
        indices_Tk=indices_Tk,
        valid_T=valid_T,
        counts_E=count(indices_Tk[valid_T], scores_TE.shape[1]),
        aux_loss=sequence_aux_loss_weight * _sequence_balance_loss(scores_TE, indices_Tk, valid_T, sequences_T),
        z_loss=z_loss(logits_TE[valid_T]),
    )


def sigmoid_topk_backward(
    dweights_Tk: np.ndarray,
    daux_loss: float,
    dz_loss: float,
    routing: Routing,
    weights: Weights,
    *,
    normalise: bool = True,
    scaling: float = 1.0,
    sequences_T: np.ndarray | None = None,
    sequence_aux_loss_weight: float = 0.0,
) -> tuple[np.ndarray, Gradients]:
    """Like `softmax_topk_backward`; the balancing bias only chooses, so it has no gradient."""
    s = routing.scores_TE
    sequences_T = np.zeros(len(s), dtype=np.int64) if sequences_T is None else sequences_T
    ds = _weights_backward(dweights_Tk, routing, normalise, scaling, SCORE_EPS)
    total_T1 = s.sum(axis=-1, keepdims=True)
    members = _members(routing.valid_T, sequences_T)
    for member_T in members:
        dshare = _balance_loss_backward(routing, member_T) * daux_loss * sequence_aux_loss_weight / len(members)
        ds += dshare / total_T1 - np.sum(dshare * s, axis=-1, keepdims=True) / total_T1**2
    dlogits = ds * s * (1 - s)
    dlogits += dz_loss * _z_loss_backward(routing)
    return linear_backward(dlogits, routing.x_TD, weights, "gate")


def balance_loss(shares_TE: np.ndarray, indices_Tk: np.ndarray) -> Scalar:
    """E sum_e f_e P_e over some tokens, 0 without any; 1 when both are uniform."""
    if not indices_Tk.size:
        return 0.0
    experts = shares_TE.shape[1]
    f_E = count(indices_Tk, experts) / indices_Tk.size
    return experts * np.sum(f_E * shares_TE.mean(axis=0))


def z_loss(logits_TE: np.ndarray) -> Scalar:
    """mean(logsumexp(logits)^2) over the tokens (Zoph et al. 2022, arXiv:2202.08906), 0 without any."""
    return np.mean(logsumexp(logits_TE) ** 2) if len(logits_TE) else 0.0


def expert_bias_update(
    bias_E: np.ndarray, ema_E: np.ndarray, counts_E: np.ndarray, *, rate: float, decay: float = 0.99
) -> tuple[np.ndarray, np.ndarray]:
    """Once an optimiser step, from the counts of all its tokens on all ranks.

    ema <- decay ema + (1 - decay) counts / sum(counts); bias <- bias + rate (1/E - ema). Without tokens nothing
    changes.
    """
    if counts_E.sum() == 0:
        return bias_E, ema_E
    ema_E = decay * ema_E + (1 - decay) * counts_E / counts_E.sum()
    return bias_E + rate * (1 / len(bias_E) - ema_E), ema_E


def expert_bias_rate(rate: float, schedule: str, step: int, max_steps: int) -> float:
    """cosine_decay: from ``rate`` to 0 over the run; linear_warmup: from 0 to ``rate`` over its first tenth."""
    progress = min(step / max_steps, 1.0) if max_steps > 0 else 1.0
    if schedule == "constant":
        return rate
    if schedule == "cosine_decay":
        return rate * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "linear_warmup":
        return rate * min(progress / 0.1, 1.0)
    raise ValueError(f"bias_schedule = {schedule!r}: must be constant, cosine_decay or linear_warmup")


def top_k_lowest_first(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest along the last axis, largest first, equal ones by index."""
    return np.argsort(-np.real(scores), axis=-1, kind="stable")[..., :k]


def count(indices: np.ndarray, experts: int) -> np.ndarray:
    """How often each expert occurs."""
    return np.bincount(indices.reshape(-1), minlength=experts)


def softmax(logits: np.ndarray) -> np.ndarray:
    numerators = np.exp(logits - np.real(logits).max(axis=-1, keepdims=True))
    return numerators / numerators.sum(axis=-1, keepdims=True)


def logsumexp(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(logits))) over the last axis."""
    highest = np.real(logits).max(axis=-1, keepdims=True)
    return highest[..., 0] + np.log(np.exp(logits - highest).sum(axis=-1))


def _sequence_balance_loss(
    scores_TE: np.ndarray, indices_Tk: np.ndarray, valid_T: np.ndarray, sequences_T: np.ndarray
) -> Scalar:
    """Mean of the balance losses of the sequences that have a valid token."""
    shares_TE = scores_TE / scores_TE.sum(axis=-1, keepdims=True)
    losses = [balance_loss(shares_TE[member_T], indices_Tk[member_T]) for member_T in _members(valid_T, sequences_T)]
    return np.mean(losses) if losses else 0.0


def _members(valid_T: np.ndarray, sequences_T: np.ndarray) -> list[np.ndarray]:
    """For each sequence with valid tokens, which tokens those are."""
    return [valid_T & (sequences_T == sequence) for sequence in np.unique(sequences_T[valid_T])]


def _weights_backward(
    dweights_Tk: np.ndarray, routing: Routing, normalise: bool, scaling: float, eps: float
) -> np.ndarray:
    """Through the combine weights: with w = s / (sum s + eps), ds = (dw - sum(dw w)) / (sum s + eps)."""
    chosen_Tk = np.take_along_axis(routing.scores_TE, routing.indices_Tk, axis=-1)
    dchosen_Tk = scaling * dweights_Tk
    if normalise:
        total_T1 = chosen_Tk.sum(axis=-1, keepdims=True) + eps
        dchosen_Tk = (dchosen_Tk - np.sum(dchosen_Tk * chosen_Tk, axis=-1, keepdims=True) / total_T1) / total_T1
    dscores_TE = np.zeros_like(routing.scores_TE)
    np.put_along_axis(dscores_TE, routing.indices_Tk, dchosen_Tk, axis=-1)
    return dscores_TE


def _balance_loss_backward(routing: Routing, member_T: np.ndarray) -> np.ndarray:
    """Gradient of `balance_loss` over the tokens of ``member_T`` by their shares: E f_e / tokens."""
    dshares_TE = np.zeros_like(routing.scores_TE)
    indices_Tk = routing.indices_Tk[member_T]
    if indices_Tk.size:
        experts = dshares_TE.shape[1]
        dshares_TE[member_T] = experts * count(indices_Tk, experts) / indices_Tk.size / len(indices_Tk)
    return dshares_TE


def _z_loss_backward(routing: Routing) -> np.ndarray:
    """Gradient of `z_loss` by the logits: 2 logsumexp softmax / tokens."""
    valid_T1 = routing.valid_T[:, None]
    slope_TE = 2 * logsumexp(routing.logits_TE)[:, None] * softmax(routing.logits_TE)
    return np.where(valid_T1, slope_TE, 0) / max(valid_T1.sum(), 1)
