"""Text to token files, once, by several processes.

The input is cut into shards by its own bytes alone, so the files are the same whatever the number of processes. A shard
is written aside and renamed; a list says which are done. After a kill the others are made, and what remains is what an
uninterrupted run leaves. The index comes last.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared_config.data.documents import Span, documents, source_files, spans_of
from shared_config.data.tokenizer import Tokenizer, build_tokenizer
from shared_config.data.workers import run_tasks
from shared_config.errors import UserError
from shared_config.interchange.files import file_errors, written_aside
from shared_config.interchange.outputs import refuse_overlap, writable_folder
from shared_config.interchange.token_index import (
    DTYPES,
    INDEX,
    UNFINISHED,
    Shard,
    TokenIndex,
    dtype_for,
    read_index,
    tokenizer_hash,
    write_index,
)
from shared_config.interchange.tokens import TOKENIZER, copy_tokenizer

SHARD_BYTES = 2**26
ENCODED_AT_ONCE = 2**19
"""Characters; those of one document more."""


@dataclass(frozen=True)
class Encoding:
    """How documents become ids.

    Attributes:
        tokenizer: "bytes", or a Hugging Face folder.
        eos_id: what ends a document in place of the tokenizer's own.
        text_field, separator: see `shared_config.data.documents.documents`.
    """

    tokenizer: str
    eos_id: int | None = None
    text_field: str = "text"
    separator: str = ""


@dataclass(frozen=True)
class Work:
    """One shard to be made: its number, the parts of the input that it holds, and where it goes."""

    number: int
    spans: tuple[Span, ...]
    folder: Path
    encoding: Encoding
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of its input."""
        return sum(span.size for span in self.spans)


@dataclass(frozen=True)
class Progress:
    """How much of the input (bytes) is done, and what it has become."""

    done: int
    total: int
    documents: int = 0
    tokens: int = 0


Show = Callable[[Progress], None]


def prepare(
    sources: Sequence[Path],
    output: Path,
    encoding: Encoding,
    *,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    follow_symlinks: bool = False,
    show: Show = lambda progress: None,
) -> TokenIndex:
    """Write the ids of all documents of sources to a folder, or go on where an earlier call was ended.

    Args:
        workers: processes.
        shard_bytes: of the input that a shard holds, as far as it can be cut.
        show: is told of progress every now and then.

    Raises:
        UserError: a source, tokenizer or document that can't be read; a folder that holds anything else.
    """
    for source in sources:
        refuse_overlap(output, source)
    tokenizer = build_tokenizer(encoding.tokenizer, encoding.eos_id)
    if tokenizer.bos is None and tokenizer.eos is None:
        raise UserError(
            f"--tokenizer = {encoding.tokenizer!r}: names no token that begins or ends a document; --eos-id gives one"
        )
    files = source_files(sources, follow_symlinks)
    plan = _plan(files, shard_bytes)
    index = _index(tokenizer, encoding, files, plan)
    if (output / INDEX).exists():
        return _finished(output, index)
    modified = hashlib.sha256(json.dumps([file.stat().st_mtime_ns for _, file in files]).encode()).hexdigest()
    with _journal(output, index, modified) as (journal, done):
        works = [Work(number, spans, output, encoding, index.dtype) for number, spans in enumerate(plan)]
        left = [work for work in works if work.number not in done]
        total = sum(work.size for work in works)
        finished = done | _made(left, workers, journal, Progress(total - sum(work.size for work in left), total), show)
        index = replace(index, shards=tuple(finished[number] for number in range(len(plan))))
        if not index.tokens:
            raise UserError(f"{', '.join(map(str, sources))}: hold no document")
        if encoding.tokenizer != "bytes":
            copy_tokenizer(Path(encoding.tokenizer), output / TOKENIZER)
        write_index(output, index)
        (output / UNFINISHED).unlink()
    return index


def encode_shard(work: Work, show: Callable[[int, int, int], None]) -> Shard:
    """Make one shard.

    Args:
        show: is told of input (bytes, as far as parts of it are done), documents and ids that have been added.
    """
    tokenizer = _tokenizer(work.encoding)
    counts = [0, 0]
    file = work.folder / f"shard_{work.number:05}.bin"
    with written_aside(file) as aside, aside.open("wb") as out:
        for texts, size in _batches(work):
            arrays = [_enclosed(ids, tokenizer) for ids in tokenizer.encode_batch(texts) if len(ids)]
            ids = np.concatenate([np.empty(0, np.uint32), *arrays])
            out.write(ids.astype(np.dtype(work.dtype).newbyteorder("<")).tobytes())
            counts = [counts[0] + len(arrays), counts[1] + len(ids)]
            show(size, len(arrays), len(ids))
    return Shard(file.name, *counts)


def _batches(work: Work) -> Iterator[tuple[list[str], int]]:
    """Documents to be encoded together, and by how many bytes of input they bring the work on."""
    texts: list[str] = []
    size = 0
    for span in work.spans:
        for text in documents(span, work.encoding.text_field, work.encoding.separator):
            texts.append(text)
            size += len(text)
            if size >= ENCODED_AT_ONCE:
                yield texts, 0
                texts, size = [], 0
        yield texts, span.size
        texts, size = [], 0


def _enclosed(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos is None else [tokenizer.eos]
    return np.concatenate([before, ids, after], dtype=np.uint32, casting="unsafe")


def _plan(files: Sequence[tuple[str, Path]], shard_bytes: int) -> list[tuple[Span, ...]]:
    """What each shard holds."""
    shards: list[list[Span]] = []
    filled = shard_bytes
    for span in itertools.chain.from_iterable(spans_of(file, shard_bytes) for _, file in files):
        if filled >= shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(span)
        filled += span.size
    return [tuple(spans) for spans in shards]


def _index(
    tokenizer: Tokenizer, encoding: Encoding, files: Sequence[tuple[str, Path]], plan: list[tuple[Span, ...]]
) -> TokenIndex:
    """What the index will say, without the shards."""
    sizes = [[(span.start, span.stop, span.size) for span in spans] for spans in plan]
    read = [[(name, file.stat().st_size) for name, file in files], sizes, encoding.text_field, encoding.separator]
    ends = [id for id in (tokenizer.bos, tokenizer.eos) if id is not None]
    vocab_size = max(tokenizer.vocab_size, *(id + 1 for id in ends))
    return TokenIndex(
        tokenizer=Path(encoding.tokenizer).resolve().name if encoding.tokenizer != "bytes" else "bytes",
        tokenizer_hash=tokenizer_hash(encoding.tokenizer, tokenizer.bos, tokenizer.eos),
        vocab_size=vocab_size,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        dtype=dtype_for(vocab_size),
        sources=hashlib.sha256(json.dumps(read).encode()).hexdigest(),
    )


def _finished(output: Path, index: TokenIndex) -> TokenIndex:
    found = read_index(output)
    _check_same(output, _facts(found), _facts(index))
    (output / UNFINISHED).unlink(missing_ok=True)
    return found


def _check_same(output: Path, there: Mapping[str, object], here: Mapping[str, object]) -> None:
    """Refuse to go on in a folder that was made of something else.

    Raises:
        UserError: naming what differs.
    """
    changed = [name for name, value in here.items() if there.get(name) != value]
    differing = [f"{name} = {here[name]!r}: is {there.get(name)!r} there" for name in changed]
    if differing:
        raise UserError(
            "\n".join([f"{output}: was made of other sources or by other options; give another folder", *differing])
        )


@contextlib.contextmanager
def _journal(output: Path, index: TokenIndex, modified: str) -> Iterator[tuple[IO[str], dict[int, Shard]]]:
    """The list of shards that are done, open for others and locked, and those shards by number.

    Raises:
        UserError: another process holds it, or the folder holds anything else.
    """
    file = output / UNFINISHED
    others = [path.name for path in output.glob("*")] if output.is_dir() and not file.exists() else []
    if others:
        raise UserError(f"{output}: holds {others[0]}, and is no folder of tokens; give a new or an empty folder")
    writable_folder(output)
    with file_errors(file, "can't be written"), file.open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another process is preparing it") from None
        for left in output.glob(".*.part"):
            left.unlink()
        entries = _entries(journal)
        head = {**_facts(index), "modified": modified}
        shards = {entry.pop("number"): Shard(**entry) for entry in entries[1:]}
        done = {number: shard for number, shard in shards.items() if _is_there(output / shard.file, shard, index)}
        if done:
            _check_same(output, entries[0], head)
        else:
            journal.truncate(0)
            _add(journal, head)
        yield journal, done


def _entries(journal: IO[str]) -> list[dict[str, Any]]:
    """The lines of a list; the last one is cut off if a kill has left a part of it."""
    journal.seek(0)
    *lines, part = journal.read().split("\n")
    if part:
        journal.seek(0)
        journal.truncate(sum(len(line.encode()) + 1 for line in lines))
        journal.seek(0, os.SEEK_END)
    return [json.loads(line) for line in lines]


def _facts(index: TokenIndex) -> dict[str, object]:
    """What an index says of its making."""
    return {name: value for name, value in asdict(index).items() if name != "shards"}


def _line(number: int, shard: Shard) -> dict[str, object]:
    return {"number": number, **asdict(shard)}


def _add(journal: IO[str], *lines: dict[str, object]) -> None:
    journal.write("".join(json.dumps(line) + "\n" for line in lines))
    journal.flush()


def _is_there(file: Path, shard: Shard, index: TokenIndex) -> bool:
    return file.is_file() and file.stat().st_size == shard.tokens * DTYPES[index.dtype]


def _made(works: list[Work], workers: int, journal: IO[str], progress: Progress, show: Show) -> dict[int, Shard]:
    """The shards of works by number, each noted once it is there."""
    made: dict[int, Shard] = {}
    shown = progress
    show(shown)

    def note(size: int, documents: int, tokens: int) -> None:
        nonlocal shown
        shown = Progress(shown.done + size, shown.total, shown.documents + documents, shown.tokens + tokens)
        show(shown)

    def done(work: Work, shard: Shard) -> None:
        made[work.number] = shard
        _add(journal, _line(work.number, shard))

    run_tasks(encode_shard, works, workers, note=note, done=done)
    return made


@functools.cache
def _tokenizer(encoding: Encoding) -> Tokenizer:
    """Read once a process."""
    return build_tokenizer(encoding.tokenizer, encoding.eos_id)
