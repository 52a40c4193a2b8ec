"""Documents of large collections of text, one after the other: no file is held in memory.

text (.txt) is a document a file, or several that a separator parts; JSON Lines (.jsonl, .ndjson), Parquet (.parquet)
and streams of Arrow (.arrow), as `datasets` saves them, are a document a row. Text and JSON Lines may be compressed
(.gz, .zst).
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shared_config.data.datasets_folder import data_files
from shared_config.data.jsonl import SUFFIXES as JSON_LINES
from shared_config.data.jsonl import parse_object, refuse, text_problem, type_name
from shared_config.errors import UserError
from shared_config.interchange.reading import check_regular, files_below, opened

TEXT, PARQUET, ARROW = ".txt", ".parquet", ".arrow"
COMPRESSED = (".gz", ".zst")
READ_AT_ONCE = 2**18
ROWS_AT_ONCE = 256
MAX_DOCUMENT_BYTES = 2**25
EXTRA = "kempnerforge-twin[prepare]"


@dataclass(frozen=True)
class Span:
    """Part of a file, of ``size`` bytes: ``start`` to ``stop`` are the bytes in which rows of JSON Lines begin, numbers
    of row groups of Parquet, or all bytes of other files.
    """

    file: Path
    start: int
    stop: int
    size: int


def source_files(sources: Sequence[Path], follow_symlinks: bool = False) -> list[tuple[str, Path]]:
    """The files that sources are or hold, in the order of the sources and of relative paths, each with the name that
    it has whatever folder the sources are in.

    Raises:
        UserError: listing what is not there, of another kind, or given twice.
    """
    found: list[tuple[str, Path]] = []
    problems: list[str] = []
    for source in sources:
        names, bad = files_below(source, follow_symlinks=follow_symlinks) if source.is_dir() else ([source.name], [])
        root = source if source.is_dir() else source.parent
        names = data_files(source, names)
        problems += bad
        if not names:
            problems.append(f"{source}: the folder holds no files")
        found += [(name, root / name) for name in names]
    seen: dict[Path, Path] = {}
    for _, file in found:
        if (first := seen.setdefault(file.resolve(), file)) is not file:
            problems.append(f"{file}: is read already, as {first}")
        tables = (PARQUET, ARROW)
        if kind_of(file) not in (TEXT, *JSON_LINES, *tables) or (kind_of(file) in tables and _compression(file)):
            kinds = ", ".join([TEXT, *JSON_LINES, *tables])
            problems.append(
                f"{file}: must be one of {kinds}; text and JSON Lines may end in {' or '.join(COMPRESSED)} too"
            )
    refuse(problems)
    for _, file in found:
        check_regular(file)
    return found


def refuse_unprepared(title: str, names: Sequence[str]) -> None:
    """Refuse to train on files that only `prepare` reads.

    Raises:
        UserError: naming the first.
    """
    for name in names:
        if Path(name).suffix.lower() in (*COMPRESSED, PARQUET, ARROW):
            raise UserError(f"{title}: holds {name}: must be made into token files first, by kempnerforge prepare")


def kind_of(file: Path) -> str:
    """The suffix that says how a file is read, without that of its compression."""
    return Path(file.stem if _compression(file) else file.name).suffix.lower()


def spans_of(file: Path, size: int) -> Iterator[Span]:
    """A file in parts of about ``size`` bytes, as far as it can be read from anywhere: JSON Lines by bytes, Parquet by
    groups of rows; all others as a whole.

    Raises:
        UserError: it can't be read.
    """
    total = check_regular(file)
    if kind_of(file) == PARQUET:
        yield from _row_groups(file, size)
    elif kind_of(file) in JSON_LINES and not _compression(file):
        for start in range(0, max(total, 1), size):
            stop = min(start + size, total)
            yield Span(file, start, stop, stop - start)
    else:
        yield Span(file, 0, total, total)


def documents(span: Span, text_field: str = "text", separator: str = "") -> Iterator[str]:
    """The documents of a part of a file.

    Args:
        text_field: the field, or column, of a row that holds its document.
        separator: what parts the documents of a text; "": a file is one.

    Raises:
        UserError: naming the file and the place of what can't be read.
    """
    if kind_of(span.file) == PARQUET:
        yield from _of_parquet(span, text_field)
    elif kind_of(span.file) == ARROW:
        yield from _of_arrow(span.file, text_field)
    elif kind_of(span.file) == TEXT:
        for place, record in _records(span.file, _chunks(span.file), separator.encode() or None):
            if b"\0" in record:
                raise UserError(f"{_at(span.file, place)}: contains zero bytes, so it is no text")
            yield _decode(record, span.file, place)
    else:
        yield from _of_json_lines(span, text_field)


def _of_json_lines(span: Span, text_field: str) -> Iterator[str]:
    before = max(span.start - 1, 0)  # whose line feed shows that a row begins where the span does
    for index, (place, record) in enumerate(_records(span.file, _chunks(span.file, before), b"\n", before)):
        if place >= span.stop and not _compression(span.file):
            return
        line = _decode(record, span.file, place).strip(" \t\r") if index > 0 or span.start == 0 else ""
        if not line:
            continue
        fields, problem = parse_object(line)
        text = fields.get(text_field)
        if not problem and not isinstance(text, str):
            has = ", ".join(map(repr, fields)) or "no fields"
            known = text_field in fields
            why = f", not {type_name(text)}" if known else f" (see --text-field); has {has}"
            problem = f"{text_field!r} must be text{why}"
        problem = problem or text_problem(str(text))
        if problem:
            raise UserError(f"{_at(span.file, place)}: {problem}")
        yield str(text)


def _records(
    file: Path, chunks: Iterator[bytes], separator: bytes | None, first: int = 0
) -> Iterator[tuple[int, bytes]]:
    """Places (bytes of what is uncompressed) and what stands between separators, the last one even if it is empty."""
    rest, place = b"", first
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        for record in whole:
            yield place, record
            place += len(record) + len(separator or b"")
        if len(rest) > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{_at(file, place)}: a document of more than {MAX_DOCUMENT_BYTES} bytes; must be at most that long"
                + (" (--separator parts the documents of a text)" if kind_of(file) == TEXT else "")
            )
    yield place, rest


def _chunks(file: Path, start: int = 0) -> Iterator[bytes]:
    """The bytes of a file from ``start`` on, uncompressed.

    Raises:
        UserError: it can't be read, or ends before what was compressed does.
    """
    with opened(file) as stream:
        if not _compression(file):
            stream.seek(start)
            while chunk := stream.read(READ_AT_ONCE):
                yield chunk
            return
        try:
            yield from _inflated(file, stream)
        except (zlib.error, *_zstandard_errors(file)) as error:
            raise UserError(f"{file}: can't be uncompressed: {error}") from None


def _inflated(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    """What a file of one or several compressed streams, one after the other, holds."""
    inflater = _inflater(file)
    fed = False
    while chunk := stream.read(READ_AT_ONCE // 4):
        while chunk:
            if inflater.eof:
                inflater, fed = _inflater(file), False
            if not fed and not chunk.strip(b"\0"):
                break  # some writers fill up with zeros
            fed = True
            yield inflater.decompress(chunk)
            chunk = inflater.unused_data if inflater.eof else b""
    if fed and not inflater.eof:
        raise UserError(f"{file}: can't be uncompressed: it ends too early")


def _inflater(file: Path) -> Any:
    """What both libraries have: decompress, eof and unused_data."""
    if _compression(file) == ".gz":
        return zlib.decompressobj(wbits=31)
    return _library("zstandard", file).ZstdDecompressor().decompressobj()


def _zstandard_errors(file: Path) -> tuple[type[Exception], ...]:
    return (_library("zstandard", file).ZstdError,) if _compression(file) == ".zst" else ()


def _row_groups(file: Path, size: int) -> Iterator[Span]:
    """Groups of rows that lie together and have about ``size`` bytes."""
    found = _parquet(file).metadata
    start = filled = 0
    for group in range(found.num_row_groups):
        filled += found.row_group(group).total_byte_size
        if filled >= size or group == found.num_row_groups - 1:
            yield Span(file, start, group + 1, filled)
            start, filled = group + 1, 0


def _of_parquet(span: Span, text_field: str) -> Iterator[str]:
    table = _parquet(span.file)
    _check_column(span.file, text_field, table.schema_arrow.names)
    row = sum(table.metadata.row_group(group).num_rows for group in range(span.start))
    groups = list(range(span.start, span.stop))
    try:
        for batch in table.iter_batches(ROWS_AT_ONCE, groups, [text_field]):
            yield from _texts(span.file, batch.column(0), text_field, row)
            row += batch.num_rows
    except (OSError, _library("pyarrow", span.file).ArrowException) as error:
        raise UserError(f"{span.file}: can't be read as Parquet: {error}") from None


def _of_arrow(file: Path, text_field: str) -> Iterator[str]:
    """Of batches that are mapped from the file, a few rows at a time."""
    library, row = _library("pyarrow", file), 0
    try:
        with library.memory_map(str(file)) as source, library.ipc.open_stream(source) as stream:
            _check_column(file, text_field, stream.schema.names)
            for batch in stream:
                column = batch.column(text_field)
                for start in range(0, len(column), ROWS_AT_ONCE):
                    yield from _texts(file, column[start : start + ROWS_AT_ONCE], text_field, row + start)
                row += len(column)
    except (OSError, library.ArrowException) as error:
        raise UserError(f"{file}: can't be read as a stream of Arrow: {error}") from None


def _check_column(file: Path, text_field: str, names: Sequence[str]) -> None:
    if text_field not in names:
        columns = ", ".join(map(repr, names))
        raise UserError(f"{file}: must have a column {text_field!r} (see --text-field); has {columns}")


def _texts(file: Path, column: Any, text_field: str, first: int) -> Iterator[str]:
    """The values of a column of Arrow, whose rows in the file begin with ``first``."""
    for row, text in enumerate(column.to_pylist(), first):
        if not isinstance(text, str):
            raise UserError(f"{file}, row {row}: {text_field!r} must be text, not {text!r:.40}")
        yield text


def _parquet(file: Path) -> Any:
    library = _library("pyarrow", file)
    try:
        return _library("pyarrow.parquet", file).ParquetFile(file)
    except (OSError, library.ArrowException) as error:
        raise UserError(f"{file}: can't be read as Parquet: {error}") from None


def _library(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{file}: reading it needs the package '{package}' (pip install '{EXTRA}')") from None


def _compression(file: Path) -> str:
    return file.suffix.lower() if file.suffix.lower() in COMPRESSED else ""


def _decode(record: bytes, file: Path, place: int) -> str:
    try:
        return (record.removeprefix(b"\xef\xbb\xbf") if place == 0 else record).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{_at(file, place)}: can't be read as text ({error})") from None


def _at(file: Path, place: int) -> str:
    return f"{file}, byte {place}"
