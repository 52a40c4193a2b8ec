"""How matrix products are computed in FP8, and which ones (Micikevicius et al. 2022, arXiv:2209.05433).

The three products of a linear map y = x W^T, with R rows of x, I inputs and O outputs, sum codes of 8 bits in float32:

    ========  ==============  ==============================  ==============================
    product   summed over     first factor                    second factor
    ========  ==============  ==============================  ==============================
    y         inputs          x in `FORWARD`, a scale a row   W in `FORWARD`, a scale an output
    dx        outputs         dy in `BACKWARD`, one a row     W in `FORWARD`, one an input
    dW        rows            dy in `BACKWARD`, one an output x in `FORWARD`, one an input
    ========  ==============  ==============================  ==============================

A scale belongs to all values that one output sums, so that it can be multiplied in after the sum: result (i, j) is
(sum of codes) * scale_j * scale_i, rounded once, to bfloat16; a bias is added to that in bfloat16. One scale a tensor
would be cheaper, but an outlier would cost all rows their digits, and a row of the result would depend on the others in
its batch. Scales follow from the values themselves, without a history, which recomputation and resumption would have to
carry.

`quantised` values: with largest = max(|v|) over what is summed, at least `FLOOR`, and max that of the format,

    scale = largest * (1 / max)        code = cast(clamp(v * (1 / scale), -max, max))

each step rounded in float32 (1 / max is a constant; dividing by a constant is a step that compilers change), the cast
to the nearest code, ties to even. A row of zeros has codes 0. One with a NaN or an infinity gives only NaN.

Weights are quantised from their bfloat16 copies, as FSDP gathers them; masters stay float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared_config.schema.training import FP8_MULTIPLE


@dataclass(frozen=True)
class Format:
    """A float of 8 bits.

    Attributes:
        name: of its dtype in torch, JAX and `ml_dtypes`.
        largest: finite value, max in the formulas above.
        unit_roundoff: largest relative error of rounding to it.
    """

    name: str
    largest: float
    unit_roundoff: float


FORWARD = Format("float8_e4m3fn", 448.0, 2.0**-4)
BACKWARD = Format("float8_e5m2", 57344.0, 2.0**-3)
"""Of gradients, whose sizes within a row or a column differ most: those of tokens that are predicted well are tiny."""

FLOOR = 2.0**-90
"""Of the largest value that a scale is made of: neither it nor its reciprocal leaves the normal numbers of float32, and
subnormal values, which XLA flushes, have code 0 in any case."""

_PRODUCTS = tuple(
    re.compile(rf"(?:transformer\.)?layers\.(\d+)\.{path}")
    for path in (
        r"attention\.[qkvo]_proj",
        r"attn\.[qkvo]_proj\.\w+",  # of a modality
        r"mlp\.(?:gate|up|down)_proj",
        r"mlp\.\w+\.(?:gate|up|down)_proj",  # of a modality, or of a shared expert
        r"mlp\.\w+\.shared_expert\.(?:gate|up|down)_proj",
    )
)
"""Paths of the modules that compute in FP8, the first and the last layer aside. All else computes in bfloat16:

- embedding and head, norms, and the first and the last layer: few products, whose errors are those of the logits;
- routers, which compute in float32;
- experts: their products are grouped, by numbers of rows that routes decide;
- `cross_attention_layers`, `vision_encoder` and `adapter`, which are often frozen and read features of another scale;
- attention itself.
"""


def is_fp8(path: str, n_layers: int) -> bool:
    """Whether the linear module at a path of a model, or of a transformer alone, computes in FP8."""
    found = next((match for pattern in _PRODUCTS if (match := pattern.fullmatch(path))), None)
    return found is not None and 0 < int(found[1]) < n_layers - 1


def fits(rows: int, inputs: int, outputs: int) -> bool:
    """Whether FP8 units can compute all three products; those of a linear map that they can't are bfloat16."""
    return rows > 0 and all(size % FP8_MULTIPLE == 0 for size in (rows, inputs, outputs))
