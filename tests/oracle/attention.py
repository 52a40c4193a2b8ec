"""Causal attention (Vaswani et al. 2017, arXiv:1706.03762) with grouped heads (Ainslie et al. 2023, arXiv:2305.13245).

Shapes: B batch, S new tokens, P tokens seen before, T = P + S keys, D model dim, H query heads, K key/value heads, h
head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.oracle.linear import Gradients, Weights, linear, linear_backward, submodule
from tests.oracle.norm import norm, norm_backward
from tests.oracle.position import apply_rope, apply_rope_backward


@dataclass(frozen=True)
class Keys:
    """Keys and values, each with all that decides who may see it. A cache is the `Keys` of the tokens seen so far.

    Where a key is stored means nothing: its position, document and validity do. ``lengths`` is the position that each
    row's next token takes.
    """

    k_BKTh: np.ndarray
    v_BKTh: np.ndarray
    positions_BT: np.ndarray
    documents_BT: np.ndarray
    valid_BT: np.ndarray
    lengths_B: np.ndarray

    def truncate(self, lengths_B: np.ndarray) -> Keys:
        """Forget what lies at or beyond each row's new length."""
        kept_BT = self.valid_BT & (self.positions_BT < lengths_B[:, None])
        return replace(self, valid_BT=kept_BT, lengths_B=lengths_B)


def empty_cache(batch: int, n_kv_heads: int, head_dim: int) -> Keys:
    """A cache that has seen nothing."""
    nothing = np.zeros((batch, n_kv_heads, 0, head_dim))
    none = np.zeros((batch, 0), dtype=np.int64)
    return Keys(nothing, nothing, none, none, none.astype(bool), np.zeros(batch, dtype=np.int64))


@dataclass(frozen=True)
class AttentionSaved:
    """What backward needs, and what other modules would call activations."""

    x_BSD: np.ndarray
    activations: dict[str, np.ndarray]
    q_BHSh: np.ndarray
    keys: Keys
    probabilities_BHST: np.ndarray
    context_BSX: np.ndarray
    rope: tuple[np.ndarray, np.ndarray] | None


def attention(
    x_BSD: np.ndarray,
    weights: Weights,
    rope: tuple[np.ndarray, np.ndarray] | None,
    *,
    n_heads: int,
    n_kv_heads: int,
    eps: float = 1e-5,
    sliding_window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    qk_norm_over: str = "head",
    qk_norm_type: str = "rmsnorm",
    doc_ids: np.ndarray | None = None,
    key_padding_mask: np.ndarray | None = None,
    prefix_lengths: np.ndarray | None = None,
    cache: Keys | None = None,
) -> tuple[np.ndarray, AttentionSaved]:
    """Attention over the cached tokens and the new ones.

    Args:
        weights: q_proj, k_proj, v_proj, o_proj, each with or without bias; q_norm and k_norm or neither, as wide as a
            head, or with ``qk_norm_over`` "width" as all of them.
        rope: cos and sin of every position, each (positions, h/2); None: nothing is rotated.
        doc_ids: (B, S) document of each new token.
        key_padding_mask: (B, S) bool, True where a new token is real.
        prefix_lengths: (B,) how many of the first positions of each row see each other.

    Returns:
        (B, S, D); a query that may see no key contributes 0 before the output projection.
    """
    q, k, v = (linear(x_BSD, weights, f"{name}_proj") for name in "qkv")
    activations = {"q_proj": q, "k_proj": k, "v_proj": v}
    is_normed, over_width = "q_norm.weight" in weights, qk_norm_over == "width"
    if is_normed and over_width:
        q = activations["q_norm"] = norm(q, submodule(weights, "q_norm"), qk_norm_type, eps)
        k = activations["k_norm"] = norm(k, submodule(weights, "k_norm"), qk_norm_type, eps)
    q_BSHh, k_BSKh, v_BSKh = split_heads(q, n_heads), split_heads(k, n_kv_heads), split_heads(v, n_kv_heads)
    if is_normed and not over_width:
        q_BSHh = activations["q_norm"] = norm(q_BSHh, submodule(weights, "q_norm"), qk_norm_type, eps)
        k_BSKh = activations["k_norm"] = norm(k_BSKh, submodule(weights, "k_norm"), qk_norm_type, eps)

    batch, length, _ = x_BSD.shape
    cache = cache or empty_cache(batch, n_kv_heads, q_BSHh.shape[-1])
    positions_BS = cache.lengths_B[:, None] + np.arange(length)
    q_BHSh, k_BKSh, angles = heads_first(q_BSHh), heads_first(k_BSKh), None
    if rope is not None:
        angles = rope[0][positions_BS][:, None], rope[1][positions_BS][:, None]
        q_BHSh, k_BKSh = apply_rope(q_BHSh, *angles), apply_rope(k_BKSh, *angles)
    new = Keys(
        k_BKTh=k_BKSh,
        v_BKTh=heads_first(v_BSKh),
        positions_BT=positions_BS,
        documents_BT=np.zeros((batch, length), dtype=np.int64) if doc_ids is None else doc_ids,
        valid_BT=np.ones((batch, length), dtype=bool) if key_padding_mask is None else key_padding_mask,
        lengths_B=cache.lengths_B + length,
    )
    keys = seen_after(cache, new)

    allowed_BST = may_attend(positions_BS, new.documents_BT, keys, sliding_window, prefix_lengths)
    context_BHSh, probabilities = attend(q_BHSh, keys.k_BKTh, keys.v_BKTh, allowed_BST, scale, softcap)
    context_BSX = heads_merged(context_BHSh)
    activations["o_proj"] = linear(context_BSX, weights, "o_proj")
    return activations["o_proj"], AttentionSaved(x_BSD, activations, q_BHSh, keys, probabilities, context_BSX, angles)


def may_attend(
    positions_BS: np.ndarray,
    documents_BS: np.ndarray,
    keys: Keys,
    sliding_window: int | None = None,
    prefix_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """(B, S, T) bool: k <= p and p - window < k, or both in the prefix; query and key of one document; the key real."""
    query, key = positions_BS[:, :, None], keys.positions_BT[:, None, :]
    allowed_BST = key <= query
    if sliding_window is not None:
        allowed_BST = allowed_BST & (query - sliding_window < key)
    if prefix_lengths is not None:
        allowed_BST = allowed_BST | (np.maximum(query, key) < prefix_lengths[:, None, None])
    same_document = documents_BS[:, :, None] == keys.documents_BT[:, None, :]
    return allowed_BST & same_document & keys.valid_BT[:, None, :]


def attend(
    q_BHSh: np.ndarray,
    k_BKTh: np.ndarray,
    v_BKTh: np.ndarray,
    allowed_BST: np.ndarray,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale q k^T) v over the allowed keys, by 1 / sqrt h where no scale is given; query head i reads
    key/value head i // (H / K). With a soft cap, scores s are softcap * tanh(s / softcap).

    Returns:
        the weighted values (B, H, S, h), and the probabilities (B, H, S, T): rows of 0 where no key is allowed.
    """
    group = q_BHSh.shape[1] // k_BKTh.shape[1]
    k_BHTh, v_BHTh = np.repeat(k_BKTh, group, axis=1), np.repeat(v_BKTh, group, axis=1)
    scores_BHST = q_BHSh @ k_BHTh.swapaxes(-1, -2) * (scale or 1 / np.sqrt(q_BHSh.shape[-1]))
    if softcap is not None:
        scores_BHST = softcap * np.tanh(scores_BHST / softcap)
    probabilities_BHST = masked_softmax(scores_BHST, allowed_BST[:, None])
    return probabilities_BHST @ v_BHTh, probabilities_BHST


def attend_backward(
    dcontext_BHSh: np.ndarray,
    q_BHSh: np.ndarray,
    k_BKTh: np.ndarray,
    v_BKTh: np.ndarray,
    probabilities_BHST: np.ndarray,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of q, k, v. Through the softmax: ds = p (dp - sum(p dp)); 0 in a row without keys. The derivative of a
    soft cap is 1 - tanh^2.
    """
    group = q_BHSh.shape[1] // k_BKTh.shape[1]
    k_BHTh, v_BHTh = np.repeat(k_BKTh, group, axis=1), np.repeat(v_BKTh, group, axis=1)
    p = probabilities_BHST
    dp = dcontext_BHSh @ v_BHTh.swapaxes(-1, -2)
    factor = scale or 1 / np.sqrt(q_BHSh.shape[-1])
    dscores = p * (dp - np.sum(p * dp, axis=-1, keepdims=True)) * factor
    if softcap is not None:
        dscores = dscores * (1 - np.tanh(q_BHSh @ k_BHTh.swapaxes(-1, -2) * factor / softcap) ** 2)
    dk_BHTh, dv_BHTh = dscores.swapaxes(-1, -2) @ q_BHSh, p.swapaxes(-1, -2) @ dcontext_BHSh
    return dscores @ k_BHTh, _sum_groups(dk_BHTh, group), _sum_groups(dv_BHTh, group)


def attention_backward(
    dy_BSD: np.ndarray,
    saved: AttentionSaved,
    weights: Weights,
    eps: float = 1e-5,
    scale: float | None = None,
    softcap: float | None = None,
    qk_norm_type: str = "rmsnorm",
) -> tuple[np.ndarray, Gradients]:
    """Gradients of the new tokens' input and of every weight; what came from a cache counts as constant."""
    length = saved.x_BSD.shape[1]
    dcontext_BSX, gradients = linear_backward(dy_BSD, saved.context_BSX, weights, "o_proj")
    n_heads, n_kv_heads = saved.q_BHSh.shape[1], saved.keys.k_BKTh.shape[1]
    dq_BHSh, dk_BKTh, dv_BKTh = attend_backward(
        heads_first(split_heads(dcontext_BSX, n_heads)),
        saved.q_BHSh,
        saved.keys.k_BKTh,
        saved.keys.v_BKTh,
        saved.probabilities_BHST,
        scale,
        softcap,
    )
    dk_BKSh = dk_BKTh[:, :, -length:]
    if saved.rope is not None:
        dq_BHSh, dk_BKSh = apply_rope_backward(dq_BHSh, *saved.rope), apply_rope_backward(dk_BKSh, *saved.rope)
    dq_BSHh, dk_BSKh = heads_first(dq_BHSh), heads_first(dk_BKSh)
    dv_BSKh = heads_first(dv_BKTh[:, :, -length:])
    if "q_norm.weight" in weights:
        q_BSHh, k_BSKh = saved.activations["q_proj"], saved.activations["k_proj"]
        if weights["q_norm.weight"].size == q_BSHh.shape[-1]:
            dq_BSHh, dk_BSKh = dq_BSHh.reshape(q_BSHh.shape), dk_BSKh.reshape(k_BSKh.shape)
        else:
            q_BSHh, k_BSKh = split_heads(q_BSHh, n_heads), split_heads(k_BSKh, n_kv_heads)
        dq_BSHh, q_norm = norm_backward(dq_BSHh, q_BSHh, submodule(weights, "q_norm"), qk_norm_type, eps)
        dk_BSKh, k_norm = norm_backward(dk_BSKh, k_BSKh, submodule(weights, "k_norm"), qk_norm_type, eps)
        gradients |= {"q_norm.weight": q_norm["weight"], "k_norm.weight": k_norm["weight"]}
    dx_BSD = np.zeros_like(saved.x_BSD)
    for name, d in (("q_proj", dq_BSHh), ("k_proj", dk_BSKh), ("v_proj", dv_BSKh)):
        dx, projection = linear_backward(d.reshape(*d.shape[:2], -1), saved.x_BSD, weights, name)
        dx_BSD = dx_BSD + dx
        gradients |= projection
    return dx_BSD, gradients


def masked_softmax(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Softmax over the allowed places of the last axis, 0 elsewhere, and 0 throughout where nothing is allowed."""
    highest = np.where(allowed, np.real(scores), -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    shifted = np.where(allowed, scores - np.where(np.isfinite(highest), highest, 0), 0)
    numerators = np.where(allowed, np.exp(shifted), 0)
    total = numerators.sum(axis=-1, keepdims=True)
    return numerators / np.where(allowed.any(axis=-1, keepdims=True), total, 1)


def seen_after(cache: Keys, new: Keys) -> Keys:
    """The cached keys followed by the new ones."""
    return Keys(
        k_BKTh=np.concatenate([cache.k_BKTh, new.k_BKTh], axis=2),
        v_BKTh=np.concatenate([cache.v_BKTh, new.v_BKTh], axis=2),
        positions_BT=np.concatenate([cache.positions_BT, new.positions_BT], axis=1),
        documents_BT=np.concatenate([cache.documents_BT, new.documents_BT], axis=1),
        valid_BT=np.concatenate([cache.valid_BT, new.valid_BT], axis=1),
        lengths_B=new.lengths_B,
    )


def split_heads(x_BSX: np.ndarray, n_heads: int) -> np.ndarray:
    """(B, S, heads * h) -> (B, S, heads, h)."""
    return x_BSX.reshape(*x_BSX.shape[:2], n_heads, -1)


def heads_first(x: np.ndarray) -> np.ndarray:
    """(B, S, heads, h) <-> (B, heads, S, h)."""
    return x.swapaxes(1, 2)


def heads_merged(x_BHSh: np.ndarray) -> np.ndarray:
    """(B, H, S, h) -> (B, S, H * h)."""
    x_BSHh = heads_first(x_BHSh)
    return x_BSHh.reshape(*x_BSHh.shape[:2], -1)


def _sum_groups(d_BHTh: np.ndarray, group: int) -> np.ndarray:
    """Each key/value head collects the gradients of the query heads that read it."""
    batch, heads, length, channels = d_BHTh.shape
    return d_BHTh.reshape(batch, heads // group, group, length, channels).sum(axis=2)
