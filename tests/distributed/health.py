"""Processes of which the second has something wrong with its first device, and what the health check says of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shared_config.errors import UserError
from shared_config.training.health import Bench, check_health

OTHERS = "health check: devices fail; rank 0 says which"
SOON, LATER = 4.0, 60.0
"""Seconds for what is stuck, and for what is not."""
RIGHT_OR_WRONG = {
    "nothing": (LATER, ""),
    "product": (LATER, "{place}: a product of matrices is wrong"),
    "given": (LATER, "{place}: what it gives to a sum over all devices is wrong"),
    "gotten": (LATER, "{place}: the sum over all devices that it gets is wrong"),
}
BY_DAY = {
    **RIGHT_OR_WRONG,
    "raised": (SOON, "health check: rank 1 on {host}, {devices}: RuntimeError: an illegal instruction"),
    "stuck": (SOON, "health check: rank 1 on {host}, {devices}: no product of matrices within 4 s"),
}
BY_NIGHT = {**BY_DAY, "silent": (SOON, "health check: rank 1 has not answered within 8 s")}
"""What is wrong -> the seconds given, and what the first process says. What keeps others from their sum leaves them
stuck in it, in JAX for good.
"""


class Spoiled:
    """A bench with something wrong."""

    def __init__(self, bench: Bench, what: str):
        self._bench, self._what = bench, what
        self.rank, self.processes, self.devices, self.own = bench.rank, bench.processes, bench.devices, bench.own

    def products(self, number: int, a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
        """Wrong in bfloat16, in one number."""
        for place, found in enumerate(self._bench.products(number, a, b)):
            if self._what == "product" and number == min(self.own) and place == 1:
                found = found + np.eye(*found.shape, dtype=found.dtype) * (np.arange(found.shape[1]) == 700)
            yield found
        if self._what == "raised":
            raise RuntimeError("an illegal instruction\n")
        if self._what == "stuck":
            threading.Event().wait()

    def sums(self, parts: Mapping[int, np.ndarray]) -> Mapping[int, np.ndarray]:
        """Wrong in what the first device gives, or gets."""
        first = min(self.own)
        given = {number: part * (1 + (self._what == "given" and number == first)) for number, part in parts.items()}
        found = dict(self._bench.sums({number: part.astype(np.float32) for number, part in given.items()}))
        if self._what == "gotten":
            found[first] = found[first] + (np.arange(self.devices) == 0)
        return found

    def send(self, text: str, rank: int, seconds: float) -> None:
        """What is told."""
        if self._what != "silent":
            self._bench.send(text, rank, seconds)

    def receive(self, rank: int, seconds: float) -> str | None:
        """What was told."""
        return self._bench.receive(rank, seconds)


def says(bench: Any, what: str, seconds: float) -> str:
    """What a process says, where the second is spoiled."""
    try:
        check_health(Spoiled(bench, what) if bench.rank == 1 else bench, seconds)
    except UserError as error:
        return str(error)
    return ""


def said(text: str, own: Mapping[int, str]) -> str:
    """What the first process has to say, of the devices of the second."""
    host, place = socket.gethostname(), own[min(own)]
    return text.format(host=host, place=f"health check: rank 1 on {host}, {place}", devices=", ".join(own.values()))
