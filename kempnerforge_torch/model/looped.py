"""A mixture of experts on the CPU: expert by expert, what an expert needs kept in the cache.

The rows of expert e are those from ends[e - 1] (0 for the first) to ends[e]; rows from ends[-1] on belong to no expert.
The offsets are on the host, so reading them waits for nothing. Tensors of all rows, as `grouped_matmul` makes them at
every step, would leave the cache, and come from memory whose first touch is a page fault.

Shapes: T tokens, R rows, D model dim, F hidden dim, E experts, n rows of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge_torch.model.mlp import ACTIVATIONS

LOOPED_ACTIVATIONS = ("silu", "gelu", "relu")
"""Those whose slopes `looped_moe` knows; silu gates."""


def loops_over_experts(x: Tensor) -> bool:
    """Whether the experts of ``x`` are to be computed here."""
    return x.device.type == "cpu"


Matrices = Sequence[Tensor]
"""One matrix per expert, or a single tensor with a leading axis of experts."""


@torch.library.custom_op(
    "kempnerforge::looped_moe",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor token, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor ends,"
    " Tensor? scale, str activation) -> (Tensor, Tensor, Tensor)",
)
def _looped_moe(
    x_TD: Tensor,
    weight_R: Tensor,
    token_R: Tensor,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
    ends_E: Tensor,
    scale_E: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what came out of ``gate`` and ``up``, which backward needs."""
    y_TD, gate_RF, up_RF = _empty_results(x_TD, weight_R, gate, up)
    gates, ups, downs = _each(gate), _each(up), _each(down)
    y_TD.zero_()
    rows = slice(0, 0)
    for e, rows in _groups(ends_E):
        x_nD = x_TD.index_select(0, token_R[rows])
        hidden_nF = torch.mm(x_nD, ups[e], out=up_RF[rows])
        if gates:
            hidden_nF = F.silu(torch.mm(x_nD, gates[e], out=gate_RF[rows])).mul_(hidden_nF)
        else:
            hidden_nF = ACTIVATIONS[activation](hidden_nF)
        out_nD = torch.mm(hidden_nF, downs[e]).to(y_TD.dtype)
        y_TD.index_add_(0, token_R[rows], out_nD.mul_(weight_R[rows, None]))
    rest = slice(rows.stop, len(token_R))
    zero_nD = (0 * weight_R[rest, None]).expand(-1, y_TD.shape[1])
    y_TD.index_add_(0, token_R[rest], zero_nD)  # 0, unless a weight is NaN or infinite, which must not get lost
    for inner_RF in (gate_RF, up_RF):
        inner_RF[rest] = 0
    return y_TD, gate_RF, up_RF


def looped_moe(
    x_TD: Tensor,
    weight_R: Tensor,
    token_R: Tensor,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
    ends_E: Tensor,
    scale_E: Tensor | None,
    activation: str,
) -> Tensor:
    """(T, D) in the dtype of the weights: for each token the weighted sum of its rows' results.

    Args:
        weight_R: of each row's result.
        token_R: the token of each row.
        gate, up: (D, F); ``gate`` empty unless the activation is silu, which gates.
        down: (F, D).
        ends_E: int32, not decreasing, at most R.
        scale_E: factors for what flows back through each expert; None is 1.
    """
    matrices = [list(part) for part in (gate, up, down)]
    return _looped_moe(x_TD, weight_R, token_R, *matrices, ends_E, scale_E, activation)[0]


@torch.library.custom_op(
    "kempnerforge::looped_moe_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor token, Tensor gate_out, Tensor up_out, Tensor[] gate,"
    " Tensor[] up, Tensor[] down, Tensor ends, Tensor? scale, str activation) -> Tensor[]",
)
def _looped_moe_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_R: Tensor,
    token_R: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
    ends_E: Tensor,
    scale_E: Tensor | None,
    activation: str,
) -> list[Tensor]:
    """Gradients of x and of the rows' weights, then of gate, up and down, laid out as these are."""
    gradients = _empty_like(*gate, *up, *down)
    dgates, dups, ddowns = (_each(part) for part in _split_like(gradients, gate, up, down))
    gates, ups, downs = _each(gate), _each(up), _each(down)
    dx_TD = torch.zeros_like(x_TD, dtype=dy_TD.dtype)
    dweight_R = torch.zeros_like(weight_R)
    for e, rows in _groups(ends_E):
        token_n, gate_nF, up_nF = token_R[rows], gate_RF[rows], up_RF[rows]
        x_nD = x_TD.index_select(0, token_n)
        dy_nD = dy_TD.index_select(0, token_n)
        act_nF = F.silu(gate_nF) if gates else ACTIVATIONS[activation](up_nF)
        hidden_nF = act_nF * up_nF if gates else act_nF
        dhidden_nF = torch.mm(dy_nD.to(x_TD.dtype), downs[e].t())
        torch.sum(hidden_nF.to(dy_nD.dtype) * dhidden_nF, dim=1, out=dweight_R[rows])
        factor_n1 = weight_R[rows, None] if scale_E is None else weight_R[rows, None] * scale_E[e]
        torch.mm(hidden_nF.t(), dy_nD.mul_(factor_n1).to(x_TD.dtype), out=ddowns[e])
        dhidden_nF.mul_(factor_n1)
        if gates:
            dgate_nF = torch.ops.aten.silu_backward(dhidden_nF * up_nF, gate_nF)
            dup_nF = dhidden_nF.mul_(act_nF)
            torch.mm(x_nD.t(), dgate_nF, out=dgates[e])
            dx_nD = torch.mm(dgate_nF, gates[e].t()).addmm_(dup_nF, ups[e].t())
        else:
            dup_nF = _slope(activation, dhidden_nF, up_nF)
            dx_nD = torch.mm(dup_nF, ups[e].t())
        torch.mm(x_nD.t(), dup_nF, out=dups[e])
        dx_TD.index_add_(0, token_n, dx_nD.to(dx_TD.dtype))
    return [dx_TD.to(x_TD.dtype), dweight_R, *gradients]


@_looped_moe.register_fake
def _(
    x_TD: Tensor, weight_R: Tensor, token_R: Tensor, gate: Matrices, up: Matrices, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(x_TD, weight_R, gate, up)


@_looped_moe_backward.register_fake
def _(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_R: Tensor,
    token_R: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
    *_: Any,
) -> list[Tensor]:
    return _empty_like(x_TD, weight_R, *gate, *up, *down)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TD, weight_R, token_R, gate, up, down, ends_E, scale_E, ctx.activation = inputs
    ctx.lengths = [len(gate), len(up), len(down)]
    ctx.set_materialize_grads(False)  # the inner results have none
    ctx.save_for_backward(x_TD, weight_R, token_R, *output[1:], ends_E, scale_E, *gate, *up, *down)


def _backward(ctx: Any, dy_TD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy_TD is None:
        return (None, None, None, *([None] * length for length in ctx.lengths), None, None, None)
    x_TD, weight_R, token_R, gate_RF, up_RF, ends_E, scale_E, *matrices = ctx.saved_tensors
    gates = ctx.lengths[0]
    ups = gates + ctx.lengths[1]
    parts = matrices[:gates], matrices[gates:ups], matrices[ups:]
    dx_TD, dweight_R, *gradients = _looped_moe_backward(
        dy_TD, x_TD, weight_R, token_R, gate_RF, up_RF, *parts, ends_E, scale_E, ctx.activation
    )
    return dx_TD, dweight_R, None, *_split_like(gradients, *parts), None, None, None


_looped_moe.register_autograd(_backward, setup_context=_save)

LOOPED_MOE = torch.ops.kempnerforge.looped_moe.default
"""The operator by the name that a dispatcher sees."""


def _groups(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        yield e, slice(start, end)
        start = end


def _each(matrices: Matrices) -> Sequence[Tensor]:
    """One matrix per expert."""
    return matrices[0].unbind() if len(matrices) == 1 and matrices[0].ndim == 3 else matrices


def _slope(activation: str, dhidden_nF: Tensor, up_nF: Tensor) -> Tensor:
    """The gradient through an activation that does not gate."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dhidden_nF, up_nF)
    assert activation == "relu"
    return torch.where(up_nF > 0, dhidden_nF, 0)


def _empty_results(x_TD: Tensor, weight_R: Tensor, gate: Matrices, up: Matrices) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = weight_R.shape[0], up[0].shape[-1]
    inner = x_TD.new_empty(rows if gate else 0, width), x_TD.new_empty(rows, width)
    return torch.empty_like(x_TD, dtype=weight_R.dtype), *inner


def _empty_like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def _split_like(gradients: list[Tensor], gate: Matrices, up: Matrices, down: Matrices) -> tuple[list[Tensor], ...]:
    ups = len(gate) + len(up)
    return gradients[: len(gate)], gradients[len(gate) : ups], gradients[ups:]
