"""``kempnerforge convert``: Hugging Face folders to native weights and back."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_config.commands.common import writable_folder
from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from shared_config.interchange.files import written_aside
from shared_config.interchange.huggingface import load_huggingface, save_huggingface
from shared_config.interchange.tokens import TOKENIZER, beside, has_tokenizer, keep_tokenizer
from shared_config.interchange.vision import job_table
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.loader import apply_overrides, config_from_dict, config_to_toml, load_config, parse_overrides
from shared_config.schema.job import JobConfig
from shared_config.schema.training import TrainConfig

HELP = "turn a Hugging Face folder into native weights, or native weights or a checkpoint into either"
FORMATS = ("native", "huggingface")
CONFIG = "config.toml"


@dataclass(frozen=True)
class Source:
    """A model from disk."""

    kind: str
    config: JobConfig
    weights: Mapping[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a Hugging Face folder, native weights (file or folder), or a training run"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--to", choices=FORMATS, help="format to write (default: the one that SOURCE isn't)")
    parser.add_argument("--config", metavar="CONFIG", help="preset or .toml of native weights without a config.toml")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    source = read_source(Path(options.source), options.config, overrides)
    folder = writable_folder(options.output)
    target = options.to or ("native" if source.kind == "huggingface" else "huggingface")
    tokenizer = tokens_of(Path(options.source), source.config)
    if target == "huggingface":
        files = save_huggingface(folder, source.weights, source.config.model, tokenizer)
    else:
        files = save_native(folder, source, tokenizer)
    for file in files:
        print(file)
    return 0


def read_source(path: Path, config: str | None, overrides: Sequence[str]) -> Source:
    """The model at ``path``, whatever its format.

    Raises:
        UserError: nothing there, no config to be found, or weights that do not fit it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "config.json").exists():
        return _read_huggingface(path, overrides)
    if (path / checkpoint.STATE).exists() or (path.is_dir() and checkpoint.latest(path) is not None):
        return _read_checkpoint(path, overrides)
    return _read_native(path, config, overrides)


def tokens_of(path: Path, config: JobConfig) -> Path | None:
    """The folder of a model's tokenizer, or with the special ids beside its weights; None if there is neither."""
    return Path(config.data.tokenizer) if config.data.tokenizer != "bytes" else beside(path)


def save_native(folder: Path, source: Source, tokenizer: Path | None = None) -> list[Path]:
    """Write weights, the config that they fit, and what ``tokenizer`` holds. Returns the files."""
    files = save_weights(folder, source.weights)
    kept = keep_tokenizer(source.config, folder, tokenizer)
    with written_aside(folder / CONFIG) as aside:
        aside.write_text(config_to_toml(kept), encoding="utf-8")
    return [*files, *sorted((folder / TOKENIZER).glob("*")), folder / CONFIG]


def _read_huggingface(path: Path, overrides: Sequence[str]) -> Source:
    """Overrides set what a config.json doesn't decide, such as ``--model.moe_packed_experts true``."""
    fields: dict = {}
    apply_overrides(fields, parse_overrides(overrides))
    model, weights = load_huggingface(path, **fields.pop("model", {}))
    if has_tokenizer(path):
        fields.setdefault("data", {}).setdefault("tokenizer", str(path))
    fields.setdefault("train", {}).setdefault("seq_len", min(TrainConfig().seq_len, model.max_seq_len))
    return Source("huggingface", config_from_dict({**fields, "model": model}), weights)


def _read_checkpoint(path: Path, overrides: Sequence[str]) -> Source:
    loaded = checkpoint.load(path, with_optimizer=False)
    fields = loaded.config
    kept = beside(loaded.path)
    if kept is not None and has_tokenizer(kept):
        fields.setdefault("data", {})["tokenizer"] = str(kept)
    apply_overrides(fields, parse_overrides(overrides))
    return Source("checkpoint", config_from_dict(fields), loaded.state.weights)


def _read_native(path: Path, config: str | None, overrides: Sequence[str]) -> Source:
    beside = (path if path.is_dir() else path.parent) / CONFIG
    if config is None and not beside.exists():
        raise UserError(f"{path}: has no {CONFIG} beside it; give the config of these weights with --config")
    job = load_config(config or str(beside), overrides)
    return Source("native", job, load_weights(path, job_table(job)))
