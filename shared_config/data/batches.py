"""Batches of token windows by index: batch k is the same arrays on every backend, machine and library version.

Shapes: B rows of a batch on one rank, S positions of a row.

Window i of a stream predicts the ids i*S+1 ... i*S+S from those before them, so all windows together predict each id
once. An epoch visits the windows in its own order, a pseudo-random permutation computed index by index with integer
arithmetic (a Feistel network with cycle walking: Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), so it
needs no memory and draws from no generator whose stream a library may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from shared_config.contract.labels import IGNORED
from shared_config.contract.mixing import splitmix
from shared_config.data.corpus import Corpus, TokenStream
from shared_config.data.tokenizer import ByteTokenizer
from shared_config.errors import UserError

Batch = dict[str, np.ndarray]

ROUNDS = 8
COUNTED_AT_ONCE, COUNTED_IDS = 2**20, 2**26


class Enclosing(Protocol):
    """What `TextData` knows of the tokenizer that made its ids: one more than the largest of them, and which of them
    enclose a document; None if none does.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos(self) -> int | None:
        """What begins a document."""
        ...

    @property
    def eos(self) -> int | None:
        """What ends a document."""
        ...


class TextData:
    """Training batches by index, and a fixed set of held-out batches.

    Rows of all training batches form one sequence, epoch after epoch. Batch k of rank r takes the B rows from
    (k * world_size + r) * B on: the ranks' rows are disjoint and, in rank order, are batch k of one rank with B *
    world_size rows.

    Attributes:
        rows_per_batch: rows of a batch over all ranks.
        tokens_per_batch: positions of a batch over all ranks.
        windows: windows of an epoch.
        notes: what a user should know about the data, one line each.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
        tokenizer: Enclosing | None = None,
        pack_documents: bool = False,
        heldout_batch_size: int | None = None,
        heldout_steps: int = 8,
        text_mask: bool = False,
    ):
        """``text_mask``: also give which held-out positions are real, so that no padding is sent to experts.
        ``vocab_size`` bounds the ids and is the tokenizer's by default; ``tokenizer`` (bytes by default) says which ids
        part documents.

        Raises:
            UserError: the training stream is shorter than one window, or no window has a label.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank}: must be at least 0 and below world_size = {world_size}")
        if min(batch_size, seq_len) < 1:
            raise ValueError(f"batch_size = {batch_size}, seq_len = {seq_len}: must be positive")
        if len(corpus.train) < seq_len + 1:
            raise UserError(
                f"train.seq_len = {seq_len}: needs at least {seq_len + 1} training tokens, "
                f"but {corpus.name} has {len(corpus.train)}"
            )
        self.corpus = corpus
        self.tokenizer: Enclosing = tokenizer or ByteTokenizer()
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.vocab_size = vocab_size if vocab_size is not None else self.tokenizer.vocab_size
        self.pack_documents = pack_documents
        self.heldout_batch_size = heldout_batch_size or batch_size
        self.heldout_steps = heldout_steps
        self.text_mask = text_mask
        self.windows = (len(corpus.train) - 1) // seq_len
        self.rows_per_batch = batch_size * world_size
        self.tokens_per_batch = self.rows_per_batch * seq_len
        self.notes = self._check_labels() if pack_documents else ()

    def _check_labels(self) -> tuple[str, ...]:
        """Count the windows that hold nothing but documents of one id; in long streams only the first ones."""
        empty = seen = 0
        at_once = max(1, COUNTED_AT_ONCE // self.seq_len)
        while seen < self.windows and (seen == empty or seen * self.seq_len < COUNTED_IDS):
            stop = min(seen + at_once, self.windows)
            starts = document_starts(
                self.corpus.train.read(seen * self.seq_len, stop * self.seq_len + 1), self.tokenizer
            )
            empty += int(starts[1:].reshape(-1, self.seq_len).all(axis=1).sum())
            seen = stop
        if empty == seen:
            raise UserError(
                f"{self.corpus.name}: none of its {seen} rows of train.seq_len = {self.seq_len} has a label; "
                "with data.pack_documents the first id of a document is not predicted"
            )
        return (f"{self.corpus.name}: {empty} of {seen} rows have no label",) if empty else ()

    @property
    def fingerprint(self) -> str:
        """Tells whether two runs read the same tokens."""
        return self.corpus.fingerprint

    @property
    def epoch_rows(self) -> int:
        """Rows of an epoch."""
        return self.windows

    def batch(self, index: int) -> Batch:
        """Training batch ``index`` (from 0) of this rank.

        Returns:
            tokens, labels: int32 (B, S); a label is the next id, or -100 where there is no loss. With
            ``pack_documents`` also doc_ids: int32 (B, S), which start at 0 in every row, grow by 1 at each document,
            and no label crosses to the next.

        Raises:
            UserError: an id outside the vocabulary, naming file and place.
        """
        if index < 0:
            raise ValueError(f"index = {index}: must be at least 0")
        first = (index * self.world_size + self.rank) * self.batch_size
        return self.rows(np.arange(first, first + self.batch_size, dtype=np.uint64))

    def rows(self, numbers: np.ndarray) -> Batch:
        """Rows of the sequence that all training batches make up, by their numbers (N,): as `batch`, of N rows.

        Raises:
            UserError: as `batch`.
        """
        epochs, places = np.divmod(numbers.astype(np.uint64), np.uint64(self.windows))
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(places[here], self.windows, f"train {self.seed} {epoch}")
        return self._rows(self.corpus.train, chosen.tolist(), len(numbers))

    def in_steps_of(self, rows: int) -> TextData:
        """The same data: no batch depends on how many rows a step has."""
        return self

    def heldout(self) -> list[Batch]:
        """The evaluation batches of this rank, at most ``heldout_steps``, the same at every call and for every seed.

        They are spread over the held-out stream. Where it is short there are fewer batches, and the last is filled up
        with rows, and its last window with positions, whose labels are all -100. With ``text_mask`` they have
        text_mask: bool (B, S), False there.
        """
        size, predictions = self.heldout_batch_size, max(0, len(self.corpus.heldout) - 1)
        windows = -(-predictions // self.seq_len)
        chosen = permute(np.arange(windows, dtype=np.uint64), windows, "heldout").tolist()
        count = min(self.heldout_steps, -(-windows // (size * self.world_size)))
        firsts = [(index * self.world_size + self.rank) * size for index in range(count)]
        chosen_rows = [chosen[first : first + size] for first in firsts]
        return [self._rows(self.corpus.heldout, rows, size, self.text_mask) for rows in chosen_rows]

    def everything(self) -> Iterator[Batch]:
        """All of the training stream, then all of the held-out one, in their order: each id but the first of either is
        a label once, as in `heldout`.
        """
        size = self.heldout_batch_size
        for stream in (self.corpus.train, self.corpus.heldout):
            windows = range(-(-max(0, len(stream) - 1) // self.seq_len))
            for first in range(0, len(windows), size):
                yield self._rows(stream, list(windows[first : first + size]), size, self.text_mask)

    def _rows(self, stream: TokenStream, windows: list[int], batch_size: int, text_mask: bool = False) -> Batch:
        tokens_BS = np.zeros((batch_size, self.seq_len), np.int32)
        labels_BS = np.full((batch_size, self.seq_len), IGNORED, np.int32)
        doc_ids_BS = np.zeros((batch_size, self.seq_len), np.int32)
        real_BS = np.zeros((batch_size, self.seq_len), bool)
        for row, window in enumerate(windows):
            start = window * self.seq_len
            ids = stream.read(start, start + self.seq_len + 1)
            stream.check_ids(ids, start, self.vocab_size)
            tokens_BS[row, : len(ids) - 1] = ids[:-1]
            labels_BS[row, : len(ids) - 1] = ids[1:]
            real_BS[row, : len(ids) - 1] = True
            if self.pack_documents:
                starts = document_starts(ids, self.tokenizer)
                starts[0] = False
                doc_ids_BS[row, : len(ids) - 1] = np.cumsum(starts[:-1])
                labels_BS[row, : len(ids) - 1][starts[1:]] = IGNORED
        batch = {"tokens": tokens_BS, "labels": labels_BS}
        if text_mask:
            batch["text_mask"] = real_BS
        return {**batch, "doc_ids": doc_ids_BS} if self.pack_documents else batch


def document_starts(ids: np.ndarray, tokenizer: Enclosing) -> np.ndarray:
    """Where a document starts: bool, as long as ``ids``. At each ``bos``; without one, after each ``eos``."""
    if tokenizer.bos is not None:
        return ids == tokenizer.bos
    return np.concatenate([[False], ids[:-1] == tokenizer.eos])


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of range(``size``), chosen by ``key``, puts each index: uint64, shaped as ``indices``."""
    round_keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    places = _encipher(indices.astype(np.uint64), half_bits, round_keys)
    outside = places >= size
    while outside.any():
        places[outside] = _encipher(places[outside], half_bits, round_keys)
        outside = places >= size
    return places


def _encipher(values: np.ndarray, half_bits: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of range(4**half_bits): Feistel rounds over two halves of ``half_bits`` bits each."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (splitmix(right + round_key) & mask)
    return (left << half_bits) | right
