"""Rotary positions: `RopeScaling`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from shared_config.schema.base import PositiveFloat, PositiveInt, Section, section

MIXED = ("linear", "llama3", "yarn")
RopeTheta = Annotated[float, Field(gt=1, allow_inf_nan=False)]


@section
class RopeScaling(Section):
    """How rotary frequencies are stretched beyond the trained context.

    linear: positions divided by ``factor``. llama3: frequencies whose wavelength exceeds
    ``original_max_seq_len / low_freq_factor`` divided by ``factor``, those below ``original_max_seq_len /
    high_freq_factor`` kept, between interpolated (Llama 3.1). yarn: NTK-by-parts interpolation between ``beta_fast``
    and ``beta_slow`` rotations, with attention factor 0.1*ln(factor)+1 unless given (Peng et al. 2023,
    arXiv:2309.00071).
    """

    type: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    original_max_seq_len: PositiveInt | None = None
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None

    def idle(self) -> Collection[str]:
        used = {
            "none": (),
            "linear": ("factor",),
            "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
        }[self.type]
        return {field.name for field in dataclasses.fields(self)} - {"type", *used}

    def problems(self) -> Iterator[str]:
        if self.type == "none" and self.factor != 1.0:
            yield f"factor = {self.factor}: must be 1 when type is 'none'; set type to one of {', '.join(MIXED)}"
        if self.type in ("llama3", "yarn") and self.original_max_seq_len is None:
            yield f"original_max_seq_len = None: type {self.type!r} needs the context length the model was trained with"
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            yield f"high_freq_factor = {self.high_freq_factor}: must exceed low_freq_factor = {self.low_freq_factor}"
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            yield f"beta_fast = {self.beta_fast}: must exceed beta_slow = {self.beta_slow}"
