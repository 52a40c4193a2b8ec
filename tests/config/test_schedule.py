"""The learning-rate schedule: hand-computed values, and what must hold for any setting."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.schedule import KINDS, learning_rate, scheduled_learning_rate
from shared_config.schema import JobConfig, ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig

QUARTER = math.cos(math.pi / 4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * (1 + QUARTER) / 2, 0.55, 0.1 + 0.9 * (1 - QUARTER) / 2, 0.1, 0.1]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_values_of_a_short_run(kind: str, expected: list[float]) -> None:
    arguments = {"peak": 2.0, "warmup_steps": 2, "decay_steps": 6, "min_ratio": 0.1, "kind": kind}
    rates = [learning_rate(step, **arguments) for step in range(8)]
    assert rates == pytest.approx([2.0 * ratio for ratio in expected], rel=1e-15)


settings = st.fixed_dictionaries(
    {
        "peak": st.floats(1e-6, 1.0),
        "warmup_steps": st.integers(0, 50),
        "decay_steps": st.integers(1, 200),
        "min_ratio": st.floats(0.0, 1.0),
        "kind": st.sampled_from(KINDS),
    }
)


@given(settings=settings)
def test_rises_to_the_peak_then_falls_to_the_minimum_and_stays(settings: dict) -> None:
    rates = [learning_rate(step, **settings) for step in range(260)]
    warmup, peak = settings["warmup_steps"], settings["peak"]
    floor = peak if settings["kind"] == "constant" else peak * settings["min_ratio"]
    assert all(0.0 <= rate <= peak * (1 + 1e-15) for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(b <= a * (1 + 1e-15) for a, b in pairwise(rates[warmup:]))
    if warmup:
        assert rates[warmup - 1] == peak
    assert rates[-1] == pytest.approx(floor, rel=1e-15, abs=1e-300)


def test_a_job_decays_until_its_last_step_unless_told_otherwise() -> None:
    job = JobConfig(
        model=ModelConfig(dim=64, n_heads=4, max_seq_len=128),
        train=TrainConfig(max_steps=10, seq_len=64),
        optimizer=OptimizerConfig(lr=1.0),
        scheduler=SchedulerConfig(name="linear", warmup_steps=2, min_lr_ratio=0.0),
    )
    assert scheduled_learning_rate(job, 6) == 0.5
    assert scheduled_learning_rate(job, 10) == 0.0
    early = job.replace(scheduler=job.scheduler.replace(decay_steps=6))
    assert scheduled_learning_rate(early, 4) == 0.5
    assert scheduled_learning_rate(early, 9) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"), [({"kind": "poly"}, "'poly': must be one of cosine"), ({"step": -1}, "step = -1")]
)
def test_refuses_what_it_does_not_know(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(**{"step": 0, "peak": 1.0, "decay_steps": 10, **arguments})
