"""Cross entropy of next-token labels. Shapes: B batch, S sequence, V vocabulary."""

from __future__ import annotations

import numpy as np

from tests.oracle.linear import Scalar
from tests.oracle.router import logsumexp, softmax

IGNORED = -100


def cross_entropy(logits_BSV: np.ndarray, labels_BS: np.ndarray, smoothing: float = 0.0, z: float = 0.0) -> Scalar:
    """Mean over the labels that are not -100 of the cross entropy of softmax(logits) with the distribution that has
    1 - smoothing at the label and smoothing all over the vocabulary, and z logsumexp(logits)^2; 0 without any.
    """
    counted_BS = labels_BS != IGNORED
    if not counted_BS.any():
        return 0.0
    logits_NV, labels_N = logits_BSV[counted_BS], labels_BS[counted_BS]
    wanted_NV = _wanted(labels_N, logits_NV.shape[1], smoothing)
    lost_N = logsumexp(logits_NV) - np.sum(wanted_NV * logits_NV, axis=-1)
    return np.sum(lost_N + z * logsumexp(logits_NV) ** 2) / len(labels_N)


def cross_entropy_backward(
    dloss: float, logits_BSV: np.ndarray, labels_BS: np.ndarray, smoothing: float = 0.0, z: float = 0.0
) -> np.ndarray:
    """(softmax (1 + 2 z logsumexp) - wanted distribution) / number of labels; 0 where the label is ignored."""
    counted_BS = labels_BS != IGNORED
    logits_NV = logits_BSV[counted_BS]
    dlogits_NV = softmax(logits_NV) * (1 + 2 * z * logsumexp(logits_NV)[:, None])
    dlogits_NV -= _wanted(labels_BS[counted_BS], logits_BSV.shape[-1], smoothing)
    dlogits_BSV = np.zeros_like(logits_BSV)
    dlogits_BSV[counted_BS] = dloss * dlogits_NV / max(counted_BS.sum(), 1)
    return dlogits_BSV


def _wanted(labels_N: np.ndarray, vocabulary: int, smoothing: float) -> np.ndarray:
    return (1 - smoothing) * np.eye(vocabulary)[labels_N] + smoothing / vocabulary
