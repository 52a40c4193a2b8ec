"""Causal self-attention with grouped heads.

Shapes: B batch, S new tokens, M keys (cached and new), D model dim, H query heads, K key/value heads, G = H / K query
heads that share a key/value head, h head_dim, A = h/2 angles. Query head i reads key/value head i // G.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from kempnerforge_jax.model.blockwise import blockwise_attention
from kempnerforge_jax.model.checks import check_positions
from kempnerforge_jax.model.fused import fused_attention, has_kernel, with_fused
from kempnerforge_jax.model.kv_cache import KVCache
from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.model.mask import CAUSAL, Mask, as_mask, with_dense
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.norm import build_norm
from kempnerforge_jax.model.position import apply_rope
from kempnerforge_jax.model.softcap import soft_capped
from kempnerforge_jax.model.within_map import read_besides

DENSE_PAIRS = 1024 * 1024
"""Of a query and a key: a mask, or scores, of more are never in one tensor."""

SCORES = "scores"
"""The `checkpoint_name` of products of queries and keys."""


class Attention(Module):
    """Causal self-attention: softmax(scale q k^T) v over the keys that the masks allow.

    Attributes:
        capture_attention_weights: if True, each call outside jit also keeps its probabilities.
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
        rngs: nnx.Rngs | None,
    ):
        """
        Args:
            sdpa_backend: names kernels of torch; here it has no effect.
            output_bias: whether ``o_proj`` has a bias; None: as the others.
            qk_norm_over: "head", or "width": one norm over all heads together.
            scale: factor on products of queries and keys; None: head_dim^-0.5.
            rotary: False: queries and keys are not rotated.
            softcap: as for `attend`.
            qk_norm_type: of the norms of queries and keys, as for `build_norm`.
        """
        head_dim = resolve_head_dim(dim, n_heads, n_kv_heads, head_dim)
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.sdpa_backend = sdpa_backend
        self.sliding_window = sliding_window
        self.qk_norm_over = qk_norm_over
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rotary = rotary
        self.softcap = softcap
        self.q_proj = Linear(dim, n_heads * head_dim, bias, rngs=rngs)
        self.k_proj = Linear(dim, n_kv_heads * head_dim, bias, rngs=rngs)
        self.v_proj = Linear(dim, n_kv_heads * head_dim, bias, rngs=rngs)
        self.o_proj = Linear(n_heads * head_dim, dim, bias if output_bias is None else output_bias, rngs=rngs)
        q_width, k_width = (n_heads * head_dim, n_kv_heads * head_dim) if qk_norm_over == "width" else (head_dim,) * 2
        self.q_norm = build_norm(qk_norm_type, q_width, norm_eps, rngs=rngs) if qk_norm else None
        self.k_norm = build_norm(qk_norm_type, k_width, norm_eps, rngs=rngs) if qk_norm else None
        self.capture_attention_weights = False

    @property
    def last_attention_weights(self) -> np.ndarray | None:
        """(B, H, S, M), of the last captured call."""
        weights = self.kept("attention_weights")
        return None if weights is None else np.asarray(weights)

    def forward(
        self,
        x: Float[Array, "B S D"],
        rope_cos: Float[Array, "... S A"],
        rope_sin: Float[Array, "... S A"],
        *,
        kv_cache: KVCache | None = None,
        mask: Mask | Bool[Array, "..."] | None = None,
        doc_ids: Integer[Array, "B S"] | None = None,
        key_padding_mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], KVCache]:
        """(B, S, D) -> (B, S, D); given a cache, -> ((B, S, D), new cache).

        Args:
            rope_cos, rope_sin: of the new tokens' positions, (S, h/2) or (B, 1, S, h/2).
            kv_cache: the tokens before; the new ones are appended.
            mask: from `self_attention_mask`, or bool that broadcasts to (B, H, S, M); None: it is built here.
            doc_ids: int (B, S); a token sees its own document.
            key_padding_mask: bool (B, S), True where a token is real; the others are not seen.

        A query that may see no key contributes 0 before the output projection. A token past the end of the cache gives
        NaN inside jit, and an error outside.
        """
        batch, length, _ = x.shape
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
        q_BHSh, k_BKMh, v_BKMh = (each.swapaxes(1, 2) for each in (q_BSHh, k_BSKh, v_BSKh))
        if self.rotary:
            q_BHSh, k_BKMh = apply_rope(q_BHSh, rope_cos, rope_sin), apply_rope(k_BKMh, rope_cos, rope_sin)
        updated = None
        if kv_cache is not None:
            updated, k_BKMh, v_BKMh = kv_cache.update(
                k_BKMh, v_BKMh, doc_ids=doc_ids, key_padding_mask=key_padding_mask
            )
            k_BKMh, v_BKMh = k_BKMh.astype(x.dtype), v_BKMh.astype(x.dtype)
        elif (others := read_besides()) is not None:
            _, k_BKMh, v_BKMh = others.update(k_BKMh, v_BKMh)
        scores = {"scale": self.scale, "softcap": self.softcap}
        if self.capture_attention_weights:
            self.keep(attention_weights=attention_weights(q_BHSh, k_BKMh, mask, **scores))
        out_BHSh = attend(q_BHSh, k_BKMh, v_BKMh, mask, **scores)
        out_BSD = self.o_proj(out_BHSh.swapaxes(1, 2).reshape(batch, length, -1))
        if kv_cache is None or updated is None:
            return out_BSD
        past_end_BS = kv_cache.positions(length) >= kv_cache.max_seq_len
        return jnp.where(past_end_BS[..., None], jnp.nan, out_BSD), updated

    def _heads(self, x_BSX: jax.Array, norm: Module | None) -> jax.Array:
        """(B, S, H h) -> (B, S, H, h), normalised if there is a norm: as a whole, or head by head."""
        split = (*x_BSX.shape[:2], -1, self.head_dim)
        if norm is not None and self.qk_norm_over == "width":
            return norm(x_BSX).reshape(split)
        x_BSHh = x_BSX.reshape(split)
        return x_BSHh if norm is None else norm(x_BSHh)


def attend(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B K M h"],
    v: Float[Array, "B K M h"],
    mask: Mask | Bool[Array, "..."] = CAUSAL,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H S h"]:
    """softmax(scale q k^T) v.

    Every attention of this backend goes through here, and here the kernel is chosen:

        whole sequences in bfloat16 or float16 on CUDA  cuDNN's, if the mask is causal, with or without a window, or all
                                                        to all, and its documents and real keys are segments
        others, up to DENSE_PAIRS                       products of all queries with all keys
        longer ones                                     blocks of queries

    cuDNN's has no soft caps.

    Args:
        q: (B, H, S, h).
        k, v: (B, K, M, h).
        mask: which keys each query may attend to; an array is bool, broadcasts to (B, H, S, M), True = attend.
        scale: None: h^-0.5.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.

    Returns:
        (B, H, S, h); 0, with gradient 0, in rows that may attend to nothing.
    """
    (length, channels), keys = q.shape[2:], k.shape[2]
    mask, one_dtype = as_mask(mask), q.dtype == k.dtype == v.dtype
    if softcap is not None or not one_dtype or not has_kernel(mask, length, keys, channels, q.dtype):
        return _attend_plainly(scale, mask, q, k, v, softcap)
    mask = mask if mask.fused is not None else with_fused(mask, length, keys)
    kernel, plain = (functools.partial(way, scale, mask) for way in (_attend_fused, _attend_plainly))
    return lax.platform_dependent(q, k, v, cuda=kernel, default=plain)


def _attend_fused(scale: float | None, mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return fused_attention(q, k, v, mask, functools.partial(_attend_plainly, scale), scale=scale)


def _attend_plainly(
    scale: float | None, mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, softcap: float | None = None
) -> jax.Array:
    is_short = q.shape[2] * k.shape[2] <= DENSE_PAIRS
    attend_dense = functools.partial(_attention, scale=scale, softcap=softcap)
    return attend_dense(q, k, v, mask) if is_short else blockwise_attention(attend_dense, q, k, v, mask)


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, scale: float | None, softcap: float | None
) -> jax.Array:
    mask = with_dense(mask, q.shape[2], k.shape[2])
    weights_BHSM = attention_weights(q, k, mask, scale=scale, softcap=softcap).astype(v.dtype)
    weights_BKGSM = weights_BHSM.reshape(q.shape[0], k.shape[1], -1, *weights_BHSM.shape[2:])
    out_BKGSh = jnp.einsum("bkgsm,bkmh->bkgsh", weights_BKGSM, v)
    out_BHSh = out_BKGSh.reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype)
    assert mask.dense is not None
    return out_BHSh if mask.dense.empty is None else jnp.where(mask.dense.empty, 0, out_BHSh)


def attention_weights(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B K M h"],
    mask: Mask | Bool[Array, "..."] = CAUSAL,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H S M"]:
    """The probabilities of `attend`: (B, H, S, M) in at least float32, 0 in rows that may attend to nothing."""
    (batch, heads, length, channels), keys = q.shape, k.shape[2]
    dense = with_dense(as_mask(mask), length, keys).dense
    assert dense is not None
    q_BKGSh = q.reshape(batch, k.shape[1], -1, length, channels)
    scores_BKGSM = _scores(q_BKGSh, k)
    scores_BHSM = scores_BKGSM.reshape(batch, heads, length, keys) * (channels**-0.5 if scale is None else scale)
    scores_BHSM = soft_capped(scores_BHSM, softcap)
    weights_BHSM = jax.nn.softmax(jnp.where(dense.allowed, scores_BHSM, -jnp.inf), axis=-1)
    return weights_BHSM if dense.empty is None else jnp.where(dense.empty, 0, weights_BHSM)


@jax.custom_vjp
def _scores(q_BKGSh: jax.Array, k_BKMh: jax.Array) -> jax.Array:
    """Products of queries and keys, in at least float32. Their gradients are products of the inputs' dtype, of which
    those of JAX would have one factor in float32, and so be computed as if both were.
    """
    dtype = jnp.promote_types(q_BKGSh.dtype, jnp.float32)
    scores_BKGSM = jnp.einsum("bkgsh,bkmh->bkgsm", q_BKGSh, k_BKMh, preferred_element_type=dtype)
    return checkpoint_name(scores_BKGSM, SCORES)


def _scores_backward(residuals: tuple[jax.Array, jax.Array], d_BKGSM: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_BKGSh, k_BKMh = residuals
    dq_BKGSh = jnp.einsum("bkgsm,bkmh->bkgsh", d_BKGSM.astype(k_BKMh.dtype), k_BKMh)
    dk_BKMh = jnp.einsum("bkgsm,bkgsh->bkmh", d_BKGSM.astype(q_BKGSh.dtype), q_BKGSh)
    return dq_BKGSh.astype(q_BKGSh.dtype), dk_BKMh.astype(k_BKMh.dtype)


_scores.defvjp(lambda q_BKGSh, k_BKMh: (_scores(q_BKGSh, k_BKMh), (q_BKGSh, k_BKMh)), _scores_backward)


def prepare_mask(
    mask: Mask, queries: int, keys: int, head_dim: int, dtype: DTypeLike, softcap: float | None = None
) -> Mask:
    """The mask as `attend` needs it for heads of this size and dtype, and for scores with or without a soft cap: in its
    dense form or in that of a kernel, unless the facts will do. What all layers share is prepared once, before the
    first.
    """
    if softcap is None and has_kernel(mask, queries, keys, head_dim, dtype):
        return with_fused(mask, queries, keys)
    return with_dense(mask, queries, keys) if queries * keys <= DENSE_PAIRS else mask


def self_attention_mask(
    length: int,
    *,
    kv_cache: KVCache | None = None,
    doc_ids: Integer[Array, "B S"] | None = None,
    key_padding_mask: Bool[Array, "B S"] | None = None,
    sliding_window: int | None = None,
    prefix_lengths: Int[Array, "B"] | None = None,
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
