"""``kempnerforge convert``: Hugging Face folders to native weights and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared_config.commands.common import overridden_fields
from shared_config.contract.vision import job_table
from shared_config.errors import UserError
from shared_config.interchange.files import written_aside
from shared_config.interchange.huggingface import save_huggingface
from shared_config.interchange.huggingface_config import config_to_huggingface
from shared_config.interchange.outputs import WRITER, claim_folder
from shared_config.interchange.source import CONFIG, ModelSource, find_config, kind_of, read_model, to_stderr
from shared_config.interchange.tokens import (
    TOKENIZER,
    beside,
    has_tokenizer,
    keep_tokenizer,
    special_ids,
    tokenizer_problem,
)
from shared_config.interchange.toml import config_to_toml
from shared_config.interchange.vision import tower_of
from shared_config.interchange.weights import check_tensors, entry_file, save_weights
from shared_config.interchange.with_images import image_model_content, save_image_model
from shared_config.loader import load_config, resolve_config
from shared_config.schema.job import JobConfig


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    source = read_source(Path(options.source), options.config, overrides)
    target = options.to or ("native" if source.kind == "huggingface" else "huggingface")
    tokenizer = tokens_of(Path(options.source), source.config)
    problem = "" if tokenizer is None else problem_of_tokens(tokenizer)
    if target == "huggingface":
        _check_expressed(source.config)
    folder = claim_folder(options.output, target, source.config, source=options.source)
    metadata = {WRITER: target}
    if target == "huggingface":
        files = (
            save_huggingface(folder, source.weights, source.config.model, tokenizer, metadata=metadata)
            if source.config.vlm is None
            else save_image_model(folder, source.weights, source.config, tokenizer, metadata=metadata)
        )
    else:
        files = save_native(folder, source, metadata, tokenizer)
    for file in files:
        print(file)
    if problem:
        to_stderr(f"note: {tokenizer}: {problem}; its files are copied as they are")
    return 0


def read_source(path: Path, config: str | None, overrides: Sequence[str]) -> ModelSource:
    """The model at ``path``, whatever its format; overrides set what a config.json doesn't decide, such as
    ``--model.moe_packed_experts true``.

    Raises:
        UserError: nothing there, no config to be found, or weights that do not fit it.
    """
    source = read_model(path, _config_of(path, config, overrides), overridden=overridden_fields(overrides))
    table = job_table(source.config, tower_of(source.config))
    check_tensors(source.weights, table, str(path))
    return ModelSource(path, source.kind, source.config, source.found, {name: source.weights[name] for name in table})


def tokens_of(path: Path, config: JobConfig) -> Path | None:
    """The folder of a model's tokenizer, or of the special ids next to its weights; None if there is neither."""
    return Path(config.data.tokenizer) if config.data.tokenizer != "bytes" else beside(path)


def problem_of_tokens(tokenizer: Path) -> str:
    """What keeps the tokenizer of a folder from being read, as `tokenizer_problem`.

    Raises:
        UserError: a file that is copied is damaged.
    """
    special_ids(tokenizer)
    return tokenizer_problem(tokenizer) if has_tokenizer(tokenizer) else ""


def save_native(
    folder: Path, source: ModelSource, metadata: dict[str, str], tokenizer: Path | None = None
) -> list[Path]:
    """Write weights, the config that they fit, and what ``tokenizer`` holds. Returns the files."""
    files = save_weights(folder, source.weights, metadata=metadata)
    kept = keep_tokenizer(source.config, folder, tokenizer)
    with written_aside(folder / CONFIG) as aside:
        aside.write_text(config_to_toml(kept), encoding="utf-8")
    return [*files, *sorted((folder / TOKENIZER).glob("*")), folder / CONFIG]


def _check_expressed(config: JobConfig) -> None:
    """Refuse a model that no Hugging Face folder can hold.

    Raises:
        ConfigError: as `config_to_huggingface`, or `image_model_content` of a model that sees.
    """
    if config.vlm is None:
        config_to_huggingface(config.model)
    else:
        image_model_content(config)


def _config_of(path: Path, config: str | None, overrides: Sequence[str]) -> JobConfig:
    if config is not None:
        return load_config(config, overrides)
    if kind_of(path) == "native":
        entry_file(path)
    fields = find_config(path)
    if fields is None:
        raise UserError(f"{path}: has no {CONFIG} beside it; give the config of these weights with --config")
    return resolve_config(fields, overrides)
