"""What a validation does: its plan, the checks that it consists of, and what they find."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shared_config.contract.sharding import has_axes
from shared_config.contract.warm_start import without_warm_start
from shared_config.parity.compare import Comparison
from shared_config.parity.dtypes import DTYPES
from shared_config.parity.layouts import LAYOUT, MOST
from shared_config.parity.provenance import check_trace, expected_meta
from shared_config.parity.scenarios import PARTS, SCENARIOS, resume_folder
from shared_config.parity.traces import Trace, TraceMeta, read_trace
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig

BACKENDS = ("torch", "jax")

TRANSFORMERS = "transformers"
"""Beside them, of a Hugging Face folder."""

TRUTH = ("torch", "float64")
"""The trace that float32 and bfloat16 are measured against, and that carries the deltas."""

LONG = "long"

LAYOUTS_STAGE = PARTS
"""Of the processes that have several devices each."""


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    Attributes:
        subject: what was compared; ``count`` tensors of it.
        worst: the tensor nearest to its limit, or beyond.
        error, limit: of that tensor, relative to its RMS.
        detail: what to say if it is not ok.
        backend: the one that was compared with itself, or `TRANSFORMERS`; "" where both backends were compared.
    """

    check: str
    subject: str
    ok: bool
    count: int = 1
    worst: str = ""
    error: float = 0.0
    limit: float = 0.0
    detail: str = ""
    backend: str = ""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return "same" if self.ok else f"{self.backend} INCONSISTENT" if self.backend in BACKENDS else "DIFFERENT"


@dataclass
class Plan:
    """What is validated, and the folder in which the processes leave their results.

    Attributes:
        dtypes: of the traces; float64 is always among them, as the truth for the others.
        steps: optimiser steps of the training run; 0 for none.
        weights: what one step and decoding are checked with; None: drawn values.
        weights_hash: of their values as they are read; "" if drawn.
        overrides: of the command line, which win over what is next to the weights.
        full: whether checks run that only a full validation has.
        layouts: parallel layouts to compare; ``config`` itself is of one device.
        foreign: whether ``weights`` is a Hugging Face folder, of which transformers runs its own model too.
        comparisons: filled by the checks, by title, for the report.
    """

    config: JobConfig
    folder: Path
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    seed: int = 0
    steps: int = 30
    device: str = "cpu"
    weights: Path | None = None
    weights_hash: str = ""
    overrides: tuple[str, ...] = ()
    full: bool = False
    layouts: tuple[DistributedConfig, ...] = ()
    foreign: bool = False
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    @property
    def config_file(self) -> Path:
        """The resolved config, for the processes to load."""
        return self.folder / "config.toml"

    def trace_file(self, backend: str, dtype: str) -> Path:
        """Where a backend's process leaves its trace."""
        return self.folder / f"{backend}-{dtype}.safetensors"

    @property
    def devices(self) -> int:
        """Of the largest layout."""
        return max((layout.fewest_devices for layout in self.layouts), default=1)

    def backends_of(self, layout: DistributedConfig) -> tuple[str, ...]:
        """Those that have such a layout."""
        return tuple(backend for backend in BACKENDS if has_axes(backend, layout))

    @property
    def checks(self) -> list[Check]:
        """Those that run."""
        wanted = {"full": self.full, "layouts": bool(self.layouts), "foreign": self.foreign}
        return [check for check in CHECKS.values() if all(wanted[name] for name in wanted if getattr(check, name))]

    @property
    def processes(self) -> tuple[str, ...]:
        """What runs side by side."""
        return (*BACKENDS, TRANSFORMERS) if self.foreign else BACKENDS

    def jobs(self, process: str, stage: int) -> list[list[str]]:
        """What the process of a backend, or of transformers, is to do."""
        own = [check for check in self.checks if check.stage == stage and check.foreign == (process == TRANSFORMERS)]
        return [job for check in own for job in check.jobs(self, process)]

    @property
    def stages(self) -> list[int]:
        """One process per backend runs the jobs of each, once those of the one before have ended."""
        return sorted({check.stage for check in self.checks})

    def scenario_file(self, backend: str, scenario: str, dtype: str = "float64") -> Path:
        """Where a backend's process leaves the trace of a scenario."""
        return self.folder / f"{backend}-{scenario}-{dtype}.safetensors"

    def layout_file(self, backend: str, place: int) -> Path:
        """Where a backend's process leaves the trace of a layout, counted from 1, or with 0 that of one device."""
        return self.scenario_file(backend, f"{LAYOUT}-{place}")

    def jobs_file(self, backend: str, stage: int = 0) -> Path:
        """What the process of a backend is to do."""
        return self.folder / f"jobs-{backend}{f'-{stage}' if stage else ''}.json"

    def files(self) -> frozenset[str]:
        """Names of all that a validation leaves in its folder."""
        own = [self.config_file, *self.traces()]
        processes = (*BACKENDS, TRANSFORMERS)
        own += [self.jobs_file(backend, stage) for backend in processes for stage in range(LAYOUTS_STAGE + 1)]
        own += [self.run_folder(backend) for backend in BACKENDS]
        own += [resume_folder(self.folder, backend, part) for backend in BACKENDS for part in range(PARTS)]
        return frozenset(file.name for file in own)

    def traces(self) -> list[Path]:
        """All that a validation of any kind leaves in its folder."""
        return [
            file
            for backend in (*BACKENDS, TRANSFORMERS)
            for dtype in DTYPES
            for file in (
                self.trace_file(backend, dtype),
                *(self.scenario_file(backend, scenario, dtype) for scenario in (LONG, *SCENARIOS)),
                *(self.layout_file(backend, place) for place in range(MOST + 1)),
            )
        ]

    def run_folder(self, backend: str) -> Path:
        """Where a backend's process trains."""
        return self.folder / f"train-{backend}"

    @functools.cache  # noqa: B019 (a plan lives as long as its command)
    def trace(self, backend: str, dtype: str) -> Trace:
        """A trace that was left behind.

        Raises:
            UserError: it can't be read, or is another than the one that was asked for.
        """
        path = self.trace_file(backend, dtype)
        asked = dataclasses.replace(self.expected, backend=backend, device=self.device, dtype=dtype)
        return check_trace(read_trace(path), asked, path)

    @functools.cache  # noqa: B019 (a plan lives as long as its command)
    def foreign_trace(self, dtype: str) -> Trace:
        """The trace that transformers left behind.

        Raises:
            UserError: as `trace`.
        """
        path, extra = self.trace_file(TRANSFORMERS, dtype), {"scenario": TRANSFORMERS}
        asked = dataclasses.replace(self.expected, backend=TRANSFORMERS, device=self.device, dtype=dtype, extra=extra)
        return check_trace(read_trace(path), asked, path)

    @functools.cached_property
    def expected(self) -> TraceMeta:
        """The metadata of the traces of one step, whatever their backend, device and dtype."""
        return expected_meta(self.expected_config, self.seed, self.weights_hash)

    @property
    def expected_config(self) -> JobConfig:
        """The config that traces of one step record: weights that are given start from no others."""
        return self.config if self.weights is None else without_warm_start(self.config)

    __hash__ = object.__hash__


@dataclass(frozen=True)
class Check:
    """One thing to prove.

    Attributes:
        jobs: command lines of ``kempnerforge`` that the process of a backend runs.
        judge: what came of it, once all processes have ended.
        stage: jobs of a later one run once those of earlier ones have ended in all backends.
        full: whether only a full validation runs it.
        layouts: whether only a validation of parallel layouts runs it.
        foreign: whether it is transformers', and only a validation with these runs it.
    """

    name: str
    jobs: Callable[[Plan, str], list[list[str]]]
    judge: Callable[[Plan], Iterable[Finding]]
    stage: int = 0
    full: bool = False
    layouts: bool = False
    foreign: bool = False


CHECKS: dict[str, Check] = {}


def register(check: Check) -> Check:
    """Let `validate` run a check.

    Raises:
        ValueError: if the name is taken.
    """
    if check.name in CHECKS:
        raise ValueError(f"check {check.name!r} is registered already")
    CHECKS[check.name] = check
    return check
