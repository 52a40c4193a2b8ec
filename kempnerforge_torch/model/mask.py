"""Which keys each query may attend to.

Shapes: B batch, H heads, S queries, M keys.

    mask (rows: new tokens at positions 2, 3, 4; columns: keys at positions 0 ... 4)

        causal        window=3      documents 0 0 1 1 1
        1 1 1 0 0     1 1 1 0 0     0 0 1 0 0
        1 1 1 1 0     0 1 1 1 0     0 0 1 1 0
        1 1 1 1 1     0 0 1 1 1     0 0 1 1 1
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """A mask in one tensor, as products of all queries with all keys need it.

    Attributes:
        allowed: bool, broadcasts to (B, H, S, M), True = attend. Rows of ``empty`` are True throughout: a softmax
            needs a key.
        empty: bool, broadcasts to (B, H, S, 1), the queries that see no key; None: there are none.
    """

    allowed: Bool[Tensor, "..."]
    empty: Bool[Tensor, "..."] | None


@dataclass(frozen=True)
class Mask:
    """Which keys each query may attend to, as facts from which a kernel is chosen. A key is visible if no fact forbids
    it.

    Attributes:
        causal: a query at position p sees no key after p.
        window: it sees no key at p - window or before; None: no limit.
        query_positions: int (S,) or (B, S); None: M - S ... M - 1, the queries are the last of the keys.
        key_positions: int (M,) or (B, M), in any order; None: 0 ... M - 1.
        query_doc_ids, key_doc_ids: int (B, S) and (B, M): a query sees the keys of its own document; None: of all.
        key_valid: bool (B, M), False where there is nothing to see, as in padding or in unfilled slots; None: all real.
        allowed: bool, broadcasts to (B, H, S, M), True = attend: what no other fact can say; None: nothing to add.
        dense: all these facts in one tensor, shared by the layers of a forward; None until `with_dense` has made it.

    Raises:
        ValueError: documents of queries without those of keys, or the reverse.
    """

    causal: bool = False
    window: int | None = None
    query_positions: Int[Tensor, "... S"] | None = None
    key_positions: Int[Tensor, "... M"] | None = None
    query_doc_ids: Integer[Tensor, "B S"] | None = None
    key_doc_ids: Integer[Tensor, "B M"] | None = None
    key_valid: Bool[Tensor, "B M"] | None = None
    allowed: Bool[Tensor, "..."] | None = None
    dense: Dense | None = None

    def __post_init__(self) -> None:
        if (self.query_doc_ids is None) != (self.key_doc_ids is None):
            missing, given = ("query", "key") if self.query_doc_ids is None else ("key", "query")
            raise ValueError(f"{missing}_doc_ids = None: must be given, as {given}_doc_ids are")

    @property
    def plain(self) -> bool:
        """Whether ``causal`` is the only fact."""
        return (
            self.window is None
            and self.query_positions is None
            and self.key_positions is None
            and self.query_doc_ids is None
            and self.key_valid is None
            and self.allowed is None
        )


CAUSAL = Mask(causal=True)
FULL = Mask()


def as_mask(mask: Mask | Bool[Tensor, "..."]) -> Mask:
    """A mask, as it is; a tensor as what it allows."""
    return mask if isinstance(mask, Mask) else Mask(allowed=mask)


def dense_mask(mask: Mask, queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, "..."]:
    """The facts of a mask for these numbers of queries and keys, in one tensor: bool, broadcasts to (B, H, S, M), True
    = attend.

    Only the reference path of attention needs it.
    """
    terms = []
    if mask.causal or mask.window is not None:
        query_positions, key_positions = mask.query_positions, mask.key_positions
        if query_positions is None:
            query_positions = torch.arange(keys - queries, keys, device=device)
        if key_positions is None:
            key_positions = torch.arange(keys, device=device)
        query, key = query_positions[..., :, None], key_positions[..., None, :]
        if mask.causal:
            terms.append(key <= query)
        if mask.window is not None:
            terms.append(key > query - mask.window)
    if mask.query_doc_ids is not None and mask.key_doc_ids is not None:
        terms.append(mask.query_doc_ids[:, :, None] == mask.key_doc_ids[:, None, :])
    if mask.key_valid is not None:
        terms.append(mask.key_valid[:, None, :])
    terms = [term[:, None] if term.ndim == 3 else term[None, None] for term in terms]
    if mask.allowed is not None:
        terms.append(mask.allowed)
    if not terms:
        return torch.ones((1, 1, 1, keys), dtype=torch.bool, device=device)
    return functools.reduce(operator.and_, terms)


def with_dense(mask: Mask, queries: int, keys: int, device: torch.device | None = None) -> Mask:
    """The mask with its dense form for these numbers of queries and keys."""
    if mask.dense is not None:
        return mask
    allowed = dense_mask(mask, queries, keys, device)
    if _each_sees_its_own_key(mask, queries, keys):
        return replace(mask, dense=Dense(allowed, None))
    empty = ~allowed.any(dim=-1, keepdim=True)
    return replace(mask, dense=Dense(allowed | empty, empty))


def _each_sees_its_own_key(mask: Mask, queries: int, keys: int) -> bool:
    """Whether every query is known to be among the keys and to see itself, whatever the tensors hold."""
    in_order = mask.query_positions is None and mask.key_positions is None and queries <= keys
    same_documents = mask.query_doc_ids is None or (mask.query_doc_ids is mask.key_doc_ids and queries == keys)
    wide_enough = mask.window is None or mask.window > 0
    return in_order and same_documents and wide_enough and mask.key_valid is None and mask.allowed is None
