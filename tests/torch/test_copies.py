"""Training in bfloat16 on copies of the masters: made once for an update, the same bits as casts in every micro-batch,
never older than the masters; and the fused step of AdamW, but for its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.training import fused_adamw
from kempnerforge_torch.training.fused_adamw import FusedStep, can_fuse
from kempnerforge_torch.training.optimizer import Step
from kempnerforge_torch.training.train import Trainer
from shared_config.contract.schedule import Rates
from shared_config.schema.job import JobConfig
from tests.jobs import EXPERTS, draw_batch, tiny_job
from tests.torch.adamw_checks import CONFIG, Drawn, drawn, plain_kernel

NARROW = {"mixed_precision": "bf16"}
MODELS: dict[str, dict[str, Any]] = {"dense": {}, "tied": {"tie_embeddings": True}, "experts": EXPERTS}

RATES = Rates(0.1, CONFIG.weight_decay)


class Casts(TorchDispatchMode):
    """Counts the elements that are cast from float32 to bfloat16 in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default and args[0][0].dtype == torch.bfloat16:
            self.elements += sum(tensor.numel() for tensor in args[1])
        return func(*args, **(kwargs or {}))


def narrow_job(model: str = "dense", **train: Any) -> JobConfig:
    return tiny_job(MODELS[model], train={**NARROW, **train}, scheduler={"warmup_steps": 0})


def steps_with_casts(trainer: Trainer, steps: list[list[Any]]) -> None:
    """Steps that cast all masters in every micro-batch, by autograd, and take torch's own AdamW."""
    config, masters = trainer.config, trainer.masters
    groups = [
        {"params": [p for n, p in masters.items() if trainer.table[n].decay == decays],
         "weight_decay": config.optimizer.weight_decay * decays}
        for decays in (True, False)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps, foreach=True)
    trainer.model.train()
    for step, batches in enumerate(steps):
        count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        for batch in batches:
            narrow = {
                f"model.{name}": p if trainer.table[name].full_precision else p.to(torch.bfloat16)
                for name, p in masters.items()
            }
            inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
            options = {"inputs": inputs, "count": count, "micro_batches": len(batches)}
            torch.func.functional_call(trainer._objective, narrow, kwargs=options)
        gradients = [p.grad for p in masters.values() if p.grad is not None]
        norm, most = torch.nn.utils.get_total_norm(gradients), config.train.grad_clip_norm
        for gradient in gradients:
            gradient *= most / norm.clamp(min=most)
        for group in optimizer.param_groups:
            group["lr"] = trainer.rates(step).lr
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_steps_have_the_bits_of_casts_in_every_micro_batch(model: str, micro_batches: int) -> None:
    job = narrow_job(model)
    trainer, other = Trainer(job, "cpu"), Trainer(job, "cpu")
    steps = [[draw_batch(job, 10 * step + place) for place in range(micro_batches)] for step in range(3)]
    for batches in steps:
        trainer.step(batches)
    steps_with_casts(other, steps)
    for name, master in trainer.masters.items():
        assert torch.equal(master, other.masters[name]), name


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_masters_are_cast_once_for_an_update(micro_batches: int) -> None:
    trainer = Trainer(narrow_job("experts"), "cpu")
    narrow = sum(p.numel() for n, p in trainer.masters.items() if not trainer.table[n].full_precision)
    batches = [draw_batch(trainer.config, seed) for seed in range(micro_batches)]
    for call, cast in ((trainer.step, narrow), (trainer.evaluate, narrow), (trainer.evaluate, 0), (trainer.step, 0)):
        with Casts() as casts:
            call(batches)
        assert casts.elements == cast


CHANGES: dict[str, Callable[[Trainer, Trainer], object]] = {
    "set_state": lambda trainer, other: set_state(trainer.model, other.state().weights),
    "load_state": lambda trainer, other: trainer.load_state(other.state()),
    "load_state_dict": lambda trainer, other: trainer.model.load_state_dict(other.model.state_dict()),
    "other memory": lambda trainer, other: [
        setattr(master, "data", other.masters[name].detach().clone()) for name, master in trainer.masters.items()
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_never_older_than_the_masters(change: str) -> None:
    job = narrow_job()
    trainer, other = (Trainer(job.replace(train=job.train.replace(seed=seed)), "cpu") for seed in (0, 1))
    batch = draw_batch(job, 5)
    for each in (trainer, other):
        each.step([draw_batch(job, 3)])
        each.evaluate([batch])
    before = float(trainer.evaluate([batch])["loss"])
    CHANGES[change](trainer, other)
    assert float(trainer.evaluate([batch])["loss"]) == float(other.evaluate([batch])["loss"]) != before


def test_a_frozen_master_has_a_frozen_copy() -> None:
    trainer = Trainer(narrow_job(), "cpu")
    trainer.masters["norm.weight"].requires_grad_(False)
    before = trainer.masters["norm.weight"].clone()
    trainer.step([draw_batch(trainer.config, 0)])
    assert not trainer.copies.current()["norm.weight"].requires_grad
    assert torch.equal(trainer.masters["norm.weight"], before)
    trainer.masters["norm.weight"].requires_grad_(True)
    trainer.step([draw_batch(trainer.config, 1)])
    assert not torch.equal(trainer.masters["norm.weight"], before)


def test_gradients_of_one_micro_batch_stay_narrow_until_they_are_used() -> None:
    trainer = Trainer(narrow_job(), "cpu")
    for micro_batches, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        trainer._differentiate([draw_batch(trainer.config, seed) for seed in range(micro_batches)], 30, micro_batches)
        assert {gradient.dtype for gradient in trainer._take_gradients().values()} == {dtype}


# The fused step, with its kernel in plain operations


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_adamw, "run_adamw", plain_kernel)


def assert_same_state(found: Drawn, expected: Drawn, ulps: float = 4) -> None:
    ours, theirs = found.state(), expected.state()
    for name, value in theirs.items():
        if name.startswith("copy."):
            assert torch.equal(ours[name], ours[name.removeprefix("copy.")].bfloat16()), name
        else:
            torch.testing.assert_close(ours[name], value, rtol=ulps * 2**-23, atol=2**-23, msg=name)


SHAPES = st.lists(st.sampled_from([(), (1,), (5,), (3, 4), (2, 3, 8)]), min_size=1, max_size=5)


@settings(max_examples=25)
@given(data=st.data(), shapes=SHAPES, seed=st.integers(0, 99))
def test_a_fused_step_is_the_step(data: st.DataObject, shapes: list[tuple[int, ...]], seed: int) -> None:
    flags = st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes))
    narrow, has_copy = data.draw(flags), data.draw(flags)
    counts = data.draw(st.lists(st.integers(0, 2000), min_size=len(shapes), max_size=len(shapes)))
    factor = data.draw(st.sampled_from([None, torch.tensor(0.25)]))
    finite = data.draw(st.sampled_from([None, torch.tensor(True), torch.tensor(False)]))
    one, other = (drawn(shapes, narrow, has_copy, counts, seed=seed) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_adamw, "run_adamw", plain_kernel)
        step = FusedStep(one.optimizer, one.gradients, RATES, factor, one.copies)
        assert step.stays_finite()
        step.take(finite)
    Step(other.optimizer, other.gradients, RATES, factor).take(finite)
    assert_same_state(one, other)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_trainer_with_fused_steps_trains_alike(policy: str) -> None:
    job = narrow_job("experts", on_nonfinite=policy)
    trainer, other = Trainer(job, "cpu"), Trainer(job, "cpu")
    trainer._is_fused = True
    for step in range(4):
        batches = [draw_batch(job, 10 * step + place) for place in range(1 + step % 2)]
        norms = [float(each.step(batches)["grad_norm"]) for each in (trainer, other)]
        np.testing.assert_allclose(*norms, rtol=1e-2)
        with Casts() as casts:
            copies = trainer.copies.current()
        assert casts.elements == 0, "the step wrote the copies"
        assert all(torch.equal(copy, trainer.masters[name].bfloat16()) for name, copy in copies.items())
    for name, master in trainer.masters.items():
        torch.testing.assert_close(master, other.masters[name], rtol=1e-3, atol=2e-3, msg=name)


@pytest.mark.usefixtures("fused")
def test_a_fused_step_that_is_not_finite_is_left_out() -> None:
    job = narrow_job(on_nonfinite="skip")
    trainer = Trainer(job, "cpu")
    trainer._is_fused = True
    trainer.step([draw_batch(job, 0)])
    trainer.optimizer.state[trainer.masters["norm.weight"]]["exp_avg"].fill_(torch.inf)
    before = {name: master.clone() for name, master in trainer.masters.items()}
    assert not trainer.step([draw_batch(job, 1)])["taken"]
    assert all(torch.equal(master, before[name]) for name, master in trainer.masters.items())


def test_only_whole_float32_tensors_of_a_gpu_are_fused() -> None:
    assert not can_fuse(Trainer(narrow_job(), "cpu").optimizer)


class OnAGpu(torch.nn.Parameter):
    is_cuda = True


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.optim.Optimizer:
    monkeypatch.setattr(fused_adamw, "HAS_TRITON", True)
    optimizer = Trainer(narrow_job(), "cpu").optimizer
    optimizer.param_groups[:] = [{"params": [OnAGpu(torch.ones(2))]}]
    return optimizer


def test_tensors_of_other_kinds_are_not_fused(on_a_gpu: torch.optim.Optimizer) -> None:
    """Such as parts of parameters."""
    assert not can_fuse(on_a_gpu)


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_steps_are_fused_on_gpus_of_nvidia_alone(
    hip: str | None, on_a_gpu: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn, "Parameter", OnAGpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert can_fuse(on_a_gpu) == (hip is None)


def test_a_gradient_may_lie_otherwise_than_its_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_adamw, "run_adamw", plain_kernel)
    one, other = (drawn([(3, 5)], [False], [False], [1], seed=0) for _ in range(2))
    gradients = {parameter: gradient.t().contiguous().t() for parameter, gradient in one.gradients.items()}
    FusedStep(one.optimizer, gradients, RATES).take()
    Step(other.optimizer, other.gradients, RATES, None).take(None)
    assert_same_state(one, other)


def test_corrections_of_moments_are_computed_in_float64() -> None:
    """1 - b2^t cancels most of what float32 holds of it while t is small."""
    counts = [*range(40), 999, 2**24]
    places = [(1,)] * len(counts)
    one = drawn(places, [True] * len(counts), [True] * len(counts), counts, seed=0)
    one.optimizer.defaults["betas"] = betas = (0.9, 0.9999)
    step = FusedStep(one.optimizer, one.gradients, RATES)
    t = np.array(counts, np.float64) + 1
    expected = np.stack([RATES.lr / (1 - betas[0] ** t), 1 / np.sqrt(1 - betas[1] ** t)], axis=1)
    found = step._numbers(list(one.parameters.values()), RATES.lr)[:, 1:].numpy()
    np.testing.assert_allclose(found, expected, rtol=2.0**-23)


def test_what_decay_leaves_is_computed_in_float64() -> None:
    """1 - lr * decay, for each parameter with its own decay, is rounded once."""
    decays = np.linspace(0, 1, 60).tolist()
    one = drawn([(1,)] * len(decays), [True] * len(decays), [True] * len(decays), [1] * len(decays), seed=0)
    step, tensors = FusedStep(one.optimizer, one.gradients, RATES), list(one.parameters.values())
    first = one.optimizer.param_groups[0]
    one.optimizer.param_groups[:] = [
        {**first, "params": [tensor], "weight_decay": decay} for tensor, decay in zip(tensors, decays, strict=True)
    ]
    for lr in (0.97, 1e-4, 1 / 7):
        found = step._numbers(tensors, lr)[:, 0].numpy()
        assert found.dtype == np.float32
        assert found.tolist() == (1 - lr * np.array(decays)).astype(np.float32).tolist()
