"""What a compiled program costs a device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind.

    Attributes:
        count: how often a device takes part in one.
        bytes: sent or received, whichever is more, summed over these times.
    """

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Program:
    """What a step costs each device, which all do the same.

    Attributes:
        flops: of matrix products, recomputation for the backward pass included.
        arguments: bytes of parameters, buffers, the optimiser's state and a batch, before the step.
        outputs: bytes of results that don't take the place of arguments.
        temporaries: bytes that are needed while it runs, at the peak.
        code: bytes of the program.
        collectives: by kind, the most bytes first.
        unknown_loops: loops with collectives whose trip count is unknown; each is counted as one iteration.
    """

    flops: int
    arguments: int
    outputs: int
    temporaries: int
    code: int
    collectives: tuple[Collective, ...]
    unknown_loops: int = 0

    @property
    def memory(self) -> int:
        """Bytes of all that is held at one time."""
        return self.arguments + self.outputs + self.temporaries + self.code

    def to_json(self) -> dict[str, object]:
        """All numbers."""
        return {**dataclasses.asdict(self), "memory": self.memory}
