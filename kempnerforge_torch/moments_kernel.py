"""The moments of `shared_config.parity.summaries` in one pass over a tensor on an NVIDIA GPU. It needs Triton, without
which torch for CPUs comes.

Each program adds up some columns of some rows of 1021 values; a second kernel adds up what the programs found.

Shapes: G pieces, W signs, P groups of rows, K blocks of columns, M moments.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from shared_config.parity.summaries import MODERATE, MOMENTS, NAN, NEGATIVE, POSITIVE, ROWS, SCALARS, SKETCH_SIZE

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    HAS_TRITON, _jit = False, lambda function: function
else:
    HAS_TRITON, _jit = True, triton.jit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Whose squares are numbers of float64."""
MOST_GROUPS = 264
"""Two for each multiprocessor of an H100, and each in four blocks of columns."""
AT_A_TIME = 8
"""Rows of a piece whose values are on their way at once."""
BLOCK, BLOCKS = 256, 4
"""Columns of a program, and how many programs have all of a row."""
SPARE = 8
"""Places for scalars."""
TILE, TOGETHER = 16, 128
"""Columns and groups that the second kernel adds up at a time."""


def run_moments(
    flat: Shaped[Tensor, "_"], signs: Int[Tensor, "W"], first: Int[Tensor, "G"], times: Float[Tensor, "G"]
) -> Float[Tensor, "M"]:
    """float64 (M,), of a tensor that is not empty.

    Args:
        flat: of one of `DTYPES`, contiguous.
        signs: int8 (W,), those of `summaries.signs`.
        first, times: int64 and float64, those of `summaries.starts` for as many pieces as there are, or more.
    """
    size = flat.numel()
    rows = -(-size // SKETCH_SIZE)
    rows_each = -(-rows // (MOST_GROUPS * AT_A_TIME)) * AT_A_TIME
    groups = -(-rows // rows_each)
    scalars_PK, columns_P = (
        torch.empty((groups, width), dtype=torch.float64, device=flat.device)
        for width in (BLOCKS * SPARE, 2 * BLOCKS * BLOCK)
    )
    found = torch.empty(MOMENTS, dtype=torch.float64, device=flat.device)
    add_up: Any = _add_up
    finish: Any = _finish
    with torch.cuda.device(flat.device) if flat.is_cuda else contextlib.nullcontext():
        add_up[(groups, BLOCKS)](
            flat, signs, first, times, scalars_PK, columns_P, size, rows, rows_each,
            SKETCH_SIZE, ROWS, NAN, POSITIVE, NEGATIVE, MODERATE, BLOCK, BLOCKS, SPARE, AT_A_TIME,
        )  # fmt: skip
        finish[(2 * BLOCKS * BLOCK // TILE + 1,)](
            scalars_PK, columns_P, found, size, groups,
            SKETCH_SIZE, SCALARS, BLOCKS * BLOCK, BLOCKS, SPARE, TILE, TOGETHER,
        )  # fmt: skip
    return found


@_jit
def _add_up(
    flat, signs, first, times, scalars, columns, size, rows, rows_each,
    width: tl.constexpr, piece: tl.constexpr, nan: tl.constexpr, positive: tl.constexpr, negative: tl.constexpr,
    moderate: tl.constexpr, block: tl.constexpr, blocks: tl.constexpr, spare: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """Of some columns of some rows: lowest and highest value, sum, sum of squares and how many are not finite; of each
    column its signed sum, and its gaps. A few rows are added up in 32 bits, and all of those in 64; where the largest
    value is not moderate all are, as its square may not be a number of 32.
    """
    column = tl.program_id(1) * block + tl.arange(0, block)
    low = tl.full([block], float("inf"), tl.float32)
    high = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float64)
    squares = tl.zeros([block], tl.float64)
    signed = tl.zeros([block], tl.float64)
    missing = tl.zeros([block], tl.int32)
    start = tl.program_id(0).to(tl.int64) * rows_each
    steps = tl.cdiv(tl.minimum(rows - start, rows_each), together)
    for step in range(steps):
        row = start + step * together
        own_signs = signs + tl.load(first + row // piece) + row % piece * width
        some = tl.zeros([block], tl.float32)
        some_squares = tl.zeros([block], tl.float32)
        some_signed = tl.zeros([block], tl.float32)
        for each in tl.static_range(together):
            value, there = _row(flat, row + each, column, size, width)
            sign = tl.load(own_signs + each * width + column, mask=there, other=0)
            counted = there & (tl.abs(value) < float("inf"))
            known = tl.where(counted, value, 0.0)
            low = tl.minimum(low, tl.where(counted, value, float("inf")))
            high = tl.maximum(high, tl.where(counted, value, float("-inf")))
            some += known
            some_squares += known * known
            some_signed += tl.where(sign < 0, -known, known)
            missing += (there & (counted == 0)).to(tl.int32)
        total += some.to(tl.float64)
        squares += some_squares.to(tl.float64)
        signed += some_signed.to(tl.float64) * tl.load(times + row // piece)
    lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
    largest = tl.maximum(highest, -lowest)
    if (largest >= moderate) | ((largest > 0) & (largest <= 1 / moderate)):
        total, squares, signed = tl.zeros_like(total), tl.zeros_like(squares), tl.zeros_like(signed)
        for step in range(steps * together):
            row = start + step
            turns = tl.load(times + row // piece)
            value, there = _row(flat, row, column, size, width)
            sign_at = tl.load(first + row // piece) + row % piece * width + column
            sign = tl.load(signs + sign_at, mask=there, other=0).to(tl.float64) * turns
            known = tl.where(tl.abs(value) < float("inf"), value, 0.0).to(tl.float64)
            total += known
            squares += known * known
            signed += known * sign
    own = scalars + (tl.program_id(0) * blocks + tl.program_id(1)) * spare
    tl.store(own, lowest.to(tl.float64))
    tl.store(own + 1, highest.to(tl.float64))
    tl.store(own + 2, tl.sum(total, axis=0))
    tl.store(own + 3, tl.sum(squares, axis=0))
    gaps_in_all = tl.sum(missing, axis=0)
    tl.store(own + 4, gaps_in_all.to(tl.float64))
    gaps = tl.zeros([block], tl.uint32)
    if gaps_in_all > 0:
        for step in range(steps * together):
            value, there = _row(flat, start + step, column, size, width)
            key = ((start + step) * nan).to(tl.uint32)
            key = (key ^ (key >> 15)) | 1
            kind = tl.where(value > 0, positive, negative)
            kind = tl.where(value == value, kind, nan).to(tl.uint32)
            gaps += tl.where(there & ((tl.abs(value) < float("inf")) == 0), kind * key, 0).to(tl.uint32)
    sums = columns + tl.program_id(0) * (2 * blocks * block) + column
    tl.store(sums, signed)
    tl.store(sums + blocks * block, gaps.to(tl.float64))


@_jit
def _row(flat, row, column, size, width: tl.constexpr):
    """Values of a row, as float32, and which of them there are."""
    begin = row * width
    there = column < tl.minimum(size - begin, width).to(tl.int32)
    return tl.load(flat + begin + column, mask=there, other=0.0).to(tl.float32), there


@_jit
def _finish(
    scalars, columns, found, size, groups,
    width: tl.constexpr, count: tl.constexpr, half: tl.constexpr, blocks: tl.constexpr, spare: tl.constexpr,
    tile: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """Some columns, or the scalars, of all programs."""
    if tl.program_id(0) * tile < 2 * half:
        _finish_columns(columns, found, groups, width, count, half, tile, together)
    else:
        _finish_scalars(scalars, found, size, groups * blocks, count, spare, together)


@_jit
def _finish_columns(
    columns, found, groups,
    width: tl.constexpr, count: tl.constexpr, half: tl.constexpr, tile: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    total = tl.zeros([tile], tl.float64)
    for start in range(0, groups, together):
        group = start + tl.arange(0, together)
        at = columns + group[:, None] * (2 * half) + place[None, :]
        total += tl.sum(tl.load(at, mask=(group < groups)[:, None], other=0.0), axis=0)
    modulus = 4294967296.0
    total = tl.where(place < half, total, total - tl.floor(total / modulus) * modulus)
    column = place % half
    tl.store(found + count + place // half * width + column, total, mask=column < width)


@_jit
def _finish_scalars(scalars, found, size, programs, count: tl.constexpr, spare: tl.constexpr, together: tl.constexpr):
    place = tl.arange(0, spare)
    low = tl.full([spare], float("inf"), tl.float64)
    high = tl.full([spare], float("-inf"), tl.float64)
    total = tl.zeros([spare], tl.float64)
    for start in range(0, programs, together):
        program = start + tl.arange(0, together)
        there = (program < programs)[:, None] & (place < count)[None, :]
        value = tl.load(scalars + program[:, None] * spare + place[None, :], mask=there, other=0.0)
        low = tl.minimum(low, tl.min(tl.where(there, value, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(there, value, float("-inf")), axis=0))
        total += tl.sum(value, axis=0)
    total = tl.where(place == 3, tl.sqrt(tl.abs(total)), tl.where(place == 4, size - total, total))
    total = tl.where(place == 0, low, tl.where(place == 1, high, total))
    tl.store(found + place, total, mask=place < count)
