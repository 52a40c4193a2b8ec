"""The text data of a job: a stream of documents, or conversations."""

from __future__ import annotations

from typing import Any

from shared_config.data.batches import TextData
from shared_config.data.conversations import ConversationData, encode_conversations
from shared_config.data.corpus import TOKEN_SUFFIXES, Corpus, data_files, json_lines_files, load_corpus, rows_corpus
from shared_config.data.jsonl import CONVERSATIONS, Row, read_rows
from shared_config.data.mixture import MixedData, phases_of
from shared_config.data.prepared import check_one_tokenizer, prepared_corpus, prepared_index
from shared_config.data.tokenizer import Tokenizer, build_tokenizer, check_vocabulary
from shared_config.errors import UserError
from shared_config.schema.data import SourceConfig
from shared_config.schema.job import JobConfig


def open_text_data(config: JobConfig, *, rank: int = 0, world_size: int = 1) -> TextData | ConversationData | MixedData:
    """The text data of a job, for one of ``world_size`` data-parallel ranks.

    Raises:
        UserError: as `load_corpus`, `build_tokenizer`, `TextData` and `ConversationData` do.
    """
    if not config.data.sources:
        return open_source(config, rank=rank, world_size=world_size)
    check_one_tokenizer(config)
    sources = [open_source(_job_of(config, source), rank=rank, world_size=world_size) for source in config.data.sources]
    return MixedData(
        sources,
        phases_of(config.data, [source.epoch_rows for source in sources], config.train.seed),
        batch_size=config.train.batch_size,
        rank=rank,
        world_size=world_size,
        rows_per_step=config.train.batch_size * world_size * config.train.grad_accum_steps,
    )


def _job_of(config: JobConfig, source: SourceConfig) -> JobConfig:
    """The job with one source of a mixture alone."""
    fields = {"path": source.path, "text_field": source.text_field, "token_dtype": source.token_dtype}
    return config.replace(data=config.data.replace(**fields, sources=(), phases=()))


def open_source(config: JobConfig, *, rank: int = 0, world_size: int = 1) -> TextData | ConversationData:
    """The data of ``data.path``, as `open_text_data`.

    Raises:
        UserError: as `open_text_data`.
    """
    shared: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "seq_len": config.train.seq_len,
        "seed": config.train.seed,
        "rank": rank,
        "world_size": world_size,
        "pack_documents": config.data.pack_documents,
        "heldout_batch_size": config.eval.batch_size,
        "heldout_steps": config.eval.steps,
        "text_mask": config.model.is_moe,
    }
    index = prepared_index(config.data.path)
    if index is not None:
        corpus = prepared_corpus(config, index)
        return TextData(corpus, vocab_size=config.model.vocab_size, tokenizer=index, **shared)
    tokenizer = build_tokenizer(config.data.tokenizer, config.data.eos_id)
    _check_tokenizer(config, tokenizer)
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
        return ConversationData(*parts, name=name, **shared)
    corpus = _corpus(config, tokenizer, rows)
    return TextData(corpus, vocab_size=config.model.vocab_size, tokenizer=tokenizer, **shared)


def _check_tokenizer(config: JobConfig, tokenizer: Tokenizer) -> None:
    """Check that the model has the tokenizer's ids, and that documents can be told apart where they have to be."""
    data, vocab_size = config.data, config.model.vocab_size
    names = data_files(data.path, data.follow_symlinks)[1] if data.path else []
    encoded = any(name.endswith(TOKEN_SUFFIXES) for name in names)
    if data.eos_id is not None and data.eos_id >= vocab_size:
        raise UserError(f"data.eos_id = {data.eos_id}: must be below model.vocab_size = {vocab_size}")
    if not encoded:
        check_vocabulary(tokenizer, data.tokenizer, vocab_size)
    if encoded and not data.pack_documents:
        return
    if encoded and data.tokenizer == "bytes" and data.eos_id is None:
        raise UserError(
            f"data.path = {data.path!r}: holds token ids, and data.pack_documents needs to know which one ends a "
            "document; set data.eos_id, or data.tokenizer to the tokenizer that made them"
        )
    if tokenizer.bos is None and tokenizer.eos is None:
        raise UserError(
            f"data.tokenizer = {data.tokenizer!r}: names no token that begins or ends a document; "
            "tokenizer_config.json must name an eos_token that is in tokenizer.json, or data.eos_id give one"
        )


def _json_rows(config: JobConfig) -> list[Row] | None:
    """None if the data are not JSON Lines."""
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
        token_dtype=data.token_dtype or "uint16",
        heldout_fraction=data.heldout_fraction,
        follow_symlinks=data.follow_symlinks,
    )
