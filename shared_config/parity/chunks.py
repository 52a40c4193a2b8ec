"""Large tensors of a trace in files of their own, beside it: written as they are recorded, so that memory holds few."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike
from shared_config.interchange.reading import parse_json
from shared_config.interchange.tensors import TensorFile, write_tensors

CHUNKS = "chunks"
"""Key of the metadata of a trace: name of a tensor -> file that holds it, relative to the folder of the trace."""
VALUES = "values"
"""Name of the tensor in such a file."""
SUFFIX = ".chunks"
RECORDED = re.compile(r"((?P<recording>[0-9a-f]{8})-)?[0-9]{6,}\.safetensors")
"""Names of such files; other files of their folder are somebody else's."""


class TraceFile(TensorFile):
    """An open trace, whose tensors may be in files of their own."""

    def __init__(self, path: PathLike):
        super().__init__(path)
        self.chunks = _checked(parse_json(self.metadata[CHUNKS].encode()), self.path) if CHUNKS in self.metadata else {}

    def read(self, name: str) -> np.ndarray:
        """One array, backed by its file until written to.

        Raises:
            UserError: if the trace has no such tensor, or its file is missing.
        """
        if name not in self.chunks:
            return super().read(name)
        return TensorFile(self.path.parent / self.chunks[name]).read(VALUES)


class Spill:
    """Writes large arrays to files as they come.

    Attributes:
        folder: of the files, beside the trace.
    """

    def __init__(self, trace: PathLike, above: int):
        if above < 1:
            raise UserError(f"chunks = {above}: must be a number of bytes, 1 or more")
        self.trace, self.above = Path(trace), above
        self.folder = self.trace.with_name(self.trace.name + SUFFIX)
        self._recording = secrets.token_hex(4)
        self._files: dict[int, str] = {}
        self._held: list[np.ndarray] = []

    def put(self, array: np.ndarray) -> np.ndarray:
        """The same values, on disk if they are larger than the limit."""
        if array.nbytes <= self.above:
            return array
        file = self.folder / f"{self._recording}-{len(self._files):06}.safetensors"
        write_tensors(file, {VALUES: array})
        read = TensorFile(file).read(VALUES)
        self._files[id(read)] = f"{self.folder.name}/{file.name}"
        self._held.append(read)
        return read

    def files(self, tensors: Mapping[str, object]) -> dict[str, str]:
        """Those of the tensors that are on disk: name -> file relative to the folder of the trace."""
        return {name: self._files[id(tensor)] for name, tensor in tensors.items() if id(tensor) in self._files}

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the recording is made and its trace is written: then what earlier recordings left in the folder is
        removed, or, if that fails, what this one has written, so that an earlier trace stays whole.
        """
        try:
            yield
        except BaseException:
            self._remove(self._recorded(own=True))
            raise
        self._remove(self._recorded(own=False))

    def _recorded(self, *, own: bool) -> list[Path]:
        """Files of this recording, or of others."""
        names = {file: RECORDED.fullmatch(file.name) for file in self.folder.glob("*.safetensors")}
        return [file for file, name in names.items() if name and (name["recording"] == self._recording) == own]

    def _remove(self, files: Iterable[Path]) -> None:
        """Remove files, and the folder once it is empty."""
        for file in files:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _checked(chunks: object, path: Path) -> dict[str, str]:
    if not isinstance(chunks, dict) or not all(_is_beside(file) for file in chunks.values()):
        raise UserError(f"{path}: chunks: must name files of the folder {path.name}{SUFFIX}")
    return chunks


def _is_beside(file: object) -> bool:
    return isinstance(file, str) and not Path(file).is_absolute() and ".." not in Path(file).parts
