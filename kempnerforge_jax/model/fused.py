"""The kernel for whole sequences in bfloat16 or float16: cuDNN's attention, which takes causality, a window, and
documents and padding as segments of a sequence.

All that touches JAX's private entry to it is here: the public `jax.nn.dot_product_attention` takes no segments.

Shapes: B batch, H query heads, K key/value heads, S queries and keys, h head_dim, N segments of a sequence.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kempnerforge_jax.model.mask import Mask, Segments, Spans

SEGMENTS = (16, 128)
"""For how many of a sequence there are programs of the kernel. The more, the slower, whatever there is of them."""

_Way = Callable[[Mask, Array, Array, Array], Array]


_known: ContextVar[int | None] = ContextVar("known", default=None)


@contextlib.contextmanager
def of_segments(count: int | None) -> Iterator[None]:
    """Context in which programs are traced for sequences of at most so many segments, one of `SEGMENTS`, that say all;
    None: programs look at their sequences, for which the host waits in each layer.
    """
    token = _known.set(count)
    try:
        yield
    finally:
        _known.reset(token)


def segments_of(batches: Sequence[Mapping[str, np.ndarray]]) -> int | None:
    """For how many segments programs may be traced that take these batches; None where they must look themselves.

    Args:
        batches: as the trainer takes them. Documents must be in one piece each, and nothing else may cut the rows.
    """
    if jax.default_backend() != "gpu" or any(set(batch) != {"tokens", "labels", "doc_ids"} for batch in batches):
        return None
    ids_RS = np.concatenate([batch["doc_ids"] for batch in batches])
    pieces_R = 1 + (ids_RS[:, 1:] != ids_RS[:, :-1]).sum(1)
    different_R = 1 + (np.diff(np.sort(ids_RS, axis=1), axis=1) != 0).sum(1)
    if (pieces_R != different_R).any():
        return None
    return next((count for count in SEGMENTS if pieces_R.max() <= count), None)


def has_kernel(mask: Mask, queries: int, keys: int, head_dim: int, dtype: DTypeLike) -> bool:
    """Whether this process has a GPU with the kernel, and the mask and heads suit it."""
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    if not narrow or not 1 < queries == keys or head_dim % 8 or head_dim > 128 or not _suits(mask, keys):
        return False
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    oldest = 9 if _is_cut(mask) else 8
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= oldest


def with_fused(mask: Mask, queries: int, keys: int) -> Mask:
    """A mask that `has_kernel`, with its form for it: segments, where documents or padding cut the sequences.

    A segment is a document: its real keys, and the queries that see any. Segments can't say all where documents are
    interleaved, have padding inside or are too many.
    """
    assert queries == keys, "of whole sequences"
    return replace(mask, fused=_segments(mask, keys)) if _is_cut(mask) else mask


def fused_attention(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    mask: Mask,
    otherwise: _Way,
    *,
    scale: float | None = None,
) -> Float[Array, "B H S h"]:
    """softmax(scale q k^T) v, by a mask `with_fused`; 0 in rows that may attend to nothing.

    Args:
        otherwise: (mask, q, k, v) -> the same, for masks whose segments turn out not to say all.
        scale: None: h^-0.5.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if mask.fused is None:
        return _whole(factor, mask, q, k, v)
    if (count := _known.get()) is not None:
        return _packed(count, factor, mask, q, k, v)
    ways = (*(functools.partial(_packed, count, factor) for count in SEGMENTS), otherwise)
    return _by(mask.fused.way, ways, mask, q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by(way: Array, ways: Sequence[_Way], mask: Mask, q: Array, k: Array, v: Array) -> Array:
    """One of several ways to the same, whose backward pass starts from the inputs: it keeps nothing of any way."""
    return lax.switch(way, ways, mask, q, k, v)


def _by_forward(way: Array, ways: Sequence[_Way], mask: Mask, q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
    return _by(way, ways, mask, q, k, v), (way, mask, q, k, v)


def _by_backward(ways: Sequence[_Way], residuals: tuple, gradient: Array) -> tuple[None, None, Array, Array, Array]:
    def backward(one: _Way, mask: Mask, *inputs: Array) -> tuple[Array, ...]:
        return jax.vjp(functools.partial(one, mask), *inputs)[1](gradient)

    way, *inputs = residuals
    dq, dk, dv = lax.switch(way, [functools.partial(backward, one) for one in ways], *inputs)
    return None, None, dq, dk, dv


_by.defvjp(_by_forward, _by_backward)


def _whole(scale: float, mask: Mask, q: Array, k: Array, v: Array) -> Array:
    """Of sequences that nothing cuts."""
    return _kernel(q, k, v, MaskType.CAUSAL if mask.causal else MaskType.NO_MASK, mask.window, scale)


def _packed(count: int, scale: float, mask: Mask, q: Array, k: Array, v: Array) -> Array:
    """Of sequences of at most so many segments."""
    segments = mask.fused
    assert segments is not None
    q, k, v = _only(segments.seeing, q), _only(segments.seen, k), _only(segments.seen, v)
    k, v = (jnp.repeat(each, q.shape[1] // each.shape[1], axis=1) for each in (k, v))  # offsets count heads of queries

    def offsets(starts_BN: Array) -> Array:
        return jnp.pad(starts_BN[:, :count], ((0, 0), (0, 1)), constant_values=-1)

    packing = {
        "q_seqlen": segments.queries.counts[:, :count],
        "kv_seqlen": segments.keys.counts[:, :count],
        "q_offsets": offsets(segments.queries.starts),
        "kv_offsets": offsets(segments.keys.starts),
    }
    kind = MaskType.PADDING_CAUSAL if mask.causal else MaskType.PADDING
    return _only(segments.seeing, _kernel(q, k, v, kind, mask.window, scale, **packing))


def _kernel(q: Array, k: Array, v: Array, kind: MaskType, window: int | None, scale: float, **packing: Array) -> Array:
    """Of lengths that are even, as the kernel wants them: with one more token, which no other sees."""
    length = q.shape[2]
    q_BSHh, k_BSHh, v_BSHh = (
        jnp.pad(heads.swapaxes(1, 2), ((0, 0), (0, length % 2), (0, 0), (0, 0))) for heads in (q, k, v)
    )
    attend: Any = dot_product_attention  # its annotations leave out what it returns
    out_BSHh = attend(q_BSHh, k_BSHh, v_BSHh, scale=scale, mask_type=kind, sliding_window_length=window, **packing)
    return out_BSHh[:, :length].swapaxes(1, 2)


def _suits(mask: Mask, length: int) -> bool:
    """Whether the kernel, or its segments, can say what this kind of mask says. (Arrays that were one are two within
    transformations of a function that takes them.)
    """
    if mask.fused is not None:
        return True
    of_itself = mask.in_order and mask.query_doc_ids is mask.key_doc_ids and mask.prefix_lengths is None
    if not mask.causal:
        return of_itself and mask.window is None and (length % 2 == 0 or _is_cut(mask))
    return of_itself and (mask.window is None or mask.window > 0)


def _is_cut(mask: Mask) -> bool:
    return mask.query_doc_ids is not None or mask.key_valid is not None


def _segments(mask: Mask, length: int) -> Segments:
    facts = mask.query_doc_ids if mask.key_valid is None else mask.key_valid
    assert facts is not None
    doc_ids_BS = jnp.zeros(facts.shape, jnp.int32) if mask.query_doc_ids is None else mask.query_doc_ids
    numbers_BS = jnp.cumsum(_starts(doc_ids_BS), axis=1, dtype=jnp.int32) - 1
    document_BNS = numbers_BS[:, None] == jnp.arange(SEGMENTS[-1], dtype=jnp.int32)[:, None]
    real_BNS = document_BNS if mask.key_valid is None else document_BNS & mask.key_valid[:, None]
    first_key_BN, end_key_BN = _span(real_BNS)
    first_BN, end_BN = _span(document_BNS)
    if mask.causal:
        first_BN = first_key_BN
    if mask.window is not None:
        end_BN = jnp.minimum(end_BN, end_key_BN - 1 + mask.window)
    places_S = jnp.arange(length, dtype=jnp.int32)
    seeing_BNS = (first_BN[..., None] <= places_S) & (places_S < end_BN[..., None]) & real_BNS.any(2, keepdims=True)
    is_there_BN = end_key_BN > 0
    is_apart_B = _starts(doc_ids_BS).sum(1) == _starts(jnp.sort(doc_ids_BS, axis=1)).sum(1)
    is_without_gaps_B = (real_BNS.sum(2) == jnp.where(is_there_BN, end_key_BN - first_key_BN, 0)).all(1)
    fits = [is_apart_B & is_without_gaps_B & (numbers_BS[:, -1] < count) for count in SEGMENTS]
    return Segments(
        queries=_spans(first_BN, end_BN, is_there_BN),
        keys=_spans(first_key_BN, end_key_BN, is_there_BN),
        seeing=None if mask.key_valid is None else seeing_BNS.any(1),
        seen=mask.key_valid,
        way=jnp.stack([~fits_B.all() for fits_B in fits]).sum(dtype=jnp.int32),
    )


def _starts(doc_ids_BS: Array) -> Array:
    """Where a document starts: bool (B, S)."""
    return jnp.pad(doc_ids_BS[:, 1:] != doc_ids_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _span(members_BNS: Array) -> tuple[Array, Array]:
    """The first place of each segment's members and the one after their last, (B, N); S and 0 if there are none."""
    length = members_BNS.shape[2]
    places_S = jnp.arange(length, dtype=jnp.int32)
    return jnp.where(members_BNS, places_S, length).min(axis=2), jnp.where(members_BNS, places_S + 1, 0).max(axis=2)


def _spans(first_BN: Array, end_BN: Array, is_there_BN: Array) -> Spans:
    return Spans(jnp.where(is_there_BN, first_BN, -1), jnp.where(is_there_BN, end_BN - first_BN, -1))


def _only(chosen_BS: Array | None, x: Array) -> Array:
    """(B, _, S, h) with 0 for tokens that are not chosen, whatever is there; so is its gradient."""
    return x if chosen_BS is None else jnp.where(chosen_BS[:, None, :, None], x, 0)
