"""How well a model predicts text: loss, perplexity and bits per byte."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from shared_config.contract.labels import IGNORED
from shared_config.data import ByteTokenizer, ConversationData, TextData, Tokenizer, build_tokenizer, open_data
from shared_config.data.corpus import TOKEN_SUFFIXES, data_files
from shared_config.errors import UserError
from shared_config.schema.base import LARGEST
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch, Trainer

LARGEST_LOSS = 700.0
"""Whose exponential is still a number."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: nats per token.
        perplexity: its exponential.
        bits_per_byte: bits of all tokens by bytes of their text; None where there is no tokenizer, or no text.
        tokens: that were predicted.
        bytes: of their text in UTF-8; None where there is no tokenizer.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None

    def line(self) -> str:
        """For the terminal."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}{bits} ({self.tokens:,} tokens)"


def evaluation_batches(config: JobConfig, split: str, most: int | None = None) -> Iterator[Batch]:
    """The batches of a job's data, held-out ones ("heldout") or "all", no more than ``most``. Of pictures drawn by
    code, which have no end, there are ``eval.steps`` where ``most`` says nothing.

    Raises:
        UserError: data that can't be used, or of which nothing is held out; all of a mixture, or of pictures.
    """
    is_endless = config.vlm is not None and not config.data.path
    steps = (most or config.eval.steps) if is_endless else LARGEST
    data = open_data(config.replace(eval=config.eval.replace(interval=0, steps=steps)))
    if split == "heldout":
        held = data.heldout()
        if not held:
            fraction = f"data.heldout_fraction = {config.data.heldout_fraction}"
            raise UserError(f"data.path = {config.data.path!r}: holds nothing that is held out, by {fraction}")
        return itertools.islice(held, most)
    if not isinstance(data, TextData | ConversationData):
        kind = "pictures" if config.vlm is not None else "a mixture"
        raise UserError(f"--split = 'all': must be 'heldout' with {kind}; all is read of one source of text")
    return itertools.islice(data.everything(), most)


def evaluate(config: JobConfig, trainer: Trainer, batches: Iterable[Batch]) -> Evaluation:
    """Evaluate a trainer's model.

    Raises:
        UserError: there is nothing to predict.
    """
    tokenizer, nats, tokens, size = _tokenizer_of(config), 0.0, 0, 0
    for batch in batches:
        numbers = trainer.evaluate([batch])
        count = int(numbers["tokens"])  # pyright: ignore[reportArgumentType]
        nats, tokens = nats + float(numbers["loss"]) * count, tokens + count
        size += 0 if tokenizer is None else text_bytes(tokenizer, batch)
    if tokens == 0:
        raise UserError(f"data.path = {config.data.path!r}: holds nothing to predict")
    loss = nats / tokens
    perplexity = math.exp(min(loss, LARGEST_LOSS))
    bits = nats / math.log(2) / size if size else None
    return Evaluation(loss, perplexity, bits, tokens, None if tokenizer is None else size)


def text_bytes(tokenizer: Tokenizer, batch: Mapping[str, np.ndarray]) -> int:
    """Bytes of UTF-8 that the labels of a batch stand for; ids that begin or end a document stand for none."""
    labels = batch["labels"]
    if isinstance(tokenizer, ByteTokenizer):
        return int(((labels >= 0) & (labels < 256) & (labels != tokenizer.eos)).sum())
    rows = (row[row != IGNORED].tolist() for row in labels)
    return sum(len(tokenizer.decode(ids).encode("utf-8", "surrogatepass")) for ids in rows)


def _tokenizer_of(config: JobConfig) -> Tokenizer | None:
    """None for token ids of which nothing says what made them, and for pictures."""
    data = config.data
    names = data_files(data.path, data.follow_symlinks)[1] if data.path and config.vlm is None else []
    encoded = any(name.endswith(TOKEN_SUFFIXES) for name in names)
    if config.vlm is not None or (encoded and data.tokenizer == "bytes"):
        return None
    return build_tokenizer(data.tokenizer, data.eos_id)
