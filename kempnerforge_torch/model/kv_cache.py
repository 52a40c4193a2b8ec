"""Keys and values of the tokens seen so far: the memory of decoding.

Shapes: B batch, S new tokens, M keys (cached and new), K key/value heads, h head_dim, R rows to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from kempnerforge_torch.model.decode_state import DecodeState, new_state
from kempnerforge_torch.model.mask import Mask


class KVCache:
    """Keys and values of the tokens seen so far, one layer's. `update` writes in place.

    Each row fills its own slots from 0; the slot of a token is its position. Keys are stored after RoPE, before head
    expansion. Where documents or padding were given, the cache remembers them for the tokens to come.

    With a sliding window the slots are a ring, in which a token overwrites one that no later token may see.

    Several layers may share a state: the last of them to be updated owns it, and advances it; the others are made with
    ``state``.

    Attributes:
        k, v: (B, K, slots, h).
        state: how far decoding is: the `DecodeState` whose ``lengths``, ``valid``, ``doc_ids``, ``oldest``,
            ``image_tokens``, ``max_seq_len`` and ``static`` are those of the cache.
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        sliding_window: int | None = None,
        spare: int = 0,
        static: bool = False,
        state: DecodeState | None = None,
    ):
        """
        Args:
            sliding_window: hold ``sliding_window + spare`` tokens of a row instead of ``max_seq_len``, if that is less.
            spare: up to ``spare + 1`` tokens of a row can be truncated, or read at once without a copy of the ring.
            static: see `DecodeState`.
            state: of another cache of the same sizes, which owns it and is updated after this one.
        """
        self._owns_state = state is None
        if state is None:
            state = new_state(
                batch_size, max_seq_len, device, sliding_window=sliding_window, spare=spare, static=static
            )
        self.state = state
        shape = (batch_size, n_kv_heads, state.policy.count, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        """int32 (B,), tokens seen by each row."""
        return self.state.lengths

    @property
    def valid(self) -> Bool[Tensor, "B slots"] | None:
        """bool (B, slots), or None while every token was real."""
        return self.state.valid

    @property
    def doc_ids(self) -> Integer[Tensor, "B slots"] | None:
        """int (B, slots), or None while no documents were given."""
        return self.state.doc_ids

    @property
    def oldest(self) -> Int[Tensor, "B"] | None:
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
    def static(self) -> bool:
        """Whether shapes stay as they are, whatever the fill."""
        return self.state.static

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
        """Length of the longest row, read from the device."""
        return self.state.seq_len

    def positions(self, length: int) -> Int[Tensor, "... S"]:
        """Positions of the next ``length`` tokens: (S,) where all rows are known to be equal, else (B, S)."""
        return self.state.positions(length)

    def keys(self, length: int) -> int:
        """How many keys `update` returns for ``length`` more tokens."""
        return self.state.keys(length)

    def reserve(self, length: int) -> None:
        """Check that ``length`` more tokens fit.

        Raises:
            ValueError: if they don't, unless the cache is static.
        """
        self.state.reserve(length)

    def update(
        self,
        k_new: Float[Tensor, "B K S h"],
        v_new: Float[Tensor, "B K S h"],
        *,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B K M h"], Float[Tensor, "B K M h"]]:
        """Append ``S`` tokens to every row.

        Args:
            k_new, v_new: (B, K, S, h).
            doc_ids: int (B, S), of the new tokens; needed once it was given.
            key_padding_mask: bool (B, S), True where a new token is real; all are if None.

        Returns:
            k, v: (B, K, M, h), all that the new tokens may see, themselves included; every slot if static. Those of a
            ring come in no order, and where the new tokens would overwrite each other's, before the new ones.

        Raises:
            ValueError: past the end of the cache, or documents missing.
        """
        length = k_new.shape[2]
        self.state.reserve(length)
        self.state.check_documents(doc_ids)
        k_BKMh, v_BKMh = self.state.append(self.k, k_new), self.state.append(self.v, v_new)
        if self._owns_state:
            self.state.advance(length, doc_ids, key_padding_mask)
        return k_BKMh, v_BKMh

    def truncate(self, lengths: Integer[Tensor, "B"]) -> None:
        """Forget, in each row, what lies at or beyond its new length (the padding at the end of a ragged prompt).

        Args:
            lengths: int (B,); where it exceeds the length so far, nothing is forgotten.

        Raises:
            ValueError: lengths that are negative, not integers, or not one per row; a ring has overwritten what the
                next token may see.
        """
        self.state.truncate(lengths)

    def without_padding(self) -> None:
        """Treat all remaining tokens as real, after the padding was truncated."""
        self.state.without_padding()

    def after_image(self, tokens: int) -> None:
        """Note that the first ``tokens`` were an image's."""
        self.state.image_tokens = max(self.state.image_tokens, tokens)

    def reorder(self, rows: Integer[Tensor, "R"]) -> None:
        """Replace the rows, as a beam search does: row i becomes what ``rows[i]`` was. A shared state is reordered with
        the cache that owns it, the last one.

        Args:
            rows: int (R,); a row may be taken several times, or not at all.

        Raises:
            ValueError: rows that are not integers, or that don't exist. On an accelerator: an assertion of the device.
        """
        rows = self.state.checked_rows(rows)
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)
        if self._owns_state:
            self.state.reorder(rows)

    def mask(
        self,
        length: int,
        *,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        sliding_window: int | None = None,
        prefix_lengths: Int[Tensor, "B"] | None = None,
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


def new_caches(
    windows: Sequence[int | None],
    batch_size: int,
    max_seq_len: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    spare: int = 0,
    static: bool = False,
) -> list[KVCache]:
    """Empty caches of layers with these windows, of which those of one window share a state.

    Args:
        batch_size, max_seq_len, n_kv_heads, head_dim, dtype, device, spare, static: as for `KVCache`.
    """
    owners = {window: layer for layer, window in enumerate(windows)}  # the last of each window
    shape = (batch_size, max_seq_len, n_kv_heads, head_dim)
    owning = {
        window: KVCache(*shape, dtype, device, sliding_window=window, spare=spare, static=static) for window in owners
    }
    return [
        owning[window] if owners[window] == layer else KVCache(*shape, dtype, device, state=owning[window].state)
        for layer, window in enumerate(windows)
    ]
