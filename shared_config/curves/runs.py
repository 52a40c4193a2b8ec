"""What the folder of a training run tells: its records, its config, and which backend wrote its last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_config.errors import UserError
from shared_config.evaluation.samples import SAMPLES, Sample, read_samples
from shared_config.interchange.run_layout import METRICS, STATE, latest, read_state
from shared_config.interchange.toml import read_fields
from shared_config.training.metrics import read_metrics

CONFIG = "config.toml"
PLACES = ("checkpoint.dir",)
"""Fields in which runs always differ."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: its folder.
        backend: that wrote the last checkpoint; "" without one.
        config: dotted field -> value, of those that were given.
        records: of metrics.jsonl, by increasing step.
        samples: what its model wrote.
    """

    name: str
    backend: str
    config: Mapping[str, object]
    records: Sequence[Mapping[str, object]]
    samples: Sequence[Sample] = ()

    def points(self, field: str) -> Points:
        """(step, value) of a number of the records, where it is finite."""
        found = [(record["step"], record.get(field)) for record in self.records]
        numbers = [(step, value) for step, value in found if isinstance(step, int) and isinstance(value, int | float)]
        return [(step, float(value)) for step, value in numbers if math.isfinite(value)]

    @property
    def label(self) -> str:
        """Name and backend."""
        return f"{self.name} ({self.backend})" if self.backend else self.name


def read_run(folder: str | Path) -> Run:
    """The run of a folder.

    Raises:
        UserError: nothing there, or no records.
    """
    folder = Path(folder)
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: holds no training run: needs a {METRICS}")
    records = read_metrics(folder / METRICS)
    if not records:
        raise UserError(f"{folder / METRICS}: holds no records yet")
    checkpoint, config = latest(folder), folder / CONFIG
    backend = "" if checkpoint is None else str(read_state(checkpoint / STATE)["backend"])
    fields = dict(flattened(read_fields(config))) if config.is_file() else {}
    ordered = sorted(records, key=lambda record: record["step"])
    return Run(str(folder), backend, fields, ordered, read_samples(folder / SAMPLES))


def flattened(fields: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, by dotted names."""
    found: dict[str, object] = {}
    for name, value in fields.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differing_fields(runs: Sequence[Run]) -> dict[str, list[object]]:
    """Field -> its value in each run, of those in which some differ; None where it was not given."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in PLACES)
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: own for name, own in values.items() if any(value != own[0] for value in own)}
