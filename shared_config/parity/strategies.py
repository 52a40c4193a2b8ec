"""Hypothesis strategies for what functions of a model are given: built so that they shrink, values from a seed.

Sizes avoid square matrices, sequences are at least 8 long, and lengths meet the edges of tiles: a wrong axis then has
the wrong shape, and a wrong edge is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from shared_config.contract.initialise import stream
from shared_config.parity.numerics import difference

EDGES = (127, 128, 129, 255, 256, 257)
"""Lengths around the edges of tiles and buckets."""
DTYPES = ("float64", "float32", "bfloat16")
LARGEST_SEED = 10**6

Cache = TypeVar("Cache")


class Heads(NamedTuple):
    """Of attention."""

    heads: int
    kv_heads: int
    head_dim: int


def seeds() -> st.SearchStrategy[int]:
    """Seeds of values."""
    return st.integers(0, LARGEST_SEED)


def dtypes() -> st.SearchStrategy[str]:
    """Names of arithmetics."""
    return st.sampled_from(DTYPES)


def lengths(shortest: int = 8, longest: int = 24, edges: bool = False) -> st.SearchStrategy[int]:
    """Lengths of sequences; with ``edges`` also those around the edges of tiles."""
    plain = st.integers(shortest, longest)
    return st.one_of(plain, st.sampled_from(EDGES)) if edges else plain


@st.composite
def heads(draw: st.DrawFn, most: int = 3) -> Heads:
    """Numbers of heads: groups of query heads for each key/value head, and an even size."""
    kv_heads, group = draw(st.integers(1, most)), draw(st.integers(1, most))
    return Heads(kv_heads * group, kv_heads, draw(st.sampled_from([4, 6, 10])))


@st.composite
def shapes(draw: st.DrawFn, ndim: int = 2, smallest: int = 2, largest: int = 12) -> tuple[int, ...]:
    """Shapes whose sizes are all different."""
    sizes = st.integers(smallest, largest)
    return tuple(draw(st.lists(sizes, min_size=ndim, max_size=ndim, unique=True)))


@st.composite
def arrays(draw: st.DrawFn, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """float32 values of a normal distribution, which bfloat16 holds exactly."""
    values = scale * stream(draw(seeds()), "values").standard_normal(tuple(shape))
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@st.composite
def tokens(draw: st.DrawFn, batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Token ids (B, S), int32."""
    return stream(draw(seeds()), "tokens").integers(0, vocabulary, (batch, length), dtype=np.int32)


@st.composite
def ties(draw: st.DrawFn, shape: Sequence[int], values: int = 3) -> np.ndarray:
    """float32 of few different values, so that top-k and argmax meet equal ones."""
    return stream(draw(seeds()), "ties").integers(0, values, tuple(shape)).astype(np.float32)


def documents(batch: int, length: int) -> st.SearchStrategy[np.ndarray]:
    """Document ids (B, S), int32: each row cut at drawn places."""
    cuts = st.lists(st.booleans(), min_size=length, max_size=length).map(np.cumsum)
    return st.lists(cuts, min_size=batch, max_size=batch).map(lambda rows: np.stack(rows).astype(np.int32))


def masks(batch: int, length: int) -> st.SearchStrategy[np.ndarray]:
    """Validity (B, S), bool: padding at the left, at the right, or anywhere, so that some rows see nothing."""
    left = st.integers(0, length).map(lambda n: np.arange(length) >= n)
    right = st.integers(0, length).map(lambda n: np.arange(length) < n)
    anywhere = st.lists(st.booleans(), min_size=length, max_size=length).map(lambda row: np.array(row, dtype=bool))
    rows = st.one_of(left, right, anywhere)
    return st.lists(rows, min_size=batch, max_size=batch).map(np.stack)


def chunkings(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Sizes of pieces that are ``length`` together."""
    cuts = st.sets(st.integers(1, max(1, length - 1))).map(
        lambda places: sorted(place for place in places if place < length)
    )
    return cuts.map(lambda places: tuple(int(n) for n in np.diff([0, *places, length])))


@st.composite
def weights(draw: st.DrawFn, table: Mapping[str, Sequence[int]], fan_in: int = -1) -> dict[str, np.ndarray]:
    """Weights by name, float32: matrices of standard deviation 1 / sqrt(fan-in), norm weights between 0.5 and 1.5,
    biases that are not 0. Values of each come from one seed and its name.

    Args:
        table: name -> shape. What is called "norm" and has one axis is a norm weight, unless it is a bias.
        fan_in: axis of the inputs of a matrix.
    """
    seed = draw(seeds())
    return {name: weight(name, shape, seed, fan_in) for name, shape in table.items()}


def weight(name: str, shape: Sequence[int], seed: int, fan_in: int = -1) -> np.ndarray:
    """One weight, as `weights` draws it."""
    rng, shape = stream(seed, name), tuple(shape)
    if len(shape) == 1 and "norm" in name and not name.endswith("bias"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) < 2:
        return (rng.choice([-1, 1], shape) * rng.uniform(0.1, 1.0, shape)).astype(np.float32)
    return (rng.standard_normal(shape) / np.sqrt(shape[fan_in])).astype(np.float32)


def cache_machine(
    full: Callable[[np.ndarray], np.ndarray],
    start: Callable[[int], Cache],
    append: Callable[[Cache, np.ndarray], tuple[np.ndarray, Cache]],
    *,
    batch: int = 2,
    longest: int = 24,
    vocabulary: int = 16,
    tolerance: float = 1e-12,
    copy: Callable[[Cache], Cache] = lambda cache: cache,
) -> type[RuleBasedStateMachine]:
    """A stateful test of a cache: whatever is appended to it, in whatever pieces, is what the full function gives.

    Its `TestCase` is what pytest collects: ``TestCache = cache_machine(...).TestCase``.

    Args:
        full: token ids (B, S) -> outputs (B, S, ...).
        start: batch size -> an empty cache.
        append: cache, token ids (B, n) -> outputs (B, n, ...) and the cache after them.
        tolerance: largest relative error; 1e-12 is for float64.
        copy: a cache that does not change with the first; needed where ``append`` writes to the one that it is given.
    """

    class CacheMachine(RuleBasedStateMachine):
        """Tokens, and a cache that has seen them."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.cache = np.zeros((batch, 0), np.int32), start(batch)

        @rule(tokens=tokens(batch, 5, vocabulary), count=st.integers(1, 5))
        def append_some(self, tokens: np.ndarray, count: int) -> None:
            """Append tokens; their outputs must be those of the full function."""
            new, seen = tokens[:, : min(count, longest - self.tokens.shape[1])], self.tokens.shape[1]
            if not new.shape[1]:
                return
            outputs, self.cache = append(self.cache, new)
            self.tokens = np.concatenate([self.tokens, new], axis=1)
            found = difference(outputs, np.asarray(full(self.tokens))[:, seen:])
            assert found.relative_error <= tolerance, f"after {seen} tokens, {new.shape[1]} more: {found.where()}"

        @rule(tokens=tokens(batch, 2, vocabulary))
        def branch(self, tokens: np.ndarray) -> None:
            """Append tokens and forget them: the cache that was there before must not have changed."""
            before = copy(self.cache)
            if self.tokens.shape[1] + 2 <= longest:
                append(self.cache, tokens)
                self.cache = before

    return CacheMachine
