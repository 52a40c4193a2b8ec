"""How probable a model finds given tokens, row by row.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from kempnerforge_torch.model.state import to_numpy
from kempnerforge_torch.model.transformer import Transformer
from shared_config.contract.labels import IGNORED


@torch.no_grad()
def scores(model: Transformer, tokens_BS: np.ndarray, labels_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the labels that are not -100 of each row: the sum of their log-probabilities, at least float32 (B,), and
    whether all are the most probable ones, bool (B,). Experts have no capacity limits.
    """
    device = next(model.parameters()).device
    tokens, labels = (torch.from_numpy(array).to(device).long() for array in (tokens_BS, labels_BS))
    logits_BSV = model.eval().run(tokens, limit_capacity=False).logits
    wide_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    counts_BS = labels != IGNORED
    chosen_BS = wide_BSV.log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    total_B = torch.where(counts_BS, chosen_BS, 0).sum(dim=-1)
    greedy_B = ((wide_BSV.argmax(dim=-1) == labels) | ~counts_BS).all(dim=-1)
    return to_numpy(total_B), to_numpy(greedy_B)
