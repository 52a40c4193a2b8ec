"""Batches of conversations: the assistant's turns are learned, what prompts them is not.

A row of a batch is one conversation, or with packing as many as fit, in the order of the files. What is longer than
a row is truncated at its end. Rows that are left without a label are left out.

Shapes: B rows of a batch on one rank, S positions of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shared_config.contract.labels import IGNORED
from shared_config.data.batches import Batch, permute
from shared_config.data.corpus import is_held_out
from shared_config.data.jsonl import Row, refuse
from shared_config.data.template import ChatTemplate, TemplateError, has_template
from shared_config.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from shared_config.errors import UserError


@dataclass(frozen=True)
class Conversation:
    """Token ids, and which of them are learned: (n,) each."""

    ids: np.ndarray
    learned: np.ndarray

    def truncate(self, seq_len: int) -> Conversation:
        """The part that fits into a row."""
        return Conversation(self.ids[: seq_len + 1], self.learned[: seq_len + 1])

    @property
    def has_label(self) -> bool:
        """Whether there is anything to learn: the first id is never predicted."""
        return bool(self.learned[1:].any())


class ConversationData:
    """Training batches by index, and a fixed set of held-out batches; see `shared_config.data.batches.TextData`.

    Attributes:
        rows_per_batch: rows of a batch over all ranks.
        tokens_per_batch: positions of a batch over all ranks.
        notes: what a user should know about the data, one line each.
    """

    def __init__(
        self,
        train: Sequence[Conversation],
        heldout: Sequence[Conversation],
        *,
        name: str,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pack_documents: bool = False,
        text_mask: bool = False,
        heldout_batch_size: int | None = None,
        heldout_steps: int = 8,
    ):
        """
        Args:
            name: of the data, for messages.
            text_mask: also give which positions are real, so that no padding is sent to experts.

        Raises:
            UserError: no conversation has a label within ``seq_len``.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank}: must be at least 0 and below world_size = {world_size}")
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.pack_documents, self.text_mask = pack_documents, text_mask
        self.heldout_batch_size = heldout_batch_size or batch_size
        self.heldout_steps = heldout_steps
        self.rows_per_batch = batch_size * world_size
        self.tokens_per_batch = self.rows_per_batch * seq_len
        self.fingerprint = _fingerprint([train, heldout])
        kept, kept_heldout = ([c for c in part if c.truncate(seq_len).has_label] for part in (train, heldout))
        self.notes = _notes(name, [*train, *heldout], [*kept, *kept_heldout], seq_len)
        if not kept:
            raise UserError(
                f"{name}: none of its {len(train)} rows to train on has a label within train.seq_len = {seq_len}; "
                "the prompts are longer, or there is no turn of the assistant"
            )
        self._train, self._heldout = (self._packed(part) for part in (kept, kept_heldout))

    def batch(self, index: int) -> Batch:
        """Training batch ``index`` (from 0) of this rank.

        Returns:
            tokens, labels: int32 (B, S); a label is the next id where the assistant wrote it, else -100. With
            ``pack_documents`` also doc_ids: int32 (B, S), which grow by 1 at each conversation and at the padding.
            With ``text_mask`` also text_mask: bool (B, S), True at real positions.
        """
        if index < 0:
            raise ValueError(f"index = {index}: must be at least 0")
        first = (index * self.world_size + self.rank) * self.batch_size
        return self.rows(np.arange(first, first + self.batch_size, dtype=np.uint64))

    def rows(self, numbers: np.ndarray) -> Batch:
        """Rows of the sequence that all training batches make up, by their numbers (N,): as `batch`, of N rows."""
        count = len(self._train)
        places = [divmod(row, count) for row in numbers.tolist()]
        chosen = [
            int(permute(np.array([place], np.uint64), count, f"conversations {self.seed} {epoch}")[0])
            for epoch, place in places
        ]
        return self._rows([self._train[row] for row in chosen], len(numbers))

    def in_steps_of(self, rows: int) -> ConversationData:
        """The same data: no batch depends on how many rows a step has."""
        return self

    @property
    def epoch_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._train)

    def heldout(self) -> list[Batch]:
        """The evaluation batches of this rank, the same at every call and for every seed; a short last one is filled up
        with rows whose labels are all -100.
        """
        size = self.heldout_batch_size
        count = min(self.heldout_steps, -(-len(self._heldout) // (size * self.world_size)))
        firsts = [(index * self.world_size + self.rank) * size for index in range(count)]
        return [self._rows(self._heldout[first : first + size], size) for first in firsts]

    def everything(self) -> Iterator[Batch]:
        """All conversations to train on, then all that are held out, in their order: each row once, as in `heldout`."""
        size = self.heldout_batch_size
        for rows in (self._train, self._heldout):
            for first in range(0, len(rows), size):
                yield self._rows(rows[first : first + size], size)

    def _packed(self, conversations: Sequence[Conversation]) -> list[list[Conversation]]:
        """The conversations of each row."""
        rows: list[list[Conversation]] = []
        filled = self.seq_len
        for conversation in conversations:
            length = min(len(conversation.ids) - 1, self.seq_len)
            if not self.pack_documents or filled + length > self.seq_len:
                rows.append([])
                filled = 0
            rows[-1].append(conversation)
            filled += length
        return rows

    def _rows(self, rows: Sequence[Sequence[Conversation]], batch_size: int) -> Batch:
        shape = (batch_size, self.seq_len)
        tokens_BS, labels_BS = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
        doc_ids_BS, text_mask_BS = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, conversations in enumerate(rows):
            start = 0
            for document, conversation in enumerate(conversations):
                cut = conversation.truncate(self.seq_len)
                stop = start + len(cut.ids) - 1
                tokens_BS[row, start:stop] = cut.ids[:-1]
                labels_BS[row, start:stop] = np.where(cut.learned[1:], cut.ids[1:].astype(np.int64), IGNORED)
                doc_ids_BS[row, start:stop] = document
                start = stop
            doc_ids_BS[row, start:] = len(conversations)
            text_mask_BS[row, :start] = True
        batch = {"tokens": tokens_BS, "labels": labels_BS}
        batch |= {"doc_ids": doc_ids_BS} if self.pack_documents else {}
        return batch | ({"text_mask": text_mask_BS} if self.text_mask else {})


def encode_conversations(
    rows: Sequence[Row], tokenizer: Tokenizer, *, name: str, vocab_size: int, heldout_fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on and held-out ones, by a hash of what they hold, so that adding rows moves none; where
    all have hashes of one side, the last ones are held out.

    Raises:
        UserError: a tokenizer without a chat template, where the rows need one; rows that the template refuses; ids
            outside the vocabulary.
    """
    encode = _encoder(rows, tokenizer, name)
    conversations, problems = [], []
    for row in rows:
        try:
            ids, learned = encode(row)
        except TemplateError as error:
            problems.append(f"{row.place}: {error}")
            continue
        if len(ids) and int(ids.max()) >= vocab_size:
            problems.append(f"{row.place}: id {ids.max()} must be below model.vocab_size = {vocab_size}")
        conversations.append(Conversation(ids, learned))
    refuse(problems)
    held = [is_held_out(row.key, heldout_fraction) for row in rows]
    if all(held) or not any(held):
        last = max(1, round(len(rows) * heldout_fraction))
        held = [len(rows) > 1 and index >= len(rows) - last for index in range(len(rows))]
    pairs = list(zip(conversations, held, strict=True))
    return [one for one, is_held in pairs if not is_held], [one for one, is_held in pairs if is_held]


def _encoder(rows: Sequence[Row], tokenizer: Tokenizer, name: str) -> Callable[[Row], tuple[np.ndarray, np.ndarray]]:
    """What gives ids of a row, and which of them are learned: the chat template, or, of prompts and completions in text
    where there is none, `as_it_stands`.
    """
    folder = tokenizer.folder if isinstance(tokenizer, HuggingFaceTokenizer) else None
    if all(row.plain for row in rows) and (folder is None or not has_template(folder)):
        return lambda row: as_it_stands(*(row.plain or ("", "")), tokenizer)
    if folder is None:
        raise UserError(
            f"{name}: rows of {rows[0].kind} need a chat template, and data.tokenizer = 'bytes' has none; "
            "must be a tokenizer folder with one"
        )
    template = ChatTemplate(folder)
    return lambda row: template.encode(row.messages, learned_from=row.learned_from, tools=row.tools)


def as_it_stands(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """A prompt, in the ids that generation continues, and a completion, which is learned, with the id that ends it.

    Returns:
        ids: uint32. learned: bool, as long.
    """
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos is None else [tokenizer.eos]
    parts = [before, tokenizer.encode(prompt), tokenizer.encode(completion), after]
    ids = np.concatenate(parts, dtype=np.uint32, casting="unsafe")
    return ids, np.arange(len(ids)) >= len(before) + len(parts[1])


def _notes(name: str, every: Sequence[Conversation], kept: Sequence[Conversation], seq_len: int) -> tuple[str, ...]:
    notes = []
    if len(kept) < len(every):
        notes.append(
            f"{name}: {len(every) - len(kept)} of {len(every)} rows have no label within train.seq_len = {seq_len} "
            "and are left out"
        )
    longer = sum(len(one.ids) > seq_len + 1 for one in kept)
    if longer:
        notes.append(
            f"{name}: {longer} of {len(every)} rows are longer than train.seq_len = {seq_len} and are truncated"
        )
    return tuple(notes)


def _fingerprint(parts: Sequence[Sequence[Conversation]]) -> str:
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(f"part {len(part)}".encode())
        for conversation in part:
            checksum.update(conversation.ids.astype("<u4").tobytes() + conversation.learned.tobytes())
    return checksum.hexdigest()[:32]
