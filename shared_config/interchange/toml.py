"""Configs as TOML text and as nested dicts, which is how every file and folder that knows its config holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter

from shared_config.errors import UserError
from shared_config.interchange.reading import MAX_TOML_BYTES, parse_toml, read_text
from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig


def config_from_dict(fields: Mapping[str, Any]) -> JobConfig:
    """A `JobConfig` from nested mappings, as TOML gives them."""
    return JobConfig(**fields)


def config_from_toml(text: str) -> JobConfig:
    """A `JobConfig` from TOML text."""
    return config_from_dict(parse_fields(text, "config"))


def config_to_dict(config: JobConfig) -> dict[str, Any]:
    """Nested dicts and lists of what was given: derived fields and None are left out, so that overrides derive them."""
    return _plain(config)


def config_to_toml(config: JobConfig) -> str:
    """TOML text that loads as an equal config."""
    return tomli_w.dumps(config_to_dict(config))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    return TypeAdapter(JobConfig).json_schema()


def read_fields(file: Path) -> dict[str, Any]:
    """Nested dicts of a TOML file, with the path of a tokenizer that is next to it.

    Raises:
        UserError: it can't be read, or is not TOML.
    """
    return with_tokenizer_beside(parse_fields(read_text(file, MAX_TOML_BYTES), str(file)), file.parent)


def parse_fields(text: str, where: str) -> dict[str, Any]:
    """Nested dicts of TOML text.

    Raises:
        UserError: it is not TOML; ``where`` says whose text it is.
    """
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None


def with_tokenizer_beside(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields, with the path of a tokenizer that is next to their file."""
    data = fields.get("data")
    name = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(name, str) or name in ("", "bytes") or not (folder / name).is_dir():
        return fields
    return {**fields, "data": {**fields["data"], "tokenizer": str(folder / name)}}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return {name: _plain(item) for name, item in value.given().items() if item is not None}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
