"""The learning rate and the weight decay over time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from shared_config.schema.base import Count, Fraction, NonNegativeFloat, PositiveInt, Section, section

WARMUP_STEPS = 2000


@section
class SchedulerConfig(Section):
    """Linear warm-up, then decay from the optimiser's ``lr`` to ``min_lr_ratio`` times it.

    name: "cosine"; "linear"; "wsd", which stays at the peak for ``stable_steps`` after the warm-up (Hu et al. 2024,
    arXiv:2404.06395); "rex" (Chen et al. 2021, arXiv:2107.04197); "constant", which does not decay; "none", which does
    not warm up either.
    decay_steps: the step at which the decay ends, counted from the start; None means the last step of the run.
    stable_steps: of "wsd"; None: nine tenths of the steps from the warm-up to ``decay_steps``.
    wsd_decay: the shape of what follows in "wsd"; "sqrt" is 1 - sqrt(t) (Hägele et al. 2024, arXiv:2405.18392).
    rex_alpha: of "rex": how much the decay is put off; 0.5 is what the paper has.
    final_weight_decay: where the weight decay ends, which begins at the optimiser's ``weight_decay``; None: it stays.
    weight_decay_shape: how it goes there, from the first step to ``decay_steps``.
    """

    name: Literal["cosine", "linear", "wsd", "rex", "constant", "none"] = "cosine"
    warmup_steps: Count = WARMUP_STEPS
    decay_steps: PositiveInt | None = None
    min_lr_ratio: Fraction = 0.1
    stable_steps: Count | None = None
    wsd_decay: Literal["linear", "cosine", "sqrt"] = "linear"
    rex_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    final_weight_decay: NonNegativeFloat | None = None
    weight_decay_shape: Literal["cosine", "linear"] = "cosine"

    def problems(self) -> Iterator[str]:
        if self.name == "none" and self.warmup_steps not in (0, WARMUP_STEPS):
            yield f"warmup_steps = {self.warmup_steps}: must be 0 with name = 'none', which does not warm up"
        for field, default, reader in (
            ("stable_steps", None, "wsd"),
            ("wsd_decay", "linear", "wsd"),
            ("rex_alpha", 0.5, "rex"),
        ):
            if self.name != reader and getattr(self, field) != default:
                yield f"{field} = {getattr(self, field)!r}: name = {self.name!r} does not read it, only {reader!r} does"
        if self.final_weight_decay is None and self.weight_decay_shape != "cosine":
            yield f"weight_decay_shape = {self.weight_decay_shape!r}: is not read without final_weight_decay"
