"""The learning-rate schedule: hand-computed values, and what must hold for any setting."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.schedule import (
    KINDS,
    average_share,
    learning_rate,
    scheduled_learning_rate,
    scheduled_rates,
)
from shared_config.errors import ConfigError
from shared_config.schema import JobConfig, ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig

QUARTER = math.cos(math.pi / 4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * (1 + QUARTER) / 2, 0.55, 0.1 + 0.9 * (1 - QUARTER) / 2, 0.1, 0.1]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("rex", [0.5, 1.0, 1.0, 0.1 + 0.9 * 6 / 7, 0.1 + 0.9 * 2 / 3, 0.1 + 0.9 * 2 / 5, 0.1, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("none", [1.0] * 8),
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
    floor = peak if settings["kind"] in ("constant", "none") else peak * settings["min_ratio"]
    assert all(0.0 <= rate <= peak * (1 + 1e-15) for rate in rates)
    assert settings["kind"] == "none" or all(a < b for a, b in pairwise(rates[:warmup]))
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
    ("shape", "left"),
    [("linear", [1, 1, 0.75, 0.5, 0.25]), ("cosine", [1, 1, (1 + QUARTER) / 2, 0.5, (1 - QUARTER) / 2]),
     ("sqrt", [1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])],
)  # fmt: skip
def test_what_follows_the_stable_part(shape: str, left: list[float]) -> None:
    options = {"kind": "wsd", "peak": 2.0, "warmup_steps": 2, "decay_steps": 9, "min_ratio": 0.5}
    rates = [learning_rate(step, **options, stable_steps=3, wsd_decay=shape) for step in range(4, 11)]
    expected = [1 + ratio for ratio in [*left, 0, 0]]
    assert rates == pytest.approx(expected, rel=1e-15)
    assert learning_rate(5, **options, stable_steps=99) == 2.0
    assert learning_rate(9, **options, stable_steps=99) == 1.0


def test_the_weight_decay_goes_from_one_value_to_another() -> None:
    def rates(**fields: Any) -> list[float]:
        job = JobConfig(
            train=TrainConfig(max_steps=4),
            optimizer=OptimizerConfig(weight_decay=0.2),
            scheduler=SchedulerConfig(name="constant", **fields),
        )
        return [scheduled_rates(job, step).decay for step in range(6)]

    assert rates() == [0.2] * 6
    assert rates(final_weight_decay=0.6, weight_decay_shape="linear") == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.6])
    turning = [0.4 - 0.2 * value for value in (1, QUARTER, 0, -QUARTER, -1, -1)]
    assert rates(final_weight_decay=0.6) == pytest.approx(turning)


@given(st.integers(0, 300), st.integers(0, 50))
def test_the_share_of_an_average_is_that_of_squared_rates(step: int, warmup: int) -> None:
    squares = [learning_rate(i, peak=1.0, warmup_steps=warmup, decay_steps=9, kind="constant") ** 2 for i in range(301)]
    assert average_share(step, warmup) == pytest.approx(squares[step] / sum(squares[: step + 1]), rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stable_steps": 5}, "stable_steps = 5: name = 'cosine' does not read it, only 'wsd' does"),
        ({"name": "wsd", "rex_alpha": 0.3}, r"rex_alpha = 0\.3: name = 'wsd' does not read it, only 'rex' does"),
        ({"name": "none", "warmup_steps": 5}, "warmup_steps = 5: must be 0 with name = 'none'"),
        ({"weight_decay_shape": "linear"}, "weight_decay_shape = 'linear': is not read without final_weight_decay"),
    ],
)
def test_fields_that_a_schedule_does_not_read_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"kind": "poly"}, "'poly': must be one of cosine"), ({"step": -1}, "step = -1")]
)
def test_refuses_what_it_does_not_know(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(**{"step": 0, "peak": 1.0, "decay_steps": 10, **arguments})
