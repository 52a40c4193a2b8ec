"""Activations in .npz files, written in pieces so that no more than a piece is in memory.

An entry is ``name.npy``, or ``name/modality.npy`` for a module with one output per modality. Types that NumPy lacks
(bfloat16) are stored as integers of the same width, and the entry ``__dtypes__`` says of which, in JSON. The comment of
the archive is the version of the names.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike, commit, file_errors, make_aside
from shared_config.interchange.former import VERSION, former
from shared_config.interchange.reading import check_regular, parse_json

DTYPES = "__dtypes__"
TOKEN_FIELDS = ("tokens", "input_ids")
MASK_FIELDS = ("text_mask", "attention_mask")
COPIED_BYTES = 1 << 20


class ActivationWriter:
    """A .npz that appears under its name when it is complete; used as a context manager.

    Raises:
        UserError: if files can't be written, or if pieces of one name don't fit together.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        with file_errors(self.path, "can't be written"):
            self._aside = make_aside(self.path)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self._aside.name}.", dir=self._aside.parent))
        self._entries: dict[str, tuple[tuple[int, ...], np.dtype]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                with file_errors(self.path, "can't be written"):
                    self._assemble()
                    commit(self._aside, self.path)
        finally:
            self._aside.unlink(missing_ok=True)
            shutil.rmtree(self._folder, ignore_errors=True)

    def append(self, arrays: Mapping[str, object]) -> None:
        """Add to each name along the first axis; arrays, or dicts of them."""
        for name, array in flattened(arrays).items():
            shape, dtype = self._entries.get(name, ((0, *array.shape[1:]), array.dtype))
            if array.ndim == 0 or array.shape[1:] != shape[1:] or array.dtype != dtype:
                raise UserError(
                    f"{name}: {array.dtype}{list(array.shape)} does not continue {dtype}{list(shape)}; all but the "
                    "first axis must stay the same"
                )
            self._entries[name] = ((shape[0] + len(array), *shape[1:]), dtype)
            with file_errors(self.path, "can't be written"), self._part(name).open("ab") as part:
                part.write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")

    def _part(self, name: str) -> Path:
        return self._folder / f"{list(self._entries).index(name)}.bin"

    def _assemble(self) -> None:
        with zipfile.ZipFile(self._aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (shape, dtype) in self._entries.items():
                stored = _stored(dtype)
                header = {"descr": stored.str, "fortran_order": False, "shape": shape}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry, self._part(name).open("rb") as part:
                    np.lib.format.write_array_header_2_0(entry, header)
                    shutil.copyfileobj(part, entry, COPIED_BYTES)
            foreign = {name: dtype.name for name, (_, dtype) in self._entries.items() if _stored(dtype) != dtype}
            with archive.open(f"{DTYPES}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.array(json.dumps(foreign)))
            archive.comment = VERSION.encode()


def with_suffix(path: PathLike) -> Path:
    """The path, ``.npz`` appended if it doesn't end so, as `numpy.savez` does."""
    path = Path(path)
    return path if path.name.endswith(".npz") else path.with_name(f"{path.name}.npz")


def write_activations(path: PathLike, activations: Mapping[str, object]) -> None:
    """Arrays by name, or dicts of arrays by modality, into a .npz file (see `with_suffix`), whole or not at all.

    Raises:
        UserError: if it can't be written.
    """
    with ActivationWriter(with_suffix(path)) as writer:
        writer.append({name: array[None] for name, array in flattened(activations).items()})
        writer._entries = {name: (shape[1:], dtype) for name, (shape, dtype) in writer._entries.items()}


def read_activations(path: PathLike, arch: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by the names of their entries, in the types they had.

    Args:
        arch: ``vlm.arch`` of the model, by which names of former versions are recognised where they are ambiguous.

    Raises:
        UserError: no such file, or not one of ours.
    """
    check_regular(path)
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as zipped:
            archive = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files}
            foreign = parse_json(str(arrays.pop(DTYPES)))
            version = zipped.comment.decode(errors="replace")
            if not isinstance(foreign, dict):
                raise ValueError(f"{DTYPES} must hold a JSON object")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: can't be read as a file of activations: {error}") from None
    types = {name: np.dtype(getattr(ml_dtypes, dtype)) for name, dtype in foreign.items()}
    arrays = {name: array.view(types[name]) if name in types else array for name, array in arrays.items()}
    return arrays if version == VERSION else former(arrays, {"vlm": {"arch": arch}} if arch else None).named(arrays)


def flattened(activations: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Arrays by name; an array of a modality is "name/modality"."""
    flat: dict[str, np.ndarray] = {}
    for name, value in activations.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{modality}": np.asarray(array) for modality, array in value.items()}
        else:
            flat[name] = np.asarray(value)
    return flat


def token_batches(
    dataset: Iterable[object], batch_size: int, max_samples: int | None, vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """int32 (batch_size, S) of consecutive samples, and bool (batch_size, S), False at padding, or None if no sample
    has a mask; the last batch may be smaller.

    Args:
        dataset: of token ids (S,), or of mappings with "tokens" or "input_ids", and perhaps "text_mask" or
            "attention_mask" (S,), of bools or of 0 and 1.

    Raises:
        UserError: invalid numbers, no samples, samples of other kinds or of different lengths, ids outside the
            vocabulary.
    """
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: must be at least 1")
    if max_samples is not None and max_samples < 1:
        raise UserError(f"max_samples = {max_samples}: must be at least 1, or None for all")
    samples = enumerate(itertools.islice(dataset, max_samples))
    length = None
    while batch := list(itertools.islice(samples, batch_size)):
        rows = [_tokens(place, sample, vocab_size) for place, sample in batch]
        masks = [_mask(place, sample, len(row)) for (place, sample), row in zip(batch, rows, strict=True)]
        length = len(rows[0]) if length is None else length
        for tokens in rows:
            if len(tokens) != length:
                raise UserError(f"dataset has samples of {length} and of {len(tokens)} tokens: all must be as long")
        given = [mask is not None for mask in masks]
        real = [np.ones(length, bool) if mask is None else mask for mask in masks]
        yield np.stack(rows).astype(np.int32), np.stack(real) if any(given) else None
    if length is None:
        raise UserError("dataset is empty: at least one sample is needed")


def _tokens(place: int, sample: object, vocab_size: int) -> np.ndarray:
    if isinstance(sample, Mapping):
        field = next((name for name in TOKEN_FIELDS if name in sample), None)
        if field is None:
            raise UserError(f"dataset[{place}] has {sorted(sample)}: must have one of {', '.join(TOKEN_FIELDS)}")
        sample = sample[field]
    tokens = np.asarray(sample)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"dataset[{place}] is {tokens.dtype}{list(tokens.shape)}: must be token ids of one sequence")
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise UserError(f"dataset[{place}] holds {bad[0]}: token ids must be in [0, {vocab_size})")
    return tokens


def _mask(place: int, sample: object, length: int) -> np.ndarray | None:
    """bool (S,), where the tokens of a sample are real; None if it doesn't say."""
    if not isinstance(sample, Mapping):
        return None
    field = next((name for name in MASK_FIELDS if name in sample), None)
    if field is None:
        return None
    mask = np.asarray(sample[field])
    if mask.shape != (length,) or not np.isin(mask, (0, 1)).all():
        raise UserError(f"dataset[{place}][{field!r}] is {mask.dtype}{list(mask.shape)}: must be {length} of 0 and 1")
    return mask.astype(bool)


def _stored(dtype: np.dtype) -> np.dtype:
    """The type that a .npy can name: the own one, or an integer of the same width."""
    return dtype if np.dtype(dtype.str) == dtype else np.dtype(f"u{dtype.itemsize}")
