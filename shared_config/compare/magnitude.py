"""What leaves errors of a certain size: arithmetic that is coarser than it is said to be.

Rounding the inputs of products to a roundoff of u moves a result by about u / 2^-24 times its float32 delta, wherever
in the model it stands; without a delta, by about u relative to its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared_config.compare.result import DIFFERS, Row
from shared_config.numerics import UNIT_ROUNDOFF


@dataclass(frozen=True)
class Coarse:
    """An arithmetic, its roundoff, and where to look for it."""

    roundoff: float
    exponent: int
    advice: str


COARSE: Mapping[str, Coarse] = {
    "TF32": Coarse(2.0**-11, -11, "train.matmul_precision, or NVIDIA_TF32_OVERRIDE, may differ between the two"),
    "bfloat16": Coarse(2.0**-8, -8, "something may be computed or stored in bfloat16 on one side"),
}
REACH = 2.0**1.5
"""An error is named if it is within this factor of the roundoff: half way from one to the other of the two."""


def magnitude_note(row: Row | None, dtype: str) -> str:
    """Which arithmetic leaves errors like that of the first float32 tensor that differs; "" if none does."""
    if row is None or row.status != DIFFERS or row.mismatched or dtype != "float32":
        return ""
    size = row.multiple * UNIT_ROUNDOFF[dtype] if row.delta and row.multiple else row.relative
    for name, coarse in COARSE.items():
        if coarse.roundoff / REACH <= size < coarse.roundoff * REACH:
            return (
                f"{row.name}: the relative error, {row.relative:.1e}, is of the size that {name} leaves "
                f"(2^{coarse.exponent}, where float32 leaves 2^-24): {coarse.advice}"
            )
    return ""
