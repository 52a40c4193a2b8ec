"""The product with the head's weight and the loss of its logits, one chunk of tokens after another: the logits of all
never exist together.

    for each chunk of tokens    logits = x W^T    dlogits = d loss / d logits    dx = dlogits W    dW += dlogits^T x

The gradients are found along with the loss, and wait for the backward pass: three products for each token, as many as
where all logits are kept. To find them in the backward pass would take a fourth. (Hsu et al. 2024, arXiv:2410.10989,
section 3.2.)

Shapes: B batch, S sequence, N = B*S tokens, n chunks of c tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer

from kempnerforge_jax.model.checks import check_shape
from kempnerforge_jax.model.embedding import FactoredLogits
from kempnerforge_jax.model.linear import linear
from shared_config.contract.labels import IGNORED, rows_of_logits

CrossEntropy = Callable[[Float[Array, "B S V"], Integer[Array, "B S"]], tuple[Float[Array, ""], Int[Array, ""]]]
_Loss = Callable[[jax.Array, jax.Array], jax.Array]
_Gradients = tuple[jax.Array, jax.Array]


def loss_in_chunks(
    cross_entropy: CrossEntropy, logits: FactoredLogits, labels_BS: Integer[Array, "B S"], vocabulary: int
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """``cross_entropy(logits.whole(), labels_BS)``, whose first result is the sum of what it is of each token.

    The gradient of the weight is summed over chunks in at least float32.

    Args:
        vocabulary: the most logits that a device has of a token, which is the same on all that compute together.

    Raises:
        ValueError: labels of another shape than the tokens; what ``cross_entropy`` raises.
    """
    check_shape("labels", labels_BS, logits.x.shape[:-1])
    rows = rows_of_logits(labels_BS.size, logits.x.shape[-1], vocabulary, logits.x.dtype.itemsize)
    if rows == labels_BS.size:
        return cross_entropy(logits.whole(), labels_BS)
    x_ND, labels_N = logits.x.reshape(-1, logits.x.shape[-1]), labels_BS.reshape(-1)

    def loss_of(logits_cV: jax.Array, labels_c: jax.Array) -> jax.Array:
        return cross_entropy(logits.finished(logits_cV)[None], labels_c[None])[0]

    total: jax.Array = _sum(loss_of, rows, x_ND, logits.weight, labels_N)
    return total, jnp.sum(labels_N != IGNORED, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(loss_of: _Loss, rows: int, x_ND: jax.Array, weight_VD: jax.Array, labels_N: jax.Array) -> jax.Array:
    """The sum over chunks of so many rows."""

    def chunk(total: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x_cD, labels_c = inputs
        return total + loss_of(linear(x_cD, weight_VD), labels_c), None

    zero = jnp.zeros((), _wide(x_ND))
    return lax.scan(chunk, zero, _chunks(rows, x_ND, labels_N))[0]


def _sum_forward(
    loss_of: _Loss, rows: int, x_ND: jax.Array, weight_VD: jax.Array, labels_N: jax.Array
) -> tuple[jax.Array, _Gradients]:
    def chunk(
        sums: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, dw_VD = sums
        x_cD, labels_c = inputs
        loss, dlogits_cV = jax.value_and_grad(loss_of)(linear(x_cD, weight_VD), labels_c)
        dw_VD += lax.dot_general(dlogits_cV, x_cD, (((0,), (0,)), ((), ())), preferred_element_type=dw_VD.dtype)
        return (total + loss, dw_VD), linear(dlogits_cV, weight_VD.T)

    zeros = jnp.zeros((), _wide(x_ND)), jnp.zeros(weight_VD.shape, _wide(weight_VD))
    (total, dw_VD), dx_ncD = lax.scan(chunk, zeros, _chunks(rows, x_ND, labels_N))
    return total, (dx_ncD.reshape(-1, x_ND.shape[1])[: len(x_ND)], dw_VD)


def _sum_backward(
    loss_of: _Loss, rows: int, gradients: _Gradients, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    dx_ND, dw_VD = gradients
    return (dx_ND * gradient).astype(dx_ND.dtype), (dw_VD * gradient).astype(dx_ND.dtype), None


_sum.defvjp(_sum_forward, _sum_backward)


def _chunks(rows: int, x_ND: jax.Array, labels_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows (n, c, D) and labels (n, c), the last chunk filled up with what does not count."""
    missing = -len(x_ND) % rows
    x_ND, labels_N = jnp.pad(x_ND, ((0, missing), (0, 0))), jnp.pad(labels_N, (0, missing), constant_values=IGNORED)
    return x_ND.reshape(-1, rows, x_ND.shape[1]), labels_N.reshape(-1, rows)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
