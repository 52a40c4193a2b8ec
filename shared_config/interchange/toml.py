"""Configs as TOML text and as nested dicts, which is how every file and folder that knows its config holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import tomli_w
from pydantic import TypeAdapter

from shared_config.errors import UserError
from shared_config.interchange.reading import MAX_TOML_BYTES, parse_toml, read_text
from shared_config.schema.base import Section, from_fields
from shared_config.schema.job import JobConfig


def config_from_dict(fields: Mapping[str, object]) -> JobConfig:
    """A `JobConfig` from nested mappings, as TOML gives them."""
    return from_fields(JobConfig, fields)


def config_from_toml(text: str) -> JobConfig:
    """A `JobConfig` from TOML text."""
    return config_from_dict(parse_fields(text, "config"))


def config_to_dict(config: JobConfig) -> dict[str, object]:
    """Nested dicts and lists of what was given: derived fields and None are left out, so that overrides derive them."""
    return _given(config)


def config_to_toml(config: JobConfig) -> str:
    """TOML text that loads as an equal config."""
    return tomli_w.dumps(config_to_dict(config))


def json_schema() -> dict[str, object]:
    """JSON Schema of a config file, for editors."""
    schema = TypeAdapter(JobConfig).json_schema()
    for section in (schema, *schema.get("$defs", {}).values()):
        said = descriptions(section.get("description", ""))
        for name, field in section.get("properties", {}).items():
            if name in said:
                field.setdefault("description", said[name])
    return schema


def descriptions(text: str) -> dict[str, str]:
    """Field -> what the text of a section says of it, in paragraphs that begin with "field:" or "field, field:"."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.split("\n"):
        start = re.match(r"((?:\w+, )*\w+): (.*)", line)
        if not line.strip():
            names = []
        elif start is not None:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2].strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def read_fields(file: Path) -> dict[str, object]:
    """Nested dicts of a TOML file, with the path of a tokenizer that is next to it.

    Raises:
        UserError: it can't be read, or is not TOML.
    """
    return with_tokenizer_beside(parse_fields(read_text(file, MAX_TOML_BYTES), str(file)), file.parent)


def parse_fields(text: str, where: str) -> dict[str, object]:
    """Nested dicts of TOML text.

    Raises:
        UserError: it is not TOML; ``where`` says whose text it is.
    """
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None


def with_tokenizer_beside(fields: dict[str, object], folder: Path) -> dict[str, object]:
    """The fields, with the path of a tokenizer that is next to their file."""
    data = fields.get("data")
    if not isinstance(data, dict):
        return fields
    name = data.get("tokenizer")
    if not isinstance(name, str) or name in ("", "bytes") or not (folder / name).is_dir():
        return fields
    return {**fields, "data": {**data, "tokenizer": str(folder / name)}}


def section_of(fields: Mapping[str, object] | None, name: str) -> Mapping[str, object]:
    """A section of nested fields; {} where there is none."""
    found = (fields or {}).get(name)
    return found if isinstance(found, Mapping) else {}


def number_of(fields: Mapping[str, object], section: str, name: str, default: float) -> float:
    """A number of a section of nested fields.

    Raises:
        UserError: it is something else.
    """
    value = section_of(fields, section).get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{section}.{name} = {value!r}: must be a number")
    return value


def _given(section: Section) -> dict[str, object]:
    return {name: _plain(item) for name, item in section.given().items() if item is not None}


def _plain(value: object) -> object:
    if isinstance(value, Section):
        return _given(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
