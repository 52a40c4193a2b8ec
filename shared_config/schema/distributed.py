"""How the work is spread over devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from shared_config.schema.base import PositiveInt, Section, section


@section
class DistributedConfig(Section):
    """Sizes of the mesh axes. Their product is the number of devices; ``dp_shard`` -1 takes what the others leave.

    dp_replicate: copies of the model; dp_shard: ranks that share one sharded copy (FSDP); cp: ranks that share the
    sequences of a micro-batch, and the sharded copy with those of ``dp_shard``; tp: tensor parallel; pp: pipeline
    stages; ep: expert parallel, a division of the ranks of ``dp_shard``, not a separate axis.
    """

    dp_replicate: PositiveInt = 1
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    cp: PositiveInt = 1
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    ep: PositiveInt = 1

    def problems(self) -> Iterator[str]:
        if self.dp_shard == 0:
            yield "dp_shard = 0: must be positive, or -1 for all devices that remain"

    @property
    def fewest_devices(self) -> int:
        """Their number; where ``dp_shard`` is -1, the least that fits."""
        shard = self.dp_shard if self.dp_shard > 0 else self.ep
        return self.dp_replicate * shard * self.cp * self.tp * self.pp

    def resolved_dp_shard(self, world_size: int) -> int:
        """``dp_shard`` as a number on ``world_size`` devices."""
        others = self.dp_replicate * self.cp * self.tp * self.pp
        return self.dp_shard if self.dp_shard > 0 else max(1, world_size // others)

    def problems_on(self, world_size: int) -> Iterator[str]:
        """What does not fit ``world_size`` devices."""
        shard = self.resolved_dp_shard(world_size)
        axes = {"dp_replicate": self.dp_replicate, "dp_shard": shard, "cp": self.cp, "tp": self.tp, "pp": self.pp}
        product = math.prod(axes.values())
        if product != world_size:
            sizes = " * ".join(f"{name} {size}" for name, size in axes.items())
            yield f"dp_shard = {self.dp_shard}: {sizes} = {product} must equal the world size {world_size}"
        if shard % self.ep != 0:
            yield f"ep = {self.ep}: must divide dp_shard = {shard}"
