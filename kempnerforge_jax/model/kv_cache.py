"""Keys and values of the tokens seen so far: the memory of decoding.

Shapes: B batch, S new tokens, M keys (cached and new), K key/value heads, h head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kempnerforge_jax.model.checks import MAX_ID, check_ids, check_shape, wide
from kempnerforge_jax.model.mask import Mask, build_mask

ARRAYS = ("k", "v", "lengths", "valid", "doc_ids", "oldest")
STATIC = ("image_tokens", "max_seq_len", "sliding_window")


@jax.tree_util.register_pytree_with_keys_class
class KVCache:
    """Keys and values of the tokens seen so far, one layer's. A value: what changes it returns the new cache.

    Each row fills its own slots from 0; the slot of a token is its position. Keys are stored after RoPE, before head
    expansion. Where documents or padding were given, the cache remembers them for the tokens to come. Shapes never
    follow the fill, so that one compiled step serves every position.

    With a sliding window the slots are a ring, in which a token takes the place of one that none of the later may see:

        window 3, spare 1, 6 tokens seen        slot     0 1 2 3
                                                holds    4 5 2 3

    Attributes:
        k, v: (B, K, slots, h).
        lengths: int32 (B,), tokens seen by each row, which is the position of its next token.
        valid: bool (B, slots), or None while every token was real.
        doc_ids: int (B, slots), or None while no documents were given. Tokens written before are of document 0.
        image_tokens: how many of the first tokens were an image's, where modalities count their positions apart;
            static.
        max_seq_len: tokens of a row, at most; static.
        sliding_window: of a ring, how many tokens each one may see; None where a slot is a position; static.
        oldest: int32 (B,), of a ring, the first position that has not been overwritten; else None.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    valid: jax.Array | None
    doc_ids: jax.Array | None
    image_tokens: int
    max_seq_len: int
    sliding_window: int | None
    oldest: jax.Array | None

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: Any = None,
        device: Any = None,
        *,
        sliding_window: int | None = None,
        spare: int = 0,
    ):
        """
        Args:
            sliding_window: hold ``sliding_window + spare`` tokens of a row instead of ``max_seq_len``, if that is less.
            spare: so many tokens of a row, and one, may be forgotten again, or read at once without a copy of the ring.
        """
        slots = max_seq_len if sliding_window is None else min(max_seq_len, sliding_window + spare)
        shape = (batch_size, n_kv_heads, slots, head_dim)
        self.k = jnp.zeros(shape, dtype or jnp.float32, device=device)
        self.v = jnp.zeros(shape, dtype or jnp.float32, device=device)
        self.lengths = jnp.zeros(batch_size, jnp.int32, device=device)
        self.valid = None
        self.doc_ids = None
        self.image_tokens = 0
        self.max_seq_len = max_seq_len
        self.sliding_window = sliding_window if slots < max_seq_len else None
        self.oldest = None if self.sliding_window is None else jnp.zeros_like(self.lengths)

    @property
    def slots(self) -> int:
        """Tokens of a row that are held, at most."""
        return self.k.shape[2]

    @property
    def seq_len(self) -> int:
        """Length of the longest row; outside jit only."""
        return int(self.lengths.max())

    def positions(self, length: int) -> jax.Array:
        """Positions of the next ``length`` tokens: (B, S)."""
        return self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)

    def reserve(self, length: int) -> None:
        """Check that ``length`` more tokens fit.

        Raises:
            ValueError: if they don't. Inside jit lengths can't be seen; there the output of `Attention` is NaN for the
                tokens past the end.
        """
        if isinstance(self.lengths, Tracer):
            return
        if self.seq_len + length > self.max_seq_len:
            raise ValueError(
                f"tokens = {length}: must fit in the cache, of whose max_seq_len = {self.max_seq_len} slots "
                f"{self.seq_len} are filled"
            )

    def update(
        self,
        k_new: jax.Array,
        v_new: jax.Array,
        *,
        doc_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
    ) -> tuple[KVCache, jax.Array, jax.Array]:
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
        self.reserve(length)
        (doc_ids, valid), _ = self._noted(length, doc_ids, key_padding_mask)
        k, k_BKMh = self._appended(self.k, k_new)
        v, v_BKMh = self._appended(self.v, v_new)
        lengths = self.lengths + length
        oldest = None if self.oldest is None else jnp.maximum(self.oldest, lengths - self.slots)
        cache = self._replace(k=k, v=v, lengths=lengths, valid=valid, doc_ids=doc_ids, oldest=oldest)
        return cache, k_BKMh, v_BKMh

    def cut(self, lengths: jax.Array) -> KVCache:
        """Forget, in each row, what lies at or beyond its new length (the padding at the end of a ragged prompt).

        Args:
            lengths: int (B,); where it exceeds the length so far, nothing is forgotten.

        Raises:
            ValueError: lengths that are negative, no integers, or not one per row; a ring has overwritten what the next
                token may see. Inside jit this can't be seen; there the row is full from then on.
        """
        check_shape("lengths", lengths, self.lengths.shape)
        check_ids("lengths", lengths, MAX_ID)
        lengths = jnp.minimum(self.lengths, lengths.astype(jnp.int32))
        if self.sliding_window is not None and self.oldest is not None:
            lost_B = jnp.maximum(lengths + 1 - self.sliding_window, 0) < self.oldest
            if not isinstance(lost_B, Tracer) and bool(lost_B.any()):
                raise ValueError(
                    f"lengths = {lengths.tolist()}: what they may see has been overwritten; of tokens seen since, at "
                    f"most spare + 1 = {self.slots - self.sliding_window + 1} can be forgotten"
                )
            lengths = jnp.where(lost_B, self.max_seq_len, lengths)
        return self._replace(lengths=lengths)

    def without_padding(self) -> KVCache:
        """The same cache, which takes every token that is left for real, after the padding was cut."""
        return self._replace(valid=None)

    def reorder(self, rows: jax.Array) -> KVCache:
        """Go on with these rows in place of those so far, as a beam search does: row i becomes what ``rows[i]`` was.

        Args:
            rows: int (B',); a row may be taken several times, or not at all.

        Raises:
            ValueError: rows that are no integers, or that don't exist. Inside jit this can't be seen; there such a row
                is full from then on.
        """
        check_shape("rows", rows, (rows.size,))
        check_ids("rows", rows, len(self.lengths))
        rows = wide(rows)
        exists_B = (rows >= 0) & (rows < len(self.lengths))
        held = {name: getattr(self, name) for name in ARRAYS}
        taken = {name: None if array is None else array[rows] for name, array in held.items()}
        taken["lengths"] = jnp.where(exists_B, self.lengths[rows], self.max_seq_len)
        return self._replace(**taken)

    def mask(
        self,
        length: int,
        *,
        doc_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        sliding_window: int | None = None,
    ) -> Mask:
        """Who the next ``length`` tokens may see of what `update` will return.

        Raises:
            ValueError: a window that a ring does not hold.
        """
        if self.sliding_window is not None and not 0 < (sliding_window or 0) <= self.sliding_window:
            raise ValueError(f"sliding_window = {sliding_window}: must be at most the cache's, {self.sliding_window}")
        _, (doc_ids_BM, valid_BM) = self._noted(length, doc_ids, key_padding_mask)
        key_positions, held = self._key_positions(length)
        if held is not None:
            valid_BM = held if valid_BM is None else valid_BM & held
        allowed = build_mask(
            self.positions(length),
            key_positions,
            query_doc_ids=doc_ids,
            key_doc_ids=doc_ids_BM,
            key_valid=valid_BM,
            sliding_window=sliding_window,
        )
        return Mask("dense", allowed)

    def _key_positions(self, length: int) -> tuple[jax.Array, jax.Array | None]:
        """Positions of what `update` will return: (M,), or of a ring (B, M), and bool (B, M) which of them it holds."""
        slots_M = jnp.arange(self.slots, dtype=jnp.int32)
        if self.oldest is None:
            return slots_M, None
        fits = self._fits(length)
        last_B1 = self.lengths[:, None] + (length if fits else 0) - 1
        positions_BM = last_B1 - (last_B1 - slots_M) % self.slots
        held_BM = positions_BM >= self.oldest[:, None]
        if fits:
            return positions_BM, held_BM
        new_BS = self.positions(length)
        return (
            jnp.concatenate([positions_BM, new_BS], axis=1),
            jnp.concatenate([held_BM, jnp.ones_like(new_BS, jnp.bool_)], axis=1),
        )

    def _fits(self, length: int) -> bool:
        """Whether so many tokens overwrite nothing that one of them may see."""
        return self.sliding_window is None or length <= self.slots - self.sliding_window + 1

    def _noted(
        self, length: int, doc_ids: jax.Array | None, key_padding_mask: jax.Array | None
    ) -> tuple[tuple[jax.Array | None, jax.Array | None], tuple[jax.Array | None, jax.Array | None]]:
        """`doc_ids` and `valid` with the next tokens' entries; and of what these tokens may see."""
        shape = (len(self.k), self.slots)
        if self.doc_ids is not None and doc_ids is None:
            raise ValueError("doc_ids = None: the cache holds tokens of documents, so new tokens need theirs")
        documents = valid = seen_documents = seen_valid = None
        if doc_ids is not None:
            documents = jnp.zeros(shape, wide(doc_ids).dtype) if self.doc_ids is None else self.doc_ids
            documents, seen_documents = self._appended(documents, doc_ids)
        if self.valid is not None or key_padding_mask is not None:
            valid = jnp.ones(shape, jnp.bool_) if self.valid is None else self.valid
            real = jnp.ones((shape[0], length), jnp.bool_)
            valid, seen_valid = self._appended(valid, real if key_padding_mask is None else key_padding_mask)
        return (documents, valid), (seen_documents, seen_valid)

    def _appended(self, slots: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slots with ``new`` (B, S) or (B, K, S, h) in the next ones, and what the new tokens may see."""
        axis = 1 if slots.ndim == 2 else 2
        written = self._write(slots, new, axis)
        if self._fits(new.shape[axis]):
            return written, written
        return written, jnp.concatenate([slots, new.astype(slots.dtype)], axis=axis)

    def _write(self, slots: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        """What lies past the end is dropped: a clamp would overwrite the last slots."""
        length = new.shape[axis]
        places = self.positions(length)
        if self.sliding_window is not None:  # of more tokens than slots the last remain
            kept = min(length, self.slots)
            places, new = places[:, length - kept :], jnp.take(new, jnp.arange(length - kept, length), axis=axis)
            places = jnp.where(places < self.max_seq_len, places % self.slots, self.slots)
        rows_B1 = jnp.arange(slots.shape[0])[:, None]
        place = slots.at[rows_B1, places] if axis == 1 else slots.at[rows_B1, :, places]
        return place.set(new.swapaxes(1, axis).astype(slots.dtype), mode="drop")

    def after_image(self, tokens: int) -> KVCache:
        """The same cache, knowing that its first ``tokens`` were an image's."""
        cache = self._replace()
        cache.image_tokens = tokens
        return cache

    def _replace(self, **arrays: jax.Array | None) -> KVCache:
        (_, static), held = self.tree_flatten_with_keys(), {name: getattr(self, name) for name in ARRAYS}
        return self.tree_unflatten(static, [{**held, **arrays}[name] for name in ARRAYS])

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The arrays are the leaves."""
        leaves = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ARRAYS]
        return leaves, tuple(getattr(self, name) for name in STATIC)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> KVCache:
        """A cache of these arrays."""
        cache = object.__new__(cls)
        for name, value in (*zip(ARRAYS, arrays, strict=True), *zip(STATIC, static, strict=True)):
            setattr(cache, name, value)
        return cache
