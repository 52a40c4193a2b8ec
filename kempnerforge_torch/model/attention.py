"""Causal self-attention with grouped heads.

Shapes: B batch, S new tokens, M keys (cached and new), D model dim, H query heads, K key/value heads, G = H / K query
heads that share a key/value head, h head_dim, A = h/2 angles. Query head i reads key/value head i // G.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kempnerforge_torch.model.blockwise import blockwise_attention
from kempnerforge_torch.model.checks import check_positions
from kempnerforge_torch.model.fused import fused_attention, has_kernel, with_fused
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.linear import Linear
from kempnerforge_torch.model.mask import CAUSAL, Mask, as_mask, with_dense
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.model.position import apply_rope
from kempnerforge_torch.model.softcap import soft_capped

SDPA_BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}

DENSE_PAIRS = 1024 * 1024
"""Of a query and a key: a mask, or scores, of more are never in one tensor."""

_CPU_KERNEL_KEYS = 16
"""Of fewer keys, the fused kernel of the CPU turns scores that are all NaN into an output of 0."""


class Attention(nn.Module):
    """Causal self-attention: softmax(scale q k^T) v over the keys that the masks allow.

    Attributes:
        capture_attention_weights: if True, each call also computes its probabilities.
        last_attention_weights: (B, H, S, M), of the last such call, on the host.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int | None = None,
        qk_norm: bool = False,
        sdpa_backend: str = "auto",
        *,
        bias: bool = False,
        output_bias: bool | None = None,
        sliding_window: int | None = None,
        norm_eps: float = 1e-5,
        qk_norm_over: str = "head",
        scale: float | None = None,
        rotary: bool = True,
        softcap: float | None = None,
        qk_norm_type: str = "rmsnorm",
    ):
        """
        Args:
            output_bias: whether ``o_proj`` has a bias; None: as the others.
            qk_norm_over: "head", or "width": one norm over all heads together.
            scale: factor on products of queries and keys; None: head_dim^-0.5.
            rotary: False: queries and keys are not rotated.
            softcap: as for `attend`.
            qk_norm_type: of the norms of queries and keys, as for `build_norm`.
        """
        super().__init__()
        head_dim = resolve_head_dim(dim, n_heads, n_kv_heads, head_dim)
        if sdpa_backend != "auto" and sdpa_backend not in SDPA_BACKENDS:
            raise ValueError(f"sdpa_backend = {sdpa_backend!r}: must be one of auto, {', '.join(SDPA_BACKENDS)}")
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.sdpa_backend = sdpa_backend
        self.sliding_window = sliding_window
        self.qk_norm_over = qk_norm_over
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rotary = rotary
        self.softcap = softcap
        self.q_proj = Linear(dim, n_heads * head_dim, bias=bias)
        self.k_proj = Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(n_heads * head_dim, dim, bias=bias if output_bias is None else output_bias)
        q_width, k_width = (n_heads * head_dim, n_kv_heads * head_dim) if qk_norm_over == "width" else (head_dim,) * 2
        self.q_norm = build_norm(qk_norm_type, q_width, norm_eps) if qk_norm else None
        self.k_norm = build_norm(qk_norm_type, k_width, norm_eps) if qk_norm else None
        self.capture_attention_weights = False
        self.last_attention_weights: Tensor | None = None

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope_cos: Float[Tensor, "... S A"],
        rope_sin: Float[Tensor, "... S A"],
        *,
        kv_cache: KVCache | None = None,
        mask: Mask | Bool[Tensor, "..."] | None = None,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """(B, S, D) -> (B, S, D).

        Args:
            rope_cos, rope_sin: of the new tokens' positions, (S, h/2) or (B, 1, S, h/2).
            kv_cache: the tokens before; the new ones are appended.
            mask: from `self_attention_mask`, or bool that broadcasts to (B, H, S, M); None: it is built here.
            doc_ids: int (B, S); a token sees its own document.
            key_padding_mask: bool (B, S), True where a token is real; the others are not seen.

        A query that may see no key contributes 0 before the output projection.

        Raises:
            ValueError: masks or ids of another dtype or shape.
        """
        length = x.shape[1]
        check_positions(x.shape[:2], doc_ids, key_padding_mask)
        if mask is None:
            mask = self_attention_mask(
                length,
                kv_cache=kv_cache,
                doc_ids=doc_ids,
                key_padding_mask=key_padding_mask,
                sliding_window=self.sliding_window,
            )
        q_BSHh, k_BSKh = self._heads(self.q_proj(x), self.q_norm), self._heads(self.k_proj(x), self.k_norm)
        v_BSKh = self._heads(self.v_proj(x), None)
        q_BHSh, k_BKMh, v_BKMh = (each.transpose(1, 2) for each in (q_BSHh, k_BSKh, v_BSKh))
        if self.rotary:
            q_BHSh, k_BKMh = apply_rope(q_BHSh, rope_cos, rope_sin), apply_rope(k_BKMh, rope_cos, rope_sin)
        if kv_cache is not None:
            k_BKMh, v_BKMh = kv_cache.update(k_BKMh, v_BKMh, doc_ids=doc_ids, key_padding_mask=key_padding_mask)
            k_BKMh, v_BKMh = k_BKMh.to(x.dtype), v_BKMh.to(x.dtype)
        scores = {"scale": self.scale, "softcap": self.softcap}
        if self.capture_attention_weights:
            self.last_attention_weights = attention_weights(q_BHSh, k_BKMh, mask, **scores).detach().cpu()
        out_BHSh = attend(q_BHSh, k_BKMh, v_BKMh, mask, sdpa_backend=self.sdpa_backend, **scores)
        return self.o_proj(out_BHSh.transpose(1, 2).flatten(2))

    def _heads(self, x_BSX: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, S, H h) -> (B, S, H, h), normalised if there is a norm: as a whole, or head by head."""
        if norm is not None and self.qk_norm_over == "width":
            return torch.unflatten(norm(x_BSX), -1, (-1, self.head_dim))
        x_BSHh = torch.unflatten(x_BSX, -1, (-1, self.head_dim))
        return x_BSHh if norm is None else norm(x_BSHh)


def attend(
    q: Float[Tensor, "B H S h"],
    k: Float[Tensor, "B K M h"],
    v: Float[Tensor, "B K M h"],
    mask: Mask | Bool[Tensor, "..."] = CAUSAL,
    *,
    sdpa_backend: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H S h"]:
    """softmax(scale q k^T) v.

    Every attention of this backend goes through here, and here the kernel is chosen:

        causal, or all to all           F.scaled_dot_product_attention, without a mask
        other masks, up to DENSE_PAIRS  the same with a dense mask; also masks of keys alone, or given dense
        longer ones on CUDA             FlexAttention
        longer ones elsewhere           blocks of queries, each with its dense mask

    With a soft cap FlexAttention on CUDA, of single queries and elsewhere products of all queries, or of blocks of
    them, with all keys.

    Args:
        q: (B, H, S, h).
        k, v: (B, K, M, h).
        mask: which keys each query may attend to; a tensor is bool, broadcasts to (B, H, S, M), True = attend.
        sdpa_backend: kernel of F.scaled_dot_product_attention that is tried first; the math path takes what that kernel
            can't do.
        scale: None: h^-0.5.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.

    Returns:
        (B, H, S, h); 0, with gradient 0, in rows that may attend to nothing.
    """
    length, keys = q.shape[2], k.shape[2]
    mask = prepare_mask(as_mask(mask), length, keys, q.shape[3], q.dtype, q.device, softcap)
    if mask.fused is not None:
        return fused_attention(q, k, v, mask, scale=scale, softcap=softcap)
    if softcap is None:
        attend_dense = functools.partial(_attend, sdpa_backend=sdpa_backend, scale=scale)
    else:
        attend_dense = functools.partial(_attend_plainly, scale=scale, softcap=softcap)
    if mask.dense is not None or (softcap is None and _is_argument(mask, length, keys)):
        return attend_dense(q, k, v, mask)
    return blockwise_attention(attend_dense, q, k, v, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, sdpa_backend: str, scale: float | None) -> Tensor:
    length, keys = q.shape[2], k.shape[2]
    if not _is_argument(mask, length, keys):
        mask = with_dense(mask, length, keys, q.device)
    allowed, empty = (None, None) if mask.dense is None else (mask.dense.allowed, mask.dense.empty)
    # numbers may be symbolic, and so may be what compares them
    causal = True if mask.causal and allowed is None and length > 1 else False  # noqa: SIM210
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    if q.device.type == "cpu" and keys < _CPU_KERNEL_KEYS:
        sdpa_backend = "math"
    with _sdpa(sdpa_backend):
        out_BHSh = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )
    return out_BHSh if empty is None else out_BHSh.masked_fill(empty, 0)


def _attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None, softcap: float | None
) -> Tensor:
    weights_BHSM = attention_weights(q, k, mask, scale=scale, softcap=softcap).to(v.dtype)
    weights_BKGSM = torch.unflatten(weights_BHSM, 1, (k.shape[1], -1))
    return torch.einsum("bkgsm,bkmh->bkgsh", weights_BKGSM, v).flatten(1, 2)


def attention_weights(
    q: Float[Tensor, "B H S h"],
    k: Float[Tensor, "B K M h"],
    mask: Mask | Bool[Tensor, "..."] = CAUSAL,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H S M"]:
    """The probabilities of `attend`: (B, H, S, M) in at least float32, 0 in rows that may attend to nothing."""
    (batch, heads, length, channels), keys = q.shape, k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    dense = with_dense(as_mask(mask), length, keys, q.device).dense
    assert dense is not None
    q_BKGSh = torch.unflatten(q.to(dtype), 1, (k.shape[1], -1))
    scores_BHSM = torch.einsum("bkgsh,bkmh->bkgsm", q_BKGSh, k.to(dtype)).reshape(batch, heads, length, keys)
    scores_BHSM = soft_capped(scores_BHSM * (channels**-0.5 if scale is None else scale), softcap)
    scores_BHSM = scores_BHSM.masked_fill(~dense.allowed, -torch.inf)
    weights_BHSM = scores_BHSM.softmax(dim=-1)
    return weights_BHSM if dense.empty is None else weights_BHSM.masked_fill(dense.empty, 0)


def prepare_mask(
    mask: Mask,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    softcap: float | None = None,
) -> Mask:
    """The mask as `attend` needs it for heads of this size and dtype, and for scores with or without a soft cap: in its
    dense form or in that of a kernel, unless the facts will do. What all layers share is prepared once, before the
    first.
    """
    if mask.dense is not None or mask.fused is not None:
        return mask
    if softcap is None and _is_argument(mask, queries, keys):
        return mask
    if softcap is not None and has_kernel(mask, queries, keys, head_dim, dtype, device):
        return with_fused(mask, queries, keys, device)
    if queries * keys <= DENSE_PAIRS or not mask.of_tokens or mask.of_keys_alone:
        return with_dense(mask, queries, keys, device)
    if has_kernel(mask, queries, keys, head_dim, dtype, device):
        return with_fused(mask, queries, keys, device)
    return mask


def _is_argument(mask: Mask, queries: int, keys: int) -> bool:
    """Whether F.scaled_dot_product_attention is told the facts by an argument, instead of a mask."""
    return mask.dense is None and mask.plain and (not mask.causal or queries == 1 or queries == keys)


def self_attention_mask(
    length: int,
    *,
    kv_cache: KVCache | None = None,
    doc_ids: Integer[Tensor, "B S"] | None = None,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    sliding_window: int | None = None,
    prefix_lengths: Int[Tensor, "B"] | None = None,
) -> Mask:
    """The mask of ``length`` new tokens, before they are appended to the cache.

    Args:
        doc_ids, key_padding_mask: (B, S), of the new tokens; those of the cached ones come from the cache.
        prefix_lengths: as for `Mask`.
    """
    if kv_cache is not None:
        return kv_cache.mask(
            length,
            doc_ids=doc_ids,
            key_padding_mask=key_padding_mask,
            sliding_window=sliding_window,
            prefix_lengths=prefix_lengths,
        )
    return Mask(
        causal=True,
        window=sliding_window if sliding_window is not None and sliding_window < length else None,
        query_doc_ids=doc_ids,
        key_doc_ids=doc_ids,
        key_valid=key_padding_mask,
        prefix_lengths=prefix_lengths,
    )


def resolve_head_dim(dim: int, n_heads: int, n_kv_heads: int, head_dim: int | None = None) -> int:
    """``head_dim``, or dim // n_heads.

    Raises:
        ValueError: for numbers of heads that don't divide.
    """
    if n_kv_heads < 1 or n_heads % n_kv_heads != 0:
        raise ValueError(f"n_kv_heads = {n_kv_heads}: must divide n_heads = {n_heads}")
    if head_dim is None and dim % n_heads != 0:
        raise ValueError(f"n_heads = {n_heads}: must divide dim = {dim}, or head_dim must be given")
    return dim // n_heads if head_dim is None else head_dim


def _sdpa(backend: str) -> contextlib.AbstractContextManager[object]:
    if backend == "auto":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPA_BACKENDS[backend], set_priority=True)
