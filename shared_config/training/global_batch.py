"""The rows of a step, which stay the same where a run goes on with another number of data ranks.

rows of a step = train.batch_size * train.grad_accum_steps * data ranks
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shared_config.schema.job import JobConfig
from shared_config.schema.training import TrainConfig

FIELDS = ("batch_size", "grad_accum_steps")


@dataclass(frozen=True)
class Accumulation:
    """``train.grad_accum_steps`` of a run that goes on, and what its user should know, "" if nothing."""

    grad_accum_steps: int
    note: str = ""


def accumulation(
    config: JobConfig, rows_per_batch: int, before: TrainConfig, rows_before: int, overridden: Collection[str] = ()
) -> Accumulation:
    """How a run goes on whose steps had ``rows_before`` rows under the section ``before``.

    Where only the number of data ranks has changed, the accumulation follows it, if the rows can be dealt out so and
    each stage of a pipeline has a micro-batch. Where they can't, or where the config or the command line ask for
    another batch, what they ask for is done, and noted.

    Args:
        rows_per_batch: rows of a micro-batch, over all data ranks.
        overridden: dotted fields that the command line sets.
    """
    train = config.train
    rows = rows_per_batch * train.grad_accum_steps
    if rows == rows_before:
        return Accumulation(train.grad_accum_steps)
    ranks = rows_per_batch // train.batch_size
    asked = any(f"train.{name}" in overridden or getattr(train, name) != getattr(before, name) for name in FIELDS)
    steps, rest = divmod(rows_before, rows_per_batch)
    if not asked and not rest and steps >= config.distributed.pp:
        said = f"train.grad_accum_steps {train.grad_accum_steps} -> {steps} with {_ranks(ranks)}"
        return Accumulation(steps, f"note: {said}: a step has {rows_before} rows, as before")
    changed = f"note: a step has {rows} rows from here on, and had {rows_before}"
    return Accumulation(train.grad_accum_steps, f"{changed}; {_advice(train.batch_size, ranks, rows_before)}")


def _advice(batch_size: int, ranks: int, rows: int) -> str:
    """What to set for this many rows."""
    of_rank, rest = divmod(rows, ranks)
    if rest:
        return f"{_ranks(ranks)} can't share {rows} rows evenly: use a number of them that divides {rows}"
    fitting = max(size for size in range(1, min(batch_size, of_rank) + 1) if of_rank % size == 0)
    fields = {"batch_size": fitting, "grad_accum_steps": of_rank // fitting}
    return f"{' and '.join(f'train.{name} = {value}' for name, value in fields.items())} would keep {rows}"


def _ranks(number: int) -> str:
    return f"{number} data rank{'s' * (number > 1)}"
