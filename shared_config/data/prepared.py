"""Folders of token files that `shared_config.data.prepare` has written, as a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared_config.data.corpus import Corpus, TokenStream, split_end
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.token_index import INDEX, UNFINISHED, TokenIndex, read_index, tokenizer_hash
from shared_config.schema.job import JobConfig


def prepared_index(path: str) -> TokenIndex | None:
    """The index of ``data.path``; None if that is no such folder.

    Raises:
        UserError: an index that is damaged, or not as its files are; a folder that is not finished.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        return None
    if (folder / INDEX).exists():
        return read_index(folder)
    if (folder / UNFINISHED).exists():
        raise UserError(f"data.path = {path!r}: is not finished; run kempnerforge prepare again, which goes on there")
    return None


def prepared_corpus(config: JobConfig, index: TokenIndex) -> Corpus:
    """The tokens of ``data.path``, whose end is held out.

    Raises:
        ConfigError: every field of the config that differs from the index.
    """
    problems = list(_problems(config, index))
    if problems:
        raise ConfigError(problems)
    folder, dtype = Path(config.data.path), np.dtype(index.dtype).newbyteorder("<")
    files = [(str(folder / shard.file), folder / shard.file) for shard in index.shards if shard.tokens]
    stream = TokenStream([(name, np.memmap(file, dtype, mode="r")) for name, file in files])
    return split_end(f"data.path = {config.data.path!r}", stream, config.data.heldout_fraction)


def check_one_tokenizer(config: JobConfig) -> None:
    """Refuse to mix sources whose ids mean different texts: those that were prepared were made by one tokenizer, which
    is that of the job where others are not prepared.

    Raises:
        UserError: naming two of them.
    """
    paths = [source.path for source in config.data.sources]
    found = {path: index for path in paths if (index := prepared_index(path)) is not None}
    first = next(iter(found), "")
    for path, index in found.items():
        if index.tokenizer_hash != found[first].tokenizer_hash:
            made = [
                f"{name!r} by {found[name].tokenizer!r} ({found[name].tokenizer_hash[:12]})" for name in (path, first)
            ]
            raise UserError(f"data.sources: {' and '.join(made)}: must be made by one tokenizer")
        others = [other for other in paths if other not in found]
        if others and tokenizer_hash(config.data.tokenizer, index.bos, index.eos) != index.tokenizer_hash:
            raise UserError(
                f"data.tokenizer = {config.data.tokenizer!r}: must be the tokenizer {index.tokenizer!r} that made "
                f"{path!r}, as {others[0]!r} is read with it"
            )


def _problems(config: JobConfig, index: TokenIndex) -> Iterator[str]:
    data, where = config.data, f"{Path(config.data.path) / INDEX}"
    if index.vocab_size > config.model.vocab_size:
        yield (
            f"model.vocab_size = {config.model.vocab_size}: must be at least vocab_size = {index.vocab_size} of {where}"
        )
    if data.token_dtype is not None and data.token_dtype != index.dtype:
        yield f"data.token_dtype = {data.token_dtype!r}: must be dtype = {index.dtype!r} of {where}, or left out"
    if data.eos_id is not None and data.eos_id != index.eos:
        yield f"data.eos_id = {data.eos_id}: must be eos = {index.eos} of {where}, or left out"
    if data.tokenizer == "bytes":
        return  # the default: the index knows what is needed
    found = tokenizer_hash(data.tokenizer, index.bos, index.eos)
    if found != index.tokenizer_hash:
        yield (
            f"data.tokenizer = {data.tokenizer!r}: must be the tokenizer {index.tokenizer!r} that made "
            f"{data.path!r}; its hash is {found[:12]}, and {where} has {index.tokenizer_hash[:12]}"
        )
