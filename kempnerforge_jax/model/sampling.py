"""Drawing a token of each distribution.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from shared_config.contract.decoding import SamplingConfig


def sample(
    logits: Float[Array, "... V"],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    uniforms: Float[Array, "..."] | None = None,
    key: Shaped[Array, "..."] | None = None,
) -> Int[Array, "..."]:
    """Draw a token of each distribution.

    Logits / temperature; tokens sorted by falling logit, equal ones by index; the first ``top_k`` are kept; of these
    the shortest run from the top whose probabilities sum to ``top_p``, the token that crosses it included; of their
    renormalised probabilities, the first token whose cumulative sum exceeds a uniform number.

    Args:
        logits: (..., V); computed with in at least float32.
        temperature: 0 takes the most probable token, of equal ones the first.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        uniforms: (...) numbers in [0, 1); drawn if None.
        key: what they are drawn with.

    Returns:
        int32 (...).

    Raises:
        ValueError: temperature < 0, top_k < 0, top_p outside (0, 1]; neither ``uniforms`` nor ``key``.
    """
    SamplingConfig(temperature, top_k, top_p)  # which refuses other values
    if temperature == 0:
        return greedy(logits)
    if uniforms is None:
        if key is None:
            raise ValueError("uniforms = None, key = None: one of them must be given at a temperature above 0")
        uniforms = jax.random.uniform(key, logits.shape[:-1], wide(logits.dtype))
    return draw(logits, uniforms, temperature, top_k or logits.shape[-1], top_p)


def greedy(logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """The most probable token of each row, of equal ones the first: (..., V) -> int32 (...)."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(
    logits: Float[Array, "... V"],
    uniforms: Float[Array, "..."],
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, "..."]:
    """`sample` at a temperature above 0: (..., V) -> (...)."""
    dtype = wide(logits.dtype)
    order_V = jnp.argsort(logits, axis=-1, descending=True, stable=True).astype(jnp.int32)
    sorted_V = jnp.take_along_axis(logits, order_V, axis=-1).astype(dtype)
    scaled_V = (sorted_V - sorted_V[..., :1]) / jnp.maximum(temperature, jnp.finfo(dtype).tiny)
    beyond_k = jnp.arange(logits.shape[-1]) >= top_k
    probabilities_V = jax.nn.softmax(jnp.where(beyond_k, -jnp.inf, scaled_V), axis=-1)
    before_V = jnp.roll(probabilities_V.cumsum(axis=-1), 1, axis=-1).at[..., 0].set(0)
    kept_V = jnp.where(before_V < top_p, probabilities_V, 0)
    cumulative_V = (kept_V / kept_V.sum(axis=-1, keepdims=True)).cumsum(axis=-1)
    index = (cumulative_V <= uniforms.astype(dtype)[..., None]).sum(axis=-1)
    last_index = jnp.maximum((kept_V > 0).sum(axis=-1) - 1, 0)
    return jnp.take_along_axis(order_V, jnp.minimum(index, last_index)[..., None], axis=-1)[..., 0]


def wide(dtype: DTypeLike) -> np.dtype:
    """The dtype that probabilities are computed in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
