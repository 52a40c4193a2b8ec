"""The text data of a job: a stream of documents, or conversations."""

from __future__ import annotations

from typing import Any

from shared_config.data.batches import TextData
from shared_config.data.conversations import ConversationData, encode_conversations
from shared_config.data.corpus import Corpus, data_files, json_lines_files, load_corpus, rows_corpus
from shared_config.data.jsonl import CONVERSATIONS, Row, read_rows
from shared_config.data.tokenizer import Tokenizer, build_tokenizer
from shared_config.schema.job import JobConfig


def open_text_data(config: JobConfig, *, rank: int = 0, world_size: int = 1) -> TextData | ConversationData:
    """The text data of a job, for one of ``world_size`` data-parallel ranks.

    Raises:
        UserError: as `load_corpus`, `build_tokenizer`, `TextData` and `ConversationData` do.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    shared: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "seq_len": config.train.seq_len,
        "seed": config.train.seed,
        "rank": rank,
        "world_size": world_size,
        "pack_documents": config.data.pack_documents,
        "heldout_batch_size": config.eval.batch_size,
        "heldout_steps": config.eval.steps,
    }
    rows = _json_rows(config)
    if rows and rows[0].kind in CONVERSATIONS:
        name = f"data.path = {config.data.path!r}"
        parts = encode_conversations(
            rows,
            tokenizer,
            name=name,
            vocab_size=config.model.vocab_size,
            heldout_fraction=config.data.heldout_fraction,
        )
        return ConversationData(*parts, name=name, text_mask=config.model.is_moe, **shared)
    corpus = _corpus(config, tokenizer, rows)
    return TextData(corpus, vocab_size=config.model.vocab_size, tokenizer=tokenizer, **shared)


def _json_rows(config: JobConfig) -> list[Row] | None:
    """None if the data are no JSON Lines."""
    if not config.data.path:
        return None
    files = json_lines_files(config.data.path, *data_files(config.data.path, config.data.follow_symlinks))
    return read_rows(files, config.data.text_field) if files else None


def _corpus(config: JobConfig, tokenizer: Tokenizer, rows: list[Row] | None) -> Corpus:
    data = config.data
    if rows is not None:
        return rows_corpus(data.path, rows, tokenizer, data.heldout_fraction, config.model.vocab_size)
    return load_corpus(
        data.path,
        tokenizer=tokenizer,
        vocab_size=config.model.vocab_size,
        token_dtype=data.token_dtype,
        heldout_fraction=data.heldout_fraction,
        follow_symlinks=data.follow_symlinks,
    )
