"""Linear maps and lookup tables: torch's own, but for a fast product with a single vector on CPUs, where decoding
spends its time, and for gradients of tables that are summed in at least float32.

Shapes: ... any leading axes, I inputs, O outputs, R rank, V rows of a table, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.fp8 import fp8_linear
from shared_config.contract.fp8 import fits


class Linear(nn.Linear):
    """x @ weight.T + bias, the weight (O, I); drawn uniform(-1, 1) / sqrt(I).

    Attributes:
        fp8: whether bfloat16 products are computed in FP8 where their sizes fit.
        lora_a, lora_b, lora_scale: an adapter, if there is one: see `shared_config.contract.lora`.
    """

    fp8 = False
    lora_scale = 1.0

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """(..., I) -> (..., O); the dtype of ``x`` must be that of the weight."""
        y = linear(x, matrix(self, "weight", x.dtype), self.bias, self.fp8)
        if self.lora_a is None or self.lora_b is None:
            return y
        return y + low_rank(x, self.lora_a, self.lora_b, self.lora_scale)

    def factors(self, x: Float[Tensor, "... _I"]) -> tuple[Float[Tensor, "... I"], Float[Tensor, "O I"]]:
        """What `forward` multiplies: inputs, and a view of the weight: wrappers leave hooks on what a model returns."""
        return x, self.weight.view_as(self.weight)


class Embedding(nn.Embedding):
    """A lookup table (V, D), drawn normal(0, 1)."""

    num_embeddings: int
    weight: nn.Parameter

    def __init__(self, num_embeddings: int, dim: int):
        super().__init__(num_embeddings, dim)

    def forward(self, ids: Integer[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Integers (...) -> (..., D)."""
        if torch.compiler.is_compiling():  # inductor sums in float32
            return super().forward(ids)
        return look_up(self.weight, ids)


def matrix(module: nn.Module, name: str, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """A weight of a module as it is; one that `hold_int8` put codes in the place of, from these, in ``dtype``."""
    weight, scales = getattr(module, name), getattr(module, f"{name}_scale", None)
    return weight if scales is None else (weight * scales).to(dtype)


def linear(
    x: Float[Tensor, "... I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None = None,
    fp8: bool = False,
) -> Float[Tensor, "... O"]:
    """x (..., I) times weight (O, I) over I, plus bias (O,).

    Compiled on a CPU, a single vector is multiplied by elementwise products and their sum, which the compiler fuses
    into one loop. That reads the matrix up to twice as fast as the libraries' matrix products, which are made for many
    vectors; uncompiled it would be slower.

    Args:
        fp8: compute the product in FP8, if it is of bfloat16 and its sizes fit.
    """
    if fp8 and x.dtype == torch.bfloat16 and fits(x.numel() // weight.shape[1], *weight.shape):
        y = fp8_linear(x, weight)
        return y if bias is None else y + bias
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() != weight.shape[1]:
        return F.linear(x, weight, bias)
    return _matrix_times_vector(weight, x.reshape(-1), bias).reshape(*x.shape[:-1], weight.shape[0])


def low_rank(
    x: Float[Tensor, "... I"], a_RI: Float[Tensor, "R I"], b_OR: Float[Tensor, "O R"], scale: float
) -> Float[Tensor, "... O"]:
    """scale * B (A x), as an adapter adds it to W x: (..., I) -> (..., O)."""
    return scale * linear(linear(x, a_RI), b_OR)


def look_up(weight: Float[Tensor, "V D"], ids: Integer[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """Rows of a table (V, D), by integers (...): (..., D)."""
    return _LookUp.apply(weight, ids)


def _matrix_times_vector(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """(O, I), (I,) -> (O,), summed in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out_O = (weight.to(dtype) * x.to(dtype)).sum(dim=-1)
    return (out_O if bias is None else out_O + bias.to(dtype)).to(x.dtype)


class _LookUp(torch.autograd.Function):
    """Rows of a table; backward adds up the gradients of a row in at least float32, as there may be thousands."""

    @staticmethod
    def forward(weight_VD: Tensor, ids: Tensor) -> Tensor:
        return F.embedding(ids, weight_VD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        weight_VD, ids = inputs
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = weight_VD.shape[0], weight_VD.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
        return torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False).to(ctx.dtype), None
