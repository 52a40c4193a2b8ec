"""Text to token ids and back: bytes, or a local Hugging Face tokenizer."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from shared_config.contract.image_token import prefix_text
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.reading import check_regular, read_json
from shared_config.interchange.tokens import stop_ids, tokenizer_problem

if typing.TYPE_CHECKING:
    import tokenizers

BOS = 256
EOS = 257
VOCAB_SIZE = 258
PADDED_TO = 1024
"""Vocabularies of models are rounded up, to multiples of at most this many ids."""
LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, and so the most tokens that one can be split over."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """``vocab_size`` is one more than the largest id. ``bos`` and ``eos`` enclose a document; None if there is none.
    A text ends with any of ``stops``.
    """

    vocab_size: int
    bos: int | None
    eos: int | None
    stops: tuple[int, ...]

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of the text of a document, without ``bos`` and ``eos``: one-dimensional, unsigned.

        The name of a special token in a document is text like any other.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, by the threads of the library where it has some."""
        ...

    def encode_with_images(self, text: str, image_token: int | None) -> np.ndarray:
        """As `encode`, but the name of the token that stands for an image is this token."""
        return self.encode(text)

    @property
    def begin(self) -> int | None:
        """The id that is named as the one that begins a text, also where the tokenizer itself puts none."""
        return self.bos

    def encode_prefix(self, text: str) -> list[int]:
        """Ids of a prompt for models with ``vlm.prefix_lm``: of `prefix_text`, after ``begin``."""
        ids = self.encode_prompt(prefix_text(text))
        return ids if self.begin is None or ids[0] == self.begin else [self.begin, *ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued. Names of special tokens are these tokens, and what the tokenizer puts before
        a text stands there once.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; ``bos``, ``eos`` and other special ids give nothing."""
        ...

    def decode_stream(self, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
        """Pieces of text, one per id and one at the end; joined they are what ``ids`` add to the text of ``after``.

        A character of several ids comes with its last id, or with the id after it.
        """
        ...


class ByteTokenizer(Tokenizer):
    """A byte is a token. Ids 256 and 257 begin and end a document; larger ones, which a model may have, give U+FFFD.

    With a custom ``eos``, documents have no start id.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, eos: int | None = None):
        self.bos: int | None = BOS if eos is None else None
        self.eos: int | None = EOS if eos is None else eos
        self.stops = (self.eos,)

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        before = [] if self.bos is None else [self.bos]
        return [*before, *self.encode(text).tolist()]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in after:
            self._next(decoder, int(token))
        for token in ids:
            yield self._next(decoder, int(token))
        yield decoder.decode(b"", final=True)

    def _next(self, decoder: codecs.IncrementalDecoder, token: int) -> str:
        if token < 256 and token != self.eos:
            return decoder.decode(bytes([token]))
        return decoder.decode(b"", final=True) + ("" if token in (BOS, EOS, self.eos) else "\ufffd")


class HuggingFaceTokenizer(Tokenizer):
    """The ``tokenizer.json`` of a local folder.

    ``tokenizer_config.json`` names ``eos`` and ``bos``; the latter begins documents and prompts if the post-processor
    of the tokenizer puts it before a text. ``stops`` are also those of a ``generation_config.json`` and ``config.json``
    in the folder. With a custom ``eos``, documents have no start id.
    """

    def __init__(self, folder: str | Path, eos: int | None = None):
        self.folder = Path(folder)
        fields = _read_config(self.folder / "tokenizer_config.json")
        self._tokenizer, self._documents = (load_library_tokenizer(self.folder / "tokenizer.json") for _ in range(2))
        bos_name, eos_name = (_special_name(self.folder, fields, key) for key in ("bos_token", "eos_token"))
        _declare_special(self._tokenizer, bos_name, eos_name)
        _declare_special(self._documents, bos_name, eos_name)
        self._documents.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._named = {self._id(name) for name in (bos_name, eos_name)} - {None}
        self._special = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._prefix = self._before_a_text()
        self._byte_tokens = _byte_tokens(self._tokenizer)
        begins = eos is None and self._id(bos_name) in self._prefix
        self.bos = self._id(bos_name) if begins else None
        self._begin = self._id(bos_name)
        self.eos = self._id(eos_name) if eos is None else eos
        ends = () if self.eos is None else (self.eos,)
        self.stops = tuple(dict.fromkeys((*ends, *stop_ids(self.folder))))

    @property
    def begin(self) -> int | None:
        return self._begin

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._tokenizer.token_to_id(name)

    def _before_a_text(self) -> list[int]:
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [id for id, _ in itertools.takewhile(lambda pair: pair[1], pairs)]

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode("utf-8")
        ids = self._documents.encode(text, add_special_tokens=False).ids
        return np.array(self._without_named(ids), np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._documents.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(self._without_named(encoding.ids), np.uint32) for encoding in encodings]

    def encode_with_images(self, text: str, image_token: int | None) -> np.ndarray:
        if image_token not in self._special:
            return self.encode(text)
        ids = self._seeing(image_token).encode(text, add_special_tokens=False).ids
        return np.array(self._without_named(ids), np.uint32)

    @functools.cache  # noqa: B019
    def _seeing(self, image_token: int) -> tokenizers.Tokenizer:
        """The library's tokenizer, to which all special tokens but one are text."""
        content = json.loads(self._documents.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["special"] and token["id"] != image_token
        seeing = type(self._documents).from_str(json.dumps(content))
        seeing.encode_special_tokens = True
        return seeing

    def _without_named(self, ids: list[int]) -> list[int]:
        """``ids`` with the names of ``bos`` and ``eos``, which may be in the vocabulary as words, letter by letter."""
        if self._named.isdisjoint(ids):
            return ids
        parts = (self._letters(token) if token in self._named else [token] for token in ids)
        return [token for part in parts for token in part]

    def _letters(self, token: int) -> list[int]:
        encoded = (self._documents.encode(letter, add_special_tokens=False).ids for letter in self._text(token))
        return [id for ids in encoded for id in ids if id not in self._named]

    def _text(self, token: int) -> str:
        return self._documents.id_to_token(token) or ""

    def encode_prompt(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if ids[: len(self._prefix)] == self._prefix else [*self._prefix, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def decode_stream(self, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
        shown = [token for token in map(int, after) if token not in self._special]
        waiting: list[int] = []
        for token in map(int, ids):
            if token in self._special:
                yield ""
                continue
            waiting.append(token)
            count = 0 if token in self._byte_tokens else self._complete(shown, waiting)
            yield self._added(shown, waiting[:count])
            if count:
                shown, waiting = waiting[:count], waiting[count:]
        yield self._added(shown, waiting)

    def _added(self, shown: list[int], new: list[int]) -> str:
        """What ``new`` ids add to the text of those before; the decoder may look at one more id than it writes."""
        if not new:
            return ""
        before, text = self.decode(shown), self.decode([*shown, *new])
        common = len(before) if text.startswith(before) else _common_length(before, text)
        return text[common:]

    def _complete(self, shown: list[int], waiting: list[int]) -> int:
        """How many of the ids that wait have a text that no later id changes."""
        text = self.decode([*shown, *waiting])
        if not text.endswith("\ufffd"):
            return len(waiting) if text.startswith(self.decode(shown)) or len(waiting) > 2 * LONGEST_CHARACTER else 0
        if len(waiting) <= 2 * LONGEST_CHARACTER:
            return 0
        whole = self.decode(waiting)
        for count in range(len(waiting) - LONGEST_CHARACTER + 1, len(waiting) - 2 * LONGEST_CHARACTER, -1):
            if self.decode(waiting[:count]) + self.decode(waiting[count:]) == whole:
                return count
        return 0


def build_tokenizer(name: str, eos: int | None = None) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``: "bytes" or a folder. ``eos``: what ends a document, in place of its own.

    Raises:
        UserError: no such folder, no usable tokenizer in it, or the library that reads it is not installed.
    """
    return ByteTokenizer(eos) if name == "bytes" else HuggingFaceTokenizer(name, eos)


def check_vocabulary(tokenizer: Tokenizer, name: str, vocab_size: int) -> None:
    """Compare a model's vocabulary with that of the tokenizer that makes its ids; a far larger one is reported on
    stderr.

    Raises:
        ConfigError: the tokenizer has ids that the model does not have.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size = {vocab_size}: must be at least {tokenizer.vocab_size}, the ids of "
                f"data.tokenizer = {name!r}"
            ]
        )
    if vocab_size > -(-tokenizer.vocab_size // PADDED_TO) * PADDED_TO:
        print(
            f"model.vocab_size = {vocab_size}: data.tokenizer = {name!r} has only {tokenizer.vocab_size} ids; "
            "the others are never seen",
            file=sys.stderr,
        )


def _common_length(a: str, b: str) -> int:
    return next(
        (place for place, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b))
    )


def load_library_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json as the package 'tokenizers' reads it, without padding or truncation.

    Raises:
        UserError: no such file, not one that can be read, or the package is not installed.
    """
    if not file.exists():
        raise UserError(f"data.tokenizer = {str(file.parent)!r}: {tokenizer_problem(file.parent)}")
    try:
        from tokenizers import Tokenizer as Library  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"data.tokenizer = {str(file.parent)!r}: reading it needs the package 'tokenizers' "
            "(pip install 'kempnerforge-twin[chat]')"
        ) from None
    check_regular(file)
    try:
        loaded = Library.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: not a tokenizer that can be read ({error})") from None
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def _declare_special(tokenizer: tokenizers.Tokenizer, *names: str | None) -> None:
    """Make tokens special that are named as such, as transformers does."""
    from tokenizers import AddedToken  # pyright: ignore[reportMissingImports]

    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for name in names:
        if name is not None and name not in special and tokenizer.token_to_id(name) is not None:
            tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])


def _byte_tokens(tokenizer: tokenizers.Tokenizer) -> set[int]:
    """Ids of bytes whose text depends on the bytes after them: a run that is no UTF-8 is shown otherwise as a whole."""
    if '"ByteFallback"' not in tokenizer.to_str():
        return set()
    return {id for text, id in tokenizer.get_vocab(with_added_tokens=True).items() if BYTE_TOKEN.fullmatch(text)}


def _read_config(file: Path) -> Mapping[str, object]:
    return read_json(file) if file.exists() else {}


def _special_name(folder: Path, fields: Mapping[str, object], key: str) -> str | None:
    entry = fields.get(key)
    if entry is None:
        entry = _read_config(folder / "special_tokens_map.json").get(key)
    name = entry.get("content") if isinstance(entry, dict) else entry
    if name is not None and not isinstance(name, str):
        raise UserError(f"{folder}: {key} = {entry!r}: must be the text of a token")
    return name or None
