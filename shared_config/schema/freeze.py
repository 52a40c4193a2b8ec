"""What is frozen when."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared_config.schema.base import NESTED, Count, FrozenDict, Items, Section, entry

DEFAULT_PATTERNS = {"vision_encoder": "vision_encoder.*", "adapter": "adapter.*", "transformer": "transformer.*"}
PATTERN_CHARACTERS = "*?["


@entry
class FreezeSpec(Section):
    """Freeze (or, ``frozen=False``, thaw) the parameters of a module named in ``module_patterns``, or those whose names
    fit ``module``, a pattern itself (* and ? as in file names).
    """

    module: str
    frozen: bool = True


@entry
class FreezeStage(Section):
    """From optimiser step ``start_step`` on, ``specs`` replace what was frozen before."""

    start_step: Count
    specs: Items[Annotated[FreezeSpec, NESTED]] = ()


def is_pattern(module: str) -> bool:
    """Whether what names a module is a pattern of parameters' names."""
    return any(character in module for character in PATTERN_CHARACTERS)


def default_patterns(**own: str | tuple[str, ...]) -> FrozenDict[str | tuple[str, ...]]:
    """The field ``module_patterns`` of an architecture, with the patterns of its own parts."""
    return Field(default_factory=lambda: FrozenDict({**DEFAULT_PATTERNS, **own}))
