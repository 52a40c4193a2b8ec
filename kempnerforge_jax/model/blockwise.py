"""Attention in blocks of queries: nothing in it has an entry for each pair of a query and a key.

Shapes: B batch, H query heads, K key/value heads, S queries, M keys, h head_dim, N blocks of s queries, m keys of a
block.

    keys that blocks of 2 queries read      causal     causal, window=3
                                            1 1 1 1 1 1     1 1 1 1 0 0
                                            1 1 1 1 1 1     1 1 1 1 0 0
                                            1 1 1 1 1 1     0 0 1 1 1 1
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kempnerforge_jax.model.mask import Mask, part, with_positions

BLOCK_QUERIES = 512
"""Of a block."""


def blockwise_attention(
    attend: Callable[
        [Float[Array, "B H _s h"], Float[Array, "B K _m h"], Float[Array, "B K _m h"], Mask], Float[Array, "B H _s h"]
    ],
    q: Float[Array, "B H S h"],
    k: Float[Array, "B K M h"],
    v: Float[Array, "B K M h"],
    mask: Mask,
) -> Float[Array, "B H S h"]:
    """``attend(q, k, v, mask)``, (B, H, S, h), by calls of it for some queries with the keys that they may see: of a
    window those, else all, as blocks of one program have equal shapes.

    The backward pass calls it again, for each block in turn. Gradients of keys and values are sums over blocks, in at
    least float32.
    """
    length, keys = q.shape[2], k.shape[2]
    wide = jnp.promote_types(k.dtype, jnp.float32)
    k, v, whole = k.astype(wide), v.astype(wide), with_positions(mask, length, keys)
    queries = min(BLOCK_QUERIES, length)
    seen_keys = _most_seen_keys(mask, queries, keys)

    @jax.checkpoint
    def block(start: Array, q_BHsh: Array) -> Array:
        first = jnp.clip(start + queries + keys - length - seen_keys, 0, keys - seen_keys)
        k_BKmh, v_BKmh = (lax.dynamic_slice_in_dim(each, first, seen_keys, 2).astype(q.dtype) for each in (k, v))
        return attend(q_BHsh, k_BKmh, v_BKmh, part(whole, start, queries, first, seen_keys))

    blocks, rest = divmod(length, queries)
    q_NBHsh = jnp.stack(jnp.split(q[:, :, : blocks * queries], blocks, axis=2))
    starts_N = jnp.arange(blocks, dtype=jnp.int32) * queries
    if rest:  # the last block starts earlier, and of what it gives again nothing is taken
        q_NBHsh = jnp.concatenate([q_NBHsh, q[None, :, :, -queries:]])
        starts_N = jnp.append(starts_N, length - queries)
    _, out_NBHsh = lax.scan(lambda _, inputs: (None, block(*inputs)), None, (starts_N, q_NBHsh))
    out_BHSh = jnp.concatenate(list(out_NBHsh[:blocks]), axis=2)
    return jnp.concatenate([out_BHSh, out_NBHsh[-1, :, :, queries - rest :]], axis=2) if rest else out_BHSh


def _most_seen_keys(mask: Mask, queries: int, keys: int) -> int:
    """How many keys, next to each other, hold all that some queries next to each other may see."""
    if not mask.in_order or not mask.causal or mask.window is None or mask.prefix_lengths is not None:
        return keys
    return min(keys, queries + mask.window - 1)
