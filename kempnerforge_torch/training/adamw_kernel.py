"""The kernel of `fused_adamw`: each of its programs updates a block of one tensor. It needs Triton, without which torch
for CPUs comes.

Shapes: T tensors, G blocks of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kempnerforge_torch.device import to_device

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    HAS_TRITON, _LARGEST, _jit = False, None, lambda function: function
else:
    HAS_TRITON, _LARGEST, _jit = True, tl.constexpr(torch.finfo(torch.float32).max), triton.jit

BLOCK = 1024
WARPS = 4


def run_adamw(
    tensors: Sequence[Sequence[Float[Tensor, "..."]]],
    numbers: Float[Tensor, "T 3"],
    factor: Float[Tensor, ""],
    verdict: Int[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
    *,
    has_copies: bool,
    writes: bool,
) -> None:
    """A step, where ``verdict`` is not 0.

    Args:
        tensors: of each parameter itself (float32), its gradient (bfloat16 or float32, like all others), its moments m
            and v (float32) and its copy (bfloat16): contiguous, from addresses that are multiples of 16 bytes on.
        numbers: float32, of each 1 - lr weight_decay, lr / (1 - b1^t) and 1 / sqrt(1 - b2^t).
        factor: float32, of the gradients.
        verdict: int32.
        has_copies: whether copies are written.
        writes: if False, nothing is written but 0 to ``verdict`` where a number that is not finite would result.
    """
    device, types = factor.device, {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
    sizes = [some[0].numel() for some in tensors]
    blocks = [triton.cdiv(size, BLOCK) for size in sizes]
    ends = list(itertools.accumulate(blocks))
    rows = [
        [*(tensor.data_ptr() for tensor in some), size, end - count]
        for some, size, end, count in zip(tensors, sizes, ends, blocks, strict=True)
    ]
    table_T7, counts_T = to_device(np.array(rows), device), to_device(np.array(blocks), device)
    owners_G = torch.repeat_interleave(counts_T, output_size=ends[-1])
    if ends[-1]:
        launch: Any = _adamw
        launch[(ends[-1],)](
            table_T7, owners_G, numbers, factor, verdict, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps,
            narrow=types[tensors[0][1].dtype], has_copies=has_copies, writes=writes, block=BLOCK, num_warps=WARPS,
        )  # fmt: skip


@_jit
def _adamw(
    table, owners, numbers, factor, verdict, b1, from_b1, b2, from_b2, eps,
    narrow: tl.constexpr, has_copies: tl.constexpr, writes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    if tl.load(verdict) != 0:
        owner = tl.load(owners + tl.program_id(0))
        row = table + owner * 7
        start = (tl.program_id(0) - tl.load(row + 6)) * block
        size = tl.load(row + 5)
        places = start + tl.arange(0, block)
        gradient_at = _start(row + 1, narrow) + places
        if start + block <= size:  # without a mask, loads are of 16 bytes
            _update(
                row, gradient_at, numbers + owner * 3, places, None, factor, verdict, b1, from_b1, b2, from_b2, eps,
                has_copies, writes,
            )  # fmt: skip
        else:
            _update(
                row, gradient_at, numbers + owner * 3, places, places < size, factor, verdict, b1, from_b1, b2, from_b2,
                eps, has_copies, writes,
            )  # fmt: skip


@_jit
def _update(
    row, gradient_at, own, places, inside, factor, verdict, b1, from_b1, b2, from_b2, eps,
    has_copies: tl.constexpr, writes: tl.constexpr,
):  # fmt: skip
    """The elements at some places, or of these the ones that are ``inside``; ``own`` are the numbers of the tensor."""
    parameter_at = _start(row, tl.float32) + places
    m_at, v_at = _start(row + 2, tl.float32) + places, _start(row + 3, tl.float32) + places
    gradient = tl.load(gradient_at, mask=inside).to(tl.float32) * tl.load(factor)
    m = b1 * tl.load(m_at, mask=inside) + from_b1 * gradient
    v = b2 * tl.load(v_at, mask=inside) + from_b2 * gradient * gradient
    step = tl.load(own + 1) * tl.div_rn(m, tl.sqrt_rn(v) * tl.load(own + 2) + eps)
    parameter = tl.load(parameter_at, mask=inside) * tl.load(own) - step
    if writes:
        tl.store(parameter_at, parameter, mask=inside)
        tl.store(m_at, m, mask=inside)
        tl.store(v_at, v, mask=inside)
        if has_copies:
            tl.store(_start(row + 4, tl.bfloat16) + places, parameter.to(tl.bfloat16), mask=inside)
    else:
        lost = ((tl.abs(parameter) <= _LARGEST) & (v <= _LARGEST)) == 0
        if inside is not None:
            lost = lost & inside
        if tl.max(lost.to(tl.int32), axis=0) != 0:
            tl.store(verdict, 0)


@_jit
def _start(entry, element: tl.constexpr):
    """Where a tensor begins that the table names."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(element)), 16)
