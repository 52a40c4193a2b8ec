"""`kempnerforge train`: both backends, the same run; resuming; exit status of signals."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from kempnerforge_torch.training.train import Trainer
from shared_config.cli import main
from shared_config.training.metrics import read_metrics

RUN = (
    "--model.dim=16",
    "--model.n_layers=1",
    "--model.n_heads=2",
    "--model.n_kv_heads=1",
    "--model.ffn_hidden_dim=24",
    "--model.max_seq_len=32",
    "--train.seq_len=32",
    "--train.batch_size=2",
    "--train.max_steps=6",
    "--scheduler.warmup_steps=2",
    "--train.compile_model=false",
    "--eval.interval=0",
    "--eval.steps=1",
)


def train(backend: str, folder: Path, *options: str) -> int:
    return main(["train", "debug", *RUN, "--backend", backend, "--device", "cpu", "--output", str(folder), *options])


def test_backends_train_alike(tmp_path: Path) -> None:
    for backend in ("torch", "jax"):
        assert train(backend, tmp_path / backend, "--quiet") == 0
    a, b = (read_metrics(tmp_path / backend / "metrics.jsonl") for backend in ("torch", "jax"))
    assert [record["step"] for record in a] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in a] == pytest.approx([record["loss"] for record in b], rel=1e-5)
    assert a[-1]["heldout_loss"] == pytest.approx(b[-1]["heldout_loss"], rel=1e-5)


def test_a_run_started_again_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("torch", tmp_path, "--scheduler.decay_steps=80") == 0
    assert train("torch", tmp_path, "--scheduler.decay_steps=80", "--train.max_steps=8") == 0
    assert "step 8/8" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_a_step_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    step = Trainer.step

    def step_and_signal(trainer: Trainer, micro_batches: Any) -> dict[str, Any]:
        numbers = step(trainer, micro_batches)
        if trainer.updates == 2:
            signal.raise_signal(number)
        return numbers

    monkeypatch.setattr(Trainer, "step", step_and_signal)
    assert train("torch", tmp_path, "--quiet") == status
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert [folder.name for folder in tmp_path.glob("step_*")] == ["step_00000002"]
