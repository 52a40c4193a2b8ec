"""How probable a model finds given tokens, row by row.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kempnerforge_jax.model.state import State, merge, split, to_numpy
from kempnerforge_jax.model.transformer import Transformer
from shared_config.contract.labels import IGNORED


def scores(model: Transformer, tokens_BS: np.ndarray, labels_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the labels that are not -100 of each row: the sum of their log-probabilities, at least float32 (B,), and
    whether all are the most probable ones, bool (B,). Experts have no capacity limits.
    """
    graphdef, parameters, buffers = split(model)
    total_B, greedy_B = _scores(graphdef, parameters, buffers, tokens_BS, labels_BS)
    return to_numpy(total_B), to_numpy(greedy_B)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    graphdef: nnx.GraphDef[Transformer], parameters: State, buffers: State, tokens: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits_BSV = merge(graphdef, parameters, buffers).run(tokens, limit_capacity=False).logits
    wide_BSV = logits_BSV.astype(jnp.promote_types(logits_BSV.dtype, jnp.float32))
    counts_BS = labels != IGNORED
    log_BSV = jax.nn.log_softmax(wide_BSV, axis=-1)
    chosen_BS = jnp.take_along_axis(log_BSV, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    total_B = jnp.where(counts_BS, chosen_BS, 0).sum(axis=-1)
    greedy_B = ((wide_BSV.argmax(axis=-1) == labels) | ~counts_BS).all(axis=-1)
    return total_B, greedy_B
