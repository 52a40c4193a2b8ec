"""What one process of `kempnerforge bench` does: it measures a machine, or a piece of work, with one backend."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared_config.bench.kernels import Kernel, shares_by_kind
from shared_config.bench.result import OURS, Json, Limits, Line, Result, Timing
from shared_config.bench.works import (
    LIMITS,
    STEPS,
    batches_of,
    decode_bytes,
    decode_lengths,
    experts_flops,
    job_of,
    step_flops,
    tokens_of,
)
from shared_config.interchange.toml import config_from_dict, config_to_dict
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

Call = Callable[[], object]

REPEATS, FEWEST = 10, 3
PATIENCE = 3.0
"""Seconds: when so many have passed, no more than `FEWEST` repeats are taken, unless a number is asked for."""
SHORTEST = 0.1
"""Seconds: of shorter calls several are taken together, as what a clock and a wait cost would count."""
MOST_TOGETHER = 64
SIZES = {True: (8192, 2**30), False: (512, 2**26)}
"""Whether there is an accelerator -> rows of the matrices of the product, bytes of the copy."""


class Machine(Protocol):
    """A backend on a device. Calls may return before the device has done their work.

    Attributes:
        kind: the model of the device.
        versions: of the backend's packages.
        is_accelerator: whether the device is no CPU.
        profile_note: why there is no profile; None where there is.
    """

    kind: str
    versions: Mapping[str, str]
    is_accelerator: bool
    profile_note: str | None

    def wait(self) -> None:
        """Return once the device has done all work."""
        ...

    def product(self, size: int, dtype: str) -> Call:
        """The product of two square matrices."""
        ...

    def copy(self, size: int) -> Call:
        """So many bytes read and written, as in a copy."""
        ...

    def step(self, job: JobConfig, batches: Sequence[Batch]) -> Call:
        """A training step of the micro-batches."""
        ...

    def experts(self, job: JobConfig) -> Call:
        """The first layer of experts, forward and backward, for the tokens of a micro-batch."""
        ...

    def decoder(self, job: JobConfig, prompts: Sequence[Sequence[int]], new: int) -> Call:
        """So many tokens after each prompt, in the dtype of the job's arithmetic."""
        ...

    def held(self, job: JobConfig, batches: Sequence[Batch]) -> tuple[dict[str, int], Mapping[str, Call]]:
        """Bytes that a trainer holds throughout, by part; and what takes more: an evaluation, a step."""
        ...

    def peak(self, call: Call) -> int | None:
        """The most bytes held during a call; None where that can't be told."""
        ...

    def profile(self, call: Call) -> Sequence[Kernel]:
        """The kernels of a call, and how long each ran."""
        ...


@dataclass(frozen=True)
class Request:
    """What a process is to measure.

    Attributes:
        work: `LIMITS`, or a name of `works.WORKS`.
        of: whose work, `result.OURS` or `result.FOREIGN`.
        repeats: how often, after the first calls; None: `REPEATS`, fewer where they take long.
    """

    config: JobConfig
    work: str
    of: str = OURS
    device: str | None = None
    repeats: int | None = None
    profile: bool = False

    def to_json(self) -> Json:
        """Plain values."""
        plain = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {**plain, "config": config_to_dict(self.config)}

    @classmethod
    def from_json(cls, values: Json) -> Request:
        """What `to_json` gave."""
        given: Any = values
        return cls(**{**given, "config": config_from_dict(given["config"])})


def measured(machine: Machine, request: Request) -> Result:
    """What a machine finds."""
    found = Result(device=machine.kind, versions=machine.versions)
    if request.work == LIMITS:
        return dataclasses.replace(found, limits=limits_of(machine, request))
    if request.work == "memory":
        return dataclasses.replace(found, memory=memory_of(machine, request.config))
    call, line = call_of(machine, request)
    timing = timed(call, machine.wait, request.repeats)
    found = dataclasses.replace(found, lines=(line(timing, machine.peak(call)),))
    if not request.profile:
        return found
    if machine.profile_note is not None:
        return dataclasses.replace(found, notes=(machine.profile_note,))
    name = request.work if request.of == OURS else f"{request.work}, {request.of}"
    return dataclasses.replace(found, profiles={name: shares_by_kind(machine.profile(call))})


def limits_of(machine: Machine, request: Request) -> Limits:
    """A product in the dtype of the job's arithmetic, and a copy."""
    (size, copied), dtype = SIZES[machine.is_accelerator], compute_dtype(request.config)
    product, copy = (
        timed(call, machine.wait, request.repeats) for call in (machine.product(size, dtype), machine.copy(copied))
    )
    return Limits.of(product, copy, dtype, size, copied)


def compute_dtype(config: JobConfig) -> str:
    """Name of the dtype of a job's arithmetic."""
    return "bfloat16" if config.train.casts else "float32"


def call_of(machine: Machine, request: Request) -> tuple[Call, Callable[[Timing, int | None], Line]]:
    """A work to be timed, and the line that follows from its times and its peak."""
    config, work, of = request.config, request.work, request.of
    job = job_of(work, config)
    if work in STEPS:
        batches = batches_of(job)
        tokens, flops = tokens_of(batches), step_flops(job, batches)
        return machine.step(job, batches), lambda timing, peak: Line(work, of, timing, tokens, flops, peak=peak)
    if work == "moe":
        tokens = job.train.batch_size * job.train.seq_len
        return machine.experts(job), lambda timing, peak: Line(work, of, timing, tokens, experts_flops(job), peak=peak)
    prompt, new = decode_lengths(config)
    ids = [place * 37 % config.model.vocab_size for place in range(prompt)]
    read = decode_bytes(config, prompt, new)

    def line(timing: Timing, peak: int | None) -> Line:
        """Of one token: a prompt is read as the weights are once, as for a token."""
        each = Timing(timing.first / new, tuple(seconds / new for seconds in timing.each))
        return Line(work, of, each, 1, bytes=read, peak=peak)

    return machine.decoder(job, [ids], new), line


def memory_of(machine: Machine, config: JobConfig) -> dict[str, int]:
    """Bytes at the peak of a training step: what is held throughout, gradients, and the rest; beside that, the peak of
    an evaluation.
    """
    held, calls = machine.held(config, batches_of(config))
    parts = dict(held)
    throughout = held["weights and buffers"] + held["moments"]
    for name, call in calls.items():
        call()
        machine.wait()
        peak = machine.peak(call)
        if peak is None:
            continue
        if name == "step":
            parts["activations and temporaries"] = max(0, peak - throughout - held["gradients"])
        parts[f"peak of {'an evaluation' if name == 'evaluation' else 'a step'}"] = peak
    return parts


def timed(call: Call, wait: Callable[[], None], repeats: int | None = None) -> Timing:
    """Seconds of a call, the first and then ``repeats`` others after one that is left out; of short ones the mean of
    several at a time. Without a number of repeats, that of `Request`.
    """

    def seconds(times: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return (time.perf_counter() - start) / times

    first, second = seconds(1), seconds(1)
    times = min(MOST_TOGETHER, max(1, math.ceil(SHORTEST / second)))
    each: list[float] = []
    while len(each) < (repeats or REPEATS):
        each.append(seconds(times))
        if repeats is None and len(each) >= FEWEST and times * sum(each) > PATIENCE:
            break
    return Timing(first, tuple(each))
