"""The rates of balancing biases over a training."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shared_config.contract import bias_schedule


def test_schedules_of_the_bias() -> None:
    for schedule, factors in {
        "constant": [1, 1, 1, 1],
        "cosine_decay": [1, (1 + math.cos(math.pi / 20)) / 2, 0.5, 0],
        "linear_warmup": [0, 0.5, 1, 1],
    }.items():
        progress = [bias_schedule.training_progress(step, 40) for step in (0, 2, 20, 40)]
        found = [bias_schedule.schedule_factor(schedule, share) for share in progress]
        np.testing.assert_allclose(found, factors, atol=1e-15)
    assert bias_schedule.training_progress(50, 40) == bias_schedule.training_progress(0, 0) == 1


def test_unknown_schedules_are_refused() -> None:
    allowed = "bias_schedule = 'cosine': must be one of constant, cosine_decay, linear_warmup"
    with pytest.raises(ValueError, match=f"^{allowed}$"):
        bias_schedule.schedule_factor("cosine", 0.5)
