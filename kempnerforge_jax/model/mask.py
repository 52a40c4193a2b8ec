"""Which keys each query may attend to.

Shapes: B batch, H heads, S queries, M keys.

    mask (rows: new tokens at positions 2, 3, 4; columns: keys at positions 0 ... 4)

        causal        window=3      documents 0 0 1 1 1     prefix of 4
        1 1 1 0 0     1 1 1 0 0     0 0 1 0 0               1 1 1 1 0
        1 1 1 1 0     0 1 1 1 0     0 0 1 1 0               1 1 1 1 0
        1 1 1 1 1     0 0 1 1 1     0 0 1 1 1               1 1 1 1 1
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Integer


class Tokens(NamedTuple):
    """Facts of tokens, in tensors of any shape; None: nothing is said.

    Attributes:
        position: int.
        doc_id: int, its document.
        valid: bool, False where there is nothing to see; of keys.
        prefix: int, how many positions the prefix of its row has; of queries.
    """

    position: Int[Array, "..."] | None
    doc_id: Integer[Array, "..."] | None
    valid: Bool[Array, "..."] | None = None
    prefix: Int[Array, "..."] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """A mask in one tensor, as products of all queries with all keys need it.

    Attributes:
        allowed: bool, broadcasts to (B, H, S, M), True = attend. Rows of ``empty`` are True throughout: a softmax
            needs a key.
        empty: bool, broadcasts to (B, H, S, 1), the queries that see no key; None: there are none.
    """

    allowed: Bool[Array, "..."]
    empty: Bool[Array, "..."] | None


class Spans(NamedTuple):
    """Parts of sequences, N at most in each; -1: there is no such part.

    Attributes:
        starts: int32 (B, N), the first position of each.
        counts: int32 (B, N), how many positions it has.
    """

    starts: Int[Array, "B N"]
    counts: Int[Array, "B N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """A mask as segments of whole sequences, as packed kernels take them: the queries of a segment see its keys, as far
    as causality and a window allow.

    Attributes:
        queries, keys: of each segment; they start together if it is causal.
        seeing: bool (B, S), the queries that are in a segment; None: all are.
        seen: bool (B, S), the keys that are in a segment; None: all are.
        way: int32 (), the first of the kernel's programs that has as many segments; beyond the last: none, or these do
            not say all that the mask says.
    """

    queries: Spans
    keys: Spans
    seeing: Bool[Array, "B S"] | None
    seen: Bool[Array, "B S"] | None
    way: Int[Array, ""]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query_positions",
        "key_positions",
        "query_doc_ids",
        "key_doc_ids",
        "key_valid",
        "prefix_lengths",
        "allowed",
        "dense",
        "fused",
    ],
    meta_fields=["causal", "window"],
)
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
        prefix_lengths: int (B,), how many of the first positions of each row see each other, whatever ``causal`` and
            ``window`` say (a prefix LM, Raffel et al. 2020, arXiv:1910.10683); None: none do.
        allowed: bool, broadcasts to (B, H, S, M), True = attend: what no other fact can say; None: nothing to add.
        dense: all these facts in one tensor, shared by the layers of a forward; None until `with_dense` has made it.
        fused: all these facts as the kernel of `fused` takes them, shared likewise.

    Raises:
        ValueError: documents of queries without those of keys, or the reverse; a prefix without causality.
    """

    causal: bool = False
    window: int | None = None
    query_positions: Int[Array, "... S"] | None = None
    key_positions: Int[Array, "... M"] | None = None
    query_doc_ids: Integer[Array, "B S"] | None = None
    key_doc_ids: Integer[Array, "B M"] | None = None
    key_valid: Bool[Array, "B M"] | None = None
    prefix_lengths: Int[Array, "B"] | None = None
    allowed: Bool[Array, "..."] | None = None
    dense: Dense | None = None
    fused: Segments | None = None

    def __post_init__(self) -> None:
        if (self.query_doc_ids is None) != (self.key_doc_ids is None):
            missing, given = ("query", "key") if self.query_doc_ids is None else ("key", "query")
            raise ValueError(f"{missing}_doc_ids = None: must be given, as {given}_doc_ids are")
        if self.prefix_lengths is not None and not self.causal:
            raise ValueError("prefix_lengths is given: must be None unless causal = True")

    @property
    def of_keys_alone(self) -> bool:
        """Whether all queries see the same keys, whatever ``allowed`` says."""
        return not self.causal and self.window is None and self.query_doc_ids is None

    @property
    def of_tokens(self) -> bool:
        """Whether all it says are facts of tokens: ``allowed`` says nothing."""
        return self.allowed is None

    @property
    def in_order(self) -> bool:
        """Whether it is `of_tokens`, keys are at positions 0 ... M - 1 and the queries are the last of them."""
        return self.of_tokens and self.query_positions is None and self.key_positions is None


CAUSAL = Mask(causal=True)
FULL = Mask()


def as_mask(mask: Mask | Bool[Array, "..."]) -> Mask:
    """A mask, as it is; a tensor as what it allows."""
    return mask if isinstance(mask, Mask) else Mask(allowed=mask)


def sees(query: Tokens, key: Tokens, causal: bool, window: int | None) -> Bool[Array, "..."] | None:
    """Whether queries see keys: what the facts of two tokens say, which broadcast against each other; None: nothing.

    Every form of a mask is made of this: the dense one, and those of kernels.
    """
    terms = []
    if causal:
        assert query.position is not None
        assert key.position is not None
        terms.append(key.position <= query.position)
    if window is not None:
        assert query.position is not None
        assert key.position is not None
        terms.append(key.position > query.position - window)
    if query.prefix is not None:
        assert query.position is not None
        assert key.position is not None
        both_in_prefix = (query.position < query.prefix) & (key.position < query.prefix)
        terms = [functools.reduce(operator.and_, terms) | both_in_prefix]
    if query.doc_id is not None:
        terms.append(query.doc_id == key.doc_id)
    terms += [key.valid] if key.valid is not None else []
    return functools.reduce(operator.and_, terms) if terms else None


def dense_mask(mask: Mask, queries: int, keys: int) -> Bool[Array, "..."]:
    """The facts of a mask for these numbers of queries and keys, in one tensor: bool, broadcasts to (B, H, S, M), True
    = attend.

    Only the reference path of attention needs it.
    """
    mask = with_positions(mask, queries, keys)

    def rows(facts: Array | None) -> Array | None:
        return None if facts is None else facts.reshape(-1, 1, queries, 1)

    def columns(facts: Array | None) -> Array | None:
        return None if facts is None else facts.reshape(-1, 1, 1, keys)

    prefix = None if mask.prefix_lengths is None else mask.prefix_lengths.reshape(-1, 1, 1, 1)
    query = Tokens(rows(mask.query_positions), rows(mask.query_doc_ids), prefix=prefix)
    key = Tokens(columns(mask.key_positions), columns(mask.key_doc_ids), columns(mask.key_valid))
    terms = [term for term in (sees(query, key, mask.causal, mask.window), mask.allowed) if term is not None]
    if not terms:
        return jnp.ones((1, 1, 1, keys), jnp.bool_)
    return functools.reduce(operator.and_, terms)


def with_positions(mask: Mask, queries: int, keys: int) -> Mask:
    """The mask with the positions that it means, where it asks for any."""
    if not mask.causal and mask.window is None:
        return mask
    query_positions, key_positions = mask.query_positions, mask.key_positions
    if query_positions is None:
        query_positions = jnp.arange(keys - queries, keys, dtype=jnp.int32)
    if key_positions is None:
        key_positions = jnp.arange(keys, dtype=jnp.int32)
    return replace(mask, query_positions=query_positions, key_positions=key_positions)


def part(mask: Mask, query: int | Int[Array, ""], queries: int, key: int | Int[Array, ""], keys: int) -> Mask:
    """The mask of ``queries`` queries from ``query`` on and ``keys`` keys from ``key`` on, of one `with_positions`."""

    def some(facts: Array | None, start: int | Int[Array, ""], length: int, axis: int = -1) -> Array | None:
        if facts is None or facts.ndim < -axis or facts.shape[axis] == 1:
            return facts
        return lax.dynamic_slice_in_dim(facts, start, length, axis)

    return replace(
        mask,
        query_positions=some(mask.query_positions, query, queries),
        key_positions=some(mask.key_positions, key, keys),
        query_doc_ids=some(mask.query_doc_ids, query, queries),
        key_doc_ids=some(mask.key_doc_ids, key, keys),
        key_valid=some(mask.key_valid, key, keys),
        allowed=some(some(mask.allowed, query, queries, -2), key, keys),
        dense=None,
        fused=None,
    )


def with_dense(mask: Mask, queries: int, keys: int) -> Mask:
    """The mask with its dense form for these numbers of queries and keys."""
    if mask.dense is not None:
        return mask
    allowed = dense_mask(mask, queries, keys)
    if _each_sees_its_own_key(mask, queries, keys):
        return replace(mask, dense=Dense(allowed, None))
    empty = ~allowed.any(axis=-1, keepdims=True)
    return replace(mask, dense=Dense(allowed | empty, empty))


def _each_sees_its_own_key(mask: Mask, queries: int, keys: int) -> bool:
    """Whether every query is known to be among the keys and to see itself, whatever the tensors hold."""
    same_documents = mask.query_doc_ids is None or (mask.query_doc_ids is mask.key_doc_ids and queries == keys)
    wide_enough = mask.window is None or mask.window > 0
    return mask.in_order and queries <= keys and same_documents and wide_enough and mask.key_valid is None
