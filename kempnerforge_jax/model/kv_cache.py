"""Keys and values of the tokens seen so far: the memory of decoding.

Shapes: B batch, S new tokens, M keys (cached and new), K key/value heads, h head_dim, R rows to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.model.decode_state import DecodeState, new_state
from kempnerforge_jax.model.mask import Mask


class KVCache:
    """Keys and values of the tokens seen so far, one layer's. A value: what changes it returns the new cache.

    Each row fills its own slots from 0; the slot of a token is its position. Keys are stored after RoPE, before head
    expansion. Where documents or padding were given, the cache remembers them for the tokens to come. Shapes never
    follow the fill, so that one compiled step serves every position.

    With a sliding window the slots are a ring, in which a token overwrites one that no later token may see.

    Several layers may share a state; `SharedCaches` holds it once.

    Attributes:
        k, v: (B, K, slots, h).
        state: how far decoding is: the `DecodeState` whose ``lengths``, ``valid``, ``doc_ids``, ``oldest``,
            ``image_tokens`` and ``max_seq_len`` are those of the cache.
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike | None = None,
        device: Device | None = None,
        *,
        sliding_window: int | None = None,
        spare: int = 0,
        state: DecodeState | None = None,
    ):
        """
        Args:
            sliding_window: hold ``sliding_window + spare`` tokens of a row instead of ``max_seq_len``, if that is less.
            spare: up to ``spare + 1`` tokens of a row can be truncated, or read at once without a copy of the ring.
            state: of another cache of the same sizes.
        """
        if state is None:
            state = new_state(batch_size, max_seq_len, device, sliding_window=sliding_window, spare=spare)
        self.state = state
        shape = (batch_size, n_kv_heads, state.policy.count, head_dim)
        self.k = jnp.zeros(shape, dtype or jnp.float32, device=device)
        self.v = jnp.zeros(shape, dtype or jnp.float32, device=device)

    @property
    def lengths(self) -> Int[Array, "B"]:
        """int32 (B,), tokens seen by each row."""
        return self.state.lengths

    @property
    def valid(self) -> Bool[Array, "B slots"] | None:
        """bool (B, slots), or None while every token was real."""
        return self.state.valid

    @property
    def doc_ids(self) -> Integer[Array, "B slots"] | None:
        """int (B, slots), or None while no documents were given."""
        return self.state.doc_ids

    @property
    def oldest(self) -> Int[Array, "B"] | None:
        """int32 (B,), for a ring, the first position that has not been overwritten; else None."""
        return self.state.oldest

    @property
    def image_tokens(self) -> int:
        """How many of the first tokens were an image's."""
        return self.state.image_tokens

    @property
    def max_seq_len(self) -> int:
        """Maximum number of tokens per row."""
        return self.state.max_seq_len

    @property
    def slots(self) -> int:
        """Maximum number of tokens held per row."""
        return self.k.shape[2]

    @property
    def sliding_window(self) -> int | None:
        """For a ring, how many tokens each one may see; None where a slot is a position."""
        return self.state.policy.window

    @property
    def seq_len(self) -> int:
        """Length of the longest row; outside jit only."""
        return self.state.seq_len

    def positions(self, length: int) -> Int[Array, "... S"]:
        """Positions of the next ``length`` tokens: (B, S)."""
        return self.state.positions(length)

    def keys(self, length: int) -> int:
        """How many keys `update` returns for ``length`` more tokens."""
        return self.state.keys(length)

    def reserve(self, length: int) -> None:
        """Check that ``length`` more tokens fit.

        Raises:
            ValueError: if they don't. Inside jit lengths can't be seen; there the output of `Attention` is NaN for the
                tokens past the end.
        """
        self.state.reserve(length)

    def update(
        self,
        k_new: Float[Array, "B K S h"],
        v_new: Float[Array, "B K S h"],
        *,
        doc_ids: Integer[Array, "B S"] | None = None,
        key_padding_mask: Bool[Array, "B S"] | None = None,
    ) -> tuple[KVCache, Float[Array, "B K M h"], Float[Array, "B K M h"]]:
        """Append ``S`` tokens to every row.

        Args:
            k_new, v_new: (B, K, S, h).
            doc_ids: int (B, S), of the new tokens; needed once it was given.
            key_padding_mask: bool (B, S), True where a new token is real; all are if None.

        Returns:
            the new cache; k, v: (B, K, M, h), every slot. Those of a ring come in no order, and where the new tokens
            would overwrite each other's, before the new ones.

        Raises:
            ValueError: past the end of the cache (see `reserve`), or documents missing.
        """
        length = k_new.shape[2]
        self.state.reserve(length)
        k, k_BKMh = self.state.append(self.k, k_new)
        v, v_BKMh = self.state.append(self.v, v_new)
        return self._replace(k=k, v=v, state=self.state.advance(length, doc_ids, key_padding_mask)), k_BKMh, v_BKMh

    def truncate(self, lengths: Integer[Array, "B"]) -> KVCache:
        """Forget, in each row, what lies at or beyond its new length (the padding at the end of a ragged prompt).

        Args:
            lengths: int (B,); where it exceeds the length so far, nothing is forgotten.

        Raises:
            ValueError: lengths that are negative, not integers, or not one per row; a ring has overwritten what the
                next token may see. Inside jit this can't be seen; there the row is full from then on.
        """
        return self._replace(state=self.state.truncate(lengths))

    def without_padding(self) -> KVCache:
        """The same cache with all remaining tokens treated as real, after the padding was truncated."""
        return self._replace(state=self.state.without_padding())

    def after_image(self, tokens: int) -> KVCache:
        """The same cache, knowing that its first ``tokens`` were an image's."""
        return self._replace(state=replace(self.state, image_tokens=max(self.state.image_tokens, tokens)))

    def reorder(self, rows: Integer[Array, "R"]) -> KVCache:
        """Replace the rows, as a beam search does: row i becomes what ``rows[i]`` was.

        Args:
            rows: int (R,); a row may be taken several times, or not at all.

        Raises:
            ValueError: rows that are not integers, or that don't exist. Inside jit this can't be seen; there such a row
                is full from then on.
        """
        rows = self.state.checked_rows(rows)
        return self._replace(k=self.k[rows], v=self.v[rows], state=self.state.reorder(rows))

    def mask(
        self,
        length: int,
        *,
        doc_ids: Integer[Array, "B S"] | None = None,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        sliding_window: int | None = None,
        prefix_lengths: Int[Array, "B"] | None = None,
    ) -> Mask:
        """Which of the keys that `update` will return the next ``length`` tokens may see.

        Raises:
            ValueError: a window that a ring does not hold.
        """
        return self.state.mask(
            length,
            doc_ids=doc_ids,
            key_padding_mask=key_padding_mask,
            sliding_window=sliding_window,
            prefix_lengths=prefix_lengths,
        )

    def _replace(self, **parts: Any) -> KVCache:
        return _cache_of(**{"k": self.k, "v": self.v, "state": self.state, **parts})


class SharedCaches(NamedTuple):
    """Caches of all layers, those with the same slots with one state, as no buffer can be donated twice.

    Attributes:
        states: of those with the same slots.
        layers: the same of keys and values, (B, K, slots, h), by layer.
    """

    states: list[DecodeState]
    layers: list[dict[int, tuple[Float[Array, "B K slots h"], Float[Array, "B K slots h"]]]]

    @classmethod
    def of(cls, caches: Sequence[KVCache]) -> SharedCaches:
        """Caches of the same tokens, one per layer."""
        states = {cache.state.policy: cache.state for cache in caches}
        layers = [
            {layer: (cache.k, cache.v) for layer, cache in enumerate(caches) if cache.state.policy == policy}
            for policy in states
        ]
        return cls(list(states.values()), layers)

    def each(self) -> list[KVCache]:
        """The cache of each layer."""
        shared = zip(self.states, self.layers, strict=True)
        caches = {layer: _cache_of(*kv, state) for state, layers in shared for layer, kv in layers.items()}
        return [caches[layer] for layer in range(len(caches))]


def new_caches(
    windows: Sequence[int | None],
    batch_size: int,
    max_seq_len: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike | None = None,
    device: Device | None = None,
    *,
    spare: int = 0,
) -> list[KVCache]:
    """Empty caches of layers with these windows, of which those of one window share a state.

    Args:
        batch_size, max_seq_len, n_kv_heads, head_dim, dtype, device, spare: as for `KVCache`.
    """
    shape = (batch_size, max_seq_len, n_kv_heads, head_dim)
    states = {
        window: new_state(batch_size, max_seq_len, device, sliding_window=window, spare=spare) for window in windows
    }
    return [KVCache(*shape, dtype, device, state=states[window]) for window in windows]


def _cache_of(k: Any, v: Any, state: Any) -> KVCache:
    cache = object.__new__(KVCache)
    cache.k, cache.v, cache.state = k, v, state
    return cache


jax.tree_util.register_pytree_with_keys(
    KVCache,
    lambda cache: ([(jax.tree_util.GetAttrKey(name), getattr(cache, name)) for name in ("k", "v", "state")], None),
    lambda _, parts: _cache_of(*parts),
)
