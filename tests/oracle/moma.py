"""Mixture of modality-aware experts (Lin et al. 2024, arXiv:2407.21770): experts choose tokens of their own modality.

Shapes: B batch, S sequence, D model dim, N tokens of one modality in the whole batch, E its experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from shared_config.schema.vlm import MoMaConfig
from tests.oracle.linear import Weights, linear, submodule
from tests.oracle.mlp import mlp, sigmoid
from tests.oracle.router import top_k_lowest_first


def expert_choice(
    x_ND: np.ndarray,
    weights: Weights,
    *,
    experts: int,
    capacity_factor: float,
    activation: str,
    noise_NE: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Expert e takes the tokens with its highest sigmoid(logits), the lowest index among equals; output sum of score *
    expert(x) (Zhou et al. 2022, arXiv:2202.09368). A token that no expert takes gets 0.

    Args:
        noise_NE: Gumbel noise, added to the logits for the choice alone.

    Returns:
        (N, D), and how many tokens each expert took (E,).
    """
    logits_NE = linear(x_ND, weights, "router.gate")
    scores_NE = sigmoid(logits_NE)
    ranked_NE = scores_NE if noise_NE is None else sigmoid(logits_NE + noise_NE)
    taken = tokens_taken(len(x_ND), experts, capacity_factor)
    y_ND = np.zeros(x_ND.shape, dtype=np.result_type(x_ND, *weights.values()))
    for expert in range(experts):
        chosen = top_k_lowest_first(ranked_NE[:, expert], taken)
        out, _ = mlp(x_ND[chosen], submodule(weights, f"experts.{expert}"), activation)
        y_ND[chosen] += scores_NE[chosen, expert, None] * out
    return y_ND, np.full(experts, taken)


def tokens_taken(tokens: int, experts: int, capacity_factor: float) -> int:
    """ceil(tokens / experts), or ceil(capacity_factor * tokens) on the factor's decimal digits: exact in both cases."""
    share = Fraction(1, experts) if capacity_factor == 0 else Fraction(str(capacity_factor))
    return math.ceil(share * tokens)


def moma_ffn(
    x_BSD: np.ndarray,
    weights: Weights,
    vlm: MoMaConfig,
    activation: str,
    modality_BS: np.ndarray,
    valid_BS: np.ndarray | None = None,
    noise: Mapping[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Each modality's valid tokens, in batch order, through its own experts; padding gets 0.

    Returns:
        (B, S, D), and {modality: tokens taken by each expert}.
    """
    valid_BS = np.ones(modality_BS.shape, dtype=bool) if valid_BS is None else valid_BS
    y_BSD = np.zeros(x_BSD.shape, dtype=np.result_type(x_BSD, *weights.values()))
    counts = {}
    for index, modality in enumerate(vlm.moma_modalities):
        mine_BS = (modality_BS == index) & valid_BS
        y_BSD[mine_BS], counts[modality] = expert_choice(
            x_BSD[mine_BS],
            submodule(weights, f"experts.{modality}"),
            experts=vlm.moma_experts_per_modality[modality],
            capacity_factor=vlm.moma_capacity_factor,
            activation=activation,
            noise_NE=None if noise is None else noise[modality],
        )
    return y_BSD, counts
