"""Attention in blocks of queries: nothing in it has an entry for each pair of a query and a key.

Shapes: B batch, H query heads, K key/value heads, S queries, M keys, h head_dim.

    keys that blocks of 2 queries read      causal     causal, window=3
                                            1 1 0 0 0 0     1 1 0 0 0 0
                                            1 1 1 1 0 0     1 1 1 1 0 0
                                            1 1 1 1 1 1     0 0 1 1 1 1
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kempnerforge_torch.model.mask import Mask, part, with_positions

BLOCK_QUERIES = 512
"""Of a block."""


def blockwise_attention(
    attend: Callable[
        [Float[Tensor, "B H _s h"], Float[Tensor, "B K _m h"], Float[Tensor, "B K _m h"], Mask],
        Float[Tensor, "B H _s h"],
    ],
    q: Float[Tensor, "B H S h"],
    k: Float[Tensor, "B K M h"],
    v: Float[Tensor, "B K M h"],
    mask: Mask,
) -> Float[Tensor, "B H S h"]:
    """``attend(q, k, v, mask)``, (B, H, S, h), by calls of it for some queries with the keys that they may see.

    The backward pass calls it again, for each block in turn. Gradients of keys and values are sums over blocks, in at
    least float32.
    """
    length, keys = q.shape[2], k.shape[2]
    wide = torch.promote_types(k.dtype, torch.float32)
    k, v, whole = k.to(wide), v.to(wide), with_positions(mask, length, keys, q.device)

    def block(q_BHsh: Tensor, k_BKmh: Tensor, v_BKmh: Tensor, mask: Mask) -> Tensor:
        return attend(q_BHsh, k_BKmh.to(q.dtype), v_BKmh.to(q.dtype), mask)

    outs = []
    for start in range(0, length, BLOCK_QUERIES):
        count = min(BLOCK_QUERIES, length - start)
        first, end = _seen_keys(mask, start + keys - length, count, keys)
        inputs = q.narrow(2, start, count), k[:, :, first:end], v[:, :, first:end]
        seen = part(whole, start, count, first, end - first)
        outs.append(checkpoint(block, *inputs, seen, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outs, dim=2)


def _seen_keys(mask: Mask, position: int, queries: int, keys: int) -> tuple[int, int]:
    """The first of the keys that queries from a position on may see, and the one after the last; at least one key."""
    if not mask.in_order or mask.prefix_lengths is not None:
        return 0, keys
    first = 0 if mask.window is None else min(max(position - mask.window + 1, 0), keys - 1)
    end = min(position + queries, keys) if mask.causal else keys
    return first, max(end, first + 1)
