"""The product with the head's weight and the loss of its logits, one chunk of tokens after another: the logits of all
never exist together.

    for each chunk of tokens    logits = x W^T    dlogits = d loss / d logits    dx = dlogits W    dW += dlogits^T x

The gradients are found along with the loss, and wait for the backward pass: three products for each token, as many as
where all logits are kept. To find them in the backward pass would take a fourth. (Hsu et al. 2024, arXiv:2410.10989,
section 3.2.)

Shapes: B batch, S sequence, N = B*S tokens, c tokens of a chunk, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.autograd.function import once_differentiable

from kempnerforge_torch.model.checks import check_shape
from kempnerforge_torch.model.embedding import FactoredLogits
from kempnerforge_torch.model.linear import linear
from shared_config.contract.labels import IGNORED, rows_of_logits

CrossEntropy = Callable[[Float[Tensor, "B S V"], Integer[Tensor, "B S"]], tuple[Float[Tensor, ""], Int[Tensor, ""]]]
_Loss = Callable[[Tensor, Tensor], Tensor]


def loss_in_chunks(
    cross_entropy: CrossEntropy, logits: FactoredLogits, labels_BS: Integer[Tensor, "B S"], vocabulary: int
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """``cross_entropy(logits.whole(), labels_BS)``, whose first result is the sum of what it is of each token.

    The gradient of the weight is summed over chunks in at least float32.

    Args:
        vocabulary: the most logits that a device has of a token, which is the same on all that compute together.

    Raises:
        ValueError: labels of another shape than the tokens; what ``cross_entropy`` raises.
    """
    check_shape("labels", labels_BS, logits.x.shape[:-1])
    rows = rows_of_logits(labels_BS.numel(), logits.x.shape[-1], vocabulary, logits.x.element_size())
    if rows == labels_BS.numel():
        return cross_entropy(logits.whole(), labels_BS)
    x_ND, labels_N = logits.x.flatten(0, -2), labels_BS.flatten()

    def loss_of(logits_cV: Tensor, labels_c: Tensor) -> Tensor:
        return cross_entropy(logits.finished(logits_cV)[None], labels_c[None])[0]

    total = _Sum.apply(x_ND, logits.weight, labels_N, loss_of, rows, torch.is_grad_enabled())
    return total, (labels_N != IGNORED).sum()


class _Sum(torch.autograd.Function):
    """The sum over chunks of so many rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        loss_of: _Loss,
        rows: int,
        differentiates: bool,
    ) -> Tensor:
        of_x, of_weight = (differentiates and needed for needed in ctx.needs_input_grad[:2])
        dx_ND = torch.empty_like(x_ND) if of_x else None
        dw_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD)) if of_weight else None
        total = torch.zeros((), dtype=_wide(x_ND), device=x_ND.device)
        for start in range(0, len(x_ND), rows):
            x_cD, labels_c = x_ND[start : start + rows], labels_N[start : start + rows]
            dx_cD = None if dx_ND is None else dx_ND[start : start + rows]
            total += _chunk(x_cD, weight_VD, labels_c, loss_of, dx_cD, dw_VD)
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        dx_ND, dw_VD = ctx.saved_tensors
        dx_ND = None if dx_ND is None else dx_ND * gradient
        if dw_VD is not None:
            dw_VD = torch.mul(dw_VD, gradient, out=torch.empty_like(dw_VD, dtype=ctx.dtype))
        return dx_ND, dw_VD, None, None, None, None


def _chunk(
    x_cD: Tensor,
    weight_VD: Tensor,
    labels_c: Tensor,
    loss_of: _Loss,
    dx_cD: Tensor | None,
    dw_VD: Tensor | None,
) -> Tensor:
    """The loss of a chunk. Its gradient is written to ``dx_cD`` and added to ``dw_VD``, where there are such."""
    logits_cV = linear(x_cD, weight_VD)
    if dx_cD is None and dw_VD is None:
        return loss_of(logits_cV, labels_c)
    with torch.enable_grad():
        loss = loss_of(logits_cV.requires_grad_(), labels_c)
        (dlogits_cV,) = torch.autograd.grad(loss, logits_cV)
    if dx_cD is not None:
        torch.mm(dlogits_cV, weight_VD, out=dx_cD)
    if dw_VD is not None:
        _add_product(dw_VD, dlogits_cV.t(), x_cD)
    return loss.detach()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b, whose sums are of the dtype of ``total``."""
    if total.dtype != a.dtype and a.is_cuda and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
