"""Where the tokens come from: the standard library's sources, a user's text, or arrays of token ids on disk.

A corpus is two streams of ids, training and held-out. In text every document (one file, or one row of JSON Lines) is
``bos``, its tokens, ``eos``, as far as the tokenizer has them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_config.data.documents import refuse_unprepared
from shared_config.data.jsonl import CONVERSATIONS, MAX_TEXT_BYTES, Row, is_json_lines, read_rows, refuse
from shared_config.data.tokenizer import ByteTokenizer, Tokenizer
from shared_config.errors import UserError
from shared_config.interchange.reading import check_regular, files_below, read_bytes

TOKEN_SUFFIXES = (".npy", ".bin")
NOT_SOURCES = frozenset(
    ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
STANDARD_LIBRARY = "the standard library's sources"
CHECKED_AT_ONCE = 2**26
SAMPLED_BLOCKS, BLOCK_LENGTH = 256, 2**16


class TokenStream:
    """Arrays of token ids, end to end, addressed as one; of memory-mapped arrays only what is asked for is read."""

    def __init__(self, parts: Sequence[tuple[str, np.ndarray]]):
        self._names = [name for name, part in parts if len(part)]
        self._parts = [part for _, part in parts if len(part)]
        self._ends = np.cumsum([0, *(len(part) for part in self._parts)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids ``start`` to ``stop`` (exclusive), fewer at the end of the stream; int64."""
        pieces = [part[low:high] for _, part, low, high in self._slices(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *pieces], dtype=np.int64, casting="unsafe")

    def slice(self, start: int, stop: int) -> TokenStream:
        """The stream of ids ``start`` to ``stop``, sharing memory with this one."""
        return TokenStream([(name, part[low:high]) for name, part, low, high in self._slices(start, stop)])

    def source(self, index: int) -> str:
        """Name of the file, and the index in it, that id ``index`` of the stream came from."""
        (name, _, low, _), *_ = self._slices(index, index + 1)
        return f"{name}, token {low}"

    def _slices(self, start: int, stop: int) -> Iterator[tuple[str, np.ndarray, int, int]]:
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        for index in range(max(first, 0), len(self._parts)):
            base = int(self._ends[index])
            if base >= stop:
                return
            part = self._parts[index]
            yield self._names[index], part, max(start - base, 0), min(stop - base, len(part))

    def check_ids(self, tokens: np.ndarray, start: int, vocab_size: int) -> None:
        """Refuse ids of ``read(start, ...)`` that a vocabulary of ``vocab_size`` does not have.

        Raises:
            UserError: naming file, place and id.
        """
        if tokens.size and int(tokens.max()) >= vocab_size:
            place = int(np.argmax(tokens >= vocab_size))
            raise UserError(
                f"{self.source(start + place)}: id {tokens[place]} is outside the vocabulary; "
                f"must be below model.vocab_size = {vocab_size}"
            )

    def digest(self) -> str:
        """A checksum of the length and the ids: all of them up to 16 Mi ids, else of evenly spaced blocks."""
        length = len(self)
        sampled = length > SAMPLED_BLOCKS * BLOCK_LENGTH
        every, spread = range(0, length, BLOCK_LENGTH), np.linspace(0, length - BLOCK_LENGTH, SAMPLED_BLOCKS)
        checksum = hashlib.sha256(str(length).encode())
        for start in spread if sampled else every:
            checksum.update(self.read(int(start), int(start) + BLOCK_LENGTH).astype("<u4").tobytes())
        return checksum.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Training and held-out ids, and a name for messages."""

    name: str
    train: TokenStream
    heldout: TokenStream

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells whether two runs read the same tokens."""
        return hashlib.sha256(f"{self.train.digest()} {self.heldout.digest()}".encode()).hexdigest()[:32]


def load_corpus(
    path: str | Path = "",
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    token_dtype: str = "uint16",
    heldout_fraction: float = 0.05,
    text_field: str = "text",
    follow_symlinks: bool = False,
) -> Corpus:
    """Open the data of a run.

    Args:
        path: "" for the Python sources of the standard library; or a folder or file of text, or of token ids: ``.npy``
            (one-dimensional uint16 or uint32) or ``.bin`` (raw little-endian ``token_dtype``). Folders are read in
            the order of their relative paths, hidden files left out.
        tokenizer: what encodes text; bytes by default. Token files are taken as they are.
        vocab_size: ids must be below it; by default that of the tokenizer.
        text_field: the field of a JSON Lines row that holds its document.
        follow_symlinks: whether links in the folder may lead out of it.
        heldout_fraction: a text file is held out if the hash of its relative path says so, so adding files moves
            none. Token files, and text whose files all hash to one side, give the end of the stream.

    Raises:
        UserError: nothing there, nothing usable, unreadable, or ids outside the vocabulary.
    """
    tokenizer = tokenizer or ByteTokenizer()
    if not str(path):
        corpus = _standard_library_corpus(tokenizer, heldout_fraction)
    else:
        corpus = _user_corpus(path, tokenizer, token_dtype, heldout_fraction, text_field, follow_symlinks)
    _check_vocabulary(corpus, vocab_size if vocab_size is not None else tokenizer.vocab_size)
    return corpus


def _check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    for stream in (corpus.train, corpus.heldout):
        checked = min(len(stream), CHECKED_AT_ONCE)
        for start in range(0, checked, BLOCK_LENGTH):
            stream.check_ids(stream.read(start, min(start + BLOCK_LENGTH, checked)), start, vocab_size)


def _standard_library_corpus(tokenizer: Tokenizer, heldout_fraction: float) -> Corpus:
    if isinstance(tokenizer, ByteTokenizer):
        return _standard_library_bytes(heldout_fraction)
    return _text_corpus(STANDARD_LIBRARY, *_standard_library_files(), tokenizer, heldout_fraction)


@functools.lru_cache(maxsize=1)
def _standard_library_bytes(heldout_fraction: float) -> Corpus:
    return _text_corpus(STANDARD_LIBRARY, *_standard_library_files(), ByteTokenizer(), heldout_fraction)


def _standard_library_files() -> tuple[Path, list[str]]:
    """Python sources, less tests, tables, installed packages and what differs between machines of one version."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [
        name
        for name in files_below(root, NOT_SOURCES, follow_symlinks=True)[0]
        if name.endswith(".py") and not name.rpartition("/")[2].startswith(("_sysconfigdata", "sitecustomize"))
    ]
    if not names:
        raise UserError(f"{root}: this Python has no sources of its standard library to train on; set data.path")
    return root, names


def data_files(path: str | Path, follow_symlinks: bool = False) -> tuple[Path, list[str]]:
    """The files that ``data.path`` stands for: a folder, and names in it.

    Raises:
        UserError: none, or some that can't be read: links out of the folder, pipes, devices.
    """
    root = Path(path)
    if not root.is_dir():
        if not os.path.lexists(root):
            raise UserError(f"data.path = {str(path)!r}: no such file or folder")
        check_regular(root)
        return root.parent, [root.name]
    names, problems = files_below(root, follow_symlinks=follow_symlinks)
    if problems:
        refuse([f"data.path = {str(path)!r}: {problem}" for problem in problems])
    if not names:
        raise UserError(f"data.path = {str(path)!r}: the folder holds no files")
    return root, names


def json_lines_files(path: str | Path, root: Path, names: Sequence[str]) -> list[Path]:
    """The files if they are JSON Lines; none if they are not.

    Raises:
        UserError: some are and others aren't, or they are larger than what is tokenised at the start of a run.
    """
    rows = [name for name in names if is_json_lines(name)]
    if all(name.lower().endswith(".json") for name in names):
        raise UserError(
            f"data.path = {str(path)!r}: {names[0]} is JSON; must be JSON Lines (.jsonl, one object per line), "
            "or have another name to be trained on as it stands"
        )
    if rows and len(rows) < len(names):
        other = next(name for name in names if not is_json_lines(name))
        raise UserError(
            f"data.path = {str(path)!r}: holds JSON Lines ({rows[0]}) and others ({other}); must be of one kind"
        )
    _check_size(_name(path), root, rows)
    return [root / name for name in rows]


def rows_corpus(
    path: str | Path, rows: Sequence[Row], tokenizer: Tokenizer, heldout_fraction: float, vocab_size: int
) -> Corpus:
    """Documents of JSON Lines, each held out if the hash of its text says so.

    Raises:
        UserError: rows of another kind, nothing to train on, or ids outside the vocabulary.
    """
    corpus = _rows_corpus(path, rows, tokenizer, heldout_fraction)
    _check_vocabulary(corpus, vocab_size)
    return corpus


def _rows_corpus(path: str | Path, rows: Sequence[Row], tokenizer: Tokenizer, heldout_fraction: float) -> Corpus:
    if rows and rows[0].kind in CONVERSATIONS:
        raise UserError(f"data.path = {str(path)!r}: holds conversations, which are no stream of text")
    held = [is_held_out(row.key, heldout_fraction) for row in rows]
    streams = [
        TokenStream([(row.place, _document(row.text, row.place, tokenizer)) for row in chosen])
        for chosen in (
            [row for row, is_held in zip(rows, held, strict=True) if is_held is side] for side in (False, True)
        )
    ]
    if len(streams[0]) and len(streams[1]):
        return Corpus(_name(path), *streams)
    return split_end(_name(path), streams[0] if len(streams[0]) else streams[1], heldout_fraction)


def _name(path: str | Path) -> str:
    return f"data.path = {str(path)!r}"


def _user_corpus(
    path: str | Path,
    tokenizer: Tokenizer,
    token_dtype: str,
    heldout_fraction: float,
    text_field: str,
    follow_symlinks: bool,
) -> Corpus:
    root, names = data_files(path, follow_symlinks)
    if files := json_lines_files(path, root, names):
        return _rows_corpus(path, read_rows(files, text_field), tokenizer, heldout_fraction)
    tokenised = [name for name in names if name.endswith(TOKEN_SUFFIXES)]
    if not tokenised:
        return _text_corpus(_name(path), root, names, tokenizer, heldout_fraction)
    if len(tokenised) < len(names):
        other = next(name for name in names if name not in set(tokenised))
        raise UserError(
            f"data.path = {str(path)!r}: holds token files ({tokenised[0]}) and others ({other}); must be of one kind"
        )
    stream = TokenStream([(str(root / name), _map_tokens(root / name, token_dtype)) for name in names])
    return split_end(_name(path), stream, heldout_fraction)


def _map_tokens(file: Path, token_dtype: str) -> np.ndarray:
    check_regular(file)
    try:
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            array = _map_raw(file, np.dtype(token_dtype).newbyteorder("<"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: can't be read as token ids ({error})") from None
    if array.ndim != 1 or array.dtype.kind != "u" or array.dtype.itemsize not in (2, 4):
        raise UserError(
            f"{file}: is {array.dtype} of shape {array.shape}; "
            "token ids must be a one-dimensional array of uint16 or uint32"
        )
    return array


def _map_raw(file: Path, dtype: np.dtype) -> np.ndarray:
    size = file.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{size} bytes are no whole number of {dtype.name} ids, see data.token_dtype")
    return np.memmap(file, dtype, mode="r") if size else np.empty(0, dtype)


def _text_corpus(title: str, root: Path, names: list[str], tokenizer: Tokenizer, heldout_fraction: float) -> Corpus:
    refuse_unprepared(title, names)
    _check_size(title, root, names)
    held = [is_held_out(name, heldout_fraction) for name in names]
    if all(held) or not any(held):
        return split_end(title, _encode_files(root, names, tokenizer), heldout_fraction)
    train, heldout = (
        [name for name, side in zip(names, held, strict=True) if side is wanted] for wanted in (False, True)
    )
    return Corpus(title, _encode_files(root, train, tokenizer), _encode_files(root, heldout, tokenizer))


def _check_size(title: str, root: Path, names: list[str]) -> None:
    total = sum(os.stat(root / name).st_size for name in names)
    if total > MAX_TEXT_BYTES:
        raise UserError(
            f"{title}: {total / 2**30:.1f} GiB of text are more than the "
            f"{MAX_TEXT_BYTES / 2**30:.0f} GiB that are tokenised at the start of a run; "
            "tokenise it once into .npy or .bin files"
        )


def is_held_out(name: str, fraction: float) -> bool:
    """Whether something of this name is held out, whatever else there is."""
    checksum = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(checksum[:8], "big") < fraction * 2**64


def _encode_files(root: Path, names: list[str], tokenizer: Tokenizer) -> TokenStream:
    return TokenStream([(str(root / name), _encode_document(root / name, tokenizer)) for name in names])


def _encode_document(file: Path, tokenizer: Tokenizer) -> np.ndarray:
    data = read_bytes(file, MAX_TEXT_BYTES)
    if b"\0" in data:
        raise UserError(f"{file}: can't be read as text (it contains zero bytes, so it is not text)")
    return _document(data, str(file), tokenizer)


def _document(text: str | bytes, place: str, tokenizer: Tokenizer) -> np.ndarray:
    try:
        tokens = tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"{place}: can't be read as text ({error})") from None
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos is None else [tokenizer.eos]
    return np.concatenate([before, tokens, after], dtype=tokens.dtype, casting="unsafe") if len(tokens) else tokens


def split_end(name: str, stream: TokenStream, heldout_fraction: float) -> Corpus:
    """A corpus of a stream whose end is held out.

    Raises:
        UserError: it is too short.
    """
    if len(stream) < 4:
        raise UserError(f"{name}: holds {len(stream)} tokens; training needs at least 4")
    split = min(len(stream) - 2, round(len(stream) * (1 - heldout_fraction)))
    return Corpus(name, stream.slice(0, split), stream.slice(split, len(stream)))
