"""From a preset name or a TOML path, plus typed command-line overrides, to a `JobConfig`, and back to TOML.

An override is ``--section.field value`` or ``--section.field=value``. The field's type decides how the text is read:
fields of text take it as it stands, others as a TOML value; ``none`` empties an optional field.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shared_config.errors import ConfigError, UserError
from shared_config.interchange.reading import MAX_TOML_BYTES, parse_toml, read_text
from shared_config.interchange.source import find_config, read_config
from shared_config.interchange.toml import config_from_dict, parse_fields, with_tokenizer_beside
from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig
from shared_config.schema.vlm import VLMConfig

PRESETS = resources.files("shared_config") / "presets"


def load_config(source: str, overrides: Sequence[str] = ()) -> JobConfig:
    """The config of a preset name, a TOML path, or a folder that knows its config (a training run or checkpoint,
    native weights, a Hugging Face folder), with command-line overrides applied.

    Raises:
        UserError: no such preset, file or folder, text that is not TOML, or a folder without a config.
        ConfigError: unknown flags, or every field that is wrong.
    """
    return resolve_config(read_source(source), overrides)


def resolve_config(fields: dict[str, object], overrides: Sequence[str] = ()) -> JobConfig:
    """A `JobConfig` from nested mappings, with command-line overrides applied.

    Raises:
        ConfigError: unknown flags, or every field that is wrong.
    """
    apply_overrides(fields, parse_overrides(overrides))
    return config_from_dict(fields)


def preset_names() -> tuple[str, ...]:
    """Names of the packaged presets."""
    return tuple(
        sorted(entry.name.removesuffix(".toml") for entry in PRESETS.iterdir() if entry.name.endswith(".toml"))
    )


def read_source(source: str) -> dict[str, object]:
    """Nested dicts of a preset, a TOML file, or a folder that knows its config.

    Raises:
        UserError: it does not exist, can't be read or is not TOML.
    """
    if source in preset_names():
        return parse_fields((PRESETS / f"{source}.toml").read_text(encoding="utf-8"), f"preset {source}")
    if Path(source).is_dir():
        return read_config(source)
    if not source.endswith(".toml") and "/" not in source:
        close = difflib.get_close_matches(source, preset_names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"presets: {', '.join(preset_names())}"
        raise UserError(f"config = {source!r}: no preset of that name, nor a path to a .toml file or a folder; {hint}")
    try:
        fields = parse_fields(read_text(source, MAX_TOML_BYTES), source)
    except ConfigError:
        raise
    except UserError as error:
        said = str(error).removeprefix(f"{source}: ")
        raise UserError(f"config = {source!r}: {said}{_folder_hint(Path(source))}") from None
    return with_tokenizer_beside(fields, Path(source).parent)


def _folder_hint(file: Path) -> str:
    """What to say of a file of a folder that knows its config, and is given in its place."""
    try:
        known = file.is_file() and find_config(file.parent) is not None
    except UserError:
        known = False
    return f"; the folder that it is in, {str(file.parent)!r}, knows its config" if known else ""


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of dotted field and value text.

    Raises:
        ConfigError: what is not ``--section.field value``.
    """
    pairs: list[tuple[str, str]] = []
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or "." not in name:
            raise ConfigError([f"{flag}: unknown argument; overrides are written --section.field value"])
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError([f"{flag}: needs a value, as in {flag} VALUE or {flag}=VALUE"])
            value = remaining.pop(0)
        pairs.append((name, value))
    return pairs


def apply_overrides(fields: dict[str, object], overrides: Sequence[tuple[str, str]]) -> None:
    """Write overrides into nested dicts; ``vlm.arch`` first, as it decides which other fields exist.

    Raises:
        ConfigError: listing every override that names no field.
    """
    problems = []
    for name, text in sorted(overrides, key=lambda pair: pair[0] != "vlm.arch"):
        if name == "vlm.arch":
            _switch_architecture(fields, text)
            continue
        try:
            _write(fields, name, text)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)


def _switch_architecture(fields: dict[str, object], arch: str) -> None:
    """Another class for the vlm section: fields that the new class lacks are dropped."""
    try:
        known = {field.name for field in dataclasses.fields(VLMConfig.class_for(arch))}  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError([f"vlm.{line}" for line in error.problems]) from None
    given = fields.get("vlm", {})
    if not isinstance(given, Mapping):
        raise ConfigError(["--vlm.arch: vlm has no fields"])
    kept = {name: value for name, value in given.items() if name in known}
    fields["vlm"] = {**kept, "arch": arch}


def _write(fields: dict[str, object], name: str, text: str) -> None:
    *sections, last = name.split(".")
    owner: Any = JobConfig
    for depth, part in enumerate(sections):
        owner = _section_of(_annotation(owner, part, name), fields, sections[: depth + 1])
        nested = fields.setdefault(part, {})
        if not isinstance(nested, dict):
            raise ConfigError([f"--{name}: {'.'.join(sections[: depth + 1])} has no fields"])
        fields = nested
    annotation = None if owner is None else _annotation(owner, last, name)
    value = _read(text, annotation)
    if value is None:
        fields.pop(last, None)
    else:
        fields[last] = value


def _annotation(owner: Any, field: str, flag: str) -> Any:
    """The type of a field of a section, or None below a mapping, whose keys are free."""
    if owner is None:
        return None
    hints = typing.get_type_hints(owner)
    names = [entry.name for entry in dataclasses.fields(owner)]
    if field not in names:
        close = fields_named(field) or difflib.get_close_matches(field, names, n=3) or fields_like(field)
        rest = flag.partition(f"{field}.")[2]
        close = [f"{name}.{rest}" if rest else name for name in close]
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
        raise ConfigError([f"--{flag}: unknown key; {hint}"])
    return hints[field]


def config_fields() -> list[str]:
    """Dotted fields of all sections, those of one that an architecture extends as in its base."""
    return [
        f"{section}.{field.name}"
        for section, annotation in typing.get_type_hints(JobConfig).items()
        for member in _members(annotation)
        if isinstance(member, type) and issubclass(member, Section)
        for field in dataclasses.fields(member)  # type: ignore[arg-type]
    ]


def fields_named(name: str) -> list[str]:
    """Dotted fields of all sections whose own name is this one."""
    return list(dict.fromkeys(field for field in config_fields() if field.partition(".")[2] == name))


def fields_like(name: str) -> list[str]:
    """Dotted fields of all sections whose own name is this one, or else resembles it."""
    names = [field.partition(".")[2] for field in config_fields()]
    close = difflib.get_close_matches(name, dict.fromkeys(names), n=3)
    return fields_named(name) or [field for wanted in close for field in fields_named(wanted)]


def _section_of(annotation: Any, fields: dict[str, object], path: list[str]) -> Any:
    """The section class that an annotation holds; None for a mapping with free keys."""
    members = list(_members(annotation))
    if VLMConfig in members:
        given = fields.get(path[-1])
        arch = given.get("arch") if isinstance(given, dict) else None
        if arch is None:
            raise ConfigError([f"vlm.arch: required, one of {', '.join(VLMConfig.architectures())}"])
        return VLMConfig.class_for(arch)
    for member in members:
        if isinstance(member, type) and issubclass(member, Section):
            return member
    if any(typing.get_origin(member) in (Mapping, typing.get_origin(Mapping[str, str])) for member in members):
        return None
    raise ConfigError([f"--{'.'.join(path)}: is a value, not a section"])


def _members(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _read(text: str, annotation: Any) -> object:
    """The value a flag's text stands for; what does not parse is left as text, for the field's type to refuse."""
    members = list(_members(annotation))
    if type(None) in members and text.lower() == "none":
        return None
    if any(member is str or typing.get_origin(member) is typing.Literal for member in members):
        return text
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
