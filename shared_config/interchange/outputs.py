"""Folders that a command writes: new or empty, or what the same command wrote before for the same model.

Anything else in a folder belongs to someone, and stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_config.errors import UserError
from shared_config.interchange import huggingface, run_layout
from shared_config.interchange.files import PathLike, make_folder
from shared_config.interchange.huggingface_config import config_from_huggingface, config_to_huggingface
from shared_config.interchange.reading import parse_json
from shared_config.interchange.source import CONFIG
from shared_config.interchange.tensors import TensorFile, is_trace
from shared_config.interchange.toml import config_from_toml
from shared_config.interchange.weights import INDEX, SINGLE
from shared_config.interchange.with_images import image_model_content
from shared_config.schema.data import DataConfig
from shared_config.schema.job import JobConfig

WRITER = "kempnerforge"
"""Key of the metadata of weights that a command wrote: the kind of the folder that they are in."""


SHOWN = 3


def claim_folder(path: PathLike, kind: str, config: JobConfig, *, source: PathLike) -> Path:
    """The folder for a model of a kind ("native" or "huggingface"), created if need be.

    Args:
        config: what will be written beside the weights.
        source: where the model comes from.

    Raises:
        UserError: it is, or is within, or holds the source; it is not empty, and what it holds was not written by a
            command as the same kind with the same config; it can't be written.
    """
    folder = Path(path)
    refuse_overlap(folder, source)
    files = _contents(folder)
    if files and not _is_former_output(folder, kind, config):
        raise UserError(
            f"{folder}: holds {_names(files)}, which this command did not write for this model and config as {kind} "
            "weights; give a new or an empty folder"
        )
    return writable_folder(folder)


def claim_run_folder(path: PathLike) -> None:
    """Let a training run have a folder that is new or empty, or that a run wrote.

    Raises:
        UserError: it holds anything else.
    """
    folder = Path(path)
    files = _contents(folder)
    is_run = (folder / ".lock").exists() or run_layout.latest(folder) is not None
    if files and not (is_run and not _weights_of_others(files)):
        raise UserError(
            f"checkpoint.dir = {str(folder)!r}: holds {_names(files)}, and is no training run; give a new or an empty "
            "folder"
        )


def forget_run(path: PathLike) -> None:
    """Remove the checkpoints and metrics of a training run, so that one in its folder starts from scratch.

    Raises:
        UserError: the folder is not that of a run.
    """
    folder = Path(path)
    claim_run_folder(folder)
    for name in _contents(folder):
        if run_layout.STEP_NAME.fullmatch(name):
            shutil.rmtree(folder / name)
        elif name == run_layout.METRICS:
            (folder / name).unlink()


def claim_record_folder(path: PathLike, files: frozenset[str]) -> Path:
    """The folder for files of these names, created if need be.

    Raises:
        UserError: it holds anything that is not one of them; it can't be written.
    """
    folder = Path(path)
    others = [name for name in _contents(folder) if name not in files]
    if others:
        raise UserError(f"{folder}: holds {_names(others)}, which validate did not write; give a new folder")
    return writable_folder(folder)


def refuse_overlap(target: PathLike, source: PathLike) -> None:
    """Refuse an output that is its own source, by whatever path.

    Raises:
        UserError: one is the other, or is within the other.
    """
    there, here = Path(target).resolve(), Path(source).resolve()
    here = here if here.is_dir() else here.parent if there == here.parent else here
    if there == here or there in here.parents or here in there.parents:
        raise UserError(f"{target}: is, is within, or holds the folder that is read, {source}; give another folder")


def refuse_overwriting(target: PathLike, *sources: PathLike | None) -> None:
    """Refuse an output file that is one of the files that are read, by whatever path. Of a folder that is read, a file
    is one of them unless it is a trace; of an index of shards, every file of its folder.

    Raises:
        UserError: naming both.
    """
    if not os.path.exists(target):
        return
    for source in filter(None, sources):
        path = Path(source)
        read = [path] if path.is_file() else []
        folder = path.parent if path.suffix == ".json" else path
        if folder.is_dir() and not is_trace(target):
            read += [file for file in folder.rglob("*") if file.is_file()]
        if any(os.path.samefile(target, file) for file in read):
            raise UserError(f"{target}: is read from {source}; give another file to write to")


def writable_folder(path: PathLike) -> Path:
    """The folder, created if need be, once it is certain that files can be written to it.

    Raises:
        UserError: if they can't.
    """
    folder = Path(path)
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be created as an output folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: the output folder is not writable")
    return folder


def _contents(folder: Path) -> list[str]:
    """Names in a folder; none if there is no such folder.

    Raises:
        UserError: it can't be read.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: can't be an output folder: {error.strerror}") from None


def _weights_of_others(files: list[str]) -> list[str]:
    return [name for name in files if name in (SINGLE, INDEX, huggingface.CONFIG)]


def _is_former_output(folder: Path, kind: str, config: JobConfig) -> bool:
    if (folder / (CONFIG if kind == "huggingface" else huggingface.CONFIG)).exists():
        return False
    return _writer(folder) == kind and _has_config(folder, kind, config)


def _writer(folder: Path) -> str | None:
    try:
        if (folder / SINGLE).exists():
            return TensorFile(folder / SINGLE).metadata.get(WRITER)
        index: Any = parse_json((folder / INDEX).read_bytes())
        return index["metadata"].get(WRITER)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _has_config(folder: Path, kind: str, config: JobConfig) -> bool:
    """Whether the config beside the weights is the one to be written. Both are written one after the other, so that a
    command that was killed may have left weights alone.
    """
    file = folder / (huggingface.CONFIG if kind == "huggingface" else CONFIG)
    if not file.exists():
        return True
    try:
        if kind == "native":
            return _elsewhere(config_from_toml(file.read_text(encoding="utf-8"))) == _elsewhere(config)
        there = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return False
    if config.vlm is not None:
        return isinstance(there, Mapping) and _same_image_model(there, image_model_content(config))
    return isinstance(there, Mapping) and _same_model(there, config_to_huggingface(config.model))


def _elsewhere(config: JobConfig) -> JobConfig:
    """The config without the path of its tokenizer, whose files are copied, and the family, which former ones lack."""
    data = config.data.replace(tokenizer=DataConfig().tokenizer)
    return config.replace(data=data, model=config.model.replace(family=None))


def _same_model(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    try:
        return config_from_huggingface(there) == config_from_huggingface(here)
    except UserError:
        return False


def _same_image_model(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Special ids are the tokenizer's."""
    return {key: there.get(key) for key in here} == here


def _names(files: list[str]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(files[:SHOWN]) + more
