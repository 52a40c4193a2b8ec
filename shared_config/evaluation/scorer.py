"""Texts scored and continued, as benchmarks ask for it, by functions of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shared_config.contract.labels import IGNORED
from shared_config.data.tokenizer import Tokenizer
from shared_config.errors import UserError

Score = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(tokens, labels), int32 (B, S) -> log-probability of the labels of each row, and whether all are the likeliest."""
Generate = Callable[[Sequence[int], int], Iterator[int]]
"""(prompt, most new tokens) -> new tokens, the most probable ones."""
SHORTEST = 32
"""Rows are as long as a power of two from this on, so that few lengths are compiled."""


@dataclass(frozen=True)
class Scorer:
    """A model by its functions.

    Attributes:
        positions: the most that a row may have.
        rows: of a batch.
    """

    score: Score
    generate: Generate
    tokenizer: Tokenizer
    positions: int
    rows: int

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-probability of the continuation, in nats, and whether it is what
        greedy decoding gives. Contexts that are too long lose their start.
        """
        return self._scored([self._pair(context, text) for context, text in pairs])

    def texts(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text, after the token that begins a document. One that is too long is cut into
        windows, in each of which the last tokens are scored with as much context as there is room for.
        """
        windows = [self._windows(self.tokenizer.encode(text).tolist()) for text in texts]
        found = iter(self._scored([window for own in windows for window in own]))
        return [sum(next(found)[0] for _ in own) for own in windows]

    def until(self, prompt: str, stops: Sequence[str], most: int) -> str:
        """What the model writes after a prompt, up to the first of some texts."""
        ids = self.tokenizer.encode_prompt(prompt)[-max(1, self.positions - most) :]
        text = ""
        for piece in self.tokenizer.decode_stream(self.generate(ids, min(most, self.positions - len(ids))), after=ids):
            text += piece
            ends = [text.find(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return text

    @property
    def start(self) -> int:
        """The token before a text that has no context."""
        first = self.tokenizer.bos if self.tokenizer.bos is not None else self.tokenizer.eos
        if first is None:
            raise UserError(
                "data.tokenizer: names no token that begins or ends a document, which texts are scored after"
            )
        return first

    def _pair(self, context: str, text: str) -> tuple[list[int], int]:
        """Tokens, and how many of the last are scored. The tokens are those of both together, as they are read."""
        if not context:
            ids = [self.start, *self.tokenizer.encode(text).tolist()]
            return ids, len(ids) - 1
        before = self.tokenizer.encode_prompt(context)
        both = self.tokenizer.encode_prompt(context + text)
        return both, max(len(both) - len(before), 1)

    def _windows(self, ids: list[int]) -> list[tuple[list[int], int]]:
        every, size = [self.start, *ids], self.positions
        ends = range(size, len(ids) + size, size)
        return [(every[max(0, min(end, len(ids)) - size) : end + 1], min(end, len(ids)) - end + size) for end in ends]

    def _scored(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each (tokens, count) what the model says of its last ``count`` tokens."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
        for first in range(0, len(order), self.rows):
            places = order[first : first + self.rows]
            total, greedy = self.score(*self._arrays([rows[place] for place in places]))
            found |= {place: (float(total[i]), bool(greedy[i])) for i, place in enumerate(places)}
        return [found[place] for place in range(len(rows))]

    def _arrays(self, rows: Sequence[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, int32 (B, S), filled up at the end with what is not scored."""
        longest = max(len(ids) for ids, _ in rows) - 1
        length = min(self.positions, max(SHORTEST, 1 << (min(longest, self.positions) - 1).bit_length()))
        tokens_BS = np.zeros((self.rows, length), np.int32)
        labels_BS = np.full((self.rows, length), IGNORED, np.int32)
        for row, (ids, count) in enumerate(rows):
            kept = ids[-(length + 1) :]
            tokens_BS[row, : len(kept) - 1] = kept[:-1]
            scored = min(count, len(kept) - 1)
            labels_BS[row, len(kept) - 1 - scored : len(kept) - 1] = kept[len(kept) - scored :]
        return tokens_BS, labels_BS
