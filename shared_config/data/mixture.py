"""Several sources whose rows are mixed, without state: what row n is follows from n alone.

Row n of a phase falls on the point (n * STRIDE + offset) mod 2^64 of a circle, on which each source owns an arc as long
as its share. STRIDE is 2^64 over the golden ratio, so that any n consecutive points are spread almost evenly (the
three-distance theorem, Sos 1958), and each source has its share of any stretch of rows, but for a few. How many rows
before n fell on an arc is a sum of floors, which Euclid's algorithm gives in O(log n): that is the number of the row
within its source. So each source is read row by row, epoch by epoch, whoever asks for whichever batch.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared_config.data.batches import Batch
from shared_config.schema.data import DataConfig

CIRCLE = 2**64
STRIDE = 0x9E3779B97F4A7C15
SHARES = 2**32
"""Shares are whole multiples of one over this: they don't depend on how a machine rounds powers."""


class Source(Protocol):
    """What `shared_config.data.TextData` and `shared_config.data.ConversationData` are."""

    seq_len: int
    notes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Changes whenever the rows do."""
        ...

    @property
    def epoch_rows(self) -> int:
        """Rows of an epoch."""
        ...

    def rows(self, numbers: np.ndarray) -> Batch:
        """Rows by their numbers."""
        ...

    def heldout(self) -> list[Batch]:
        """The held-out batches."""
        ...


@dataclass(frozen=True)
class Phase:
    """From ``from_step`` updates on, rows fall on arcs that end at ``ends``, in the order of the sources; the last one
    is `CIRCLE`.
    """

    from_step: int
    ends: tuple[int, ...]
    offset: int

    def before(self, count: int) -> list[int]:
        """How many of the first ``count`` rows of the phase each source has."""
        sums = [0, *(self._on_arc(count, end) for end in self.ends)]
        return [high - low for low, high in itertools.pairwise(sums)]

    def source_of(self, row: int) -> int:
        """The source of a row of the phase."""
        point = (row * STRIDE + self.offset) % CIRCLE
        return next(source for source, end in enumerate(self.ends) if point < end)

    def _on_arc(self, count: int, end: int) -> int:
        """How many of the first rows fall below ``end``: x mod m < t is floor(x / m) - floor((x - t) / m)."""
        whole = floor_sum(count, CIRCLE, STRIDE, self.offset)
        return whole - floor_sum(count, CIRCLE, STRIDE, self.offset - end)


class MixedData:
    """Training batches by index, and the held-out batches of all sources; see `shared_config.data.batches.TextData`.

    Attributes:
        rows_per_batch, tokens_per_batch: rows and positions of a batch over all ranks.
        notes: of all sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        rows_per_step: int,
    ):
        """
        Args:
            phases: in the order of their steps, the first from step 0 on.
            rows_per_step: over all micro-batches and ranks.
        """
        self.sources, self.phases = tuple(sources), tuple(phases)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.rows_per_batch = batch_size * world_size
        self.tokens_per_batch = self.rows_per_batch * sources[0].seq_len
        self.rows_per_step = rows_per_step
        self.notes = tuple(note for source in sources for note in source.notes)
        first = np.zeros(1, np.uint64)
        self._shapes = {name: row.shape[1:] for source in sources for name, row in source.rows(first).items()}
        self._dtypes = {name: row.dtype for source in sources for name, row in source.rows(first).items()}

    @property
    def fingerprint(self) -> str:
        """Tells whether two runs read the same rows."""
        parts = [source.fingerprint for source in self.sources]
        return hashlib.sha256(repr((parts, self.phases)).encode()).hexdigest()[:32]

    def in_steps_of(self, rows: int) -> MixedData:
        """The data of a run whose steps have so many rows: its phases begin with their steps."""
        changed = copy.copy(self)
        changed.rows_per_step = rows
        return changed

    def batch(self, index: int) -> Batch:
        """Training batch ``index`` (from 0) of this rank: the rows of its sources. Where only some of them
        have a text_mask, all positions of the others are real.

        Raises:
            UserError: as the sources.
        """
        if index < 0:
            raise ValueError(f"index = {index}: must be at least 0")
        placed = self.places((index * self.world_size + self.rank) * self.batch_size, self.batch_size)
        batch = {name: np.ones((len(placed), *shape), self._dtypes[name]) for name, shape in self._shapes.items()}
        for number, source in enumerate(self.sources):
            rows = [row for row, (chosen, _) in enumerate(placed) if chosen == number]
            if rows:
                for name, array in source.rows(np.array([placed[row][1] for row in rows], np.uint64)).items():
                    batch[name][rows] = array
        return batch

    def heldout(self) -> list[Batch]:
        """The held-out batches of this rank, one source after the other."""
        batches = [batch for source in self.sources for batch in source.heldout()]
        names = dict.fromkeys(name for batch in batches for name in batch)
        return [{name: batch.get(name, np.ones(batch["tokens"].shape, bool)) for name in names} for batch in batches]

    def places(self, first: int, count: int) -> list[tuple[int, int]]:
        """(source, number of the row within it) of rows ``first`` to ``first + count`` (exclusive) of the run."""
        starts = [phase.from_step * self.rows_per_step for phase in self.phases]
        found: list[tuple[int, int]] = []
        counts = [0] * len(self.sources)
        for phase, start, end in zip(self.phases, starts, [*starts[1:], None], strict=True):
            done = max(0, (first if end is None else min(first, end)) - start)
            counts = [a + b for a, b in zip(counts, phase.before(done), strict=True)]
            while len(found) < count and (end is None or start + done < end) and start + done == first + len(found):
                source = phase.source_of(done)
                found.append((source, counts[source]))
                counts[source] += 1
                done += 1
        return found


def phases_of(data: DataConfig, sizes: Sequence[int], seed: int) -> list[Phase]:
    """The phases of a mixture.

    Args:
        sizes: what stands for weights that are not given.
    """
    weights = [source.weight for source in data.sources]
    given = [size if weight is None else weight for weight, size in zip(weights, sizes, strict=True)]
    steps = [(0, given), *((phase.from_step, list(phase.weights)) for phase in data.phases)]
    return [Phase(step, arcs(weights, data.temperature), _offset(seed, step)) for step, weights in steps]


def arcs(weights: Sequence[float], temperature: float) -> tuple[int, ...]:
    """Where the arcs of sources end, whose lengths are as weight^(1/temperature); one of weight 0 has none."""
    largest = max(weights)
    powers = [(weight / largest) ** (1 / temperature) if weight else 0.0 for weight in weights]
    ends = [round(sum(powers[: number + 1]) / sum(powers) * SHARES) for number in range(len(powers))]
    return tuple(end * (CIRCLE // SHARES) for end in ends)


def floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """The sum of floor((factor * i + offset) / modulus) over i from 0 to ``count`` (exclusive), by Euclid's algorithm
    (Graham, Knuth & Patashnik 1994, "Concrete Mathematics", section 3.5).
    """
    total, sign = 0, 1
    while count > 0:
        quotient, factor = divmod(factor, modulus)
        total += sign * quotient * (count * (count - 1) // 2)
        quotient, offset = divmod(offset, modulus)
        total += sign * quotient * count
        top = factor * (count - 1) + offset
        if top < modulus:
            break
        rows = top // modulus  # columns below the line, counted along the other axis
        total += sign * rows * count
        count, modulus, factor, offset, sign = rows, factor, modulus, modulus - offset - 1 + factor, -sign
    return total


def _offset(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"mixture {seed} {step}".encode(), digest_size=8).digest(), "little")
