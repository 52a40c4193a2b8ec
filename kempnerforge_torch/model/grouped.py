"""Matrix products over groups of rows, one matrix per group, without a host sync.

The rows of group e are those from ends[e - 1] (0 for the first) to ends[e]; rows from ends[-1] on belong to no group.

Shapes: R rows, D inputs, F outputs, E groups, N tiles, b rows of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

TILE_ROWS = 128
_ALIGNED_BYTES = 16


def grouped_matmul(
    x_RD: Float[Tensor, "R D"],
    w_EDF: Float[Tensor, "E D F"] | Sequence[Float[Tensor, "D F"]],
    ends_E: Int[Tensor, "E"],
    complete: bool = False,
) -> Float[Tensor, "R F"]:
    """(R, F): row r times the matrix of its group; 0 for rows of no group, whatever they hold.

    One opaque operator, so that compiled code keeps it whole; differentiable any number of times. bfloat16 on a GPU of
    compute capability 9 goes to `torch.nn.functional.grouped_mm`, all else on accelerators to batched products of equal
    tiles, and the CPU, whose offsets are on the host, to one product per group.

    Args:
        x_RD, w_EDF: of one dtype; ``w_EDF`` may be a transposed view, or E matrices (D, F), which the CPU multiplies
            where they are, while accelerators stack them.
        ends_E: int32, not decreasing, at most R.
        complete: promises that every row belongs to a group, or that no other is read, nor its gradient: these are then
            what happened to be in memory.
    """
    if isinstance(w_EDF, Tensor):
        w_EDF = [w_EDF]
    elif x_RD.device.type != "cpu":
        w_EDF = [_stacked(w_EDF)]
    return _grouped_matmul(x_RD, list(w_EDF), ends_E, complete)


@torch.library.custom_op(
    "kempnerforge::grouped_matmul",
    mutates_args=(),
    schema="(Tensor x, Tensor[] w, Tensor ends, bool complete) -> Tensor",
)
def _grouped_matmul(x_RD: Tensor, matrices: Sequence[Tensor], ends_E: Tensor, complete: bool) -> Tensor:
    """
    Args:
        matrices: one packed tensor (E, D, F), or on the CPU one matrix per group.
    """
    if x_RD.device.type == "cpu":
        return looped_matmul(x_RD, matrices if matrices[0].ndim == 2 else matrices[0], ends_E, complete)
    (w_EDF,) = matrices
    if _has_kernel(x_RD, w_EDF.shape[1:]):
        out_RF = F.grouped_mm(x_RD.contiguous(), _dense(w_EDF), offs=ends_E)
        if complete:
            return out_RF
        rows_R1 = torch.arange(len(x_RD), device=x_RD.device)[:, None]
        return torch.where(rows_R1 < ends_E[-1], out_RF, 0)
    return tiled_matmul(x_RD, w_EDF, ends_E)


@torch.library.custom_op(
    "kempnerforge::grouped_outer", mutates_args=(), schema="(Tensor x, Tensor y, Tensor ends) -> Tensor"
)
def grouped_outer(
    x_RD: Float[Tensor, "R D"], y_RF: Float[Tensor, "R F"], ends_E: Int[Tensor, "E"]
) -> Float[Tensor, "E D F"]:
    """(E, D, F): for each group, the sum over its rows of x_r y_r^T; 0 for a group without rows."""
    if x_RD.device.type == "cpu":
        return looped_outer(x_RD, y_RF, ends_E)
    if _has_kernel(x_RD, (x_RD.shape[1], y_RF.shape[1])):
        return F.grouped_mm(x_RD.contiguous().t(), y_RF.contiguous(), offs=ends_E)
    return tiled_outer(x_RD, y_RF, ends_E)


@_grouped_matmul.register_fake
def _(x_RD: Tensor, matrices: Sequence[Tensor], ends_E: Tensor, complete: bool) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], matrices[0].shape[-1])


@grouped_outer.register_fake
def _(x_RD: Tensor, y_RF: Tensor, ends_E: Tensor) -> Tensor:
    return x_RD.new_empty(ends_E.shape[0], x_RD.shape[1], y_RF.shape[1])


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RD, matrices, ends_E, ctx.complete = inputs
    ctx.save_for_backward(x_RD, ends_E, *matrices)


def _matmul_backward(ctx: Any, dy_RF: Tensor) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    x_RD, ends_E, *matrices = ctx.saved_tensors
    dx_RD = (
        _grouped_matmul(dy_RF, [matrix.mT for matrix in matrices], ends_E, ctx.complete)
        if ctx.needs_input_grad[0]
        else None
    )
    d_matrices: list[Tensor | None] = [None] * len(matrices)
    if any(ctx.needs_input_grad[1]):  # laid out as the matrices are, so that adding it to their gradient needs no copy
        transposed = matrices[0].stride(-2) < matrices[0].stride(-1)
        dw_EDF = _outer_transposed(x_RD, dy_RF, ends_E) if transposed else grouped_outer(x_RD, dy_RF, ends_E)
        d_matrices = [dw_EDF] if matrices[0].ndim == 3 else [*dw_EDF.unbind()]
    return dx_RD, d_matrices, None, None


def _outer_transposed(x_RD: Tensor, y_RF: Tensor, ends_E: Tensor) -> Tensor:
    return grouped_outer(y_RF, x_RD, ends_E).transpose(1, 2)


def _save_outer(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, dw_EDF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RD, y_RF, ends_E = ctx.saved_tensors
    dx_RD = grouped_matmul(y_RF, dw_EDF.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    dy_RF = grouped_matmul(x_RD, dw_EDF, ends_E) if ctx.needs_input_grad[1] else None
    return dx_RD, dy_RF, None


_grouped_matmul.register_autograd(_matmul_backward, setup_context=_save_matmul)
grouped_outer.register_autograd(_outer_backward, setup_context=_save_outer)

GROUPED_MATMUL = torch.ops.kempnerforge.grouped_matmul.default
"""The operator by the name that a dispatcher sees."""


def looped_matmul(
    x_RD: Float[Tensor, "R D"],
    w_EDF: Float[Tensor, "E D F"] | Sequence[Float[Tensor, "D F"]],
    ends_E: Int[Tensor, "E"],
    complete: bool = False,
) -> Float[Tensor, "R F"]:
    """`grouped_matmul` as one product per group; reads the offsets."""
    out_RF = x_RD.new_empty(x_RD.shape[0], w_EDF[0].shape[-1])
    start = 0
    for w_DF, end in zip(w_EDF, ends_E.tolist(), strict=True):
        torch.mm(x_RD[start:end], w_DF, out=out_RF[start:end])
        start = end
    if not complete:
        out_RF[start:] = 0
    return out_RF


def looped_outer(
    x_RD: Float[Tensor, "R D"], y_RF: Float[Tensor, "R F"], ends_E: Int[Tensor, "E"]
) -> Float[Tensor, "E D F"]:
    """`grouped_outer` as one product per group; reads the offsets."""
    out_EDF = x_RD.new_empty(ends_E.shape[0], x_RD.shape[1], y_RF.shape[1])
    start = 0
    for out_DF, end in zip(out_EDF, ends_E.tolist(), strict=True):
        torch.mm(x_RD[start:end].t(), y_RF[start:end], out=out_DF)
        start = end
    return out_EDF


def tiled_matmul(
    x_RD: Float[Tensor, "R D"], w_EDF: Float[Tensor, "E D F"], ends_E: Int[Tensor, "E"], tile_rows: int = TILE_ROWS
) -> Float[Tensor, "R F"]:
    """`grouped_matmul` as batched products: every group cut into tiles of equal size, their number bounded by R and
    E alone.
    """
    if x_RD.shape[0] == 0:
        return x_RD.new_zeros(0, w_EDF.shape[2])
    expert_N, rows_Nb, inside_Nb = _tiles(ends_E, x_RD.shape[0], tile_rows)
    x_NbD = _gather(x_RD, rows_Nb, inside_Nb)
    out_NbF = x_RD.new_empty(*rows_Nb.shape, w_EDF.shape[2])
    for tiles in _chunks(len(expert_N), w_EDF.shape[0]):
        torch.bmm(x_NbD[tiles], w_EDF[expert_N[tiles]], out=out_NbF[tiles])
    trash = x_RD.shape[0]
    out_RF = x_RD.new_zeros(trash + 1, w_EDF.shape[2])
    out_RF[torch.where(inside_Nb, rows_Nb, trash).flatten()] = out_NbF.flatten(0, 1)
    return out_RF[:-1]


def tiled_outer(
    x_RD: Float[Tensor, "R D"], y_RF: Float[Tensor, "R F"], ends_E: Int[Tensor, "E"], tile_rows: int = TILE_ROWS
) -> Float[Tensor, "E D F"]:
    """`grouped_outer` as batched products; the tiles of a group are added up in at least float32, in an order that does
    not vary.
    """
    dtype = torch.promote_types(x_RD.dtype, torch.float32)
    out_EDF = x_RD.new_zeros(ends_E.shape[0], x_RD.shape[1], y_RF.shape[1], dtype=dtype)
    if x_RD.shape[0] == 0:
        return out_EDF.to(x_RD.dtype)
    expert_N, rows_Nb, inside_Nb = _tiles(ends_E, x_RD.shape[0], tile_rows)
    x_NbD, y_NbF = _gather(x_RD, rows_Nb, inside_Nb), _gather(y_RF, rows_Nb, inside_Nb)
    member_EN = (expert_N == torch.arange(len(ends_E), device=x_RD.device)[:, None]).to(dtype)
    for tiles in _chunks(len(expert_N), len(ends_E)):
        parts_NDF = _wide_product(x_NbD[tiles].transpose(1, 2), y_NbF[tiles], dtype)
        out_EDF.flatten(1).addmm_(member_EN[:, tiles], parts_NDF.flatten(1))
    return out_EDF.to(x_RD.dtype)


def _wide_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x y in ``dtype``, which the factors needn't have."""
    if x.dtype != dtype and x.is_cuda and not torch.version.hip:
        return torch.bmm(x, y, out_dtype=dtype)
    return torch.bmm(x.to(dtype), y.to(dtype))


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """(E, D, F): the matrices (D, F), which are views of transposed ones, as a view of their stack."""
    return torch.stack([w_DF.t() for w_DF in matrices]).transpose(1, 2)


def skips_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of no group cost no products on a device, where sizes suit its kernel."""
    return device.type == "cpu" or _has_offsets(device, dtype)


def _tiles(ends_E: Tensor, rows: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group of each tile, its rows, and which of these belong to the group. Tiles beyond those needed are empty."""
    groups = len(ends_E)
    starts_E = F.pad(ends_E, (1, 0))[:-1]
    tiles_E = (ends_E - starts_E + tile_rows - 1) // tile_rows
    tile_ends_E = tiles_E.cumsum(0)
    tile_N = torch.arange(rows // tile_rows + groups, device=ends_E.device)
    expert_N = torch.searchsorted(tile_ends_E, tile_N, right=True)
    needed_N = expert_N < groups
    expert_N = expert_N.clamp(max=groups - 1)
    first_N = starts_E[expert_N] + (tile_N - (tile_ends_E - tiles_E)[expert_N]) * tile_rows
    rows_Nb = first_N[:, None] + torch.arange(tile_rows, device=ends_E.device)
    inside_Nb = needed_N[:, None] & (rows_Nb < ends_E[expert_N][:, None])
    return expert_N, rows_Nb, inside_Nb


def _gather(x_RD: Tensor, rows_Nb: Tensor, inside_Nb: Tensor) -> Tensor:
    gathered_NbD = x_RD[rows_Nb.clamp(max=x_RD.shape[0] - 1)]
    return torch.where(inside_Nb[:, :, None], gathered_NbD, 0)


def _chunks(tiles: int, groups: int) -> list[slice]:
    """Slices of at most as many tiles as there are groups, so that no more matrices are gathered than there are."""
    return [slice(start, min(start + groups, tiles)) for start in range(0, tiles, groups)]


def _has_kernel(x: Tensor, sizes: Any) -> bool:
    """Whether `torch.nn.functional.grouped_mm` has a kernel here that reads the offsets on the device.

    Elsewhere it copies them to the host. The kernel wants rows that start at multiples of 16 bytes.
    """
    aligned = all(size * x.element_size() % _ALIGNED_BYTES == 0 for size in sizes)
    return aligned and len(x) > 0 and _has_offsets(x.device, x.dtype)


def _has_offsets(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or torch.version.hip or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def _dense(w_EDF: Tensor) -> Tensor:
    """The same values with one of the two matrix axes contiguous."""
    return w_EDF if w_EDF.is_contiguous() or w_EDF.transpose(1, 2).is_contiguous() else w_EDF.contiguous()
