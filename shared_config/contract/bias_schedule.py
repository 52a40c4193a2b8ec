"""How the rate at which balancing biases move changes while a model is trained."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BIAS_SCHEDULES = ("constant", "cosine_decay", "linear_warmup")
WARMUP_SHARE = 0.1


def training_progress(step: Any, max_steps: int, xp: Any = np) -> Any:
    """Share of training done at ``step``, at most 1.

    Args:
        xp: NumPy, or a namespace like it for a step that is an array of it.
    """
    return xp.minimum(step / max_steps, 1.0) if max_steps > 0 else 1.0


def schedule_factor(schedule: str, progress: Any, xp: Any = np) -> Any:
    """The factor of a schedule on the rate: cosine_decay goes from 1 to 0, linear_warmup from 0 to 1 over the first
    tenth.

    Args:
        xp: as for `training_progress`.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine_decay":
        return (1.0 + xp.cos(math.pi * progress)) / 2.0
    if schedule == "linear_warmup":
        return xp.minimum(progress / WARMUP_SHARE, 1.0)
    raise ValueError(f"bias_schedule = {schedule!r}: must be one of {', '.join(BIAS_SCHEDULES)}")
