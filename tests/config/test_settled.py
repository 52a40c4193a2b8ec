"""Constants and defaults, each stated a second time: what runs do, and what is written for others, rests on them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import shared_config
from tests.golden import check_golden

FOLDERS = ("contract", "data", "interchange", "parity")
PLAIN = (bool, int, float, str, bytes, type(None))


def plain(value: Any) -> bool:
    """Whether a value is made of numbers and text alone."""
    if isinstance(value, dict):
        return all(plain(part) for item in value.items() for part in item)
    if isinstance(value, tuple | list):
        return all(map(plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, PLAIN)


def said(value: Any) -> str:
    """As Python writes it; sets in order, patterns by their text, long text by its hash."""
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(map(repr, sorted(value)))}}}" if all(isinstance(part, str) for part in value) else ""
    if isinstance(value, re.Pattern):
        return f"re {value.pattern!r}"
    if not plain(value):
        return ""
    text = repr(value)
    return text if len(text) < 400 else f"{text[:40]}... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def defaults(name: str, function: Any) -> Iterator[str]:
    """One line for each parameter that has a default of numbers or text."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty and (text := said(parameter.default)):
            yield f"{name}({parameter.name}) = {text}"


def settled(module: Any) -> Iterator[str]:
    path = module.__name__.removeprefix("shared_config.")
    for name, value in vars(module).items():
        own = getattr(value, "__module__", module.__name__) == module.__name__
        if not own or name.startswith("__"):
            continue
        if inspect.isfunction(value):
            yield from defaults(f"{path}.{name}", value)
        elif inspect.isclass(value):
            if dataclasses.is_dataclass(value):
                yield from defaults(f"{path}.{name}", value)
            methods = (pair for pair in vars(value).items() if inspect.isfunction(pair[1]))
            for method, function in methods:
                if method == "__init__" or not method.startswith("__"):
                    yield from defaults(f"{path}.{name}.{method}", function)
        elif name.lstrip("_").isupper() and (text := said(value)):
            yield f"{path}.{name} = {text}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_constants_and_defaults_are_what_they_were(folder: str) -> None:
    package = importlib.import_module(f"{shared_config.__name__}.{folder}")
    names = sorted(found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    names = [name for name in names if ".huggingface" not in name]  # held to transformers' own classes
    lines = [line for name in names for line in settled(importlib.import_module(name))]
    first = {line.split(".", 2)[2]: line for line in reversed(lines)}  # where it is defined, or imported first
    check_golden(f"settled_{folder}.txt", "\n".join(sorted(first.values())) + "\n")
