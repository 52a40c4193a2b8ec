"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864); angles are formed in float64 by `shared_config`.

Shapes: B batch, S sequence, h head_dim, A = h/2 angles, P positions in the table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.model.module import Module, Table
from shared_config.contract.rope import rope_tables
from shared_config.schema.model import RopeScaling


def precompute_rope_frequencies(
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    device: Device | None = None,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "P A"], Float[Array, "P A"]]:
    """Cosines and sines of every position.

    Returns:
        cos, sin: (max_seq_len, head_dim // 2), float64 where JAX has it (jax_enable_x64), else rounded once to float32.

    Raises:
        ValueError: if ``head_dim`` is odd or not positive.
    """
    cos, sin = rope_tables(head_dim, max_seq_len, theta, scaling)
    dtype = jax.dtypes.canonicalize_dtype(cos.dtype)
    return jnp.asarray(cos, dtype, device=device), jnp.asarray(sin, dtype, device=device)


class RotaryTables(Module):
    """The tables of a model: as exact as JAX allows whatever dtype the model is cast to, not in its state."""

    def __init__(
        self,
        head_dim: int,
        max_seq_len: int,
        theta: float = 10000.0,
        scaling: RopeScaling | None = None,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        self.scaling = scaling
        cos_Ph, sin_Ph = self._precompute()
        self.cos = Table(cos_Ph)
        self.sin = Table(sin_Ph)

    def reset(self) -> None:
        """Compute the tables again."""
        cos_Ph, sin_Ph = self._precompute()
        self.cos.set_value(cos_Ph)
        self.sin.set_value(sin_Ph)

    def forward(
        self, positions: Integer[Array, "... S"], dtype: DTypeLike
    ) -> tuple[Float[Array, "... S A"], Float[Array, "... S A"]]:
        """Rows of the tables for `apply_rope`, in at least float32; rows past the table are NaN.

        Args:
            positions: integers (S,), or (B, S) where rows differ.
            dtype: of the queries and keys.

        Returns:
            cos, sin: (S, h/2), or (B, 1, S, h/2), which broadcasts over heads.
        """
        dtype = jnp.promote_types(dtype, jnp.float32)
        tables = (self.cos.get_value(), self.sin.get_value())
        cos, sin = (table.at[positions].get(mode="fill", fill_value=jnp.nan).astype(dtype) for table in tables)
        return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])

    def _precompute(self) -> tuple[jax.Array, jax.Array]:
        return precompute_rope_frequencies(self.head_dim, self.max_seq_len, self.theta, scaling=self.scaling)


def apply_rope(
    x: Float[Array, "... S h"], cos: Float[Array, "... h//2"], sin: Float[Array, "... h//2"]
) -> Float[Array, "... S h"]:
    """Turn the halves of each head: [x1 cos - x2 sin, x2 cos + x1 sin], in at least float32.

    Args:
        x: (..., S, h).
        cos, sin: (S, h/2), or any shape that broadcasts against (..., S, h/2).

    Returns:
        (..., S, h), in the dtype of ``x``.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x1, x2 = jnp.split(x.astype(dtype), 2, axis=-1)
    cos, sin = cos.astype(dtype), sin.astype(dtype)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
