"""The training loop, driven by a small NumPy trainer: resume, crashes, signals, metrics, evaluation, errors."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared_config.contract.counts import flops_per_token
from shared_config.contract.flops import micro_batch_flops
from shared_config.contract.schedule import scheduled_learning_rate
from shared_config.data import Corpus, TextData, TokenStream, open_data
from shared_config.errors import UserError
from shared_config.interchange import checkpoint, run_layout, saving
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.parts import Part, Parts, StateParts
from shared_config.interchange.together import Processes
from shared_config.interchange.toml import config_from_toml
from shared_config.loader import load_config
from shared_config.schema import JobConfig
from shared_config.training import resume
from shared_config.training.loop import run_training
from shared_config.training.metrics import read_metrics
from shared_config.training.progress import Pace, format_duration
from shared_config.training.signals import StopRequest
from shared_config.training.speed import Devices
from shared_config.training.trainer import TrainingDivergedError, TrainingSummary
from tests.ranks import together

ROOT = Path(__file__).parents[2]
VOCAB = 20
OF_THE_MOMENT = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
"""What records tell of the machine, not of the training."""


class BigramTrainer:
    """Logits of the next id are a row of a table; AdamW without decay, on gradients with a little noise from a
    generator.
    """

    backend = "numpy"
    devices = Devices(3, "an abacus")

    def __init__(self, config: JobConfig):
        self.config = config
        self.table = np.zeros((VOCAB, VOCAB), np.float32)
        self.m, self.v = np.zeros_like(self.table), np.zeros_like(self.table)
        self.rng = np.random.Generator(np.random.Philox(key=7))
        self.updates = 0
        self.seen: list[int] = []

    def step(self, micro_batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        self.seen.append(len(micro_batches))
        tokens, labels = (np.concatenate([batch[name] for batch in micro_batches]) for name in ("tokens", "labels"))
        loss, gradient = self._loss(tokens, labels)
        gradient = gradient + 1e-3 * self.rng.standard_normal(gradient.shape, np.float32)
        rate = scheduled_learning_rate(self.config, self.updates)
        self.updates += 1
        self.m = np.float32(0.9) * self.m + np.float32(0.1) * gradient
        self.v = np.float32(0.95) * self.v + np.float32(0.05) * gradient**2
        m_hat, v_hat = self.m / (1 - 0.9**self.updates), self.v / (1 - 0.95**self.updates)
        self.table = (self.table - rate * m_hat / (np.sqrt(v_hat) + 1e-8)).astype(np.float32)
        return {"grad_norm": float(np.linalg.norm(gradient)), "loss": loss, "lr": rate}

    def evaluate(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        tokens, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "labels"))
        return {"loss": self._loss(tokens, labels)[0]}

    def _loss(self, tokens: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
        tokens, labels = tokens[labels != -100], labels[labels != -100]
        logits = self.table[tokens]
        chances = np.exp(logits - logits.max(axis=-1, keepdims=True))
        chances /= chances.sum(axis=-1, keepdims=True)
        loss = -np.log(chances[np.arange(len(labels)), labels]).mean()
        chances[np.arange(len(labels)), labels] -= 1
        gradient = np.zeros_like(self.table)
        np.add.at(gradient, tokens, chances / len(labels))
        return float(loss), gradient

    @contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        first = self.updates
        yield
        (folder / f"trace_{first}_{self.updates}").touch()

    def peak_memory(self) -> int | None:
        return 1000 + self.updates

    def state(self) -> TrainingState:
        counter = self.rng.bit_generator.state
        extra = {"rng": json.loads(json.dumps(counter, default=lambda array: [int(item) for item in array]))}
        return TrainingState(self.updates, {"table": self.table}, {"m.table": self.m, "v.table": self.v}, extra)

    def parts(self) -> StateParts:
        return self.state().parts()

    def load_state(self, state: TrainingState | StateParts) -> None:
        self.updates, self.table = state.step, np.asarray(state.weights["table"])
        if state.optimizer:
            self.m, self.v = (np.asarray(state.optimizer[f"{moment}.table"]) for moment in "mv")
            saved: Any = state.extra["rng"]
            numbers = {name: np.array(value, np.uint64) for name, value in saved["state"].items()}
            self.rng.bit_generator.state = {**saved, "state": numbers, "buffer": np.array(saved["buffer"], np.uint64)}


def config_of(folder: Path, *overrides: str) -> JobConfig:
    small = ["train.max_steps=12", "train.batch_size=2", "train.seq_len=8", "train.grad_accum_steps=2"]
    often = [
        "checkpoint.interval=3",
        "eval.interval=4",
        "eval.steps=2",
        "scheduler.warmup_steps=2",
        "optimizer.lr=0.05",
    ]
    chosen = [*small, *often, f"checkpoint.dir={folder}", *overrides]
    return load_config("debug", [f"--{override}" for override in chosen])


def data_for(config: JobConfig, length: int = 500, **arguments) -> TextData:
    ids = np.random.default_rng(0).integers(0, VOCAB // 2, size=length + 60).cumsum() % VOCAB
    parts = ids[:length].astype(np.uint16), ids[length:].astype(np.uint16)
    corpus = Corpus("ids", *(TokenStream([("ids", part)]) for part in parts))
    return TextData(
        corpus, batch_size=config.train.batch_size, seq_len=config.train.seq_len, seed=config.train.seed,
        heldout_steps=config.eval.steps, vocab_size=VOCAB, **arguments,
    )  # fmt: skip


def train(config: JobConfig, trainer: BigramTrainer | None = None, **arguments) -> TrainingSummary:
    return run_training(config, trainer or BigramTrainer(config), data_for(config), **arguments)


def end_state(folder: Path) -> tuple[dict, list]:
    """Everything that a run leaves and that does not tell the time."""
    loaded = checkpoint.load(folder)
    arrays = {**loaded.state.weights, **loaded.state.optimizer}
    state = {name: array.tobytes() for name, array in arrays.items()}
    state |= {"extra": loaded.state.extra, "step": loaded.state.step, "rows": loaded.rows}
    records = [
        {name: value for name, value in record.items() if name not in OF_THE_MOMENT}
        for record in read_metrics(folder / "metrics.jsonl")
    ]
    return state, records


# A run that nothing disturbs


def test_a_run_trains_and_leaves_its_files(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    trainer = BigramTrainer(config)
    summary = train(config, trainer)
    assert trainer.seen == [2] * 12
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "config.toml", "metrics.jsonl", "step_00000006", "step_00000009", "step_00000012"}
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert list(records[0])[:4] == ["step", "loss", "grad_norm", "lr"], "the same order from any trainer"
    assert [record["step"] for record in records if "heldout_loss" in record] == [4, 8, 12]
    assert records[0]["loss"] == pytest.approx(math.log(VOCAB), rel=1e-5)
    assert records[11]["heldout_loss"] < records[7]["heldout_loss"] < records[3]["heldout_loss"] < records[0]["loss"]
    assert (summary.step, summary.steps_run, summary.resumed_from) == (12, 12, 0)
    assert (summary.exit_status, summary.stopped_by) == (0, None)
    assert summary.loss == records[-1]["loss"]
    assert summary.heldout_loss == records[-1]["heldout_loss"]
    assert summary.heldout_loss == trainer.evaluate(data_for(config).heldout())["loss"]
    assert summary.checkpoint == tmp_path / "run" / "step_00000012"
    assert summary.tokens_per_second > 0
    assert config_from_toml((tmp_path / "run" / "config.toml").read_text()) == config


def test_records_and_lines_tell_shares_of_the_peak_and_memory(tmp_path: Path) -> None:
    """The memory is that of the rank that has held most by the time when the step was asked for, told by the exchange
    of signals.
    """
    asked: list[int] = []

    def agree(numbers: Sequence[int]) -> list[int]:
        asked.append(len(numbers))
        return [number + 3 * 2**30 * (number > 0) for number in numbers]

    config, text = config_of(tmp_path, "metrics.peak_tflops=0.25"), io.StringIO()
    train(config, console=Console(file=text, width=200), processes=Processes(largest_of=agree))
    flops = flops_per_token(config.model, config.train.seq_len).training
    records = read_metrics(tmp_path / "metrics.jsonl")
    for record in records:
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / (3 * 0.25e12))
        assert record["peak_memory_bytes"] == 3 * 2**30 + 1000 + record["step"]
    assert re.search(r"step 12/12 .* tokens/s  MFU \d+\.\d%  peak 3\.0 GiB  0:00 left", text.getvalue())
    assert asked.count(2) == len(records) == 12, "once a step, with the signal"


def test_shares_of_prefix_models_count_the_prompts_of_the_data(tmp_path: Path) -> None:
    """Their data, drawn by code, have a prompt of two tokens: what begins a text, and the end of a line."""

    class Counts(BigramTrainer):
        def step(self, micro_batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
            self.updates += 1
            assert (micro_batches[0]["prompt_lengths"] == 2).all()
            return {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0}

    given = ["--vlm.prefix_lm=true", "--train.max_steps=2", "--eval.steps=0", "--metrics.peak_tflops=0.25"]
    config = load_config("debug_vlm_joint_decoder", [*given, f"--checkpoint.dir={tmp_path}"])
    run_training(config, trainer=Counts(config), data=open_data(config), console=None)
    found, empty = (micro_batch_flops(config, prompts=[prompt]) for prompt in (2, 0))
    assert found is not None
    assert found != empty
    each = found.training / (config.train.batch_size * config.train.seq_len)
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * each / (3 * 0.25e12), rel=1e-9)


def test_losses_are_those_of_stepping_by_hand_to_the_last_digit(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    train(config)
    data, trainer = data_for(config), BigramTrainer(config)
    expected = [trainer.step([data.batch(2 * step), data.batch(2 * step + 1)]) for step in range(12)]
    for record, numbers in zip(read_metrics(tmp_path / "metrics.jsonl"), expected, strict=True):
        assert {name: record[name] for name in numbers} == numbers


def test_micro_batches_and_rows_are_the_same_training(tmp_path: Path) -> None:
    """Two micro-batches of two rows are one of four: the same rows in the same order."""
    train(config_of(tmp_path / "two"))
    train(config_of(tmp_path / "one", "train.batch_size=4", "train.grad_accum_steps=1"))
    assert end_state(tmp_path / "one")[0] == end_state(tmp_path / "two")[0]


FIVES = [5, 10, 12]


@pytest.mark.parametrize(
    ("overrides", "evaluated", "saved", "logged"),
    [
        (["eval.interval=0", "checkpoint.interval=0"], [12], [12], list(range(1, 13))),
        (["eval.interval=0", "eval.steps=0"], [], [6, 9, 12], list(range(1, 13))),
        (["eval.interval=5", "checkpoint.interval=5", "metrics.log_interval=4"], FIVES, FIVES, [4, 5, 8, 10, 12]),
        (["checkpoint.keep_last_n=1", "metrics.log_interval=100"], [4, 8, 12], [12], [3, 4, 6, 8, 9, 12]),
    ],
)  # fmt: skip
def test_intervals(tmp_path: Path, overrides: list[str], evaluated: list, saved: list, logged: list) -> None:
    train(config_of(tmp_path, *overrides))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "heldout_loss" in record] == evaluated
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step_*")) == saved
    assert [record["step"] for record in records] == logged


def test_a_plain_console_gets_lines_and_a_terminal_a_bar(tmp_path: Path) -> None:
    plain = io.StringIO()
    train(config_of(tmp_path / "plain"), console=Console(file=plain, width=200))
    lines = plain.getvalue().splitlines()
    assert lines[0].startswith("step 1/12  loss 2.99")
    assert any(line.startswith("step 8/12  loss") and "heldout_loss" in line and "tokens/s" in line for line in lines)
    assert any(line.startswith("step 12/12") and line.endswith("0:00 left") for line in lines)
    assert lines[-1] == f"checkpoint {tmp_path / 'plain' / 'step_00000012'}"
    assert "\x1b" not in plain.getvalue()
    assert not any("MFU" in line for line in lines), "the peak of an abacus is not known"
    terminal = io.StringIO()
    train(config_of(tmp_path / "bar"), console=Console(file=terminal, force_terminal=True, width=120))
    assert "12/12" in terminal.getvalue()
    assert "tokens/s" in terminal.getvalue()


def test_numbers_are_read_only_after_the_next_step_was_asked_for(tmp_path: Path) -> None:
    """So that a device has its next work before the host waits for a number."""
    events: list[str] = []

    class Late(float):
        def __float__(self) -> float:
            events.append("read")
            return float.__float__(self)

    class Asynchronous(BigramTrainer):
        def step(self, micro_batches: Sequence) -> dict[str, float]:
            events.append("step")
            return {"loss": Late(super().step(micro_batches)["loss"])}

    config = config_of(tmp_path, "train.max_steps=4", "checkpoint.interval=0", "eval.interval=0")
    train(config, Asynchronous(config))
    assert events == ["step", "step", "read", "step", "read", "step", "read", "read"]


# Resume


def test_a_run_that_is_done_does_nothing_more(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    train(config)
    before, text = end_state(tmp_path), io.StringIO()
    summary = train(config, console=Console(file=text, width=200))
    assert (summary.step, summary.steps_run, summary.loss, summary.exit_status) == (12, 0, None, 0)
    assert "nothing to do: 12 of 12 steps have been taken" in text.getvalue()
    assert end_state(tmp_path) == before


def test_resuming_continues_exactly(tmp_path: Path) -> None:
    constant = ["scheduler.name=constant", "train.max_steps=12"]
    train(config_of(tmp_path / "whole", *constant))
    train(
        config_of(tmp_path / "parts", "scheduler.name=constant", "train.max_steps=5", "eval.interval=4", "eval.steps=2")
    )
    text = io.StringIO()
    summary = train(config_of(tmp_path / "parts", *constant), console=Console(file=text, width=300))
    assert (summary.resumed_from, summary.steps_run) == (5, 7)
    assert f"resuming at step 5 from {tmp_path / 'parts' / 'step_00000005'}\n" in text.getvalue()
    assert "note: changed since the checkpoint: train.max_steps 5 -> 12\n" in text.getvalue()
    state, records = end_state(tmp_path / "parts")
    whole_state, whole_records = end_state(tmp_path / "whole")
    assert state == whole_state
    records[4].pop("heldout_loss")  # the first part ended there, so it was evaluated
    assert records == whole_records


def test_resuming_with_other_batches_takes_up_where_the_rows_left_off(tmp_path: Path) -> None:
    """The rows that a checkpoint counts carry the place over to other batch sizes and numbers of ranks."""
    asked: list[int] = []
    train(config_of(tmp_path, "train.max_steps=6"))
    config = config_of(tmp_path, "train.max_steps=8", "train.grad_accum_steps=1")
    data = data_for(config, world_size=2, rank=1)
    original = data.batch
    data.batch = lambda index: asked.append(index) or original(index)
    run_training(config, BigramTrainer(config), data)
    assert asked == [6, 7]  # 6 steps of 2 micro-batches of 2 rows are 24 rows: 6 batches of 2 ranks with 2 rows


def test_records_after_the_resumed_step_are_taken_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    train(config)
    reference = end_state(tmp_path)
    run_layout.prune(tmp_path, 3)
    for step in (9, 12):
        (tmp_path / f"step_{step:08d}").rename(tmp_path / f"gone_{step}")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "lo')
    assert train(config).resumed_from == 6
    assert end_state(tmp_path) == reference


def test_other_data_or_another_backend_are_told(tmp_path: Path) -> None:
    train(config_of(tmp_path, "train.max_steps=3"))
    config, text = config_of(tmp_path, "train.max_steps=3"), io.StringIO()
    trainer = BigramTrainer(config)
    trainer.backend = "other"
    run_training(config, trainer, data_for(config, length=499), console=Console(file=text, width=300))
    assert "step_00000003, written by numpy" in text.getvalue()
    assert "note: the training data are not those of the checkpoint" in text.getvalue()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(config_of(tmp_path, "train.max_steps=3"))
    config = config_of(tmp_path, "model.rope_theta=5000.0", "model.n_kv_heads=4", "model.sdpa_backend=math")
    with pytest.raises(UserError) as caught:
        train(config)
    message = str(caught.value)
    assert "model.rope_theta = 5000.0: was 10000.0 when" in message
    assert "model.n_kv_heads = 4: was 2 when" in message
    assert "sdpa_backend" not in message
    assert "set checkpoint.dir to another folder" in message


def test_specs_that_freeze_the_same_are_no_change() -> None:
    freeze = (
        "--vlm.freeze=[{module = 'adapter'}, {module = 'vision_encoder'}, {module = 'transformer', frozen = false}]"
    )
    other = "--vlm.freeze=[{module = 'vision_encoder'}, {module = 'adapter'}]"
    one, two, three = (resume._flatten(load_config("debug_vlm_mot", options)) for options in ([freeze], [other], []))
    assert one == two != three


class Recording(BigramTrainer):
    """Keeps the weights from before its first step."""

    first: np.ndarray | None = None

    def step(self, micro_batches: Sequence) -> dict[str, float]:
        self.first = self.table if self.first is None else self.first
        return super().step(micro_batches)


def test_a_run_can_start_from_given_weights(tmp_path: Path) -> None:
    train(config_of(tmp_path / "first"))
    start = checkpoint.load(tmp_path / "first").state.weights["table"]
    for place, name in enumerate(("first", "first/step_00000012", "first/step_00000012/weights.safetensors")):
        config = config_of(tmp_path / f"run{place}", f"checkpoint.load_path={tmp_path / name}", "train.max_steps=1")
        trainer = Recording(config)
        summary = train(config, trainer)
        np.testing.assert_array_equal(trainer.first, start)
        assert (summary.resumed_from, summary.steps_run) == (0, 1)
    config = config_of(tmp_path / "second", f"checkpoint.load_path={tmp_path / 'absent'}")
    with pytest.raises(UserError, match="absent"):
        train(config)


# Errors before and during training


class Unused(BigramTrainer):
    def step(self, micro_batches: Sequence) -> dict[str, float]:
        raise AssertionError("training began")


@pytest.mark.parametrize("folder", ["file/run", "file", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path / folder)
    with pytest.raises(UserError, match=r"checkpoint\.dir = .*: can't be written"):
        train(config, Unused(config))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    class Nested(BigramTrainer):
        def step(self, micro_batches: Sequence) -> dict[str, float]:
            train(self.config, Unused(self.config))
            return {}

    config = config_of(tmp_path)
    with pytest.raises(UserError, match="another run is using this folder"):
        train(config, Nested(config))
    assert train(config).steps_run == 12


@pytest.mark.parametrize("field", ["metrics.tensorboard=true", "metrics.wandb_project=p"])
def test_a_missing_logger_is_an_error_before_training(tmp_path: Path, field: str) -> None:
    package = "tensorboard" if "tensorboard" in field else "wandb"
    hidden = dict.fromkeys((package, f"{package}.summary"))
    config = config_of(tmp_path, field)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in hidden.items():
            patch.setitem(sys.modules, name, module)
        with pytest.raises(UserError, match=f"the package {package} is not installed; pip install {package}"):
            train(config, Unused(config))


@pytest.mark.parametrize(("name", "value"), [("loss", math.nan), ("loss", math.inf), ("grad_norm", math.inf)])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path: Path, name: str, value: float) -> None:
    class Diverging(BigramTrainer):
        def step(self, micro_batches: Sequence) -> dict[str, float]:
            numbers = super().step(micro_batches)
            return {**numbers, name: value} if self.updates >= 6 else numbers

    config = config_of(tmp_path)
    with pytest.raises(TrainingDivergedError) as caught:
        train(config, Diverging(config))
    assert f"step 6: {name} is {value}; training stopped, the last checkpoint is {tmp_path / 'step_00000003'}" in str(
        caught.value
    )
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000003"]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_other_numbers_may_be_anything(tmp_path: Path) -> None:
    class Odd(BigramTrainer):
        def step(self, micro_batches: Sequence) -> dict[str, float]:
            return {**super().step(micro_batches), "ratio": math.nan, "count": 3}

    config = config_of(tmp_path, "train.max_steps=2")
    train(config, Odd(config))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert [(record["ratio"], record["count"]) for record in map(json.loads, text.splitlines())] == [(None, 3.0)] * 2


# Several ranks


class HalfTrainer(BigramTrainer):
    """One of two that do the same; each writes half of the table."""

    def __init__(self, config: JobConfig, rank: int):
        super().__init__(config)
        self.rank = rank

    def parts(self) -> StateParts:
        state = self.state()
        weights, optimizer = (
            {name: self._half(array) for name, array in arrays.items()} for arrays in (state.weights, state.optimizer)
        )
        return StateParts(state.step, weights, optimizer, state.extra)

    def _half(self, array: np.ndarray) -> Parts:
        first = self.rank * VOCAB // 2
        return Parts(array.shape, array.dtype, (Part((first, 0), array[first : first + VOCAB // 2]),))


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_each_rank_writes_its_parts_and_the_first_all_else(in_background: str, tmp_path: Path) -> None:
    flat = "scheduler.name=constant"
    train(config_of(tmp_path / "alone", flat))
    for steps in (7, 12):
        options = f"train.max_steps={steps}", f"checkpoint.async_save={in_background}"
        config = config_of(tmp_path / "run", flat, *options)
        screens = [io.StringIO(), io.StringIO()]

        def run(own: Processes, config: JobConfig = config, screens: list[io.StringIO] = screens) -> TrainingSummary:
            return train(config, HalfTrainer(config, own.rank), processes=own, console=Console(file=screens[own.rank]))

        for summary in together(2, run):
            assert isinstance(summary, TrainingSummary), summary
            assert (summary.step, summary.checkpoint) == (steps, tmp_path / "run" / f"step_{steps:08d}")
        assert f"checkpoint {tmp_path / 'run'}" in screens[0].getvalue().replace("\n", "")
        assert screens[1].getvalue() == ""
    assert len(list((tmp_path / "run" / "step_00000012").iterdir())) == 6
    (state, records), (truth, true_records) = end_state(tmp_path / "run"), end_state(tmp_path / "alone")
    assert state == truth
    assert [record["loss"] for record in records] == [record["loss"] for record in true_records]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    steps = {f"step_{step:08d}" for step in (7, 9, 12)}
    assert names == {".lock", "config.toml", "metrics.jsonl", *steps}


def test_all_ranks_stop_at_the_step_that_they_agree_on(tmp_path: Path) -> None:
    rounds = 3  # of agreement before the first step
    asked: list[int] = []

    def agree(numbers: Sequence[int]) -> Sequence[int]:
        asked.append(numbers[0])
        return [signal.SIGTERM, *numbers[1:]] if len(asked) == rounds + 5 else numbers

    summary = train(config_of(tmp_path, "checkpoint.interval=0"), processes=Processes(largest_of=agree))
    assert (summary.step, summary.stopped_by, summary.exit_status) == (5, "SIGTERM", 143)
    assert run_layout.latest(tmp_path) == tmp_path / "step_00000005"


def test_no_rank_goes_on_when_another_cannot_start(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="process 0 of the run has failed") as refusal:
        train(config, Unused(config), processes=Processes(1, 2, lambda numbers: [3] * len(numbers)))
    assert refusal.value.shown_elsewhere


def test_what_all_ranks_find_is_shown_by_the_first(tmp_path: Path) -> None:
    """A loss that is not finite is so for all."""

    class Diverging(BigramTrainer):
        def step(self, micro_batches: Sequence[Any]) -> dict[str, float]:
            return {**super().step(micro_batches), "loss": math.nan}

    for rank in range(2):
        config = config_of(tmp_path / str(rank), "checkpoint.interval=0")
        with pytest.raises(TrainingDivergedError, match="loss is nan") as refusal:
            train(config, Diverging(config), processes=Processes(rank, 2))
        assert refusal.value.shown_elsewhere == (rank > 0)


# Checkpoints while training goes on


@contextmanager
def slow_writing(monkeypatch: pytest.MonkeyPatch, until: threading.Event) -> Iterator[None]:
    """Checkpoints are written once an event has come."""
    write = saving.write_share

    def slow(*arguments: Any) -> None:
        assert until.wait(30)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_share", slow)
        yield


class Watching(BigramTrainer):
    """Calls something before a step."""

    def __init__(self, config: JobConfig, calls: Mapping[int, Callable[[], None]]):
        super().__init__(config)
        self.calls = calls

    def step(self, micro_batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        self.calls.get(self.updates, lambda: None)()
        return super().step(micro_batches)


BACKGROUND = ("checkpoint.async_save=true", "checkpoint.interval=3", "train.max_steps=6")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    until, seen = threading.Event(), []
    config = config_of(tmp_path / "run", *BACKGROUND)

    def look() -> None:
        seen.append(run_layout.latest(tmp_path / "run"))
        until.set()

    with slow_writing(monkeypatch, until):
        train(config, Watching(config, {5: look}))
    assert seen == [None]
    assert sorted(run_layout.published_steps(tmp_path / "run")) == [3, 6]
    train(config_of(tmp_path / "alone", "train.max_steps=6", "checkpoint.interval=3"))
    assert end_state(tmp_path / "run") == end_state(tmp_path / "alone")
    first = [checkpoint.load(tmp_path / name / "step_00000003").state for name in ("run", "alone")]
    assert first[0].weights["table"].tobytes() == first[1].weights["table"].tobytes()


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    until = threading.Event()
    config = config_of(tmp_path, *BACKGROUND)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.2, until.set).start()

    with slow_writing(monkeypatch, until):
        summary = train(config, Watching(config, {4: stop}))
    assert (summary.step, summary.stopped_by, summary.checkpoint) == (5, "SIGTERM", tmp_path / "step_00000005")
    assert sorted(run_layout.published_steps(tmp_path)) == [3, 5]


def test_an_error_of_the_writer_ends_the_run_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_of(tmp_path, *BACKGROUND, "train.max_steps=2"))

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "write_share", broken)
    config = config_of(tmp_path, *BACKGROUND)
    trainer = BigramTrainer(config)
    with pytest.raises(UserError, match=r"step_00000003: the checkpoint can't be written: Input/output error"):
        train(config, trainer)
    assert 3 <= trainer.updates <= 6
    assert [path.name for path in tmp_path.glob("*step_*")] == ["step_00000002"]


def test_a_run_that_diverges_keeps_the_checkpoint_that_was_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = threading.Event()
    config = config_of(tmp_path, *BACKGROUND)

    class Diverging(BigramTrainer):
        def step(self, micro_batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
            numbers = super().step(micro_batches)
            if self.updates == 4:
                threading.Timer(0.2, until.set).start()
                return {**numbers, "loss": math.nan}
            return numbers

    with slow_writing(monkeypatch, until), pytest.raises(TrainingDivergedError, match=r"checkpoint is .*step_00000003"):
        train(config, Diverging(config))
    assert checkpoint.load(tmp_path).state.step == 3


def test_milestones_stay(tmp_path: Path) -> None:
    often = ("checkpoint.interval=1", "checkpoint.keep_last_n=2", "checkpoint.milestone_interval=5")
    train(config_of(tmp_path, *often))
    assert sorted(run_layout.published_steps(tmp_path)) == [5, 10, 11, 12]


# Signals


class Interrupted(BigramTrainer):
    """Gets a signal in the middle of its 5th step."""

    number = signal.SIGINT

    def step(self, micro_batches: Sequence) -> dict[str, float]:
        if self.updates == 4:
            os.kill(os.getpid(), self.number)
        return super().step(micro_batches)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_later(tmp_path: Path, number: int, status: int) -> None:
    def handler(*_: object) -> None:
        raise AssertionError("the handler from before the run was called")

    config, text = config_of(tmp_path / "run"), io.StringIO()
    trainer = Interrupted(config)
    trainer.number = signal.Signals(number)
    before = {each: signal.signal(each, handler) for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        summary = train(config, trainer, console=Console(file=text, width=200))
        assert [signal.getsignal(each) for each in before] == [handler, handler, handler]
    finally:
        for each, old in before.items():
            signal.signal(each, old)
    name = signal.Signals(number).name
    assert (summary.step, summary.stopped_by, summary.exit_status) == (5, name, status)
    assert f"{name}: stopped after step 5 of 12\ncheckpoint {tmp_path / 'run' / 'step_00000005'}\n" in text.getvalue()
    assert train(config).resumed_from == 5
    train(config_of(tmp_path / "whole"))
    assert end_state(tmp_path / "run") == end_state(tmp_path / "whole")


def test_handlers_come_back_after_an_error(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]

    class Failing(BigramTrainer):
        def step(self, micro_batches: Sequence) -> dict[str, float]:
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise RuntimeError("out of memory")

    config = config_of(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, Failing(config))
    assert [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)] == before


def test_only_a_later_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with StopRequest(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_in_another_thread_needs_no_handlers(tmp_path: Path) -> None:
    summaries: list[TrainingSummary] = []
    thread = threading.Thread(target=lambda: summaries.append(train(config_of(tmp_path))))
    thread.start()
    thread.join()
    assert summaries[0].step == 12


# Crashes

KILLS = """
import os, shutil, signal, sys
from pathlib import Path
from tests.config.test_loop import BigramTrainer, config_of, end_state, train

def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def counted(function, limit, count=[0]):
    def call(*args, **kwargs):
        count[0] += 1
        if count[0] > limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def killed_run(limit):
    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name), limit))
    BigramTrainer.step = counted(BigramTrainer.step, limit)
    train(config)

os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
folder = Path(sys.argv[1])
train(config_of(folder / "whole"))
expected = end_state(folder / "whole")
config = config_of(folder / "run")
kills = 0
for first in range(0, 1000, int(sys.argv[2])):
    shutil.rmtree(folder / "run", ignore_errors=True)
    status = in_child(lambda: killed_run(first))
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    in_child(lambda: killed_run(first // 2 + 7))
    assert in_child(lambda: train(config)) == 0, first
    assert end_state(folder / "run") == expected, first
    left = [path.name for path in (folder / "run").iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert not left, left
    kills += 1
print(kills)
"""


def test_a_run_killed_at_any_instant_and_started_again_ends_in_the_same_state(tmp_path: Path) -> None:
    """SIGKILL before the n-th step or system call that changes the folder, then again in the next attempt."""
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "4"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


SLOW = """
import sys, time
from pathlib import Path
from rich.console import Console
from tests.config.test_loop import BigramTrainer, config_of, train

class Slow(BigramTrainer):
    def step(self, micro_batches):
        print("step", flush=True)
        time.sleep(0.05)
        return super().step(micro_batches)

config = config_of(Path(sys.argv[1]))
sys.exit(train(config, Slow(config), console=Console(stderr=True)).exit_status)
"""


def test_a_process_interrupted_from_outside_saves_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors
    assert "SIGINT: stopped after step 3 of 12" in errors
    assert "Traceback" not in errors
    assert train(config_of(tmp_path / "run")).resumed_from == 3
    train(config_of(tmp_path / "whole"))
    assert end_state(tmp_path / "run") == end_state(tmp_path / "whole")


# Loggers and figures


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config_of(tmp_path, "metrics.tensorboard=true"))
    read = events.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    expected = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    found = [event.tensor_proto.float_val[0] for event in read.Tensors("loss")]
    assert found == pytest.approx(expected, rel=1e-6)


def test_weights_and_biases_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run and its continuation, without a network: both have the identity that the run's folder keeps."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(config_of(tmp_path, "metrics.wandb_project=p", "train.max_steps=3"))
    train(config_of(tmp_path, "metrics.wandb_project=p", "train.max_steps=5"))
    identity = (tmp_path / "wandb_id").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{identity}"] * 2
    first, second = (file.read_bytes() for file in files)
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        loss = json.dumps(record["loss"]).encode()
        assert (loss in first, loss in second) == (record["step"] <= 3, record["step"] > 3)


@pytest.mark.parametrize("works_when", ["asked", "read"])
def test_each_step_is_timed_alone(tmp_path: Path, works_when: str) -> None:
    """Whether the work is done in ``step`` or goes on until a number is read, and with evaluations between."""

    class Slow(float):
        def __float__(self) -> float:
            time.sleep(0.03)
            return float.__float__(self)

    class SlowTrainer(BigramTrainer):
        def step(self, micro_batches: Sequence) -> dict[str, float]:
            numbers = super().step(micro_batches)
            if works_when == "read":
                return {"loss": Slow(numbers["loss"])}
            time.sleep(0.03)
            return numbers

        def evaluate(self, batches: Sequence) -> dict[str, float]:
            time.sleep(0.1)
            return super().evaluate(batches)

    config = config_of(tmp_path, "train.max_steps=6", "eval.interval=2")
    began = time.perf_counter()
    summary = train(config, SlowTrainer(config))
    elapsed = time.perf_counter() - began
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert all(record["seconds"] >= 0.03 for record in records)
    assert sum(record["seconds"] for record in records) < elapsed - 0.3
    assert all(record["tokens_per_second"] == 32 / record["seconds"] for record in records)
    assert summary.tokens_per_second == pytest.approx(32 / np.mean([record["seconds"] for record in records[1:]]))


def test_the_pace_leaves_out_the_first_step() -> None:
    pace = Pace()
    assert pace.seconds_per_step == 0.0
    pace.step(60.0)
    assert pace.seconds_per_step == 60.0
    for seconds in (1.0, 3.0):
        pace.step(seconds)
    assert (pace.seconds, pace.seconds_per_step) == (3.0, 2.0)


def test_durations_read_well() -> None:
    assert [format_duration(seconds) for seconds in (0.4, 59.6, 750, 3723)] == ["0:00", "1:00", "12:30", "1:02:03"]


# Profiling


def traces(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("trace_*")}


@pytest.mark.parametrize(("start", "end", "wanted"), [(0, 0, set()), (3, 5, {"trace_3_5"}), (0, 99, {"trace_0_12"})])
def test_the_steps_asked_for_are_traced(tmp_path: Path, start: int, end: int, wanted: set[str]) -> None:
    train(config_of(tmp_path / "run", f"profiling.start_step={start}", f"profiling.end_step={end}"))
    assert traces(tmp_path / "run" / "profile") == wanted
    assert (tmp_path / "run" / "profile").exists() == bool(wanted)


def test_a_trace_ends_with_its_run_however_that_ends(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", "profiling.start_step=2", "profiling.end_step=9", "profiling.dir=p")
    trainer = BigramTrainer(config)
    step = trainer.step

    def diverging(micro_batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        return {**step(micro_batches), "loss": math.nan if trainer.updates == 5 else 1.0}

    trainer.step = diverging
    with pytest.raises(TrainingDivergedError):
        train(config, trainer)
    assert len(traces(tmp_path / "run" / "p")) == 1
    train(config)
    assert "trace_3_9" in traces(tmp_path / "run" / "p"), "what is left of the steps asked for"


def test_profiling_without_a_step_to_trace_is_told(tmp_path: Path) -> None:
    output = io.StringIO()
    config = config_of(tmp_path / "run", "profiling.start_step=12", "profiling.end_step=20")
    train(config, console=Console(file=output, width=200))
    assert "profiling.start_step = 12: no step up to 19 is left to be profiled" in output.getvalue()


def test_a_folder_of_profiles_that_cannot_be_written_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    config = config_of(tmp_path / "run", "profiling.end_step=2", f"profiling.dir={tmp_path / 'taken'}")
    trainer = BigramTrainer(config)
    with pytest.raises(UserError, match="taken"):
        train(config, trainer)
    assert trainer.updates == 0
