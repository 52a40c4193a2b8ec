"""A check of all devices before a run: each multiplies matrices whose product is known, and adds its part to a sum over
all devices that is known.

Each process looks at its own devices, and tells the first what it found; the first judges, and tells all. Nothing waits
for longer than given, so that a device that is stuck is found like one that is wrong.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np

from shared_config.errors import UserError

ROWS, INNER = 1024, 256
"""Of the matrices: a sum of so few numbers of -1, 0 and 1 is exact in bfloat16."""
PRODUCT, SUM, DONE = "product", "sum", "done"
NAMED = 16
"""Of places that are wrong, and of devices that fail, how many are told."""
ERROR = 200
"""Characters of an error that are told."""


class Bench(Protocol):
    """The devices of a process, and its way to the other processes.

    Attributes:
        rank: the number of the process, of so many ``processes``.
        own: its devices, by their numbers among all ``devices`` of the run.
    """

    rank: int
    processes: int
    devices: int
    own: Mapping[int, str]

    def products(self, number: int, a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
        """The product of two float32 matrices, computed by a device in float32 and in bfloat16."""
        ...

    def sums(self, parts: Mapping[int, np.ndarray]) -> Mapping[int, np.ndarray]:
        """What each own device gets as the sum of the float32 vectors that all devices of the run give."""
        ...

    def send(self, text: str, rank: int, seconds: float) -> None:
        """Tell a process something; where it does not listen within so many seconds, that is that."""
        ...

    def receive(self, rank: int, seconds: float) -> str | None:
        """What a process has told this one; None if it has not within so many seconds."""
        ...


@dataclass(frozen=True)
class Report:
    """What a process has found so far.

    Attributes:
        own: its devices, by number.
        reached: PRODUCT or SUM, which it is still at, or DONE.
        error: what ended it there.
        products: devices whose product is wrong.
        sums: device -> places, which are numbers of devices, at which the sum that it got is wrong.
    """

    host: str
    own: Mapping[int, str]
    reached: str = PRODUCT
    error: str = ""
    products: Sequence[int] = ()
    sums: Mapping[int, Sequence[int]] = field(default_factory=dict)


def check_health(bench: Bench, seconds: float) -> None:
    """Check all devices of a run; every process calls it.

    Args:
        seconds: within which a process has to look at its devices, and then to tell what it found.

    Raises:
        UserError: naming each device that fails, its host and its process, in the first process; that there are some,
            in the others.
    """
    report = examined(bench, seconds)
    if bench.rank > 0:
        bench.send(to_text(report), 0, 2 * seconds)
        said = bench.receive(0, 3 * seconds)
        if said is None:
            raise UserError(f"health check: rank 0 has not answered within {3 * seconds:g} s")
        if said:
            error = UserError("health check: devices fail; rank 0 says which")
            error.shown_elsewhere = True
            raise error
        return
    end = time.monotonic() + seconds
    told = {rank: bench.receive(rank, max(0.1, end - time.monotonic())) for rank in range(1, bench.processes)}
    problem = verdict([report, *(None if text is None else from_text(text) for text in told.values())], seconds)
    for rank in (rank for rank, text in told.items() if text is not None):
        bench.send(problem, rank, seconds)
    if problem:
        raise UserError(problem)


def examined(bench: Bench, seconds: float) -> Report:
    """What a process finds of its devices in so many seconds; what is stuck stays behind."""
    reports = [Report(socket.gethostname(), bench.own)]

    def examine() -> None:
        try:
            for report in findings(bench, reports[0]):
                reports.append(report)
        except Exception as error:
            reports.append(replace(reports[-1], error=f"{type(error).__name__}: {str(error).strip()[:ERROR]}"))

    worker = threading.Thread(target=examine, daemon=True)
    worker.start()
    worker.join(seconds)
    return reports[-1]


def findings(bench: Bench, report: Report) -> Iterator[Report]:
    """What a process has found after its products, and after its sums."""
    a, b = known_matrices()
    product = (a.astype(np.float64) @ b).astype(np.float32)
    wrong = [
        number for number in bench.own if not all(np.array_equal(one, product) for one in bench.products(number, a, b))
    ]
    report = replace(report, reached=SUM, products=wrong)
    yield report
    total = np.arange(1, bench.devices + 1, dtype=np.float32)
    found = bench.sums({number: np.where(total == number + 1, total, np.float32(0)) for number in bench.own})
    places = {number: np.flatnonzero(found[number] != total)[:NAMED].tolist() for number in bench.own}
    yield replace(report, reached=DONE, sums=places)


def known_matrices() -> tuple[np.ndarray, np.ndarray]:
    """Float32 (ROWS, INNER) and (INNER, ROWS), of -1, 0 and 1."""
    draw = np.random.Generator(np.random.Philox(key=0)).integers
    return draw(-1, 2, (ROWS, INNER)).astype(np.float32), draw(-1, 2, (INNER, ROWS)).astype(np.float32)


def verdict(reports: Sequence[Report | None], seconds: float) -> str:
    """What is wrong, by what processes have reported, in their order, each None where it has not: a line for each
    device or process, "" if all is well.

    A device that is stuck in a product, or a process that is, keeps the others from their sum: they are named only
    where there is no such one.
    """
    lines = [*_before_sums(reports, seconds)] or [*_of_sums([each for each in reports if each is not None], seconds)]
    more = [f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    return "\n".join([*lines[:NAMED], *more])


def _before_sums(reports: Sequence[Report | None], seconds: float) -> Iterator[str]:
    for rank, report in enumerate(reports):
        if report is None:
            yield f"health check: rank {rank} has not answered within {2 * seconds:g} s"
            continue
        yield from (f"{_place(reports, number)}: a product of matrices is wrong" for number in report.products)
        if report.reached == PRODUCT:
            devices = ", ".join(report.own.values())
            problem = report.error or f"no product of matrices within {seconds:g} s"
            yield f"health check: rank {rank} on {report.host}, {devices}: {problem}"


def _of_sums(reports: Sequence[Report], seconds: float) -> Iterator[str]:
    """A place that is wrong in the sums of all is the fault of the device that gives it; one that is wrong in some, of
    those that get it.
    """
    for rank, report in enumerate(reports):
        if report.reached == SUM:
            problem = report.error or f"no sum over all devices within {seconds:g} s"
            yield f"health check: rank {rank} on {report.host}, {', '.join(report.own.values())}: {problem}"
    sums = {number: set(places) for report in reports for number, places in report.sums.items()}
    everywhere = set.intersection(*sums.values()) if sums else set()
    if len(everywhere) == min(NAMED, len(sums)) > 1:
        yield "health check: every part of the sum over all devices is wrong, on each of them"
        return
    yield from (
        f"{_place(reports, one)}: what it gives to a sum over all devices is wrong" for one in sorted(everywhere)
    )
    for number, places in sums.items():
        if places - everywhere:
            yield f"{_place(reports, number)}: the sum over all devices that it gets is wrong"


def _place(reports: Sequence[Report | None], number: int) -> str:
    """Where a device is."""
    rank, report = next((rank, each) for rank, each in enumerate(reports) if each is not None and number in each.own)
    return f"health check: rank {rank} on {report.host}, {report.own[number]}"


def to_text(report: Report) -> str:
    """A report, to be told."""
    return json.dumps(asdict(report))


def from_text(text: str) -> Report:
    """What was told."""
    fields = json.loads(text)
    own, sums = ({int(number): value for number, value in fields[name].items()} for name in ("own", "sums"))
    return Report(**{**fields, "own": own, "sums": sums})
