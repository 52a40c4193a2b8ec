"""The host asks for nothing that a device has to compute first, in a training step: forward, backward and update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from kempnerforge_torch.model import router
from kempnerforge_torch.training import fused_adamw
from kempnerforge_torch.training.optimizer import Step, build_optimizer
from kempnerforge_torch.training.train import Trainer
from shared_config.contract.moments import optimizer_of
from shared_config.contract.parameters import parameter_table
from shared_config.contract.schedule import Rates
from shared_config.data import open_data
from shared_config.loader import load_config
from tests.distributed.layouts import MODELS, VLM
from tests.jobs import draw_batch, tiny_job
from tests.torch.waits import rows_of_no_group_spoiled, waits

NIGHTLY = settings.get_current_profile_name() == "nightly"
TRAIN: tuple[dict[str, str], ...] = (
    {"mixed_precision": "bf16"},
    {"on_nonfinite": "skip"},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
)
CASES = [(model, train) for model in MODELS for train in TRAIN]
BY_DAY = [("sigmoid", TRAIN[0]), ("limited", TRAIN[1]), ("apart", TRAIN[3]), ("scaled", TRAIN[2])]


def padded_batches(job: Any, seed: int) -> list[dict[str, np.ndarray]]:
    """Two, whose last tokens are padding."""
    batches = [draw_batch(job, seed + place) for place in range(2)]
    real = np.ones_like(batches[0]["tokens"], dtype=bool)
    real[:, -2:] = False
    return [{**batch, "text_mask": real} for batch in batches]


@pytest.mark.parametrize(("model", "train"), CASES if NIGHTLY else BY_DAY, ids=str)
def test_a_step_waits_for_nothing(model: str, train: dict[str, str]) -> None:
    job = tiny_job(MODELS[model], train={"grad_accum_steps": 2, **train})
    trainer = Trainer(job, "cpu")
    with waits() as found:
        for seed in (0, 10):
            trainer.step(padded_batches(job, seed))
    assert found == []


@pytest.mark.parametrize("skips", [False, True])
def test_the_fused_update_waits_for_nothing(skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does around its kernel."""
    monkeypatch.setattr(fused_adamw, "run_adamw", lambda *given, **named: None)
    trainer = Trainer(tiny_job({}), "cpu")
    gradients: dict[Tensor, Tensor] = {master: torch.ones_like(master) for master in trainer.parameters.values()}
    with waits() as found:
        step = fused_adamw.FusedStep(trainer.optimizer, gradients, Rates(0.1, 0.1), torch.ones(()))
        step.take(step.stays_finite() if skips else None)
    assert found == []


@pytest.mark.parametrize(("name", "average"), [("lion", 0.0), ("muon", 0.9), ("schedule_free_adamw", 0.0)])
def test_an_update_that_may_be_skipped_waits_for_nothing(name: str, average: float) -> None:
    """On a device that has no values to ask for."""
    job = tiny_job({}, optimizer={"name": name, "ema_decay": average}, scheduler={"name": "constant"})
    table = parameter_table(job.model)
    own = [key for key, spec in table.items() if optimizer_of(job.optimizer, key, spec) == name]
    parameters = {key: nn.Parameter(torch.empty(table[key].shape, device="meta")) for key in own}
    optimizer = build_optimizer(parameters, table, job.optimizer)
    gradients: dict[Tensor, Tensor] = {tensor: torch.empty_like(tensor) for tensor in parameters.values()}
    step = Step(optimizer, gradients, Rates(0.1, 0.1), torch.empty((), device="meta"))
    step.take(step.stays_finite())


@pytest.mark.parametrize("arch", ["moma", "mot"] if NIGHTLY else ["moma"])
def test_a_step_with_images_waits_for_nothing(arch: str) -> None:
    job = load_config(f"debug_vlm_{arch}", VLM)
    trainer = Trainer(job, "cpu")
    with waits() as found:
        trainer.step([open_data(job).batch(0)])
    assert found == []


@pytest.mark.parametrize("way", ["tolist", "item", "bool", "mask", "in a gradient"])
def test_who_asks_is_seen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here in place of the choice of experts."""
    choose = router.top_k_lowest_first

    def asking(scores: torch.Tensor, k: int) -> torch.Tensor:
        {"tolist": scores.tolist, "item": scores.sum().item, "bool": lambda: bool(scores.sum() > 0)}.get(way, int)()
        return choose(scores[scores > -1].reshape(scores.shape) if way == "mask" else scores, k)

    def weighed(self: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
        if way == "in a gradient":
            chosen.register_hook(lambda gradient: gradient * float(gradient.sum() != torch.inf))
        return chosen

    code = compile("", router.__file__, "exec").co_filename
    for function in (asking, weighed):
        function.__code__ = function.__code__.replace(co_filename=code)
    monkeypatch.setattr(router, "top_k_lowest_first", asking)
    monkeypatch.setattr(router.TopKRouter, "_weigh", weighed)
    job = tiny_job(MODELS["softmax"])
    trainer = Trainer(job, "cpu")
    with waits() as found:
        trainer.step([draw_batch(job, 0)])
    assert found


@pytest.mark.parametrize("model", ["sigmoid", "limited", "apart"])
def test_rows_of_no_expert_reach_no_sum(model: str) -> None:
    """Of padding and beyond the capacity: whatever a kernel leaves there, steps are the same to the bit."""
    job = tiny_job(MODELS[model])
    states = []
    for spoils in (False, True):
        trainer = Trainer(job, "cpu", dtype=torch.float64)
        batches = padded_batches(job, 5)
        if spoils:
            with rows_of_no_group_spoiled():
                trainer.step(batches)
        else:
            trainer.step(batches)
        states.append(trainer.state().weights)
    for name, value in states[0].items():
        assert value.tobytes() == states[1][name].tobytes(), name
