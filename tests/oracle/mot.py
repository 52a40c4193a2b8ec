"""Mixture of transformers (Liang et al. 2024, arXiv:2411.04996): own weights for each modality, one joint attention.

Shapes: B batch, S sequence, D model dim, M modalities, h head_dim, R tokens of one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoTConfig
from tests.oracle.linear import Scalar, Weights, linear, submodule
from tests.oracle.mlp import mlp
from tests.oracle.moe import moe
from tests.oracle.norm import norm, rms_norm
from tests.oracle.position import apply_rope, rope_at
from tests.oracle.router import softmax
from tests.oracle.transformer import moe_options


@dataclass(frozen=True)
class Stream:
    """What is known of the residual stream's positions.

    Attributes:
        modality_BS: index into the config's list of modalities, in any order along the sequence.
        documents_BS, valid_BS: as in attention; padding is neither attended to nor routed.
    """

    modality_BS: np.ndarray
    documents_BS: np.ndarray
    valid_BS: np.ndarray


def stream(
    modality_BS: np.ndarray, doc_ids: np.ndarray | None = None, key_padding_mask: np.ndarray | None = None
) -> Stream:
    """A `Stream` with one document and no padding where these are not given."""
    documents_BS = np.zeros_like(modality_BS) if doc_ids is None else doc_ids
    valid_BS = np.ones(modality_BS.shape, dtype=bool) if key_padding_mask is None else key_padding_mask
    return Stream(modality_BS, documents_BS, valid_BS)


@dataclass
class RouterLosses:
    """Sums over the MoE layers of all modalities, and the assignments of each."""

    aux_loss: Scalar = 0.0
    z_loss: Scalar = 0.0
    counts: dict[str, np.ndarray] = field(default_factory=dict)


def mot_attention(
    normed_BSD: np.ndarray, weights: Weights, config: ModelConfig, vlm: MoTConfig, where: Stream
) -> np.ndarray:
    """One row and one query at a time; each token is projected by its modality's weights on the way in and out.

    Causal in sequence order, while rotary positions count within a modality. Query head i of the H heads of its own
    modality reads key/value head i // (H / K) of the K heads of the key's modality. A query that may see no key
    contributes 0.
    """
    y_BSD = np.zeros(normed_BSD.shape, dtype=np.result_type(normed_BSD, *weights.values()))
    for row, modality_S in enumerate(where.modality_BS):
        names = [vlm.mot_modalities[m] for m in modality_S]
        positions = positions_within(modality_S)
        tokens = [_Token(normed_BSD[row, s], weights, names[s], positions[s], config) for s in range(len(names))]
        for s, query in enumerate(tokens):
            seen = [tokens[t] for t in range(s + 1) if _allowed(where, row, s, t, config.sliding_window)]
            y_BSD[row, s] = linear(_attend(query, seen), weights, f"o_proj.{names[s]}")
    return y_BSD


class _Token:
    """Query, key and value heads of one token, by its modality's weights: q (H, h), k and v (K, h)."""

    def __init__(self, x_D: np.ndarray, weights: Weights, modality: str, position: int, config: ModelConfig):
        rope = rope_at(np.array([position]), config.head_size, config.rope_theta, config.rope_scaling)
        self.q_Hh = apply_rope(_project(x_D, weights, "q", modality, config), *rope)
        self.k_Kh = apply_rope(_project(x_D, weights, "k", modality, config), *rope)
        self.v_Kh = _project(x_D, weights, "v", modality, config)


def _attend(query: _Token, seen: list[_Token]) -> np.ndarray:
    """The heads' weighted values, one after the other: (H * h,)."""
    if not seen:
        return np.zeros(query.q_Hh.size)
    heads, channels = query.q_Hh.shape
    k_RHh = np.stack([np.repeat(token.k_Kh, heads // len(token.k_Kh), axis=0) for token in seen])
    v_RHh = np.stack([np.repeat(token.v_Kh, heads // len(token.v_Kh), axis=0) for token in seen])
    p_HR = softmax(np.einsum("Hh,RHh->HR", query.q_Hh, k_RHh) / np.sqrt(channels))
    return np.einsum("HR,RHh->Hh", p_HR, v_RHh).reshape(-1)


def mot_block(
    x_BSD: np.ndarray, weights: Weights, config: ModelConfig, vlm: MoTConfig, layer: int, where: Stream
) -> tuple[np.ndarray, RouterLosses]:
    """x + attention(attn_norm_m(x)), then x + mlp_m(mlp_norm_m(x)), m the modality of each position."""
    normed = by_modality(x_BSD, submodule(weights, "attn_norm"), config, vlm, where)
    middle_BSD = x_BSD + mot_attention(normed, submodule(weights, "attn"), config, vlm, where)
    normed = by_modality(middle_BSD, submodule(weights, "mlp_norm"), config, vlm, where)
    out_BSD, losses = middle_BSD.copy(), RouterLosses()
    for index, modality in enumerate(vlm.mot_modalities):
        mine_BS = where.modality_BS == index
        own = submodule(weights, f"mlp.{modality}")
        if config.is_moe_layer(layer):
            y_BSD, saved = moe(normed, own, moe_options(config), where.valid_BS, mine_BS)
            losses.aux_loss = losses.aux_loss + saved.routing.aux_loss
            losses.z_loss = losses.z_loss + saved.routing.z_loss
            losses.counts[modality] = saved.routing.counts_E
        else:
            y_BSD, _ = mlp(normed, own, config.activation)
        out_BSD = out_BSD + np.where(mine_BS[..., None], y_BSD, 0)
    return out_BSD, losses


def by_modality(x_BSD: np.ndarray, norms: Weights, config: ModelConfig, vlm: MoTConfig, where: Stream) -> np.ndarray:
    """Each position through its modality's norm."""
    per_modality = [norm(x_BSD, submodule(norms, m), config.norm_type, config.norm_eps) for m in vlm.mot_modalities]
    return np.take_along_axis(np.stack(per_modality), where.modality_BS[None, ..., None], axis=0)[0]


def positions_within(modality_S: np.ndarray) -> np.ndarray:
    """How many earlier positions have the same modality."""
    return np.array([np.sum(modality_S[:s] == m) for s, m in enumerate(modality_S)])


def _project(x_D: np.ndarray, weights: Weights, name: str, modality: str, config: ModelConfig) -> np.ndarray:
    """(heads, h), normalised where q_norm and k_norm exist."""
    projected = linear(x_D, weights, f"{name}_proj.{modality}").reshape(-1, config.head_size)
    norm_name = f"{name}_norm.{modality}.weight"
    if norm_name not in weights:
        return projected
    one = 1 if config.norm_type == "rmsnorm_1p" else 0
    return rms_norm(projected, one + weights[norm_name], config.norm_eps)


def _allowed(where: Stream, row: int, query: int, key: int, window: int | None) -> bool:
    """``key`` is not after ``query``; the window counts positions of the sequence."""
    near = window is None or query - key < window
    same_document = where.documents_BS[row, query] == where.documents_BS[row, key]
    return bool(near and same_document and where.valid_BS[row, key])
