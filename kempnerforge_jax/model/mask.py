"""Who may see whom in attention.

Shapes: B batch, S queries, M keys.

    mask (rows: new tokens at positions 2, 3, 4; columns: keys at positions 0 ... 4)

        causal        window=3      documents 0 0 1 1 1
        1 1 1 0 0     1 1 1 0 0     0 0 1 0 0
        1 1 1 1 0     0 1 1 1 0     0 0 1 1 0
        1 1 1 1 1     0 0 1 1 1     0 0 1 1 1
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax

Kind = Literal["causal", "full", "dense"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["allowed"], meta_fields=["kind"])
@dataclass(frozen=True)
class Mask:
    """Who may see whom in attention, as data: what a kernel knows by name, and a tensor for all else.

    Attributes:
        kind: "causal": the queries are the last of the keys, and see themselves and all before; "full": every query
            sees every key; "dense": what ``allowed`` says.
        allowed: of "dense" alone: bool, broadcasts to (B, H, S, M), True = attend.

    Raises:
        ValueError: a dense mask without a tensor, or another one with it.
    """

    kind: Kind
    allowed: jax.Array | None = None

    def __post_init__(self) -> None:
        if (self.kind == "dense") != (self.allowed is not None):
            raise ValueError(f"kind = {self.kind!r}: a dense mask, and no other, has a tensor of who is allowed")


CAUSAL = Mask("causal")
FULL = Mask("full")


def as_mask(mask: Mask | jax.Array) -> Mask:
    """A mask, as it is; a tensor as a dense one."""
    return mask if isinstance(mask, Mask) else Mask("dense", mask)


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
