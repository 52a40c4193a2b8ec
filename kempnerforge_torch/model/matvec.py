"""Linear maps whose product with a single vector is fast on CPUs, where decoding spends its time.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`. Compiled on a CPU it maps a single vector by `matrix_times_vector`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if not torch.compiler.is_compiling() or input.device.type != "cpu" or input.numel() != self.in_features:
            return super().forward(input)
        out_O = matrix_times_vector(self.weight, input.reshape(-1), self.bias)
        return out_O.reshape(*input.shape[:-1], self.out_features)


def matrix_times_vector(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """(O, I), (I,) -> (O,), summed in at least float32.

    As products and their sum, of which a compiler makes one loop. That reads the matrix up to twice as fast as the
    libraries' matrix products, which are made for many vectors; without a compiler it would be slower.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    out_O = (weight.to(dtype) * x.to(dtype)).sum(dim=-1)
    return (out_O if bias is None else out_O + bias.to(dtype)).to(x.dtype)
