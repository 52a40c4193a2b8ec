"""Keys and values of the tokens seen so far: the memory of decoding.

Shapes: B batch, S new tokens, M keys (cached and new), K key/value heads, h head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kempnerforge_torch.model.checks import MAX_ID, check_ids, check_shape, wide
from kempnerforge_torch.model.mask import CAUSAL, Mask, build_mask


class KVCache:
    """Keys and values of the tokens seen so far, one layer's. `update` writes in place.

    Each row fills its own slots from 0; the slot of a token is its position. Keys are stored after RoPE, before head
    expansion. Where documents or padding were given, the cache remembers them for the tokens to come.

    With a sliding window the slots are a ring, in which a token takes the place of one that none of the later may see:

        window 3, spare 1, 6 tokens seen        slot     0 1 2 3
                                                holds    4 5 2 3

    Attributes:
        k, v: (B, K, slots, h).
        lengths: int32 (B,), tokens seen by each row, which is the position of its next token.
        valid: bool (B, slots), or None while every token was real.
        doc_ids: int (B, slots), or None while no documents were given. Tokens written before are of document 0.
        image_tokens: how many of the first tokens were an image's, where modalities count their positions apart.
        max_seq_len: tokens of a row, at most.
        sliding_window: of a ring, how many tokens each one may see; None where a slot is a position.
        oldest: int32 (B,), of a ring, the first position that has not been overwritten; else None.
        static: if True, shapes don't follow the fill, and no number of the fill is kept on the host: `update` returns
            all slots, and what it changes stays where it is in memory, so that one step, compiled or recorded, serves
            every position.
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
    ):
        """
        Args:
            sliding_window: hold ``sliding_window + spare`` tokens of a row instead of ``max_seq_len``, if that is less.
            spare: so many tokens of a row, and one, may be forgotten again, or read at once without a copy of the ring.
        """
        slots = max_seq_len if sliding_window is None else min(max_seq_len, sliding_window + spare)
        shape = (batch_size, n_kv_heads, slots, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.valid: Tensor | None = None
        self.doc_ids: Tensor | None = None
        self.image_tokens = 0
        self.max_seq_len = max_seq_len
        self.sliding_window = sliding_window if slots < max_seq_len else None
        self.oldest = None if self.sliding_window is None else torch.zeros_like(self.lengths)
        self.static = static
        self._most = 0  # no row is longer than this, and all layers hold the same number; unused if static
        self._even = not static  # all rows have length _most

    @property
    def slots(self) -> int:
        """Tokens of a row that are held, at most."""
        return self.k.shape[2]

    @property
    def seq_len(self) -> int:
        """Length of the longest row, read from the device."""
        return self._most if self._even else int(self.lengths.max())

    def positions(self, length: int) -> Tensor:
        """Positions of the next ``length`` tokens: (S,) where all rows are known to be equal, else (B, S)."""
        steps_S = torch.arange(length, device=self.lengths.device)
        return steps_S + self._most if self._even else self.lengths.long()[:, None] + steps_S

    def reserve(self, length: int) -> None:
        """Check that ``length`` more tokens fit.

        Raises:
            ValueError: if they don't. A static cache can't be asked without waiting for the device, whose bounds check
                is that of the slots, or for a ring that of the rotary tables.
        """
        if self.static or self._most + length <= self.max_seq_len:
            return
        if self.seq_len + length > self.max_seq_len:
            raise ValueError(
                f"tokens = {length}: must fit in the cache, of whose max_seq_len = {self.max_seq_len} slots "
                f"{self.seq_len} are filled"
            )

    def update(
        self,
        k_new: Tensor,
        v_new: Tensor,
        *,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
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
        self.reserve(length)
        (documents, valid), _ = self._noted(length, doc_ids, key_padding_mask)
        self._take(doc_ids=documents, valid=valid)
        k_BKMh, v_BKMh = self._append(self.k, k_new), self._append(self.v, v_new)
        self._take(lengths=self.lengths + length)
        if self.oldest is not None:
            self._take(oldest=torch.maximum(self.oldest, self.lengths - self.slots))
        if not self.static:
            self._most = min(self._most + length, self.max_seq_len)
        return k_BKMh, v_BKMh

    def cut(self, lengths: Tensor) -> None:
        """Forget, in each row, what lies at or beyond its new length (the padding at the end of a ragged prompt).

        Args:
            lengths: int (B,); where it exceeds the length so far, nothing is forgotten.

        Raises:
            ValueError: lengths that are negative, no integers, or not one per row; a ring has overwritten what the next
                token may see.
        """
        check_shape("lengths", lengths, self.lengths.shape)
        check_ids("lengths", lengths, MAX_ID)
        lengths = torch.minimum(self.lengths, lengths.to(self.lengths))
        if self.sliding_window is not None and self.oldest is not None:
            first_seen_B = (lengths + 1 - self.sliding_window).clamp(min=0)
            if bool((first_seen_B < self.oldest).any()):
                raise ValueError(
                    f"lengths = {lengths.tolist()}: what they may see has been overwritten; of tokens seen since, at "
                    f"most spare + 1 = {self.slots - self.sliding_window + 1} can be forgotten"
                )
        self.lengths, self._even = lengths, False

    def without_padding(self) -> None:
        """Take every token that is left for real, after the padding was cut."""
        self.valid = None

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows in place of those so far, as a beam search does: row i becomes what ``rows[i]`` was.

        Args:
            rows: int (B',); a row may be taken several times, or not at all.

        Raises:
            ValueError: rows that are no integers, or that don't exist. On an accelerator: an assertion of the device.
        """
        check_shape("rows", rows, (rows.numel(),))
        check_ids("rows", rows, len(self.lengths))
        rows = wide(rows)
        for name in ("k", "v", "lengths", "valid", "doc_ids", "oldest"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.index_select(0, rows))

    def mask(
        self,
        length: int,
        *,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        sliding_window: int | None = None,
    ) -> Mask:
        """Who the next ``length`` tokens may see of what `update` will return.

        Raises:
            ValueError: a window that a ring does not hold.
        """
        if self.sliding_window is not None and not 0 < (sliding_window or 0) <= self.sliding_window:
            raise ValueError(f"sliding_window = {sliding_window}: must be at most the cache's, {self.sliding_window}")
        _, (doc_ids_BM, valid_BM) = self._noted(length, doc_ids, key_padding_mask)
        keys = self._filled(length) if self._fits(length) else self._filled(0) + length
        windowed = sliding_window is not None and sliding_window < keys
        aligned = self._even and (self._most == 0 or length == 1)
        if aligned and doc_ids_BM is None and valid_BM is None and not windowed:
            return CAUSAL
        key_positions, held = self._key_positions(length)
        if held is not None:
            valid_BM = held if valid_BM is None else valid_BM & held
        allowed = build_mask(
            self.positions(length),
            key_positions,
            query_doc_ids=doc_ids,
            key_doc_ids=doc_ids_BM,
            key_valid=valid_BM,
            sliding_window=sliding_window if windowed else None,
        )
        return Mask("dense", allowed)

    def _key_positions(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Positions of what `update` will return: (M,), or of a ring (B, M), and bool (B, M) which of them it holds."""
        if self.oldest is None:
            return torch.arange(self._filled(length), device=self.k.device), None
        fits = self._fits(length)
        slots_M = torch.arange(self._filled(length if fits else 0), device=self.k.device)
        last_B1 = (self.lengths + (length if fits else 0)).long()[:, None] - 1
        positions_BM = last_B1 - (last_B1 - slots_M) % self.slots
        held_BM = positions_BM >= self.oldest[:, None]
        if fits:
            return positions_BM, held_BM
        new_BS = self.positions(length).expand(len(self.k), length)
        return torch.cat([positions_BM, new_BS], dim=1), torch.cat([held_BM, torch.ones_like(new_BS).bool()], dim=1)

    def _filled(self, length: int) -> int:
        """Slots that may hold something after ``length`` more tokens."""
        return self.slots if self.static else min(self._most + length, self.slots)

    def _fits(self, length: int) -> bool:
        """Whether so many tokens overwrite nothing that one of them may see."""
        return self.sliding_window is None or length <= self.slots - self.sliding_window + 1

    def _noted(
        self, length: int, doc_ids: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        """`doc_ids` and `valid` with the next tokens' entries, in new tensors; and of what these tokens may see."""
        shape = (len(self.k), self.slots)
        device = self.k.device
        if self.doc_ids is not None and doc_ids is None:
            raise ValueError("doc_ids = None: the cache holds tokens of documents, so new tokens need theirs")
        documents = valid = seen_documents = seen_valid = None
        if doc_ids is not None:
            first = torch.zeros(shape, dtype=torch.int64, device=device)
            documents = first if self.doc_ids is None else self.doc_ids.clone()
            seen_documents = self._append(documents, doc_ids)
        if self.valid is not None or key_padding_mask is not None:
            valid = torch.ones(shape, dtype=torch.bool, device=device) if self.valid is None else self.valid.clone()
            real = torch.ones((shape[0], length), dtype=torch.bool, device=device)
            seen_valid = self._append(valid, real if key_padding_mask is None else key_padding_mask)
        return (documents, valid), (seen_documents, seen_valid)

    def _take(self, **values: Tensor | None) -> None:
        """Set attributes, those of a static cache in the memory of what they were."""
        for name, value in values.items():
            held = getattr(self, name)
            if self.static and held is not None and value is not None:
                held.copy_(value)
            else:
                setattr(self, name, value)

    def _append(self, slots: Tensor, new: Tensor) -> Tensor:
        """Put ``new`` (B, S) or (B, K, S, h) into the next slots; gives what the new tokens may see."""
        axis = 1 if slots.ndim == 2 else 2
        length = new.shape[axis]
        if self._fits(length):
            self._write(slots, new, axis)
            return slots.narrow(axis, 0, self._filled(length))
        seen = torch.cat([slots.narrow(axis, 0, self._filled(0)), new.to(slots.dtype)], dim=axis)
        self._write(slots, new, axis)
        return seen

    def _write(self, slots: Tensor, new: Tensor, axis: int) -> None:
        length = new.shape[axis]
        if self._even and self._most + length <= self.slots:
            slots.narrow(axis, self._most, length).copy_(new)
            return
        places = self.positions(length)
        if self.sliding_window is not None:  # of more tokens than slots the last remain
            kept = min(length, self.slots)
            places, new = places[..., length - kept :] % self.slots, new.narrow(axis, length - kept, kept)
        rows_B1 = torch.arange(slots.shape[0], device=slots.device)[:, None]
        slots.transpose(1, axis)[rows_B1, places] = new.transpose(1, axis).to(slots.dtype)
