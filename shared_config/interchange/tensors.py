"""Named arrays in one safetensors file: written whole or not at all, read lazily through a memory map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike, file_errors, written_aside
from shared_config.interchange.reading import check_regular, parse_json
from shared_config.interchange.states import host_array

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""safetensors' names of the dtypes that NumPy (with ml_dtypes) can hold."""

TRACE = "kempnerforge_trace"
"""Key of the metadata of a trace: the number of its format."""


def write_tensors(path: PathLike, tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays or tensors of any library and memory layout (views and transposes included) to one file, atomically.

    Raises:
        UserError: naming the file, if it can't be written, or the tensor, if its dtype has no place in the format.
    """
    stored = {name: _storable(name, array) for name, array in tensors.items()}
    with written_aside(path) as aside:
        permissions = aside.stat().st_mode
        save_file(stored, aside, metadata=dict(metadata) if metadata else None)  # {} would break the header
        aside.chmod(permissions)  # the library makes files that only their owner can read


def read_tensors(path: PathLike, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The named arrays (all of them by default), in file order. See `TensorFile.read` for how they share the file.

    Raises:
        UserError: if the file is missing, truncated or no safetensors file, or lacks one of the names.
    """
    file = TensorFile(path)
    return {name: file.read(name) for name in (file.entries if names is None else names)}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: what the header says, and the bytes it takes in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file; reading a tensor costs nothing until its values are touched.

    Attributes:
        entries: name -> `TensorEntry`, in the order of the file.
        metadata: the text metadata of the file.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder, where a safetensors file is needed")
        check_regular(self.path)
        with file_errors(self.path, "can't be read as a safetensors file"):
            with safe_open(self.path, framework="np"):
                pass  # the library checks the header and that it accounts for every byte of the file
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c")
        start = 8 + int.from_bytes(self._bytes[:8].tobytes(), "little")
        header = parse_json(self._bytes[8:start].tobytes())
        assert isinstance(header, dict)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        entries = {name: self._entry(name, fields, start) for name, fields in header.items()}
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1].start))

    def read(self, name: str) -> np.ndarray:
        """One array, backed by the file until written to (copy on write: the file never changes).

        Raises:
            UserError: if the file has no such tensor.
        """
        if name not in self.entries:
            raise UserError(f"{self.path}: has no tensor {name!r}")
        entry = self.entries[name]
        flat = np.asarray(self._bytes[entry.start : entry.stop])
        if entry.start % entry.dtype.itemsize:
            flat = flat.copy()  # files of other writers may be unaligned
        return flat.view(entry.dtype).reshape(entry.shape)

    def _entry(self, name: str, fields: dict[str, Any], start: int) -> TensorEntry:
        if fields["dtype"] not in DTYPES:
            raise UserError(
                f"{self.path}: tensor {name!r} has dtype {fields['dtype']}: must be one of {', '.join(DTYPES)}"
            )
        first, last = fields["data_offsets"]
        return TensorEntry(DTYPES[fields["dtype"]], tuple(fields["shape"]), start + first, start + last)


def is_trace(path: PathLike) -> bool:
    """Whether a file is a trace."""
    try:
        return TRACE in TensorFile(path).metadata
    except UserError:
        return False


def _storable(name: str, array: object) -> np.ndarray:
    """The array as safetensors must have it: C-contiguous (or it stores other values), in native byte order."""
    values = host_array(name, array)
    native = values.dtype.newbyteorder("=")
    if native not in DTYPES.values():
        allowed = ", ".join(dtype.name for dtype in DTYPES.values())
        raise UserError(f"tensor {name!r} has dtype {values.dtype}: must be one of {allowed}")
    return np.asarray(values, dtype=native, order="C")
