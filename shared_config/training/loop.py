"""The training loop that knows no framework: steps, evaluation, metrics, checkpoints, exact resume, clean stops.

A backend gives a `Trainer`, the data batches by index. A run is a folder (``checkpoint.dir``); the loop started again
there, after a stop or a crash at any instant, ends in the same state as one that was never stopped, provided that the
trainer is deterministic and its `TrainingState` is all there is to it. A step number counts the updates done: record,
checkpoint and evaluation n are those after the n-th update (the loss of record n is that before it).
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from shared_config.errors import UserError
from shared_config.interchange import checkpoint, run_layout
from shared_config.interchange.saving import Saving
from shared_config.interchange.source import to_stderr
from shared_config.interchange.together import ALONE, Processes
from shared_config.interchange.toml import config_to_dict
from shared_config.schema.job import JobConfig
from shared_config.training.metrics import Logger, finite_or_none, open_loggers
from shared_config.training.profiling import Profiler
from shared_config.training.progress import PEAK_MEMORY, Display, say
from shared_config.training.resume import ROWS_PER_STEP, Start, restore
from shared_config.training.run_folder import own_folder, write_config
from shared_config.training.signals import StopRequest
from shared_config.training.speed import Speed
from shared_config.training.trainer import (
    Batch,
    Numbers,
    Record,
    Trainer,
    TrainingData,
    TrainingDivergedError,
    TrainingSummary,
)

MUST_BE_FINITE = ("loss", "grad_norm")
TAKEN = "taken"

log = logging.getLogger(__name__)


def run_training(
    config: JobConfig,
    trainer: Trainer,
    data: TrainingData,
    *,
    console: Console | None = None,
    processes: Processes = ALONE,
    overridden: Collection[str] = (),
    loggers: Sequence[Logger] = (),
) -> TrainingSummary:
    """Train until ``train.max_steps``, or until SIGINT, SIGTERM or SIGHUP asks to stop after the step at hand.

    Where metrics or lines for the console can't be written in mid-run, as on a full disk, the run continues: the log
    says so once, and metrics.jsonl gets its missing records when there is space. ``checkpoint.keep_last_n`` makes
    space for checkpoints; if one can't be written, the run ends with an error that says what is kept.

    Args:
        console: where progress is shown; None shows nothing.
        processes: all that train together. Each writes its parts of checkpoints, the first all else.
        overridden: dotted fields that the command line sets: see `shared_config.training.resume.restore`.
        loggers: further ones, which the first process has.

    Raises:
        UserError: the folder can't be written or another run is using it (before anything is trained), a checkpoint
            does not fit or is damaged, a checkpoint can't be written.
        TrainingDivergedError: a loss that is not finite. No checkpoint is written from then on.
    """
    is_main = processes.is_main
    console = console if is_main else None
    folder = Path(config.checkpoint.dir)
    with ExitStack() as stack:
        with processes.agreed():
            if is_main:
                stack.enter_context(own_folder(folder))
                run_layout.clean(folder)
        with processes.agreed():
            start = restore(
                config,
                trainer.load_state,
                backend=trainer.backend,
                fingerprint=data.fingerprint if is_main else "",
                say=partial(say, console),
                note=to_stderr if is_main else lambda _: None,
                overridden=overridden,
                processes=processes,
                rows_per_batch=data.rows_per_batch,
            )
        config = config.replace(train=config.train.replace(grad_accum_steps=start.grad_accum_steps))
        data = data.in_steps_of(data.rows_per_batch * start.grad_accum_steps)
        tokens = data.tokens_per_batch * config.train.grad_accum_steps
        speed = Speed.of(config, trainer.devices, tokens, getattr(data, "prompts", (0,)))  # rows of text say none
        display = Display(console, total=config.train.max_steps, done=start.step, speed=speed)
        profiler: Profiler | None = None
        with processes.agreed():
            own_loggers: list[Logger] = []
            if is_main:
                keep, milestones = config.checkpoint.keep_last_n, config.checkpoint.milestone_interval
                with_room = partial(run_layout.with_room, folder, keep, milestones=milestones)
                with_room(partial(write_config, config, folder))
                logging = partial(open_loggers, config, folder, start.step)
                own_loggers = [*with_room(lambda: stack.enter_context(logging())), *loggers]
                profiler = Profiler(config, start.step, trainer.profile, display.say)
        stop = stack.enter_context(StopRequest(announce=console is not None))
        stack.enter_context(display)
        for note in data.notes:
            display.say(f"note: {note}")
        if profiler is not None:
            stack.enter_context(profiler)
        return _Run(config, trainer, data, start, speed, folder, own_loggers, display, profiler, stop, processes).run()


@dataclass(frozen=True)
class _Pending:
    """Numbers that may still be computed, and the time that asking for them took. Together with the time that reading
    them takes, that is what a step costs, whether a trainer works while it is asked or while it is waited for."""

    numbers: Numbers
    seconds: float


class _Run:
    """The loop and its few variables."""

    def __init__(
        self,
        config: JobConfig,
        trainer: Trainer,
        data: TrainingData,
        start: Start,
        speed: Speed,
        folder: Path,
        loggers: list[Logger],
        display: Display,
        profiler: Profiler | None,
        stop: StopRequest,
        processes: Processes,
    ):
        self.config, self.trainer, self.data = config, trainer, data
        self.start, self.speed, self.folder, self.loggers, self.display = start, speed, folder, loggers, display
        self.profiler, self.stop, self.processes = profiler, stop, processes
        self.last_step = config.train.max_steps
        self.peak_memory = 0
        self.first_batch = -(-start.rows // data.rows_per_batch)
        self.step = start.step
        self.record: Record = {}
        self.checkpoint = start.path
        self.saving: Saving | None = None
        self.heldout: Sequence[Batch] | None = None
        self.warned_no_label, self.warned_unwritten = False, False
        self.skipped, self.skipped_in_a_row = start.skipped, start.skipped_in_a_row

    def run(self) -> TrainingSummary:
        began = time.monotonic()
        stopped = 0
        pending: _Pending | None = None
        if self.step >= self.last_step:
            self.display.say(f"nothing to do: {self.step} of {self.last_step} steps have been taken")
        while self.step < self.last_step and not stopped:
            if self.profiler is not None:
                self.profiler.before(self.step)
            asked = self._ask()
            if pending is not None:
                self._log(self._read(pending))
            self.step, pending = self.step + 1, asked
            stopped, self.peak_memory = self.processes.largest_of([self.stop.signal, self.trainer.peak_memory() or 0])
            self._saved(wait=False)
            if stopped or self._evaluates() or self._saves():
                self._settle(self._read(pending), stopped)
                pending = None
        self._saved(wait=True)
        return self._summary(stopped, time.monotonic() - began)

    def _ask(self) -> _Pending:
        began = time.perf_counter()
        numbers = self.trainer.step(self._micro_batches())
        return _Pending(numbers, time.perf_counter() - began)

    def _micro_batches(self) -> list[Batch]:
        first = self._batches_before(self.step)
        return [self.data.batch(index) for index in range(first, first + self.config.train.grad_accum_steps)]

    def _batches_before(self, step: int) -> int:
        return self.first_batch + (step - self.start.step) * self.config.train.grad_accum_steps

    def _evaluates(self) -> bool:
        return self.config.eval.steps > 0 and self._is_due(self.config.eval.interval)

    def _saves(self) -> bool:
        return self._is_due(self.config.checkpoint.interval)

    def _is_due(self, interval: int) -> bool:
        return self.step == self.last_step or (interval > 0 and self.step % interval == 0)

    def _read(self, pending: _Pending) -> Record:
        """The record of the step before, once the device has its numbers.

        Raises:
            TrainingDivergedError: one that must be finite is not, and such updates are not skipped, or too many were.
        """
        began = time.perf_counter()
        first = filter(pending.numbers.__contains__, MUST_BE_FINITE)  # JAX sorts the names that it gives
        names = dict.fromkeys((*first, *pending.numbers))
        values = {name: float(pending.numbers[name]) for name in names}
        seconds = pending.seconds + time.perf_counter() - began
        self.display.pace.step(seconds)
        values |= self._skips(values)
        values.pop(TAKEN, None)
        record = self._without_empty_loss({name: finite_or_none(value) for name, value in values.items()})
        memory = {PEAK_MEMORY: self.peak_memory} if self.peak_memory else {}
        return {**record, **self.speed.record(seconds, self.step), **memory}

    def _without_empty_loss(self, record: Record) -> Record:
        """A mean over no labels is not a loss of 0: it is left empty, which is logged once."""
        if record.get("tokens") != 0:
            return record
        if not self.warned_no_label:
            self.warned_no_label = True
            self.display.say(f"note: at step {self.step} no label of the whole batch counts; it has no loss")
        return {**record, "loss": None}

    def _skips(self, values: Mapping[str, float]) -> dict[str, float]:
        """Count an update that was left out; {} if none may be."""
        problem = _problem(values)
        skips, limit = self.config.train.on_nonfinite == "skip", self.config.train.max_skipped_steps
        if problem and not skips:
            raise self._divergence(problem)
        self.skipped += problem is not None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if problem else 0
        if problem and self.skipped_in_a_row >= limit:
            in_a_row = f"train.max_skipped_steps = {limit} updates in a row were left out"
            raise self._divergence(f"{problem}, {in_a_row}")
        return {"skipped_steps": float(self.skipped)} if skips else {}

    def _divergence(self, problem: str, shown_elsewhere: bool | None = None) -> TrainingDivergedError:
        """What all processes raise; the first one shows it, if nothing else is given."""
        self._saved(wait=True)
        kept = f"the last checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint"
        error = TrainingDivergedError(
            f"step {self.step}: {problem}; training stopped, {kept}. "
            "A lower optimizer.lr, a longer scheduler.warmup_steps or a smaller train.grad_clip_norm may help"
        )
        error.shown_elsewhere = not self.processes.is_main if shown_elsewhere is None else shown_elsewhere
        return error

    def _settle(self, record: Record, stopped: int) -> None:
        """All that is due after a step. The record is on disk before the checkpoint that it precedes."""
        if self._evaluates() and not stopped:
            record |= self._evaluate()
        self._log(record, settled=True)
        if stopped:
            self.display.say(f"{signal.Signals(stopped).name}: stopped after step {self.step} of {self.last_step}")
        if stopped or self._saves():
            self._save()

    def _evaluate(self) -> Record:
        if self.heldout is None:
            self.heldout = self.data.heldout()
        if not self.heldout:
            return {}
        numbers = self.trainer.evaluate(self.heldout)
        record = self._without_empty_loss({name: finite_or_none(float(value)) for name, value in numbers.items()})
        return {f"heldout_{name}": value for name, value in record.items()}

    def _log(self, record: Record, settled: bool = False) -> None:
        self.record = record
        self.display.show(self.step, record, important=settled)
        if settled or self.step % self.config.metrics.log_interval == 0:
            for logger in self.loggers:
                self._logging(partial(logger.write, self.step, record))

    def _logging(self, action: Callable[[], None]) -> None:
        """Let a logger write; a run is worth more than its metrics."""
        try:
            action()
        except (OSError, UserError) as error:
            if not self.warned_unwritten:
                self.warned_unwritten = True
                log.warning("step %d: %s; the run goes on without", self.step, error)

    def _save(self) -> None:
        self._saved(wait=True)
        state = self.trainer.parts()
        assert state.step == self.step, f"the trainer is at step {state.step}, the loop at step {self.step}"
        for logger in self.loggers:
            self._logging(logger.sync)
        state.extra[ROWS_PER_STEP] = self.data.rows_per_batch * self.config.train.grad_accum_steps
        if self.skipped:
            state.extra.update(skipped=self.skipped, skipped_in_a_row=self.skipped_in_a_row)
        try:
            self.saving = checkpoint.begin(
                self.folder,
                state,
                rows=self._batches_before(self.step) * self.data.rows_per_batch,
                fingerprint=self.data.fingerprint if self.processes.is_main else "",
                config=config_to_dict(self.config),
                backend=self.trainer.backend,
                keep=self.config.checkpoint.keep_last_n,
                milestones=self.config.checkpoint.milestone_interval,
                processes=self.processes,
            )
        except checkpoint.NonFiniteError as error:
            problem = f"{error.name} is not finite after the update, no checkpoint is written"
            raise self._divergence(problem, error.shown_elsewhere) from None
        self._saved(wait=not self.config.checkpoint.async_save)

    def _saved(self, wait: bool) -> None:
        """Take note of a checkpoint that was being written, once it is there."""
        saving, self.saving = self.saving, None  # of one that has failed nothing is to come
        done = saving and (saving.finish() if wait else saving.poll())
        if done is None:
            self.saving = saving
            return
        self.checkpoint = done
        self.display.say(f"checkpoint {done}")

    def _summary(self, stopped: int, seconds: float) -> TrainingSummary:
        pace = self.display.pace.seconds_per_step
        return TrainingSummary(
            step=self.step,
            steps_run=self.step - self.start.step,
            resumed_from=self.start.step,
            loss=self.record.get("loss"),
            metrics=self.record,
            tokens_per_second=self.speed.tokens / pace if pace else 0.0,
            seconds=seconds,
            checkpoint=self.checkpoint,
            stopped_by=signal.Signals(stopped).name if stopped else None,
            exit_status=128 + stopped if stopped else 0,
        )


def _problem(values: Mapping[str, float]) -> str | None:
    """Why an update is unusable; None if it is usable."""
    bad = next((name for name in MUST_BE_FINITE if not math.isfinite(values.get(name, 0.0))), None)
    if bad is not None:
        return f"{bad} is {values[bad]}"
    return None if values.get(TAKEN, 1.0) else "the update gives weights or moments that are not finite"
