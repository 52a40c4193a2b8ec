"""Feed-forward networks of groups of rows on the CPU: group by group, what a group needs kept in the cache.

The rows of group e are those from ends[e - 1] (0 for the first) to ends[e]; rows from ends[-1] on belong to no group.
The offsets are on the host, so reading them waits for nothing. Results for all rows at once, as `grouped_matmul` makes
them at every step, would leave the cache, and come from memory whose first touch is a page fault.

Shapes: R rows, D model dim, F hidden dim, E groups, n rows of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge_torch.model.mlp import ACTIVATIONS


def loops_over_groups(x_RD: Tensor) -> bool:
    """Whether the networks of ``x_RD`` are to be computed here."""
    return x_RD.device.type == "cpu"


Matrices = Sequence[Tensor]
"""One matrix a group, or a single tensor with a leading axis of groups."""


@torch.library.custom_op(
    "kempnerforge::looped_mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor ends, str activation)"
    " -> (Tensor, Tensor, Tensor)",
)
def _looped_mlp(
    x_RD: Tensor, gate: Matrices, up: Matrices, down: Matrices, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what came out of ``gate`` and ``up``, which backward needs."""
    out_RD, gate_RF, up_RF = _empty_results(x_RD, gate, up)
    ups, downs, gates = _each(up), _each(down), _each(gate)
    rows = slice(0, 0)
    for e, rows in _groups(ends_E):
        hidden_nF = torch.mm(x_RD[rows], ups[e], out=up_RF[rows])
        if gates:
            hidden_nF = F.silu(torch.mm(x_RD[rows], gates[e], out=gate_RF[rows])).mul_(hidden_nF)
        else:
            hidden_nF = ACTIVATIONS[activation](hidden_nF)
        torch.mm(hidden_nF, downs[e], out=out_RD[rows])
    for result in (out_RD, gate_RF, up_RF):
        result[rows.stop :] = 0
    return out_RD, gate_RF, up_RF


def looped_mlp(x_RD: Tensor, gate: Matrices, up: Matrices, down: Matrices, ends_E: Tensor, activation: str) -> Tensor:
    """(R, D): each row through the network of its group; 0 for rows of no group.

    Args:
        gate, up: (D, F); ``gate`` empty unless the activation is silu, which gates.
        down: (F, D).
        ends_E: int32, not decreasing, at most R.
    """
    return _looped_mlp(x_RD, list(gate), list(up), list(down), ends_E, activation)[0]


@torch.library.custom_op(
    "kempnerforge::looped_mlp_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor gate_out, Tensor up_out, Tensor[] gate, Tensor[] up, Tensor[] down,"
    " Tensor ends, str activation) -> Tensor[]",
)
def _looped_mlp_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
    ends_E: Tensor,
    activation: str,
) -> list[Tensor]:
    """Gradients of x, then of gate, up and down, laid out as these are."""
    dx_RD, *gradients = _empty_gradients(x_RD, gate, up, down)
    dgates, dups, ddowns = (_each(part) for part in _split_like(gradients, gate, up, down))
    gates, ups, downs = _each(gate), _each(up), _each(down)
    rows = slice(0, 0)
    for e, rows in _groups(ends_E):
        x_nD, dy_nD, up_nF = x_RD[rows], dy_RD[rows], up_RF[rows]
        dhidden_nF = torch.mm(dy_nD, downs[e].t())
        if gates:
            gate_nF = gate_RF[rows]
            act_nF = F.silu(gate_nF)
            torch.mm((act_nF * up_nF).t(), dy_nD, out=ddowns[e])
            dgate_nF = torch.ops.aten.silu_backward(dhidden_nF * up_nF, gate_nF)
            dup_nF = dhidden_nF.mul_(act_nF)
            torch.mm(x_nD.t(), dgate_nF, out=dgates[e])
            torch.mm(dgate_nF, gates[e].t(), out=dx_RD[rows]).addmm_(dup_nF, ups[e].t())
        else:
            torch.mm(ACTIVATIONS[activation](up_nF).t(), dy_nD, out=ddowns[e])
            dup_nF = _slope(activation, dhidden_nF, up_nF)
            torch.mm(dup_nF, ups[e].t(), out=dx_RD[rows])
        torch.mm(x_nD.t(), dup_nF, out=dups[e])
    dx_RD[rows.stop :] = 0
    return [dx_RD, *gradients]


@_looped_mlp.register_fake
def _(
    x_RD: Tensor, gate: Matrices, up: Matrices, down: Matrices, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(x_RD, gate, up)


@_looped_mlp_backward.register_fake
def _(
    dy_RD: Tensor,
    x_RD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
    ends_E: Tensor,
    activation: str,
) -> list[Tensor]:
    return _empty_gradients(x_RD, gate, up, down)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_RD, gate, up, down, ends_E, ctx.activation = inputs
    ctx.lengths = [len(gate), len(up), len(down)]
    ctx.set_materialize_grads(False)  # the inner results have none
    ctx.save_for_backward(x_RD, *output[1:], ends_E, *gate, *up, *down)


def _backward(ctx: Any, dy_RD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy_RD is None:
        return (None, *([None] * length for length in ctx.lengths), None, None)
    x_RD, gate_RF, up_RF, ends_E, *matrices = ctx.saved_tensors
    gates = ctx.lengths[0]
    ups = gates + ctx.lengths[1]
    gate, up, down = matrices[:gates], matrices[gates:ups], matrices[ups:]
    dx_RD, *gradients = _looped_mlp_backward(dy_RD, x_RD, gate_RF, up_RF, gate, up, down, ends_E, ctx.activation)
    return dx_RD, *_split_like(gradients, gate, up, down), None, None


_looped_mlp.register_autograd(_backward, setup_context=_save)

LOOPED_MLP = torch.ops.kempnerforge.looped_mlp.default
"""The operator by the name that a dispatcher sees."""


def _groups(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        yield e, slice(start, end)
        start = end


def _each(matrices: Matrices) -> Sequence[Tensor]:
    """One matrix a group."""
    return matrices[0].unbind() if len(matrices) == 1 and matrices[0].ndim == 3 else matrices


def _slope(activation: str, dhidden_nF: Tensor, up_nF: Tensor) -> Tensor:
    """The gradient through an activation that does not gate."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dhidden_nF, up_nF)
    assert activation == "relu"
    return torch.where(up_nF > 0, dhidden_nF, 0)


def _empty_results(x_RD: Tensor, gate: Matrices, up: Matrices) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x_RD.shape[0], up[0].shape[-1]
    return torch.empty_like(x_RD), x_RD.new_empty(rows if gate else 0, width), x_RD.new_empty(rows, width)


def _empty_gradients(x_RD: Tensor, gate: Matrices, up: Matrices, down: Matrices) -> list[Tensor]:
    return [torch.empty_like(x_RD), *(torch.empty_like(matrix) for matrix in (*gate, *up, *down))]


def _split_like(gradients: list[Tensor], gate: Matrices, up: Matrices, down: Matrices) -> tuple[list[Tensor], ...]:
    ups = len(gate) + len(up)
    return gradients[: len(gate)], gradients[len(gate) : ups], gradients[ups:]
