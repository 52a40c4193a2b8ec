"""What the facts of a mask say, against one query and one key at a time; also those that caches give.

Shapes: B batch, S queries, M keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.oracle.mask import Token, dense, may_see
from tests.parity.backends import BACKENDS, Torch

KEYS = 5
SLOTS, WINDOW, SPARE = 16, 4, 2
RING = {"sliding_window": WINDOW, "spare": SPARE}
CACHES: dict[str, tuple[dict[str, Any], ...]] = {
    "torch": ({}, {"static": True}, RING, {**RING, "static": True}),
    "jax": ({}, RING),
}


def compare_facts(backend: Torch, queries: int, fields: Mapping[str, Any]) -> None:
    """The dense form of a mask of two rows with these fields, given as arrays, and its rows without a key."""
    masks = backend.module("model.mask")
    given = {name: backend.array(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    mask, seen = masks.Mask(**given), said(queries, fields)
    shape = (2, 1, queries, KEYS)
    found = backend.numpy(masks.dense_mask(mask, queries, KEYS))
    np.testing.assert_array_equal(np.broadcast_to(found, shape)[:, 0], seen)
    form, none = masks.with_dense(mask, queries, KEYS).dense, ~seen.any(-1, keepdims=True)
    empty = np.zeros(1, bool) if form.empty is None else backend.numpy(form.empty)
    np.testing.assert_array_equal(np.broadcast_to(empty, (2, 1, queries, 1))[:, 0], none)
    np.testing.assert_array_equal(np.broadcast_to(backend.numpy(form.allowed), shape)[:, 0], seen | none)


def said(queries: int, fields: Mapping[str, Any]) -> np.ndarray:
    """bool (2, S, M): who sees whom by these fields."""

    def tokens(side: str, default: np.ndarray, real: Any) -> list[list[Token]]:
        positions = np.broadcast_to(fields.get(f"{side}_positions", default), (2, len(default)))
        documents = fields.get(f"{side}_doc_ids", np.zeros_like(positions))
        valid = np.ones_like(positions, bool) if real is None else real
        rows = (np.stack([positions, documents, valid], axis=-1)).tolist()
        prefixes = fields.get("prefix_lengths", np.zeros(2, int)).tolist()
        return [
            [Token(position, document, bool(valid), prefix) for position, document, valid in row]
            for row, prefix in zip(rows, prefixes, strict=True)
        ]

    of_queries = tokens("query", np.arange(KEYS - queries, KEYS), None)
    of_keys = tokens("key", np.arange(KEYS), fields.get("key_valid"))
    seen = dense(of_queries, of_keys, causal=fields["causal"], window=fields["window"])
    return seen & fields["allowed"][:, 0] if "allowed" in fields else seen


@dataclass(frozen=True)
class Chunk:
    """Tokens (2, S) that follow in a cache.

    Attributes:
        forgotten: how many of the last ones each row then forgets.
    """

    documents: np.ndarray
    real: np.ndarray
    forgotten: tuple[int, int] = (0, 0)


def compare_cache(
    backend: Torch,
    options: Mapping[str, Any],
    chunks: Sequence[Chunk],
    window: int | None,
    prefix: tuple[int, int] | None = None,
) -> None:
    """Who the tokens of each chunk may see of the keys that the cache gives: documents and padding are those of the
    chunks, where any differ. Keys hold the number of their token, from 1 on.

    Args:
        prefix: of each row, within the first chunk; later single tokens are not told of it.
    """
    cache = backend.module("model.attention").KVCache(2, SLOTS, 1, 2, **options)
    dense_mask = backend.module("model.mask").dense_mask
    with_documents = any(chunk.documents.any() for chunk in chunks)
    rows: list[dict[int, Token]] = [{}, {}]
    count = 0
    for chunk in chunks:
        size = chunk.documents.shape[1]
        numbers = count + 1 + np.arange(2 * size).reshape(2, size)
        count += 2 * size
        new: list[list[Token]] = []
        for row, known in enumerate(rows):
            start = len(known)
            within = 0 if prefix is None else prefix[row]
            tokens = [
                Token(start + i, int(chunk.documents[row, i]), bool(chunk.real[row, i]), within) for i in range(size)
            ]
            known |= dict(zip(numbers[row].tolist(), tokens, strict=True))
            new.append(tokens)
        notes = {
            "doc_ids": backend.array(chunk.documents) if with_documents else None,
            "key_padding_mask": None if chunk.real.all() else backend.array(chunk.real),
        }
        is_told = prefix is not None and (size > 1 or count == 2 * size)
        prefixes = backend.array(np.array(prefix)) if is_told else None
        mask = cache.mask(size, sliding_window=window, prefix_lengths=prefixes, **notes)
        keys = backend.array(np.repeat(numbers[:, None, :, None], 2, axis=3).astype(np.float32))
        *updated, held, _ = cache.update(keys, keys, **notes)
        seen = backend.numpy(dense_mask(mask, size, held.shape[2]))
        cache, held = updated[0] if updated else cache, backend.numpy(held)[:, 0, :, 0].astype(int)
        for row, known in enumerate(rows):
            for query, token in enumerate(new[row]):
                expected = sorted(n for n, key in known.items() if may_see(token, key, causal=True, window=window))
                allowed = np.broadcast_to(seen, (2, 1, size, held.shape[1]))[row, 0, query]
                assert sorted(held[row][allowed].tolist()) == expected, (options, window, row, token)
        if any(chunk.forgotten):
            lengths = [len(known) - lost for known, lost in zip(rows, chunk.forgotten, strict=True)]
            cache = cache.truncate(backend.array(np.array(lengths))) or cache
            rows = [dict(list(known.items())[:length]) for known, length in zip(rows, lengths, strict=True)]


def drawn_fields(rng: np.random.Generator, given: int) -> tuple[int, dict[str, Any]]:
    """Queries, and fields of a mask: optional ones where ``given`` has a bit."""
    queries = int(rng.choice((1, 3, KEYS)))
    optional = {
        "query_positions": rng.integers(0, 8, (2, queries)),
        "key_positions": rng.integers(-1, 8, (2, KEYS)),
        "key_valid": rng.random((2, KEYS)) < 0.7,
        "allowed": rng.random((2, 1, queries, KEYS)) < 0.7,
    }
    fields = {name: value for place, (name, value) in enumerate(optional.items()) if given >> place & 1}
    if given >> 4 & 1:
        fields |= {"query_doc_ids": rng.integers(0, 2, (2, queries)), "key_doc_ids": rng.integers(0, 2, (2, KEYS))}
    if given >> 5 & 1:
        fields["prefix_lengths"] = rng.integers(0, 8, 2)
    causal = bool(rng.random() < 0.7) or "prefix_lengths" in fields
    return queries, {"causal": causal, "window": [None, 1, 3][rng.integers(3)], **fields}


def backend_of(name: str) -> Torch:
    return next(backend for backend in BACKENDS if backend.name == name)


def check_facts(name: str) -> None:
    """Every combination of facts."""
    rng = np.random.default_rng(5)
    for given in range(64):
        compare_facts(backend_of(name), *drawn_fields(rng, given))


def check_caches(name: str) -> None:
    """Ragged and padded prompts of several documents in chunks, single tokens, more than a ring has to spare."""
    rng = np.random.default_rng(6)
    none, ragged = [(0, 0)] * 5, [(0, 0), (1, 3), (0, 0), (0, 0), (0, 0)]
    for options in CACHES[name]:
        for documents, real, window, forgotten in ((1, 2.0, None, none), (2, 0.7, 3, ragged)):
            chunks = [
                Chunk(rng.integers(0, documents, (2, size)), rng.random((2, size)) < real, lost)
                for size, lost in zip((3, 3, 1, 2, 4), forgotten, strict=True)
            ]
            prefix = (3, 1) if real > 1 else None
            compare_cache(backend_of(name), options, chunks, window or options.get("sliding_window"), prefix)


MASK_CHECKS: dict[str, tuple[Callable[[str], None], ...]] = {
    "model.mask": (check_facts,),
    "model.decode_state": (check_caches,),
    "model.slots": (check_caches,),
}
