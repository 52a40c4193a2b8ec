"""Bugs of parallel layouts to plant, each with the case that has to differ from one device."""

from __future__ import annotations

from typing import NamedTuple

from tests.distributed.layouts import Case
from tests.mutants import Mutant

DENSE, COPIES, SIGMOID = Case("dense", 2, {}), Case("dense", 2, {"dp_replicate": 2}), Case("sigmoid", 2, {})


class LayoutMutant(NamedTuple):
    """A bug, and the case that shows it."""

    mutant: Mutant
    case: Case


def torch_bug(component: str, name: str, text: str, replacement: str, case: Case) -> LayoutMutant:
    return LayoutMutant(Mutant(component, name, (text, replacement), None), case)


DISTRIBUTED_MUTANTS = (
    torch_bug(
        "distributed.fsdp", "gradient divided twice",
        "unit.set_gradient_divide_factor(1.0)", "unit.set_gradient_divide_factor(2.0)", DENSE,
    ),
    torch_bug(
        "distributed.ranks", "a rank's own clip",
        "    dist.all_reduce(total)\n", "", DENSE,
    ),
    torch_bug(
        "distributed.ranks", "replicas count twice in the norm",
        "return ranks // torch.Size(parts).numel()", "return 1", COPIES,
    ),
    torch_bug(
        "training.train", "labels of one rank counted",
        "self.ranks.number(label_count(micro_batches))", "label_count(micro_batches)", DENSE,
    ),
    torch_bug(
        "training.train", "counts of experts not summed",
        "balance(self.model, total.expert_counts, taken=taken)",
        "balance(self.model, summed(terms).expert_counts, taken=taken)", SIGMOID,
    ),
    torch_bug(
        "training.train", "bias updated on one rank",
        "            balance(self.model, total",
        "            if self.ranks.rank == 0: balance(self.model, total", SIGMOID,
    ),
    torch_bug(
        "training.train", "router losses of one rank's share",
        "shares = len(micro_batches) * self.ranks.count", "shares = len(micro_batches)", SIGMOID,
    ),
    torch_bug(
        "training.train", "metrics of one rank",
        "total = self.ranks.sums(summed(terms))",
        "total = summed(terms)._replace(expert_counts=self.ranks.sums(summed(terms).expert_counts))", SIGMOID,
    ),
    torch_bug(
        "training.train", "the same noise on all ranks",
        "self.updates, self.ranks.rank, self.ranks.count)", "self.updates)",
        Case("moma", 2, {}, {"vlm": {"moma_gumbel_noise": "true"}}),
    ),
)  # fmt: skip
