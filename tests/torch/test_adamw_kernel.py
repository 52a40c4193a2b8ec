"""The kernel of fused AdamW against the same in plain operations: on a GPU,

python -m pytest -n 0 -m gpu tests/torch/test_adamw_kernel.py

or, where Triton is installed without one, by its interpreter: TRITON_INTERPRET=1 python -m pytest -n 0 with this file.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

from kempnerforge_torch.training.fused_adamw import FusedStep, can_fuse
from kempnerforge_torch.training.optimizer import Step
from kempnerforge_torch.training.train import Trainer
from shared_config.contract.schedule import Rates
from tests.jobs import EXPERTS, draw_batch, tiny_job
from tests.torch.adamw_checks import CONFIG, Drawn, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
SHAPES = [(4096,), (5000, 3), (), (1,), (17, 9), (2, 4096), (33_000,), (4095,)]
"""Whole blocks, parts of blocks, both."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU"),
]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RATES = Rates(0.05, CONFIG.weight_decay)


def pair(seed: int = 0) -> tuple[Drawn, Drawn]:
    """The same parameters twice: narrow and wide gradients, with and without copies, of many ages."""
    places = range(len(SHAPES))
    options: dict[str, Any] = {"seed": seed, "device": DEVICE}
    kinds = [place % 3 > 0 for place in places], [place % 2 > 0 for place in places], [7**place for place in places]
    return drawn(SHAPES, *kinds, **options), drawn(SHAPES, *kinds, **options)


def assert_same(found: Drawn, expected: Drawn, rounding: float = 2.0**-20) -> None:
    """Of float32 to a few roundings, copies to the bit of what they are copies of."""
    ours, theirs = found.state(), expected.state()
    for name, value in theirs.items():
        if not name.startswith("copy."):
            torch.testing.assert_close(ours[name], value, rtol=rounding, atol=rounding, msg=name)
        elif not INTERPRETED:  # the interpreter truncates
            assert torch.equal(ours[name], ours[name.removeprefix("copy.")].bfloat16()), name


@pytest.mark.parametrize("factor", [None, 0.37])
def test_a_step_is_that_of_plain_operations(factor: float | None) -> None:
    one, other = pair()
    scale = None if factor is None else torch.tensor(factor, device=DEVICE)
    step = FusedStep(one.optimizer, one.gradients, RATES, scale, one.copies)
    before = one.state()
    assert step.stays_finite()
    assert all(torch.equal(value, before[name]) for name, value in one.state().items()), "looking writes nothing"
    step.take()
    Step(other.optimizer, other.gradients, RATES, scale).take()
    assert_same(one, other)


def test_a_step_that_is_left_out_changes_nothing() -> None:
    one, _ = pair()
    before = one.state()
    step = FusedStep(one.optimizer, one.gradients, RATES, None, one.copies)
    step.take(torch.tensor(False, device=DEVICE))
    assert all(torch.equal(value, before[name]) for name, value in one.state().items())
    step.take(torch.tensor(True, device=DEVICE))
    assert not any(torch.equal(value, before[name]) for name, value in one.state().items())


@pytest.mark.parametrize("place", range(len(SHAPES)))
@pytest.mark.parametrize("what", ["gradient", "exp_avg", "exp_avg_sq", "parameter"])
def test_what_is_not_finite_anywhere_is_seen(what: str, place: int) -> None:
    one, _ = pair()
    parameter = list(one.parameters.values())[place]
    spoiled = {"gradient": one.gradients[parameter], "parameter": parameter.detach(), **one.optimizer.state[parameter]}
    spoiled[what].view(-1)[-1] = torch.inf
    assert not FusedStep(one.optimizer, one.gradients, RATES, None, one.copies).stays_finite()


def test_gradients_that_start_anywhere_are_read() -> None:
    one, other = pair()
    parameter = one.parameters["p4"]
    shifted = torch.zeros(17 * 9 + 1, device=DEVICE, dtype=one.gradients[parameter].dtype)
    shifted[1:] = one.gradients[parameter].flatten()
    one.gradients[parameter] = shifted[1:].view(17, 9)
    FusedStep(one.optimizer, one.gradients, RATES).take()
    Step(other.optimizer, other.gradients, RATES).take()
    ours, theirs = one.parameters["p4"], other.parameters["p4"]
    torch.testing.assert_close(ours, theirs, rtol=2.0**-22, atol=2.0**-22)


@on_gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", [{}, EXPERTS])
def test_trainers_on_a_gpu_take_fused_steps(model: dict[str, Any], compiled: bool) -> None:
    """And train as with plain ones: one micro-batch, then two."""
    job = tiny_job(model, train={"mixed_precision": "bf16", "compile_model": compiled, "on_nonfinite": "skip"})
    trainer, other = Trainer(job, DEVICE), Trainer(job, DEVICE)
    assert can_fuse(trainer.optimizer)
    other._is_fused = False
    for step in range(4):
        batches = [draw_batch(job, 10 * step + place) for place in range(1 + step % 2)]
        losses = [float(each.step(batches)["loss"]) for each in (trainer, other)]
        np.testing.assert_allclose(*losses, rtol=2e-3)
    for name, copy in trainer.copies.current().items():
        assert torch.equal(copy, trainer.masters[name].bfloat16()), name
        torch.testing.assert_close(trainer.masters[name], other.masters[name], rtol=1e-2, atol=1e-2, msg=name)


def launches(layers: int) -> dict[str, int]:
    """Kernels of a trainer's update, and how often each runs."""
    job = tiny_job({"n_layers": layers}, train={"mixed_precision": "bf16"})
    trainer = Trainer(job, DEVICE)
    trainer.step([draw_batch(job, 0)])
    trainer._differentiate([draw_batch(job, 1)], 30, 1)
    with torch.profiler.profile(acc_events=True) as profile:
        trainer._update(Rates(0.01, 0.1), torch.zeros((), device=DEVICE))
        torch.cuda.synchronize()
    return {event.key: event.count for event in profile.key_averages() if event.device_type.name == "CUDA"}


@on_gpu
def test_a_step_of_a_trainer_launches_no_kernel_for_each_tensor() -> None:
    few, many = launches(1), launches(4)
    assert [count for name, count in many.items() if "_adamw" in name] == [1]
    assert sum(many.values()) == sum(few.values()), (few, many)
