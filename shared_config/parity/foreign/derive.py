"""How many deltas correct pairs are apart: what the limits of a kind of function can be derived from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from shared_config.parity.result import Comparison
from shared_config.parity.tolerance import tolerance_of

Multiples = Mapping[tuple[str, str], tuple[float, ...]]
"""(dtype, group) -> errors in multiples of delta, in ascending order."""


def derive_tolerance(comparisons: Iterable[Comparison]) -> dict[tuple[str, str], tuple[float, ...]]:
    """Errors of correct pairs in multiples of delta, by dtype and group, of all tensors that have one.

    Args:
        comparisons: of pairs that are known to be the same function, at several draws of weights and inputs.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for comparison in comparisons:
        for row in comparison.rows:
            if row.multiple is not None and math.isfinite(row.multiple):
                found.setdefault((comparison.dtype, row.group), []).append(row.multiple)
    return {key: tuple(sorted(multiples)) for key, multiples in found.items()}


def tolerance_lines(found: Multiples) -> Iterator[str]:
    """What was found, a line for each dtype and group, with the K that is in use."""
    for (dtype, group), multiples in sorted(found.items()):
        middle = multiples[len(multiples) // 2]
        yield (
            f"{dtype} {group}: {len(multiples)} tensors, median {middle:.2g}, largest {multiples[-1]:.3g} deltas; "
            f"allowed K = {tolerance_of(group, dtype).K:g}"
        )
