"""The index of a folder of token files: what made them, what they hold, and what follows for whoever reads them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared_config.errors import UserError
from shared_config.interchange.files import written_aside
from shared_config.interchange.reading import check_regular, read_bytes, read_json
from shared_config.interchange.tokens import READ

INDEX = "token_index.json"
UNFINISHED = ".token_index.part.jsonl"
"""What is there as long as the files of a folder are being made."""
VERSION = 1
DTYPES = {"uint16": 2, "uint32": 4}
"""Bytes of an id, little-endian."""
MAX_TOKENIZER_BYTES = 2**30


@dataclass(frozen=True)
class Shard:
    """A file of ids, end to end, and how many documents and ids it holds."""

    file: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class TokenIndex:
    """What a folder of token files holds.

    Attributes:
        tokenizer, tokenizer_hash: name and hash (`tokenizer_hash`) of what made the ids.
        vocab_size: one more than the largest id there can be.
        bos, eos: what encloses a document; None if nothing does.
        dtype: "uint16" or "uint32".
        sources: hash of what was read, and how.
        shards: in the order of the documents.
    """

    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    bos: int | None
    eos: int | None
    dtype: str
    sources: str
    shards: tuple[Shard, ...] = ()

    @property
    def documents(self) -> int:
        """Of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Of all shards."""
        return sum(shard.tokens for shard in self.shards)


def dtype_for(vocab_size: int) -> str:
    """The smallest dtype that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokenizer_hash(name: str, bos: int | None, eos: int | None) -> str:
    """A hash of all that decides which ids a text has: the tokenizer.json of the folder ``name`` (nothing of "bytes"),
    and what encloses documents.

    Raises:
        UserError: a file that can't be read.
    """
    content = b"" if name == "bytes" else read_bytes(Path(name) / READ, MAX_TOKENIZER_BYTES)
    return hashlib.sha256(content + f"\0{bos} {eos}".encode()).hexdigest()


def write_index(folder: Path, index: TokenIndex) -> None:
    """Write the index of a folder whose shards are all there."""
    fields = {"version": VERSION, "documents": index.documents, "tokens": index.tokens, **dataclasses.asdict(index)}
    with written_aside(folder / INDEX) as aside:
        aside.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def read_index(folder: Path) -> TokenIndex:
    """The index of a folder, once it is certain that the files are as it says.

    Raises:
        UserError: naming the field and its value, or the file and its size.
    """
    file = folder / INDEX
    fields = read_json(file)
    index = _parse(fields, file)
    for name in ("documents", "tokens"):
        if fields.get(name) != getattr(index, name):
            raise UserError(f"{file}: {name} = {fields.get(name)!r}: its shards have {getattr(index, name)}")
    for shard in index.shards:
        size, expected = check_regular(folder / shard.file), shard.tokens * DTYPES[index.dtype]
        if size != expected:
            raise UserError(
                f"{folder / shard.file}: has {size} bytes; must be {expected}, as {INDEX} has {shard.tokens} tokens "
                f"of {index.dtype} for it"
            )
    return index


def _parse(fields: Mapping[str, object], file: Path) -> TokenIndex:
    def value(owner: Mapping[str, object], name: str, kind: type, optional: bool = False, where: str = "") -> object:
        found = owner.get(name)
        if not (isinstance(found, kind) and not isinstance(found, bool)) and not (optional and found is None):
            raise UserError(f"{file}: {where}{name} = {found!r}: must be {_NAMES[kind]}{' or null' * optional}")
        if isinstance(found, int) and found < 0:
            raise UserError(f"{file}: {where}{name} = {found}: must be at least 0")
        return found

    if fields.get("version") != VERSION:
        raise UserError(f"{file}: version = {fields.get('version')!r}: must be {VERSION}")
    if fields.get("dtype") not in DTYPES:
        raise UserError(f"{file}: dtype = {fields.get('dtype')!r}: must be one of {', '.join(DTYPES)}")
    texts = {name: value(fields, name, str) for name in ("tokenizer", "tokenizer_hash", "dtype", "sources")}
    ids = {name: value(fields, name, int, name != "vocab_size") for name in ("vocab_size", "bos", "eos")}
    entries = value(fields, "shards", list)
    assert isinstance(entries, list)
    shards = []
    for number, entry in enumerate(entries):
        where = f"shards[{number}]."
        if not isinstance(entry, dict):
            raise UserError(f"{file}: shards[{number}] = {entry!r}: must be an object")
        found = {name: value(entry, name, kind, where=where) for name, kind in _OF_SHARD.items()}
        if Path(str(found["file"])).name != found["file"]:
            raise UserError(f"{file}: {where}file = {found['file']!r}: must be the name of a file beside the index")
        shards.append(Shard(**found))  # type: ignore[arg-type]
    return TokenIndex(**texts, **ids, shards=tuple(shards))  # type: ignore[arg-type]


_NAMES = {str: "text", int: "a number", list: "a list"}
_OF_SHARD = {"file": str, "documents": int, "tokens": int}
