"""What the caches of all layers have in common: how far each row is, and what its tokens are.

Shapes: B batch, S new tokens, M keys (cached and new), K key/value heads, h head_dim, R rows to keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int, Integer, Shaped
from torch import Tensor

from kempnerforge_torch.model.checks import MAX_ID, check_ids, check_shape, wide
from kempnerforge_torch.model.mask import Mask
from kempnerforge_torch.model.slots import Slots, slots_for


@dataclass(eq=False)
class DecodeState:
    """How far decoding is: one for all layers, or one per cache.

    Attributes:
        lengths: int32 (B,), tokens seen by each row, which is the position of its next token.
        valid: bool (B, slots), or None while every token was real.
        doc_ids: int (B, slots), or None while no documents were given. Tokens written before are of document 0.
        oldest: int32 (B,), for a ring, the first position that has not been overwritten; else None.
        image_tokens: how many of the first tokens were an image's, where each modality counts its own positions.
        max_seq_len: maximum number of tokens per row.
        policy: which slot a token takes.
        static: if True, shapes don't follow the fill, and no number of the fill is kept on the host: keys are all
            slots, and what changes stays where it is in memory, so that one step, compiled or recorded, serves every
            position.
    """

    lengths: Int[Tensor, "B"]
    valid: Bool[Tensor, "B slots"] | None
    doc_ids: Integer[Tensor, "B slots"] | None
    oldest: Int[Tensor, "B"] | None
    image_tokens: int
    max_seq_len: int
    policy: Slots
    static: bool

    def __post_init__(self) -> None:
        self._max_length = 0  # no row is longer than this; unused if static
        self._rows_equal = not self.static  # all rows have length _max_length
        self._next_slots: tuple[int, Tensor] | None = None  # number and slots of the next tokens, for all layers

    @property
    def seq_len(self) -> int:
        """Length of the longest row, read from the device."""
        return self._max_length if self._rows_equal else int(self.lengths.max())

    def positions(self, length: int) -> Int[Tensor, "... S"]:
        """Positions of the next ``length`` tokens: (S,) where all rows are known to be equal, else (B, S)."""
        steps_S = torch.arange(length, device=self.lengths.device)
        return steps_S + self._max_length if self._rows_equal else self.lengths.long()[:, None] + steps_S

    def reserve(self, length: int) -> None:
        """Check that ``length`` more tokens fit.

        Raises:
            ValueError: if they don't. A static state can't be checked without waiting for the device; there the bounds
                check of the slots applies, or for a ring that of the rotary tables.
        """
        if self.static or self._max_length + length <= self.max_seq_len:
            return
        if self.seq_len + length > self.max_seq_len:
            raise ValueError(
                f"tokens = {length}: must fit in the cache, of whose max_seq_len = {self.max_seq_len} slots "
                f"{self.seq_len} are filled"
            )

    def check_documents(self, doc_ids: Integer[Tensor, "B S"] | None) -> None:
        """Check that new tokens (B, S) have documents if earlier ones did.

        Raises:
            ValueError: if they don't.
        """
        if self.doc_ids is not None and doc_ids is None:
            raise ValueError("doc_ids = None: the cache holds tokens of documents, so new tokens need theirs")

    def advance(
        self, length: int, doc_ids: Integer[Tensor, "B S"] | None, key_padding_mask: Bool[Tensor, "B S"] | None
    ) -> None:
        """Count ``length`` more tokens in every row, whose keys and values all layers now hold, with their (B, S)
        documents and which of them are real.
        """
        (documents, valid), _ = self._extended(length, doc_ids, key_padding_mask)
        self._next_slots = None
        self._assign(doc_ids=documents, valid=valid, lengths=self.lengths + length)
        if self.oldest is not None:
            self._assign(oldest=torch.maximum(self.oldest, self.lengths - self.policy.count))
        if not self.static:
            self._max_length = min(self._max_length + length, self.max_seq_len)

    def truncate(self, lengths: Integer[Tensor, "B"]) -> None:
        """Forget what lies at or beyond the new lengths (B,); see `KVCache.truncate`."""
        check_shape("lengths", lengths, self.lengths.shape)
        check_ids("lengths", lengths, MAX_ID)
        lengths = torch.minimum(self.lengths, lengths.to(self.lengths))
        if self.oldest is not None and bool((self.policy.first_seen(lengths) < self.oldest).any()):
            raise ValueError(
                f"lengths = {lengths.tolist()}: what they may see has been overwritten; of tokens seen since, at "
                f"most spare + 1 = {self.policy.spare + 1} can be forgotten"
            )
        self.lengths, self._rows_equal, self._next_slots = lengths, False, None

    def without_padding(self) -> None:
        """Treat all remaining tokens as real, after the padding was truncated."""
        self.valid = None

    def checked_rows(self, rows: Integer[Tensor, "R"]) -> Int[Tensor, "R"]:
        """Rows (R,) to keep, as int64.

        Raises:
            ValueError: rows that are not integers, or that don't exist. On an accelerator: an assertion of the device.
        """
        check_shape("rows", rows, (rows.numel(),))
        check_ids("rows", rows, len(self.lengths))
        return wide(rows)

    def reorder(self, rows: Int[Tensor, "R"]) -> None:
        """Replace the rows by these (R,), which are `checked_rows`; see `KVCache.reorder`."""
        self._next_slots = None
        for name in ("lengths", "valid", "doc_ids", "oldest"):
            old = getattr(self, name)
            setattr(self, name, None if old is None else old.index_select(0, rows))

    def mask(
        self,
        length: int,
        *,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        sliding_window: int | None = None,
        prefix_lengths: Int[Tensor, "B"] | None = None,
    ) -> Mask:
        """Which of the keys that `append` returns the next ``length`` tokens may see.

        Args:
            prefix_lengths: as for `Mask`; a prefix begins and ends within these tokens, or is over before them.

        Raises:
            ValueError: a window that a ring does not hold.
        """
        self.policy.check_window(sliding_window)
        _, (doc_ids_BM, valid_BM) = self._extended(length, doc_ids, key_padding_mask)
        mask = Mask(
            causal=True,
            window=sliding_window if sliding_window is not None and sliding_window < self.keys(length) else None,
            query_doc_ids=doc_ids,
            key_doc_ids=doc_ids_BM,
            key_valid=valid_BM,
            prefix_lengths=prefix_lengths,
        )
        if self._rows_equal and (self._in_order(length) or (mask.plain and length == 1)):
            return mask
        key_positions, held_BM = self._key_positions(length)
        if held_BM is not None:
            valid_BM = held_BM if valid_BM is None else valid_BM & held_BM
        return replace(mask, query_positions=self.positions(length), key_positions=key_positions, key_valid=valid_BM)

    def keys(self, length: int) -> int:
        """How many keys `append` returns for ``length`` more tokens."""
        return self._filled(length) if self.policy.fits(length) else self._filled(0) + length

    def append(self, slots: Shaped[Tensor, "B ..."], new: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "B ..."]:
        """Write ``new`` (B, S) or (B, K, S, h) into the next slots, in place; returns what the new tokens may see."""
        axis = 1 if slots.ndim == 2 else 2
        length = new.shape[axis]
        if self.policy.fits(length):
            self._write(slots, new, axis)
            return slots.narrow(axis, 0, self._filled(length))
        seen = torch.cat([slots.narrow(axis, 0, self._filled(0)), new.to(slots.dtype)], dim=axis)
        self._write(slots, new, axis)
        return seen

    def _in_order(self, length: int) -> bool:
        """Whether what `append` returns is at positions 0, 1, ... and ends with the new tokens, given rows of equal
        length.
        """
        return self.oldest is None or self._max_length == 0 or self._max_length + length <= self.policy.count

    def _key_positions(self, length: int) -> tuple[Tensor | None, Tensor | None]:
        """For a ring, the positions (B, M) of what `append` returns, and bool (B, M), which of them it holds; else
        None.
        """
        fits = self.policy.fits(length)
        written = length if fits else 0
        positions_BM = self.policy.positions(self._filled(written), self.lengths + written)
        if positions_BM is None or self.oldest is None:
            return None, None
        held_BM = positions_BM >= self.oldest[:, None]
        if fits:
            return positions_BM, held_BM
        new_BS = self.positions(length).expand(len(self.lengths), length)
        return torch.cat([positions_BM, new_BS], dim=1), torch.cat([held_BM, torch.ones_like(new_BS).bool()], dim=1)

    def _filled(self, length: int) -> int:
        """Slots that may hold something after ``length`` more tokens."""
        return self.policy.count if self.static else min(self._max_length + length, self.policy.count)

    def _extended(
        self, length: int, doc_ids: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        """`doc_ids` and `valid` extended by the next tokens, in new tensors; and those of the keys that these tokens
        may see.
        """
        shape = (len(self.lengths), self.policy.count)
        device = self.lengths.device
        self.check_documents(doc_ids)
        documents = valid = seen_documents = seen_valid = None
        if doc_ids is not None:
            first = torch.zeros(shape, dtype=torch.int64, device=device)
            documents = first if self.doc_ids is None else self.doc_ids.clone()
            seen_documents = self.append(documents, doc_ids)
        if self.valid is not None or key_padding_mask is not None:
            valid = torch.ones(shape, dtype=torch.bool, device=device) if self.valid is None else self.valid.clone()
            real_BS = torch.ones((shape[0], length), dtype=torch.bool, device=device)
            seen_valid = self.append(valid, real_BS if key_padding_mask is None else key_padding_mask)
        return (documents, valid), (seen_documents, seen_valid)

    def _assign(self, **values: Tensor | None) -> None:
        """Set attributes; those of a static state in place."""
        for name, value in values.items():
            old = getattr(self, name)
            if self.static and old is not None and value is not None:
                old.copy_(value)
            else:
                setattr(self, name, value)

    def _write(self, slots: Tensor, new: Tensor, axis: int) -> None:
        length = new.shape[axis]
        if self._rows_equal and self._max_length + length <= self.policy.count:
            slots.narrow(axis, self._max_length, length).copy_(new)
            return
        stored = self.policy.stored(length)
        targets, new = self._slots_of_next(length, stored), new.narrow(axis, length - stored, stored)
        rows_B1 = torch.arange(slots.shape[0], device=slots.device)[:, None]
        if axis == 1:
            slots[rows_B1, targets] = new.to(slots.dtype)
        else:  # through a view the compiler would write all slots anew
            heads_K1 = torch.arange(slots.shape[1], device=slots.device)[:, None]
            slots[rows_B1[..., None], heads_K1, targets.unsqueeze(-2)] = new.to(slots.dtype)

    def _slots_of_next(self, length: int, stored: int) -> Tensor:
        """Slots of those of the next ``length`` tokens that are stored, (S,) or (B, S)."""
        if self._next_slots is None or self._next_slots[0] != length:
            self._next_slots = length, self.policy.slots_of(self.positions(length)[..., length - stored :])
        return self._next_slots[1]


def new_state(
    batch_size: int,
    max_seq_len: int,
    device: torch.device | str | None = None,
    *,
    sliding_window: int | None = None,
    spare: int = 0,
    static: bool = False,
) -> DecodeState:
    """The state before the first token; arguments as for `KVCache`."""
    lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
    policy = slots_for(max_seq_len, sliding_window, spare)
    oldest = None if policy.window is None else torch.zeros_like(lengths)
    return DecodeState(lengths, None, None, oldest, 0, max_seq_len, policy, static)
