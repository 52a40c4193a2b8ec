"""Which tensors of a run a trace holds: those of some layers, or those whose names match patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypedDict

from shared_config.errors import UserError

LAYER = re.compile(r"[^/]+/(?:transformer\.)?layers\.(\d+)(?:\.|$)")
"""Start of the name of a tensor that belongs to a layer of the language model."""

LOSS = "loss"
SUGGESTIONS = 3
DIGITS = 18
"""Digits of the largest number of a layer that is read."""


class SelectionFields(TypedDict, total=False):
    """What a trace says of the `Selection` that was asked for; {} for all."""

    layers: list[int] | None
    only: list[str]


class RefedFields(TypedDict, total=False):
    """What a trace says of another one whose recorded outputs went into its layers; {} if none did."""

    backend: str
    device: str
    dtype: str
    modules: list[str]
    own: list[str]
    hash: str
    backward: bool


@dataclass(frozen=True)
class Selection:
    """What to keep; the loss always is.

    Attributes:
        layers: tensors of these layers of the language model, and no others; None for all tensors.
        only: glob patterns, of which a name must match one; () for all names. "*" also stands for dots and slashes. A
            pattern without "/" is held to the name without its group: "norm*" is "forward/norm" and
            "gradient/norm.weight".
    """

    layers: tuple[int, ...] | None = None
    only: tuple[str, ...] = ()

    def wants(self, name: str) -> bool:
        """Whether a trace keeps the tensor of this name."""
        if name == LOSS:
            return True
        return self._of_layers(name) and (not self.only or any(_matches(name, pattern) for pattern in self.only))

    def wants_any(self, names: Iterable[str]) -> bool:
        """Whether it keeps one of these."""
        return any(map(self.wants, names))

    def check(self, names: Sequence[str], n_layers: int) -> None:
        """Refuse layers that don't exist and patterns that match none of the names a run can have.

        Raises:
            UserError: naming what would be right.
        """
        for layer in self.layers or ():
            if not 0 <= layer < n_layers:
                raise UserError(f"layers = {layer}: must be in 0-{n_layers - 1}, as model.n_layers = {n_layers}")
        for pattern in self.only:
            if not any(_matches(name, pattern) for name in names):
                raise UserError(f"only = {pattern!r}: matches no tensor; {_suggestion(pattern, names)}")

    def _of_layers(self, name: str) -> bool:
        if self.layers is None:
            return True
        found = LAYER.match(name)
        return found is not None and int(found[1]) in self.layers


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Numbers of layers of a model, from numbers and ranges as in "0,3-5".

    Raises:
        UserError: anything else, or a layer that the model doesn't have.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        digits = (first, last) if dash else (first, first)
        if not all(number.isdecimal() and len(number) <= DIGITS for number in digits) or int(digits[1]) < int(first):
            raise UserError(f"layers = {text!r}: must be numbers and ranges of layers, as in 0,3-5")
        if int(digits[1]) >= n_layers:
            raise UserError(f"layers = {text}: must be in 0-{n_layers - 1}, as model.n_layers = {n_layers}")
        layers |= set(range(int(first), int(digits[1]) + 1))
    return tuple(sorted(layers))


def _matches(name: str, pattern: str) -> bool:
    path = name.partition("/")[2]
    return fnmatchcase(name, pattern) or ("/" not in pattern and fnmatchcase(path, pattern))


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    """What may have been meant: the pattern with its unknown words mended, or names like it."""
    mended = _mended(pattern, names)
    short = [name.partition("/")[2] or name for name in names]
    known = dict.fromkeys([*names, *short] if "/" in pattern else [*short, *names])
    close = [mended] if mended else difflib.get_close_matches(pattern, known, SUGGESTIONS)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    examples = [next((name for name in names if name.startswith(group)), "") for group in ("forward/", "gradient/")]
    return f"names are as {' and '.join(filter(None, examples))}"


def _mended(pattern: str, names: Sequence[str]) -> str:
    """The pattern with every unknown word replaced by the most similar one; "" if that matches nothing either."""
    words = {word for name in names for word in re.split(r"[./]", name)}
    parts = re.split(r"([./])", pattern)
    for place, part in enumerate(parts):
        if part not in words and part not in "./" and not any(fnmatchcase(word, part) for word in words):
            parts[place] = next(iter(difflib.get_close_matches(part, words, 1)), part)
    mended = "".join(parts)
    return mended if any(_matches(name, mended) for name in names) else ""
