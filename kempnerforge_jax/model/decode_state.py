"""What the caches of all layers have in common: how far each row is, and what its tokens are.

Shapes: B batch, S new tokens, M keys (cached and new), K key/value heads, h head_dim, R rows to keep.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Integer, Shaped

from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.model.checks import MAX_ID, check_ids, check_shape, wide
from kempnerforge_jax.model.mask import Mask
from kempnerforge_jax.model.slots import Slots, slots_for


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "valid", "doc_ids", "oldest"],
    meta_fields=["image_tokens", "max_seq_len", "policy"],
)
@dataclass(frozen=True)
class DecodeState:
    """How far decoding is: one for all layers, or one per cache. A value: what changes it returns the new state.

    Attributes:
        lengths: int32 (B,), tokens seen by each row, which is the position of its next token.
        valid: bool (B, slots), or None while every token was real.
        doc_ids: int (B, slots), or None while no documents were given. Tokens written before are of document 0.
        oldest: int32 (B,), for a ring, the first position that has not been overwritten; else None.
        image_tokens: how many of the first tokens were an image's, where each modality counts its own positions.
        max_seq_len: maximum number of tokens per row.
        policy: which slot a token takes.
    """

    lengths: Int[Array, "B"]
    valid: Bool[Array, "B slots"] | None
    doc_ids: Integer[Array, "B slots"] | None
    oldest: Int[Array, "B"] | None
    image_tokens: int
    max_seq_len: int
    policy: Slots

    @property
    def seq_len(self) -> int:
        """Length of the longest row; outside jit only."""
        return int(self.lengths.max())

    def positions(self, length: int) -> Int[Array, "... S"]:
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

    def check_documents(self, doc_ids: Integer[Array, "B S"] | None) -> None:
        """Check that new tokens (B, S) have documents if earlier ones did.

        Raises:
            ValueError: if they don't.
        """
        if self.doc_ids is not None and doc_ids is None:
            raise ValueError("doc_ids = None: the cache holds tokens of documents, so new tokens need theirs")

    def advance(
        self, length: int, doc_ids: Integer[Array, "B S"] | None, key_padding_mask: Bool[Array, "B S"] | None
    ) -> DecodeState:
        """Count ``length`` more tokens in every row, whose keys and values all layers now hold, with their (B, S)
        documents and which of them are real.
        """
        (documents, valid), _ = self._extended(length, doc_ids, key_padding_mask)
        lengths = self.lengths + length
        oldest = None if self.oldest is None else jnp.maximum(self.oldest, lengths - self.policy.count)
        return replace(self, lengths=lengths, valid=valid, doc_ids=documents, oldest=oldest)

    def truncate(self, lengths: Integer[Array, "B"]) -> DecodeState:
        """Forget what lies at or beyond the new lengths (B,); see `KVCache.truncate`."""
        check_shape("lengths", lengths, self.lengths.shape)
        check_ids("lengths", lengths, MAX_ID)
        lengths = jnp.minimum(self.lengths, lengths.astype(jnp.int32))
        if self.oldest is not None:
            overwritten_B = self.policy.first_seen(lengths) < self.oldest
            if not isinstance(overwritten_B, Tracer) and bool(overwritten_B.any()):
                raise ValueError(
                    f"lengths = {lengths.tolist()}: what they may see has been overwritten; of tokens seen since, at "
                    f"most spare + 1 = {self.policy.spare + 1} can be forgotten"
                )
            lengths = jnp.where(overwritten_B, self.max_seq_len, lengths)
        return replace(self, lengths=lengths)

    def without_padding(self) -> DecodeState:
        """Treat all remaining tokens as real, after the padding was truncated."""
        return replace(self, valid=None)

    def checked_rows(self, rows: Integer[Array, "R"]) -> Int[Array, "R"]:
        """Rows (R,) to keep, as int64 where JAX has it.

        Raises:
            ValueError: rows that are not integers, or that don't exist. Inside jit the latter can't be seen.
        """
        check_shape("rows", rows, (rows.size,))
        check_ids("rows", rows, len(self.lengths))
        return wide(rows)

    def reorder(self, rows: Int[Array, "R"]) -> DecodeState:
        """Replace the rows by these (R,), which are `checked_rows`; see `KVCache.reorder`."""
        exists_B = (rows >= 0) & (rows < len(self.lengths))
        old = {name: getattr(self, name) for name in ("valid", "doc_ids", "oldest")}
        new = {name: None if array is None else array[rows] for name, array in old.items()}
        return replace(self, lengths=jnp.where(exists_B, self.lengths[rows], self.max_seq_len), **new)

    def mask(
        self,
        length: int,
        *,
        doc_ids: Integer[Array, "B S"] | None = None,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        sliding_window: int | None = None,
        prefix_lengths: Int[Array, "B"] | None = None,
    ) -> Mask:
        """Which of the keys that `append` returns the next ``length`` tokens may see.

        Args:
            prefix_lengths: as for `Mask`; a prefix begins and ends within these tokens, or is over before them.

        Raises:
            ValueError: a window that a ring does not hold.
        """
        self.policy.check_window(sliding_window)
        _, (doc_ids_BM, valid_BM) = self._extended(length, doc_ids, key_padding_mask)
        key_positions, held_BM = self._key_positions(length)
        if held_BM is not None:
            valid_BM = held_BM if valid_BM is None else valid_BM & held_BM
        return Mask(
            causal=True,
            window=sliding_window if sliding_window is not None and sliding_window < self.keys(length) else None,
            query_positions=self.positions(length),
            key_positions=key_positions,
            query_doc_ids=doc_ids,
            key_doc_ids=doc_ids_BM,
            key_valid=valid_BM,
            prefix_lengths=prefix_lengths,
        )

    def keys(self, length: int) -> int:
        """How many keys `append` returns for ``length`` more tokens."""
        return self.policy.count if self.policy.fits(length) else self.policy.count + length

    def append(
        self, slots: Shaped[Array, "B ..."], new: Shaped[Array, "B ..."]
    ) -> tuple[Shaped[Array, "B ..."], Shaped[Array, "B ..."]]:
        """Slots with ``new`` (B, S) or (B, K, S, h) in the next ones, and what the new tokens may see."""
        axis = 1 if slots.ndim == 2 else 2
        written = self._write(slots, new, axis)
        if self.policy.fits(new.shape[axis]):
            return written, written
        return written, jnp.concatenate([slots, new.astype(slots.dtype)], axis=axis)

    def _key_positions(self, length: int) -> tuple[jax.Array | None, jax.Array | None]:
        """For a ring, the positions (B, M) of what `append` returns, and bool (B, M), which of them it holds; else
        None.
        """
        fits = self.policy.fits(length)
        positions_BM = self.policy.positions(self.policy.count, self.lengths + (length if fits else 0))
        if positions_BM is None or self.oldest is None:
            return None, None
        held_BM = positions_BM >= self.oldest[:, None]
        if fits:
            return positions_BM, held_BM
        new_BS = self.positions(length)
        return (
            jnp.concatenate([positions_BM, new_BS], axis=1),
            jnp.concatenate([held_BM, jnp.ones_like(new_BS, jnp.bool_)], axis=1),
        )

    def _extended(
        self, length: int, doc_ids: jax.Array | None, key_padding_mask: jax.Array | None
    ) -> tuple[tuple[jax.Array | None, jax.Array | None], tuple[jax.Array | None, jax.Array | None]]:
        """`doc_ids` and `valid` extended by the next tokens; and those of the keys that these tokens may see."""
        shape = (len(self.lengths), self.policy.count)
        self.check_documents(doc_ids)
        documents = valid = seen_documents = seen_valid = None
        if doc_ids is not None:
            documents = jnp.zeros(shape, wide(doc_ids).dtype) if self.doc_ids is None else self.doc_ids
            documents, seen_documents = self.append(documents, doc_ids)
        if self.valid is not None or key_padding_mask is not None:
            valid = jnp.ones(shape, jnp.bool_) if self.valid is None else self.valid
            real_BS = jnp.ones((shape[0], length), jnp.bool_)
            valid, seen_valid = self.append(valid, real_BS if key_padding_mask is None else key_padding_mask)
        return (documents, valid), (seen_documents, seen_valid)

    def _write(self, slots: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        """What lies past the end is dropped: a clamp would overwrite the last slots."""
        length = new.shape[axis]
        stored = self.policy.stored(length)
        positions = self.positions(length)[:, length - stored :]
        new = lax.slice_in_dim(new, length - stored, length, axis=axis)
        targets = jnp.where(positions < self.max_seq_len, self.policy.slots_of(positions), self.policy.count)
        rows_B1 = jnp.arange(slots.shape[0])[:, None]
        ref = slots.at[rows_B1, targets] if axis == 1 else slots.at[rows_B1, :, targets]
        return ref.set(new.swapaxes(1, axis).astype(slots.dtype), mode="drop")


def new_state(
    batch_size: int,
    max_seq_len: int,
    device: Device | None = None,
    *,
    sliding_window: int | None = None,
    spare: int = 0,
) -> DecodeState:
    """The state before the first token; arguments as for `KVCache`."""
    lengths = jnp.zeros(batch_size, jnp.int32, device=device)
    policy = slots_for(max_seq_len, sliding_window, spare)
    oldest = None if policy.window is None else jnp.zeros_like(lengths)
    return DecodeState(lengths, None, None, oldest, 0, max_seq_len, policy)
