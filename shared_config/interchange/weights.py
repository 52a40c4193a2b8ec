"""Weights of a model on disk: one safetensors file, or shards with an index as Hugging Face lays them out.

A set of files is replaced as a whole. The file that readers look for first (`model.safetensors`, or the index) gets its
name last, and files of an older set go only after that, so an interrupted write leaves the older set intact.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypedDict

import ml_dtypes
import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike, file_errors, make_folder, written_aside
from shared_config.interchange.former import NAMES, VERSION, former
from shared_config.interchange.reading import MAX_JSON_BYTES, parse_json, read_bytes
from shared_config.interchange.states import AnyArray, Key, numpy_dtype, plain_state, without_repeats, without_unused
from shared_config.interchange.tensors import TensorFile, read_tensors, write_tensors

__all__ = ["WeightsError", "check_tensors", "load_weights", "read_tensors", "save_weights", "write_tensors"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors")
MAX_SHARD_BYTES = 5 * 10**9
FOREIGN_NAMES = {
    ".bin": "PyTorch's pickle format",
    ".pt": "PyTorch's pickle format",
    ".pth": "PyTorch's pickle format",
    ".ckpt": "PyTorch's pickle format",
    ".pkl": "the pickle format",
    ".gguf": "the GGUF format of llama.cpp",
    ".ggml": "the GGML format of llama.cpp",
    ".h5": "the HDF5 format",
    ".msgpack": "the msgpack format of Flax",
    ".npz": "NumPy's format",
    ".npy": "NumPy's format",
    ".onnx": "the ONNX format",
}
FOREIGN_STARTS = {b"PK\3\4": "a zip archive, as torch.save writes", b"GGUF": FOREIGN_NAMES[".gguf"], b"\x89HDF": "HDF5"}
"""Kinds of files that hold weights in other formats, by suffix and by their first bytes."""

ADAPTER = re.compile(r"adapter_(model|config)\..*")
NEEDED = (
    f"needed are safetensors: a .safetensors file, or a folder with {SINGLE} or {INDEX} "
    "(in transformers: model.save_pretrained(folder))"
)
METADATA = {"format": "pt", NAMES: VERSION}
"""What transformers asks of a file before it loads it, and what `former` asks."""


class WeightsError(UserError):
    """Tensors that do not fit the model.

    Attributes:
        problems: one line for each tensor.
    """

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{source}: {len(self.problems)} tensors do not fit:", *self.problems]))


class HasShape(Protocol):
    """What loading needs of a tensor's entry in the parameter table."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...


class SaveOptions(TypedDict, total=False):
    """The options of `save_weights`."""

    max_shard_bytes: int
    metadata: Mapping[str, str] | None


def save_weights(
    path: PathLike,
    state: Mapping[Key, object],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a state dict and return the files, the one that readers look for last.

    Args:
        state: what `plain_state` accepts, with arrays or tensors of any library; a tied torch tensor is written once.
        path: a file (ending in .safetensors), which is never sharded, or a folder, made if need be.
        max_shard_bytes: a folder gets several files if the tensors take more than this; no tensor is split.
        metadata: text stored in every file.
    """
    if max_shard_bytes <= 0:
        raise UserError(f"max_shard_bytes = {max_shard_bytes}: must be positive")
    path, metadata = Path(path), {**METADATA, **(metadata or {})}
    named = without_repeats(plain_state(state))
    if path.suffix == ".safetensors":
        write_tensors(path, named, metadata)
        return [path]
    with file_errors(path, "the folder can't be made"):
        path = make_folder(path)
    shards = _split(named, max_shard_bytes)
    files = _save_single(path, named, metadata) if len(shards) == 1 else _save_shards(path, shards, metadata)
    _remove_older(path, keep=files)
    return files


def load_weights(
    path: PathLike, table: Mapping[str, HasShape] | None = None, *, config: Mapping[str, object] | None = None
) -> dict[str, np.ndarray]:
    """Read a state dict, memory-mapped, from a file, an index, or a folder that holds either.

    Names are plain: what wrappers of torch put into them is left out. Those of former versions become those of now.

    Args:
        table: the parameters that the model has. Names and shapes must be exactly these, the order becomes theirs.
        config: nested fields of the model's job, where they are known, to tell what former versions wrote.

    Raises:
        WeightsError: listing every missing, extra, misshapen or non-floating tensor.
        UserError: if a file is missing, damaged or of another format; it says what was found and what is needed.
    """
    path = entry_file(path)
    files = _files(path)
    state = plain_state({name: file.read(name) for name, file in files.items()})
    if any(file.metadata.get(NAMES) != VERSION for file in files.values()):
        state = former(state, config).state(state)
    if table is None:
        return state
    state = without_unused(state, table)
    check_tensors(state, table, source=str(path))
    return {name: state[name] for name in table}


def weight_names(path: PathLike) -> list[str]:
    """Names of the tensors that `load_weights` would read, as they are in the files.

    Raises:
        UserError: as `load_weights`.
    """
    return list(_files(entry_file(path)))


def check_tensors(state: Mapping[str, AnyArray], table: Mapping[str, HasShape], source: str = "weights") -> None:
    """Refuse a state dict that is not exactly what the table lists.

    Raises:
        WeightsError: listing every missing, extra, misshapen or non-floating tensor.
    """
    problems = list(_problems(state, table))
    if problems:
        raise WeightsError(source, problems)


def _problems(state: Mapping[str, AnyArray], table: Mapping[str, HasShape]) -> Iterator[str]:
    for name, spec in table.items():
        if name not in state:
            yield f"{name}: missing, the model has it with shape {spec.shape}"
            continue
        shape, dtype = tuple(state[name].shape), state[name].dtype
        if shape != spec.shape:
            yield f"{name}: shape {shape}, the model needs {spec.shape}"
        if not is_floating(dtype):
            yield f"{name}: dtype {dtype}, the model needs floating-point values"
    for name in state:
        if name not in table:
            yield f"{name}: extra, the model has no such tensor"


def is_floating(dtype: object) -> bool:
    """Whether values of this dtype, of any library, are real numbers that a model can hold (bfloat16 included)."""
    try:
        known = numpy_dtype(dtype)
    except TypeError:
        return False
    return known.kind == "f" or known == ml_dtypes.bfloat16


def _split(state: Mapping[str, AnyArray], max_bytes: int) -> list[dict[str, AnyArray]]:
    """Consecutive tensors of at most ``max_bytes`` together; at least one shard, no empty one among several."""
    shards: list[dict[str, AnyArray]] = [{}]
    filled = 0
    for name, array in state.items():
        if shards[-1] and filled + array.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    return shards


def _save_single(folder: Path, state: Mapping[str, AnyArray], metadata: Mapping[str, str]) -> list[Path]:
    write_tensors(folder / SINGLE, state, metadata)
    return [folder / SINGLE]


def _save_shards(folder: Path, shards: list[dict[str, AnyArray]], metadata: Mapping[str, str]) -> list[Path]:
    names = _free_names(folder, len(shards))
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(array.nbytes for shard in shards for array in shard.values())
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
    with ExitStack() as renames:  # leaves in reverse order of entering: the index, entered first, is renamed last
        aside = renames.enter_context(written_aside(folder / INDEX))
        aside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file, shard in zip(names, shards, strict=True):
            write_tensors(renames.enter_context(written_aside(folder / file)), shard, metadata)
    return [*(folder / name for name in names), folder / INDEX]


def _free_names(folder: Path, count: int) -> list[str]:
    """The usual shard names, with a tag where an older set in the folder uses one of them."""
    names = [f"-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    taken = any((folder / f"model{name}").exists() for name in names)
    prefix = f"model-{secrets.token_hex(4)}" if taken else "model"
    return [prefix + name for name in names]


def _remove_older(folder: Path, keep: list[Path]) -> None:
    """Remove every weight file of a folder but those just written, the ones that readers look for first."""
    with file_errors(folder, "an older set of weights can't be removed"):
        older = [folder / SINGLE, folder / INDEX, *(file for file in folder.iterdir() if SHARD.fullmatch(file.name))]
        for file in older:
            if file not in keep:
                file.unlink(missing_ok=True)


def entry_file(path: PathLike) -> Path:
    """The file to start reading from. A folder with both kinds counts as the single file, as in transformers.

    Raises:
        UserError: there is none, or it is of another format; it says what was found and what is needed.
    """
    path = Path(path)
    if path.is_file():
        _refuse_foreign(path)
    if not path.is_dir():
        return path
    for name in (SINGLE, INDEX):
        if (path / name).exists():
            return path / name
    there = _what_is_there(path)
    found = f"; there {'is' if len(there) == 1 else 'are'} {', '.join(there)}" if there else ""
    raise UserError(f"{path}: holds no weights: neither {SINGLE} nor {INDEX}{found}; {NEEDED}")


def _refuse_foreign(file: Path) -> None:
    with file_errors(file, "can't be read as a safetensors file"), file.open("rb") as opened:
        start = opened.read(4)
    kind = FOREIGN_STARTS.get(start) or FOREIGN_NAMES.get(file.suffix.lower())
    if kind is not None:
        raise UserError(f"{file}: is in {kind}, which is not read; {NEEDED}")
    if ADAPTER.fullmatch(file.name):
        raise UserError(f"{file}: holds an adapter (LoRA), which is merged into its base model first; {NEEDED}")


def _what_is_there(folder: Path) -> list[str]:
    """Files of a folder without weights that look like some, each with what it is."""
    found = []
    for file in sorted(folder.iterdir()):
        if ADAPTER.fullmatch(file.name):
            found.append(f"{file.name} (an adapter, to be merged into its base model first)")
        elif file.suffix.lower() in FOREIGN_NAMES:
            found.append(f"{file.name} ({FOREIGN_NAMES[file.suffix.lower()]})")
        elif file.suffix == ".safetensors":
            found.append(f"{file.name} (by another name)")
    return found


def _files(path: Path) -> dict[str, TensorFile]:
    """The file of each tensor, of a single file or of an index."""
    if path.suffix == ".json":
        return _shards(path)
    file = TensorFile(path)
    return dict.fromkeys(file.entries, file)


def _shards(index: Path) -> dict[str, TensorFile]:
    weight_map = _weight_map(index)
    files = {file: TensorFile(index.parent / file) for file in dict.fromkeys(weight_map.values())}
    absent = [f"{name}: not in {file}" for name, file in weight_map.items() if name not in files[file].entries]
    if absent:
        raise WeightsError(str(index), absent)
    return {name: files[file] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    text = read_bytes(index, MAX_JSON_BYTES)
    try:
        content: Any = parse_json(text)
        weight_map = content["weight_map"]
        plain = all(Path(file).name == file for file in weight_map.values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is no index of safetensors shards: {error!r}") from error
    if not plain:
        raise UserError(f"{index}: must name files of its own folder only")
    return weight_map
