"""Which labels count in a loss, and how many logits exist at a time for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from shared_config.contract.counts import FLOAT32
from shared_config.schema.training import TrainConfig

IGNORED = -100
"""The label of a position without a loss."""
LOGITS_BYTES = 2**28
"""Of logits that exist at a time in training and evaluation, about."""


def loss_terms(train: TrainConfig) -> dict[str, float]:
    """What `cross_entropy` of either backend takes beside logits and labels where a model is trained."""
    terms = {"smoothing": train.label_smoothing, "z_weight": train.logit_z_loss_weight}
    return {name: value for name, value in terms.items() if value}


def label_count(batches: Iterable[Mapping[str, np.ndarray]]) -> int:
    """Labels that count in the loss, over all batches."""
    return sum(int(np.count_nonzero(batch["labels"] != IGNORED)) for batch in batches)


def rows_of_logits(tokens: int, width: int, vocabulary: int, number: int) -> int:
    """Of how many tokens the logits exist at a time: of all where that takes less, or of a power of two, whose logits
    take `LOGITS_BYTES` or come nearest to that.

    Args:
        width: inputs of the head.
        vocabulary: logits of a token.
        number: bytes of a logit.
    """
    if takes_less_whole(tokens, width, number):
        return tokens
    fitting = LOGITS_BYTES / (vocabulary * number)
    return min(tokens, 2 ** max(0, round(math.log2(fitting))))


def takes_less_whole(tokens: int, width: int, number: int) -> bool:
    """Whether the logits of all tokens and their gradient take no more than what is there beside those of a chunk: the
    gradient of the head's weight in at least float32, and then in the dtype of the weight. Each of these has as many
    columns as there are logits of a token.
    """
    return 2 * number * tokens <= (max(number, FLOAT32) + number) * width
