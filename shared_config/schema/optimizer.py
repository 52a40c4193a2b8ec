"""The optimiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from shared_config.schema.base import NonNegativeFloat, Pair, PositiveFloat, Section, registered, section

Beta = Annotated[float, Field(ge=0, lt=1)]
MOST_ITERATIONS = 99

READ = {
    "adamw": ("betas", "eps"),
    "lion": ("betas",),
    "muon": ("betas", "eps", "momentum", "nesterov", "newton_schulz_steps"),
    "schedule_free_adamw": ("betas", "eps"),
}
"""Of the fields that not all optimisers read, those of each one; one that is registered elsewhere may read any."""


@section
class OptimizerConfig(Section):
    """How the weights follow the gradients. Weight decay acts on matrices, not on norms and biases.

    name: "adamw" (Loshchilov & Hutter 2019, arXiv:1711.05101); "lion" (Chen et al. 2023, arXiv:2302.06675);
    "muon" (Jordan et al. 2024, scaled as by Liu et al. 2025, arXiv:2502.16982) for the matrices of blocks, with AdamW
    for all else; "schedule_free_adamw" (Defazio et al. 2024, arXiv:2405.15682), which needs ``scheduler.name``
    "constant" or "none"; or another that is registered.
    betas, eps: of AdamW; of Lion ``betas`` alone.
    momentum, nesterov, newton_schulz_steps: of Muon.
    ema_decay: 0 keeps no average of the weights; d keeps ema <- d ema + (1 - d) w after each update.
    """

    name: Annotated[str, registered("optimizer")] = "adamw"
    lr: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.1
    betas: Pair[Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    momentum: Beta = 0.95
    nesterov: bool = True
    newton_schulz_steps: Annotated[int, Field(ge=1, le=MOST_ITERATIONS)] = 5
    ema_decay: Beta = 0.0

    def problems(self) -> Iterator[str]:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for field in dict.fromkeys(name for names in READ.values() for name in names):
            value, readers = getattr(self, field), [name for name, fields in READ.items() if field in fields]
            if self.name in READ and self.name not in readers and value != defaults[field]:
                yield (
                    f"{field} = {value!r}: name = {self.name!r} does not read it: must be {defaults[field]!r}, or name "
                    f"one of {', '.join(readers)}"
                )
        if self.averages and self.betas[0] == 0:
            yield f"betas = {self.betas!r}: the first must be above 0 with name = {self.name!r}"
        if self.averages and self.ema_decay:
            yield f"ema_decay = {self.ema_decay!r}: must be 0 with name = {self.name!r}, which averages itself"

    @property
    def averages(self) -> bool:
        """Whether the weights to use are an average, beside those that are trained."""
        return self.name == "schedule_free_adamw"
