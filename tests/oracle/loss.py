"""Cross entropy of next-token labels. Shapes: B batch, S sequence, V vocabulary."""

from __future__ import annotations

import numpy as np

from tests.oracle.linear import Scalar
from tests.oracle.router import logsumexp, softmax

IGNORED = -100


def cross_entropy(logits_BSV: np.ndarray, labels_BS: np.ndarray) -> Scalar:
    """Mean over the labels that are not -100 of logsumexp(logits) - logits[label]; 0 without any."""
    counted_BS = labels_BS != IGNORED
    if not counted_BS.any():
        return 0.0
    logits_NV, labels_N = logits_BSV[counted_BS], labels_BS[counted_BS]
    chosen_N = np.take_along_axis(logits_NV, labels_N[:, None], axis=-1)[:, 0]
    return np.sum(logsumexp(logits_NV) - chosen_N) / len(labels_N)


def cross_entropy_backward(dloss: float, logits_BSV: np.ndarray, labels_BS: np.ndarray) -> np.ndarray:
    """(softmax - one-hot label) / number of labels; 0 where the label is ignored."""
    counted_BS = labels_BS != IGNORED
    dlogits_NV = softmax(logits_BSV[counted_BS])
    dlogits_NV[np.arange(len(dlogits_NV)), labels_BS[counted_BS]] -= 1
    dlogits_BSV = np.zeros_like(logits_BSV)
    dlogits_BSV[counted_BS] = dloss * dlogits_NV / max(counted_BS.sum(), 1)
    return dlogits_BSV
