"""What trainers say of their devices: kind, number, and the most memory that one has held; the records of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import torch
from rich.console import Console

import kempnerforge_jax.device as jax_device
import kempnerforge_jax.training.train as jax_training
import kempnerforge_torch.device as torch_device
import kempnerforge_torch.training.train as torch_training
from shared_config.contract.counts import count_parameters
from shared_config.contract.peaks import peak_flops
from shared_config.evaluation.samples import read_samples
from shared_config.schema.job import JobConfig
from shared_config.training.speed import Devices, resident_peak
from tests.jobs import text_job, tiny_job

TRAINING = {"torch": torch_training, "jax": jax_training}


def accelerator(most: int | None) -> Any:
    stats = None if most is None else {"bytes_in_use": 1, "peak_bytes_in_use": most}
    return SimpleNamespace(platform="gpu", device_kind="a card", process_index=0, memory_stats=lambda: stats)


def test_devices_of_jax_say_what_they_held() -> None:
    assert [jax_device.peak_memory(accelerator(most)) for most in (None, 7)] == [None, 7]
    assert jax_device.device_kind(accelerator(7)) == "a card"
    trainer = object.__new__(jax_training.Trainer)
    for several, most in {(None,): None, (3, 9, 5): 9, (3, None): 3}.items():
        trainer._own_devices = [accelerator(each) for each in several]
        assert trainer.peak_memory() == most
    cpu: Any = jax.devices("cpu")[0]
    assert jax_device.device_kind(cpu) == "cpu"
    assert 0.9 * resident_peak() < (jax_device.peak_memory(cpu) or 0) <= resident_peak()


def test_devices_of_torch_say_what_they_held(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card, {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 9)
    trainer = object.__new__(torch_training.Trainer)
    trainer.device = torch.device("cuda:1")
    assert trainer.peak_memory() == 9
    assert asked == [trainer.device]
    assert torch_device.device_kind(trainer.device) == "a card, cuda:1"
    assert torch_device.peak_memory(torch.device("mps")) is None
    trainer.device = torch.device("cpu")
    assert torch_device.device_kind(trainer.device) == "cpu"
    assert 0.9 * resident_peak() < (trainer.peak_memory() or 0) <= resident_peak()


def job_of(folder: Path) -> JobConfig:
    train, place = {"max_steps": 3, "health_check_seconds": 300}, {"dir": str(folder / "run")}
    return text_job(folder, train=train, checkpoint=place)


@pytest.mark.parametrize("backend", TRAINING)
def test_a_run_is_told_where_it_is_shown_and_what_was_overridden(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, told = TRAINING[backend], dict[str, Any]()
    trainer = SimpleNamespace(ranks=SimpleNamespace(rank=0, own=range(1), count=1), devices=Devices(1, "cpu"))
    monkeypatch.setattr(module, "Trainer", lambda *_, **__: trainer)
    monkeypatch.setattr(module, "run_training", lambda *given, **named: told.update(named, given=given))
    job, console = text_job(tmp_path), Console()
    module.train(job, device="cpu", console=console, overridden=("train.max_steps",))
    assert told["given"][:2] == (job, trainer)
    assert (told["console"], told["overridden"]) == (console, ("train.max_steps",))


@pytest.mark.parametrize("backend", TRAINING)
def test_what_only_evaluates_has_no_moments(backend: str) -> None:
    trainer = TRAINING[backend].Trainer(tiny_job({"n_layers": 1}), "cpu", draws=False, trains=False)
    assert not trainer.optimizer_state if backend == "jax" else not trainer.optimizer.state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", TRAINING)
def test_a_run_on_a_gpu_has_records_of_it(backend: str, tmp_path: Path) -> None:
    """A card that isn't in the table has no share of a peak."""
    assert TRAINING[backend].Trainer(job_of(tmp_path)).devices == Devices(1, torch.cuda.get_device_name())
    summary = TRAINING[backend].train(job_of(tmp_path))
    most = summary.metrics["peak_memory_bytes"]
    moments_and_weights = 3 * 4 * count_parameters(job_of(tmp_path).model)
    assert moments_and_weights < most < torch.cuda.get_device_properties(0).total_memory
    assert ("mfu" in summary.metrics) == (peak_flops(torch.cuda.get_device_name()) is not None)
    assert 0 < summary.metrics.get("mfu", 0.5) < 1


@pytest.mark.parametrize("backend", TRAINING)
def test_a_run_takes_samples_with_its_held_out_losses(backend: str, tmp_path: Path) -> None:
    sampled = {"sample_prompt": "the", "sample_tokens": 3, "steps": 1, "interval": 2}
    job = text_job(tmp_path, eval=sampled, train={"max_steps": 4})
    TRAINING[backend].train(job, device="cpu")
    samples = read_samples(tmp_path / "run" / "samples.jsonl")
    assert [sample.step for sample in samples] == [2, 4]
    assert all(sample.text.startswith("the") for sample in samples)


@pytest.mark.parametrize("backend", TRAINING)
def test_a_run_is_told_what_the_command_line_sets(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all else that it is given."""
    console, told = Console(quiet=True), {}
    monkeypatch.setattr(TRAINING[backend], "run_training", lambda *parts, **options: told.update(options, parts=parts))
    job = text_job(tmp_path)
    TRAINING[backend].train(job, device="cpu", console=console, overridden=["optimizer.lr"])
    assert told["overridden"] == ["optimizer.lr"]
    assert told["console"] is console
    assert told["parts"][0] is job
