"""What was measured, and the arithmetic of it: medians, spread, and shares of what the machine can do."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, object]
OURS, FOREIGN = "kempnerforge", "transformers"


@dataclass(frozen=True)
class Timing:
    """Seconds of a call.

    Attributes:
        first: of the first one, which compiles.
        each: of later ones, at least one.
    """

    first: float
    each: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the later ones."""
        return statistics.median(self.each)

    @property
    def spread(self) -> float:
        """Between the longest and the shortest, as a share of the median."""
        return (max(self.each) - min(self.each)) / self.median

    @property
    def compilation(self) -> float:
        """Seconds that the first call took longer; 0 if it did not."""
        return max(0.0, self.first - self.median)


@dataclass(frozen=True)
class Limits:
    """What the machine reached in this run.

    Attributes:
        product: FLOP/s of a product of two square matrices of ``size`` in ``dtype``.
        copy: bytes that are read and written a second, in a copy of ``copied`` bytes.
        spread: of both, as in `Timing`.
    """

    product: float
    copy: float
    dtype: str
    size: int
    copied: int
    spread: tuple[float, float]

    @classmethod
    def of(cls, product: Timing, copy: Timing, dtype: str, size: int, copied: int) -> Limits:
        """From the seconds of one product and of one copy."""
        spread = product.spread, copy.spread
        return cls(2 * size**3 / product.median, 2 * copied / copy.median, dtype, size, copied, spread)


@dataclass(frozen=True)
class Line:
    """A piece of work.

    Attributes:
        work: a name of `works.WORKS`.
        of: who did it, `OURS` or `FOREIGN`.
        timing: of one time.
        tokens: of one time.
        flops: that it needs; None where the limit is another one, or they are not known.
        bytes: that it must read; None where the limit is another one.
        peak: the most bytes held meanwhile; None where that is not known.
    """

    work: str
    of: str
    timing: Timing
    tokens: int
    flops: float | None = None
    bytes: float | None = None
    peak: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """At the median."""
        return self.tokens / self.timing.median

    def share(self, limits: Limits) -> float | None:
        """Of the limit that the work has, product or copy."""
        if self.flops is not None:
            return self.flops / self.timing.median / limits.product
        return None if self.bytes is None else self.bytes / self.timing.median / limits.copy


@dataclass(frozen=True)
class Result:
    """What one process found, or all together.

    Attributes:
        device: the model of the device.
        memory: part of the peak of a training step -> bytes.
        profiles: work -> kind of kernel -> share of the time of all kernels.
    """

    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    limits: Limits | None = None
    lines: tuple[Line, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Plain values, with the numbers that follow from others."""
        found: dict[str, Any] = dataclasses.asdict(self)
        for line, values in zip(self.lines, found["lines"], strict=True):
            values["median"], values["spread"] = line.timing.median, line.timing.spread
            values["tokens_per_second"], values["compilation"] = line.tokens_per_second, line.timing.compilation
            values["share"] = None if self.limits is None else line.share(self.limits)
        return found

    @classmethod
    def from_json(cls, values: Json) -> Result:
        """What `to_json` gave."""
        given: Any = values
        names = {each.name for each in dataclasses.fields(Line)}
        lines = [{name: value for name, value in line.items() if name in names} for line in given["lines"]]
        limits = given["limits"]
        return cls(
            given["device"],
            given["versions"],
            None if limits is None else Limits(**{**limits, "spread": tuple(limits["spread"])}),
            tuple(Line(**{**line, "timing": _timing(line["timing"])}) for line in lines),
            given["memory"],
            given["profiles"],
            tuple(given["notes"]),
        )


def joined(results: Sequence[Result]) -> Result:
    """What several processes found, the first of which says what the device is."""
    versions: dict[str, str] = {}
    memory: dict[str, int] = {}
    profiles: dict[str, Mapping[str, float]] = {}
    for result in results:
        versions |= result.versions
        memory |= result.memory
        profiles |= result.profiles
    return Result(
        results[0].device,
        versions,
        next((result.limits for result in results if result.limits is not None), None),
        tuple(line for result in results for line in result.lines),
        memory,
        profiles,
        tuple(dict.fromkeys(note for result in results for note in result.notes)),
    )


def _timing(values: Mapping[str, Any]) -> Timing:
    return Timing(values["first"], tuple(values["each"]))
