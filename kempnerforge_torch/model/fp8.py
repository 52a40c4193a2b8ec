"""Linear maps whose three matrix products are computed in FP8, by the recipe of `shared_config.contract.fp8`.

Shapes: R rows, I inputs, O outputs, K what a product sums over, N rows of its second factor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shared_config.contract.fp8 import BACKWARD, FLOOR, FORWARD, Format

_DTYPES = {format.name: getattr(torch, format.name) for format in (FORWARD, BACKWARD)}
_FIRST_CAPABILITY = (8, 9)


class Quantised(NamedTuple):
    """codes * scales: rows of float8 codes (R, K), each with a float32 scale (R, 1)."""

    codes: Float[Tensor, "R K"]
    scales: Float[Tensor, "R 1"]


def fp8_linear(x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "... O"]:
    """bfloat16 x (..., I) times weight (O, I) over I, in FP8; the sizes must be such that `fits`."""
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])


def quantise(x: Float[Tensor, "R K"], format: Format) -> Quantised:
    """Each row in a float8 format, with its own scale."""
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scales = largest.clamp(min=FLOOR) * (1 / format.largest)
    scaled = (wide * (1 / scales)).clamp(-format.largest, format.largest)
    return Quantised(scaled.to(_DTYPES[format.name]), scales)


def product(a: Quantised, b: Quantised) -> Float[Tensor, "R N"]:
    """The rows of ``a`` (R, K) times those of ``b`` (N, K): bfloat16 (R, N), summed in float32.

    FP8 units sum in as many digits as they can; elsewhere the codes are multiplied in float32, where their products are
    exact.
    """
    if has_units(a.codes.device):
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a.codes,
            b.codes.t(),
            scale_a=a.scales,
            scale_b=b.scales.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
    sums = F.linear(a.codes.float(), b.codes.float())
    return (sums * b.scales.t() * a.scales).to(torch.bfloat16)


@torch.compiler.assume_constant_result
def has_units(device: torch.device) -> bool:
    """Whether a device multiplies FP8 numbers: NVIDIA GPUs of compute capability 8.9 and later."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
    )


class _Linear(torch.autograd.Function):
    """x (R, I), weight (O, I) -> (R, O)."""

    @staticmethod
    def forward(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        return product(quantise(x_RI, FORWARD), quantise(weight_OI, FORWARD))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_RO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_RI, weight_OI = ctx.saved_tensors
        dx_RI = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx_RI = product(quantise(dy_RO, BACKWARD), quantise(weight_OI.t().contiguous(), FORWARD))
        if ctx.needs_input_grad[1]:
            dweight_OI = product(quantise(dy_RO.t().contiguous(), BACKWARD), quantise(x_RI.t().contiguous(), FORWARD))
        return dx_RI, dweight_OI
