"""What the parameter table holds for one tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shared_config.errors import ConfigError, UserError

Axes = tuple[str | None, ...]

Named = Iterator[tuple[str, "ParameterSpec"]]

PACKED = {f"{name}_proj.weight": f"{name}_w" for name in ("gate", "up", "down")}
"""Weights of an expert, and what they are called where those of all experts are one tensor."""


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


Initializer = Normal | Constant


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor of the model.

    Attributes:
        shape: sizes.
        initializer: distribution of the initial values.
        axes: logical name of each axis, as long as ``shape``.
        is_buffer: not trained by gradient, float32 whatever the compute dtype.
        full_precision: stays float32 in mixed precision (what decides a route).
        decay: whether weight decay acts on it.
        residual: it writes to the residual stream, and is 0 where a block starts as the identity.
    """

    shape: tuple[int, ...]
    initializer: Initializer
    axes: Axes
    is_buffer: bool = False
    full_precision: bool = False
    decay: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes = {self.axes}: must name each axis of shape = {self.shape}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


ParameterTable = dict[str, ParameterSpec]


def given(specs: Mapping[str, object]) -> Named:
    """What a declared function gives, item by item.

    Raises:
        ConfigError: it gives something else.
    """
    table: ParameterTable = {}
    if isinstance(specs, Mapping):
        table = {name: spec for name, spec in specs.items() if isinstance(spec, ParameterSpec)}
    if not isinstance(specs, Mapping) or len(table) != len(specs):
        raise ConfigError([f"declared parameters = {specs!r}: must be a mapping from names to ParameterSpec"])
    return iter(table.items())


def prefixed(prefix: str, specs: Named) -> Named:
    """The same, of a module by the name of ``prefix``."""
    for name, spec in specs:
        yield f"{prefix}.{name}", spec


FOLDED = re.compile(r"\{(\d+)(?:,(\d+))?(?:\.\.(\d+))?\}")
"""Where a name stands for several: ``{0..31}``, ``{1,3..31}`` or ``{0,1}``."""


def fold(numbers: range) -> str:
    """Numbers in braces, as `FOLDED` reads them; a single one stands alone."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if first + numbers.step == last:
        return f"{{{first},{last}}}"
    return f"{{{first}..{last}}}" if numbers.step == 1 else f"{{{first},{first + numbers.step}..{last}}}"


def unfold(numbers: re.Match[str]) -> range:
    """The numbers that a match of `FOLDED` stands for."""
    first, second, last = (None if text is None else int(text) for text in numbers.groups())
    assert first is not None
    step = 1 if second is None else second - first
    return range(first, (last or second or first) + 1, step)


def check_names(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes.

    Raises:
        UserError: one line for each problem.
    """
    problems = [f"{name}: missing, must have shape {shape}" for name, shape in expected.items() if name not in given]
    problems += [f"{name}: unknown to the model" for name in given if name not in expected]
    problems += [
        f"{name}.shape = {given[name]}: must be {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if problems:
        raise UserError("the state doesn't fit the model:\n" + "\n".join(problems))
