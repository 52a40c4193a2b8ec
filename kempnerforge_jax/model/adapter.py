"""Adapters: from the width of vision features to that of the language model, some with fewer tokens.

Shapes: B batch, N image tokens in a square grid of side g, M tokens after pooling, C cells of a window, F feature dim,
D model dim, H heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kempnerforge_jax.model.attention import attend
from kempnerforge_jax.model.init import init_from_table
from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.model.mask import FULL
from kempnerforge_jax.model.mlp import ACTIVATIONS
from kempnerforge_jax.model.module import Module, named_modules
from kempnerforge_jax.registry import registry
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.vision import adapter_table
from shared_config.schema.adapter import AdapterConfig, check_sizes, pooled_token_count

__all__ = [
    "AttentionalPoolAdapter",
    "AvgPoolAdapter",
    "LinearAdapter",
    "MLP2LayerAdapter",
    "VisionAdapter",
    "build_adapter",
    "pooled_token_count",
]


class VisionAdapter(Module):
    """Base of all adapters: (B, N, F) -> (B, output_num_tokens(N), D)."""

    table: tuple[tuple[str, ParameterSpec], ...] = ()

    def init_weights(self, seed: int | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        """Set every parameter that ``table`` knows (see `shared_config.contract.vision.adapter_table`)."""
        if self.table:
            init_from_table(self, dict(self.table), seed, stream="adapter.", rngs=rngs)

    def reset_parameters(self, *, rngs: nnx.Rngs) -> None:
        """Redraw all projections: weights normal(0, 1 / sqrt(inputs)), biases 0."""
        for _, layer in named_modules(self):
            if isinstance(layer, Linear) and layer.weight is not None:
                shape = layer.weight.get_value().shape
                layer.weight.set_value(jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(shape[1]))
                if layer.bias is not None:
                    layer.bias.set_value(jnp.zeros(shape[:1], jnp.float32))

    def output_num_tokens(self, num_input_tokens: int) -> int:
        """Number of output tokens for ``num_input_tokens`` input tokens."""
        return num_input_tokens

    def forward(self, x: Float[Array, "B N F"]) -> Float[Array, "B M D"]:
        """(B, N, F) -> (B, output_num_tokens(N), D)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")


class MLP2LayerAdapter(VisionAdapter):
    """proj2(act(proj1(x)))."""

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dim: int | None = None, activation: str = "gelu", *, rngs: nnx.Rngs
    ):
        """``hidden_dim`` None or 0 means ``out_dim``."""
        hidden_dim = hidden_dim or out_dim
        check_sizes(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim)
        self.activation = registry.check("activation", activation)
        self.proj1 = Linear(in_dim, hidden_dim, True, rngs=rngs)
        self.proj2 = Linear(hidden_dim, out_dim, True, rngs=rngs)
        if rngs is not None:
            self.reset_parameters(rngs=rngs)

    def forward(self, x: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
        """(B, N, F) -> (B, N, D)."""
        return self.proj2(ACTIVATIONS[self.activation](self.proj1(x)))


class LinearAdapter(VisionAdapter):
    """proj(x)."""

    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs | None):
        check_sizes(in_dim=in_dim, out_dim=out_dim)
        self.proj = Linear(in_dim, out_dim, True, rngs=rngs)
        if rngs is not None:
            self.reset_parameters(rngs=rngs)

    def forward(self, x: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
        """(B, N, F) -> (B, N, D)."""
        return self.proj(x)


class AvgPoolAdapter(VisionAdapter):
    """proj(mean of each window); a window that reaches over the edge averages its real cells."""

    def __init__(self, in_dim: int, out_dim: int, pool_window: int = 2, *, rngs: nnx.Rngs | None):
        check_sizes(in_dim=in_dim, out_dim=out_dim, pool_window=pool_window)
        self.pool_window = pool_window
        self.proj = Linear(in_dim, out_dim, True, rngs=rngs)
        if rngs is not None:
            self.reset_parameters(rngs=rngs)

    def output_num_tokens(self, num_input_tokens: int) -> int:
        """Windows over the grid; ``num_input_tokens`` must be a square."""
        return pooled_token_count(num_input_tokens, self.pool_window)

    def forward(self, x: Float[Array, "B N F"], pool_window: int | None = None) -> Float[Array, "B M D"]:
        """(B, N, F) -> (B, M, D), by windows of ``pool_window``; None: those of the constructor."""
        windows_BMCF, real_MC = windows(x, self.pool_window if pool_window is None else pool_window)
        return self.proj(_mean_of_real(windows_BMCF, real_MC))


class AttentionalPoolAdapter(VisionAdapter):
    """In each window one query, its mean, attends to its cells (as in Molmo, Deitke et al. 2024, arXiv:2409.17146)."""

    def __init__(self, in_dim: int, out_dim: int, pool_window: int = 2, pool_heads: int = 16, *, rngs: nnx.Rngs | None):
        check_sizes(in_dim=in_dim, out_dim=out_dim, pool_window=pool_window, pool_heads=pool_heads)
        if in_dim % pool_heads != 0:
            raise ValueError(f"pool_heads = {pool_heads}: must divide in_dim = {in_dim}")
        self.pool_window = pool_window
        self.pool_heads = pool_heads
        self.q_proj = Linear(in_dim, in_dim, True, rngs=rngs)
        self.k_proj = Linear(in_dim, in_dim, True, rngs=rngs)
        self.v_proj = Linear(in_dim, in_dim, True, rngs=rngs)
        self.o_proj = Linear(in_dim, in_dim, True, rngs=rngs)
        self.out_proj = Linear(in_dim, out_dim, True, rngs=rngs)
        if rngs is not None:
            self.reset_parameters(rngs=rngs)

    def output_num_tokens(self, num_input_tokens: int) -> int:
        """Windows over the grid; ``num_input_tokens`` must be a square whose side the window divides."""
        return pooled_token_count(num_input_tokens, self.pool_window, require_divisible=True)

    def forward(self, x: Float[Array, "B N F"], pool_window: int | None = None) -> Float[Array, "B M D"]:
        """(B, N, F) -> (B, M, D), by windows of ``pool_window``; None: those of the constructor."""
        window = self.pool_window if pool_window is None else pool_window
        pooled_token_count(x.shape[1], window, require_divisible=True)
        windows_BMCF, real_MC = windows(x, window)
        query_BM1F = jnp.expand_dims(_mean_of_real(windows_BMCF, real_MC), 2)
        q, k, v = (
            self._heads_first(project(source))
            for project, source in ((self.q_proj, query_BM1F), (self.k_proj, windows_BMCF), (self.v_proj, windows_BMCF))
        )
        context = attend(q, k, v, FULL).swapaxes(1, 2).reshape(len(x), -1, x.shape[-1])
        return self.out_proj(self.o_proj(context))

    def _heads_first(self, x: jax.Array) -> jax.Array:
        """(B, M, C, F) -> (B * M, H, C, h)."""
        batch, pooled, cells, _ = x.shape
        return x.reshape(batch * pooled, cells, self.pool_heads, -1).swapaxes(1, 2)


registry.register("adapter", "mlp_2layer")(
    lambda adapter_config, in_dim, out_dim, *, rngs: MLP2LayerAdapter(
        in_dim, out_dim, adapter_config.hidden_dim, adapter_config.activation, rngs=rngs
    )
)
registry.register("adapter", "linear")(
    lambda adapter_config, in_dim, out_dim, *, rngs: LinearAdapter(in_dim, out_dim, rngs=rngs)
)
registry.register("adapter", "avgpool")(
    lambda adapter_config, in_dim, out_dim, *, rngs: AvgPoolAdapter(
        in_dim, out_dim, adapter_config.pool_window, rngs=rngs
    )
)
registry.register("adapter", "attentional_pool")(
    lambda adapter_config, in_dim, out_dim, *, rngs: AttentionalPoolAdapter(
        in_dim, out_dim, adapter_config.pool_window, adapter_config.pool_heads, rngs=rngs
    )
)


def build_adapter(adapter_config: AdapterConfig, in_dim: int, out_dim: int, *, rngs: nnx.Rngs | None) -> VisionAdapter:
    """The adapter registered as ``adapter_config.type``; its builder is called with the config, both widths and
    ``rngs``.

    Raises:
        KeyError: "Unknown adapter: ..." with the names that exist.
        ValueError: numbers that don't divide.
    """
    adapter = registry.get("adapter", adapter_config.type)(adapter_config, in_dim, out_dim, rngs=rngs)
    adapter.table = tuple(adapter_table(adapter_config, in_dim, out_dim).items())
    if rngs is not None:
        adapter.init_weights(rngs=rngs)
    return adapter


def windows(x: Float[Array, "B N F"], window: int) -> tuple[Float[Array, "B M C F"], Bool[Array, "M C"]]:
    """Cut the grid into windows, in reading order, those at the right and lower edge padded with zeros.

    Returns:
        (B, M, C, F); bool (M, C), True at cells of the grid.

    Raises:
        ValueError: the tokens form no square.
    """
    pooled_token_count(x.shape[1], window)
    side = math.isqrt(x.shape[1])
    padding = -side % window
    grid = jnp.pad(x.reshape(len(x), side, side, -1), ((0, 0), (0, padding), (0, padding), (0, 0)))
    inside = jnp.arange(side + padding) < side
    real = _to_windows((inside[:, None] & inside)[None, :, :, None], window)
    return _to_windows(grid, window), real[0, :, :, 0]


def _to_windows(grid: jax.Array, window: int) -> jax.Array:
    """(B, rows * window, columns * window, F) -> (B, rows * columns, window * window, F)."""
    batch, rows, columns, features = grid.shape
    split = grid.reshape(batch, rows // window, window, columns // window, window, features)
    return split.swapaxes(2, 3).reshape(batch, -1, window * window, features)


def _mean_of_real(windows_BMCF: jax.Array, real_MC: jax.Array) -> jax.Array:
    """(B, M, F), summed in at least float32."""
    dtype = jnp.promote_types(windows_BMCF.dtype, jnp.float32)
    total_BMF = windows_BMCF.astype(dtype).sum(axis=2)
    return (total_BMF / real_MC.sum(axis=1)[:, None].astype(dtype)).astype(windows_BMCF.dtype)
