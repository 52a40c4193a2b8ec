"""The rates of every step, in float64 Python arithmetic, so that both backends use the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from shared_config.schema.job import JobConfig


class Rates(NamedTuple):
    """The numbers of an update: of the host, or scalars of a device.

    Attributes:
        lr: learning rate.
        decay: weight decay, of parameters that decay.
        average: how far the average of a schedule-free optimiser moves to the newest weights; others do not read it.
    """

    lr: Any
    decay: Any
    average: Any = 1.0


SHAPES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1.0 - t,
    "sqrt": lambda t: 1.0 - math.sqrt(t),
}
"""What is left of a rate after a share t of the decay."""
KINDS = ("cosine", "linear", "wsd", "rex", "constant", "none")


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int = 0,
    decay_steps: int,
    min_ratio: float = 0.0,
    kind: str = "cosine",
    stable_steps: int | None = None,
    wsd_decay: str = "linear",
    rex_alpha: float = 0.5,
) -> float:
    """Learning rate of the update number ``step``, counted from 0 (so the first update has step 0).

    With w = ``warmup_steps``, d = ``decay_steps``, m = ``min_ratio``, a = ``rex_alpha``::

        step < w    peak * (step + 1) / w
        step >= w   t = min(1, (step - w) / (d - w)), or 1 if d <= w
                    cosine    peak * (m + (1 - m) * (1 + cos(pi * t)) / 2)
                    linear    peak * (m + (1 - m) * (1 - t))
                    rex       peak * (m + (1 - m) * (1 - t) / (1 - a + a * (1 - t)))
                    wsd       peak up to step b = min(w + ``stable_steps``, d), then as ``wsd_decay`` from b to d:
                              as cosine, as linear, or "sqrt": peak * (m + (1 - m) * (1 - sqrt(t)))
                    constant  peak
        none        peak at every step

    The peak is reached by the last warm-up step (w - 1) and held by step w; ``min_ratio * peak`` is reached at step
    d, the first after the decay, and kept. A run of d steps thus makes no update at the bare minimum, which may be 0.
    ``stable_steps`` None is 9/10 of d - w, rounded down.

    Raises:
        ValueError: unknown ``kind``, or a negative step.
    """
    if kind not in KINDS:
        raise ValueError(f"scheduler.name = {kind!r}: must be one of {', '.join(KINDS)}")
    if step < 0:
        raise ValueError(f"step = {step}: must be at least 0")
    if kind == "none":
        return peak
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    if kind == "constant":
        return peak
    start = warmup_steps
    if kind == "wsd":
        stable = max(decay_steps - warmup_steps, 0) * 9 // 10 if stable_steps is None else stable_steps
        start = min(warmup_steps + stable, max(decay_steps, warmup_steps))
        if step < start:
            return peak
    done = share_done(step, start, decay_steps)
    if kind == "rex":
        left = (1.0 - done) / (1.0 - rex_alpha + rex_alpha * (1.0 - done))
    else:
        left = SHAPES[wsd_decay if kind == "wsd" else kind](done)
    return peak * (min_ratio + (1.0 - min_ratio) * left)


def share_done(step: int, start: int, end: int) -> float:
    """Of the way from step ``start`` to step ``end``."""
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0


def weight_decay(step: int, *, first: float, final: float | None, decay_steps: int, shape: str = "cosine") -> float:
    """Weight decay of the update number ``step``: from ``first`` at step 0 to ``final`` at step ``decay_steps``, which
    is kept; ``first`` throughout if there is no ``final``.
    """
    if final is None:
        return first
    return final + (first - final) * SHAPES[shape](share_done(step, 0, decay_steps))


def average_share(step: int, warmup_steps: int) -> float:
    """lr^2 of the update number ``step`` over the sum of those up to it, after a linear warm-up to a constant rate.

    The weights of the average of Defazio et al. 2024 (arXiv:2405.15682), section 4 and appendix: c = 1 at step 0.
    """
    warm = min(step + 1, warmup_steps)
    squares = warm * (warm + 1) * (2 * warm + 1) / 6 / warmup_steps**2 if warmup_steps else 0.0
    newest = ((step + 1) / warmup_steps) ** 2 if step < warmup_steps else 1.0
    return newest / (squares + step + 1 - warm)


def scheduled_learning_rate(config: JobConfig, step: int) -> float:
    """`learning_rate` of a job; the decay ends with the run unless ``scheduler.decay_steps`` is given."""
    schedule = config.scheduler
    return learning_rate(
        step,
        peak=config.optimizer.lr,
        warmup_steps=schedule.warmup_steps,
        decay_steps=_decay_steps(config),
        min_ratio=schedule.min_lr_ratio,
        kind=schedule.name,
        stable_steps=schedule.stable_steps,
        wsd_decay=schedule.wsd_decay,
        rex_alpha=schedule.rex_alpha,
    )


def scheduled_rates(config: JobConfig, step: int) -> Rates:
    """All rates of a job's update number ``step``, counted from 0."""
    schedule = config.scheduler
    decay = weight_decay(
        step,
        first=config.optimizer.weight_decay,
        final=schedule.final_weight_decay,
        decay_steps=_decay_steps(config),
        shape=schedule.weight_decay_shape,
    )
    warmup_steps = 0 if schedule.name == "none" else schedule.warmup_steps
    return Rates(scheduled_learning_rate(config, step), decay, average_share(step, warmup_steps))


def _decay_steps(config: JobConfig) -> int:
    return config.scheduler.decay_steps if config.scheduler.decay_steps is not None else config.train.max_steps
