"""Factors on activations, that are kept in float32 whatever the dtype of what they multiply.

PyTorch keeps a number that it multiplies a tensor by in float32, and rounds the product.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def scaled(x: Float[Tensor, "..."], factor: float) -> Float[Tensor, "..."]:
    """The product, found in at least float32 and given in the dtype of x; what is multiplied by 1 stays as it is."""
    return x if factor == 1 else x * factor


def divided(x: Float[Tensor, "..."], divisor: float) -> Float[Tensor, "..."]:
    """The quotient, found in at least float32 and given in the dtype of x; what is divided by 1 stays as it is."""
    return x if divisor == 1 else x / divisor
