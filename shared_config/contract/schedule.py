"""The learning rate of every step, in float64 Python arithmetic, so that both backends use the same numbers."""

from __future__ import annotations

import math

from shared_config.schema.job import JobConfig

KINDS = ("cosine", "linear", "constant")


def learning_rate(
    step: int, *, peak: float, warmup_steps: int = 0, decay_steps: int, min_ratio: float = 0.0, kind: str = "cosine"
) -> float:
    """Learning rate of the update number ``step``, counted from 0 (so the first update has step 0).

    With w = ``warmup_steps``, d = ``decay_steps``, m = ``min_ratio``::

        step < w    peak * (step + 1) / w
        step >= w   t = min(1, (step - w) / (d - w)), or 1 if d <= w
                    cosine    peak * (m + (1 - m) * (1 + cos(pi * t)) / 2)
                    linear    peak * (1 - (1 - m) * t)
                    constant  peak

    The peak is reached by the last warm-up step (w - 1) and held by step w; ``min_ratio * peak`` is reached at step
    d, the first after the decay, and kept. A run of d steps thus makes no update at the bare minimum, which may be 0.

    Raises:
        ValueError: unknown ``kind``, or a negative step.
    """
    if kind not in KINDS:
        raise ValueError(f"scheduler.name = {kind!r}: must be one of {', '.join(KINDS)}")
    if step < 0:
        raise ValueError(f"step = {step}: must be at least 0")
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    if kind == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / (decay_steps - warmup_steps)) if decay_steps > warmup_steps else 1.0
    left = (1.0 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1.0 - done
    return peak * (min_ratio + (1.0 - min_ratio) * left)


def scheduled_learning_rate(config: JobConfig, step: int) -> float:
    """`learning_rate` of a job; the decay ends with the run unless ``scheduler.decay_steps`` is given."""
    schedule = config.scheduler
    return learning_rate(
        step,
        peak=config.optimizer.lr,
        warmup_steps=schedule.warmup_steps,
        decay_steps=schedule.decay_steps if schedule.decay_steps is not None else config.train.max_steps,
        min_ratio=schedule.min_lr_ratio,
        kind=schedule.name,
    )
