"""Fine-tuning by low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterator

from shared_config.schema.base import Items, PositiveFloat, PositiveInt, Section, section


@section
class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): the model's own weights are frozen, and a matrix W of
    ``targets`` acts as W + alpha / rank * B A, of which A (rank, in) and B (out, rank) are trained.

    targets: names of linear maps of the layers, * and ? as in file names; those of the paper's section 7.1.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    targets: Items[str] = ("*.attention.q_proj", "*.attention.v_proj")

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return self.alpha / self.rank

    def problems(self) -> Iterator[str]:
        if not self.targets:
            yield "targets = (): must name a matrix at least"
