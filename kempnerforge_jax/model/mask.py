"""Who may see whom in self-attention.

Shapes: B batch, S queries, M keys.

    mask (rows: new tokens at positions 2, 3, 4; columns: keys at positions 0 ... 4)

        causal        window=3      documents 0 0 1 1 1
        1 1 1 0 0     1 1 1 0 0     0 0 1 0 0
        1 1 1 1 0     0 1 1 1 0     0 0 1 1 0
        1 1 1 1 1     0 0 1 1 1     0 0 1 1 1
"""

from __future__ import annotations

import jax


def build_mask(
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    query_doc_ids: jax.Array | None = None,
    key_doc_ids: jax.Array | None = None,
    key_valid: jax.Array | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    """Who may see whom: a query at p sees a key at k if k <= p, p - window < k, both are of one document, and the key
    is real.

    Args:
        query_positions: int (S,) or (B, S).
        key_positions: int (M,) or (B, M).
        query_doc_ids, key_doc_ids: int (B, S) and (B, M).
        key_valid: bool (B, M).

    Returns:
        bool (B, 1, S, M), or (1, 1, S, M) if nothing depends on the row; True = attend.
    """
    query, key = query_positions[..., :, None], key_positions[..., None, :]
    mask = key <= query
    if sliding_window is not None:
        mask = mask & (key > query - sliding_window)
    if query_doc_ids is not None and key_doc_ids is not None:
        mask = mask & (query_doc_ids[:, :, None] == key_doc_ids[:, None, :])
    if key_valid is not None:
        mask = mask & key_valid[:, None, :]
    return mask[:, None] if mask.ndim == 3 else mask[None, None]
