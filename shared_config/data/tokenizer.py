"""Text to token ids and back: bytes, or a local Hugging Face tokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shared_config.errors import UserError
from shared_config.reading import check_regular, read_json

BOS = 256
EOS = 257
VOCAB_SIZE = 258


class Tokenizer(Protocol):
    """``vocab_size`` is one more than the largest id. ``bos`` and ``eos`` enclose a document; None if there is none."""

    vocab_size: int
    bos: int | None
    eos: int | None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text, without ``bos`` and ``eos``: one-dimensional, unsigned."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; ``bos``, ``eos`` and other special ids give nothing."""
        ...

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text, one an id; joined they are ``decode``. A character of several ids comes with its last id."""
        ...


class ByteTokenizer:
    """A byte is a token. Ids 256 and 257 begin and end a document; larger ones, which a model may have, give U+FFFD."""

    vocab_size = VOCAB_SIZE
    bos: int | None = BOS
    eos: int | None = EOS

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            token = int(token)
            if token < 256:
                yield decoder.decode(bytes([token]))
            else:
                yield decoder.decode(b"", final=True) + ("" if token in (BOS, EOS) else "\ufffd")
        yield decoder.decode(b"", final=True)


class HuggingFaceTokenizer:
    """The ``tokenizer.json`` of a local folder; ``bos`` and ``eos`` as its ``tokenizer_config.json`` names them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._tokenizer = load_library_tokenizer(self.folder / "tokenizer.json")
        names = _special_names(self.folder / "tokenizer_config.json")
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos = self._id(names.get("bos_token"))
        self.eos = self._id(names.get("eos_token"))
        if self.bos is None and self.eos is None:
            raise UserError(
                f"data.tokenizer = {str(folder)!r}: tokenizer_config.json must name a bos_token or an eos_token "
                "that is in tokenizer.json, to tell documents apart"
            )

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._tokenizer.token_to_id(name)

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        seen: list[int] = []
        shown = ""
        for token in ids:
            seen.append(int(token))
            text = self.decode(seen)
            complete = not text.endswith("\ufffd") and text.startswith(shown)
            yield text[len(shown) :] if complete else ""
            shown = text if complete else shown
        yield self.decode(seen)[len(shown) :]


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``: "bytes" or a folder.

    Raises:
        UserError: no such folder, no usable tokenizer in it, or the library that reads it is not installed.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def load_library_tokenizer(file: Path) -> Any:
    """What the package 'tokenizers' makes of a tokenizer.json.

    Raises:
        UserError: no such file, not one that can be read, or the package is not installed.
    """
    if not file.exists():
        raise UserError(f"data.tokenizer = {str(file.parent)!r}: must be 'bytes' or a folder with a tokenizer.json")
    try:
        from tokenizers import Tokenizer as Library  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"data.tokenizer = {str(file.parent)!r}: reading it needs the package 'tokenizers' (pip install tokenizers)"
        ) from None
    check_regular(file)
    try:
        return Library.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: not a tokenizer that can be read ({error})") from None


def _special_names(file: Path) -> dict[str, str]:
    fields = read_json(file) if file.exists() else {}
    entries = {key: fields.get(key) for key in ("bos_token", "eos_token")}
    names = {key: entry["content"] if isinstance(entry, dict) else entry for key, entry in entries.items()}
    return {key: name for key, name in names.items() if name}
