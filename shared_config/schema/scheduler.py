"""The learning rate over time."""

from __future__ import annotations

from typing import Literal

from shared_config.schema.base import Count, Fraction, PositiveInt, Section, section


@section
class SchedulerConfig(Section):
    """Linear warm-up, then decay from the optimiser's ``lr`` to ``min_lr_ratio`` times it.

    ``decay_steps`` is the step at which the decay ends, counted from the start; None means the last step of the run.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 2000
    decay_steps: PositiveInt | None = None
    min_lr_ratio: Fraction = 0.1
