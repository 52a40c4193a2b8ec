"""Kinds of masks that attention meets, as facts in arrays: of 2 rows, at any length.

Shapes: S queries, M keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Facts = dict[str, Any]
ROWS = 2


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        facts: of a number of keys: the fields of a `Mask`, in arrays.
        segments: whether they are segments, of at most 128 documents: None where the kernel is told without.
        queries: how many there are of so many keys.
        is_fused: whether the kernel of JAX's GPUs takes them at all.
    """

    facts: Callable[[int], Facts]
    segments: bool | None = True
    queries: Callable[[int], int] = lambda keys: keys
    is_fused: bool = True


def documents(keys: int, most: int = 9) -> Facts:
    """Of uneven lengths, some of a single token; those of the second row in the reverse order of their numbers."""
    ids = np.sort(np.random.default_rng(0).integers(0, most, (ROWS, keys), dtype=np.int32), axis=1)
    ids[1] = most - ids[1]
    return {"query_doc_ids": ids, "key_doc_ids": ids}


def interleaved(keys: int) -> Facts:
    """Three documents, each in two or three pieces."""
    ids = np.tile(np.arange(keys, dtype=np.int32) // (keys // 7) % 3, (ROWS, 1))
    return {"query_doc_ids": ids, "key_doc_ids": ids}


def padding(keys: int, *, left: bool = False, gaps: bool = False) -> Facts:
    """Of the first row a third at its end, or its start; of the second nothing, or a token here and there."""
    real = np.ones((ROWS, keys), bool)
    real[0, : keys // 3] = not left
    real[0, keys - keys // 3 :] = left
    if gaps:
        real[1, 3::5] = False
    return {"key_valid": real}


def padded_documents(keys: int) -> Facts:
    """Each of which ends in padding, and one is nothing else."""
    facts = documents(keys, 4)
    ids = facts["key_doc_ids"]
    real = np.concatenate([ids[:, 3:] == ids[:, :-3], np.zeros((ROWS, 3), bool)], axis=1) & (ids != 2)
    return {**facts, "key_valid": real}


def causal(facts: Callable[[int], Facts], window: Callable[[int], int] | None = None) -> Callable[[int], Facts]:
    return lambda keys: {"causal": True, "window": None if window is None else window(keys), **facts(keys)}


def nothing(_: int) -> Facts:
    return {}


def third(keys: int) -> int:
    return keys // 3


def last_queries(keys: int) -> Facts:
    """Those of the second half of a sequence."""
    ids = documents(keys, 5)["key_doc_ids"]
    return {"query_doc_ids": ids[:, keys // 2 :], "key_doc_ids": ids}


def later_part(keys: int) -> Facts:
    """The second half of a sequence in two parts, whose positions are given."""
    return {"query_positions": np.arange(keys // 2, keys, dtype=np.int32), **last_queries(keys)}


def prefix(keys: int) -> Facts:
    """Of the first row more than half, of the second a few."""
    return {"prefix_lengths": np.array([keys // 2 + 3, 5], np.int32)}


def padded_prefix(keys: int) -> Facts:
    """With padding before what is real."""
    return {**prefix(keys), **padding(keys, left=True)}


KINDS = {
    "causal": Kind(causal(nothing), None),
    "all to all": Kind(nothing, None),
    "a window": Kind(causal(nothing, third), None),
    "a window of two": Kind(causal(nothing, lambda _: 2), None),
    "documents": Kind(causal(documents)),
    "documents, all to all": Kind(documents),
    "interleaved documents": Kind(causal(interleaved), False),
    "many documents": Kind(causal(lambda keys: documents(keys, keys // 3)), False),
    "documents in a window": Kind(causal(documents, lambda keys: keys // 20)),
    "padding": Kind(causal(padding)),
    "padding, all to all": Kind(padding),
    "padding at the left, all to all": Kind(lambda keys: padding(keys, left=True)),
    "a window of all that follow": Kind(lambda keys: {"window": third(keys)}, None, is_fused=False),
    "padding at the left": Kind(causal(lambda keys: padding(keys, left=True))),
    "padding, in a window": Kind(causal(padding, lambda keys: keys // 5)),
    "padding inside": Kind(causal(lambda keys: padding(keys, gaps=True)), False),
    "padded documents": Kind(causal(padded_documents)),
    "padded documents in a window": Kind(causal(padded_documents, lambda keys: keys // 9)),
    "the last of documents, in a window": Kind(
        causal(last_queries, third), queries=lambda keys: keys - keys // 2, is_fused=False
    ),
    "the later part of documents": Kind(causal(later_part), queries=lambda keys: keys - keys // 2, is_fused=False),
    "a prefix": Kind(causal(prefix), None, is_fused=False),
    "a prefix, in a window": Kind(causal(prefix, lambda keys: keys // 9), None, is_fused=False),
    "a padded prefix": Kind(causal(padded_prefix), None, is_fused=False),
    "the end of a prefix": Kind(causal(prefix), None, queries=lambda keys: keys - keys // 2, is_fused=False),
    "queries from before the first key": Kind(
        causal(nothing, third), None, queries=lambda keys: keys + keys // 3, is_fused=False
    ),
}


def mask_of(side: Any, facts: Facts) -> Any:
    """The mask of a backend; documents of queries that are those of keys are one array."""
    arrays = {name: side.array(value) for name, value in facts.items() if isinstance(value, np.ndarray)}
    if facts.get("query_doc_ids") is facts.get("key_doc_ids") and "key_doc_ids" in facts:
        arrays["query_doc_ids"] = arrays["key_doc_ids"]
    return side.module("model.mask").Mask(**{**facts, **arrays})


def seen_by(facts: Facts, queries: int, keys: int) -> np.ndarray:
    """bool (2, S, M): which keys each query sees by these facts."""
    query = facts.get("query_positions", np.arange(keys - queries, keys))[:, None]
    key, seen = np.arange(keys), np.ones((ROWS, queries, keys), bool)
    if facts.get("causal"):
        seen &= query >= key
    if facts.get("window") is not None:
        seen &= query - key < facts["window"]
    if "prefix_lengths" in facts:
        seen |= np.maximum(query, key) < facts["prefix_lengths"][:, None, None]
    if "key_doc_ids" in facts:
        seen &= facts["query_doc_ids"][:, :, None] == facts["key_doc_ids"][:, None]
    if "key_valid" in facts:
        seen &= facts["key_valid"][:, None]
    return seen
