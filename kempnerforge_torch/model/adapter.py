"""Adapters: from the width of vision features to that of the language model, some with fewer tokens.

Shapes: B batch, N image tokens in a square grid of side g, M tokens after pooling, C cells of a window, F feature dim,
D model dim, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kempnerforge_torch.model.attention import attend
from kempnerforge_torch.model.init import init_from_table
from kempnerforge_torch.model.mask import FULL
from kempnerforge_torch.model.mlp import ACTIVATIONS
from kempnerforge_torch.registry import registry
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


class VisionAdapter(nn.Module):
    """Base of all adapters: (B, N, F) -> (B, output_num_tokens(N), D)."""

    table: tuple[tuple[str, ParameterSpec], ...] = ()

    def init_weights(self, seed: int | None = None) -> None:
        """Set every parameter that ``table`` knows (see `shared_config.contract.vision.adapter_table`)."""
        if self.table:
            init_from_table(self, dict(self.table), seed, stream="adapter.")

    def reset_parameters(self) -> None:
        """Redraw all projections: weights normal(0, 1 / sqrt(inputs)), biases 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def output_num_tokens(self, num_input_tokens: int) -> int:
        """Number of output tokens for ``num_input_tokens`` input tokens."""
        return num_input_tokens

    def forward(self, x: Float[Tensor, "B N F"]) -> Float[Tensor, "B M D"]:
        """(B, N, F) -> (B, output_num_tokens(N), D)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")


class MLP2LayerAdapter(VisionAdapter):
    """proj2(act(proj1(x)))."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None, activation: str = "gelu"):
        """``hidden_dim`` None or 0 means ``out_dim``."""
        super().__init__()
        hidden_dim = hidden_dim or out_dim
        check_sizes(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim)
        self.activation = registry.check("activation", activation)
        self.proj1 = nn.Linear(in_dim, hidden_dim)
        self.proj2 = nn.Linear(hidden_dim, out_dim)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "B N F"]) -> Float[Tensor, "B N D"]:
        """(B, N, F) -> (B, N, D)."""
        return self.proj2(ACTIVATIONS[self.activation](self.proj1(x)))


class LinearAdapter(VisionAdapter):
    """proj(x)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        check_sizes(in_dim=in_dim, out_dim=out_dim)
        self.proj = nn.Linear(in_dim, out_dim)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "B N F"]) -> Float[Tensor, "B N D"]:
        """(B, N, F) -> (B, N, D)."""
        return self.proj(x)


class AvgPoolAdapter(VisionAdapter):
    """proj(mean of each window); a window that reaches over the edge averages its real cells."""

    def __init__(self, in_dim: int, out_dim: int, pool_window: int = 2):
        super().__init__()
        check_sizes(in_dim=in_dim, out_dim=out_dim, pool_window=pool_window)
        self.pool_window = pool_window
        self.proj = nn.Linear(in_dim, out_dim)
        self.reset_parameters()

    def output_num_tokens(self, num_input_tokens: int) -> int:
        """Windows over the grid; ``num_input_tokens`` must be a square."""
        return pooled_token_count(num_input_tokens, self.pool_window)

    def forward(self, x: Float[Tensor, "B N F"], pool_window: int | None = None) -> Float[Tensor, "B M D"]:
        """(B, N, F) -> (B, M, D), by windows of ``pool_window``; None: those of the constructor."""
        windows_BMCF, real_MC = windows(x, self.pool_window if pool_window is None else pool_window)
        return self.proj(_mean_of_real(windows_BMCF, real_MC))


class AttentionalPoolAdapter(VisionAdapter):
    """In each window one query, its mean, attends to its cells (as in Molmo, Deitke et al. 2024, arXiv:2409.17146)."""

    def __init__(self, in_dim: int, out_dim: int, pool_window: int = 2, pool_heads: int = 16):
        super().__init__()
        check_sizes(in_dim=in_dim, out_dim=out_dim, pool_window=pool_window, pool_heads=pool_heads)
        if in_dim % pool_heads != 0:
            raise ValueError(f"pool_heads = {pool_heads}: must divide in_dim = {in_dim}")
        self.pool_window = pool_window
        self.pool_heads = pool_heads
        self.q_proj = nn.Linear(in_dim, in_dim)
        self.k_proj = nn.Linear(in_dim, in_dim)
        self.v_proj = nn.Linear(in_dim, in_dim)
        self.o_proj = nn.Linear(in_dim, in_dim)
        self.out_proj = nn.Linear(in_dim, out_dim)
        self.reset_parameters()

    def output_num_tokens(self, num_input_tokens: int) -> int:
        """Windows over the grid; ``num_input_tokens`` must be a square whose side the window divides."""
        return pooled_token_count(num_input_tokens, self.pool_window, require_divisible=True)

    def forward(self, x: Float[Tensor, "B N F"], pool_window: int | None = None) -> Float[Tensor, "B M D"]:
        """(B, N, F) -> (B, M, D), by windows of ``pool_window``; None: those of the constructor."""
        window = self.pool_window if pool_window is None else pool_window
        pooled_token_count(x.shape[1], window, require_divisible=True)
        windows_BMCF, real_MC = windows(x, window)
        query_BM1F = _mean_of_real(windows_BMCF, real_MC).unsqueeze(2)
        q, k, v = (
            self._heads_first(project(source))
            for project, source in ((self.q_proj, query_BM1F), (self.k_proj, windows_BMCF), (self.v_proj, windows_BMCF))
        )
        context = attend(q, k, v, FULL).transpose(1, 2).reshape(len(x), -1, x.shape[-1])
        return self.out_proj(self.o_proj(context))

    def _heads_first(self, x: Tensor) -> Tensor:
        """(B, M, C, F) -> (B * M, H, C, h)."""
        return torch.unflatten(x.flatten(0, 1), -1, (self.pool_heads, -1)).transpose(1, 2)


registry.register("adapter", "mlp_2layer")(
    lambda adapter_config, in_dim, out_dim: MLP2LayerAdapter(
        in_dim, out_dim, adapter_config.hidden_dim, adapter_config.activation
    )
)
registry.register("adapter", "linear")(lambda adapter_config, in_dim, out_dim: LinearAdapter(in_dim, out_dim))
registry.register("adapter", "avgpool")(
    lambda adapter_config, in_dim, out_dim: AvgPoolAdapter(in_dim, out_dim, adapter_config.pool_window)
)
registry.register("adapter", "attentional_pool")(
    lambda adapter_config, in_dim, out_dim: AttentionalPoolAdapter(
        in_dim, out_dim, adapter_config.pool_window, adapter_config.pool_heads
    )
)


def build_adapter(adapter_config: AdapterConfig, in_dim: int, out_dim: int) -> VisionAdapter:
    """The adapter registered as ``adapter_config.type``; its builder is called with the config and both widths.

    Raises:
        KeyError: "Unknown adapter: ..." with the names that exist.
        ValueError: numbers that don't divide.
    """
    adapter = registry.get("adapter", adapter_config.type)(adapter_config, in_dim, out_dim)
    adapter.table = tuple(adapter_table(adapter_config, in_dim, out_dim).items())
    adapter.init_weights()
    return adapter


def windows(x: Float[Tensor, "B N F"], window: int) -> tuple[Float[Tensor, "B M C F"], Bool[Tensor, "M C"]]:
    """Cut the grid into windows, in reading order, those at the right and lower edge padded with zeros.

    Returns:
        (B, M, C, F); bool (M, C), True at cells of the grid.

    Raises:
        ValueError: the tokens form no square.
    """
    pooled_token_count(x.shape[1], window)
    side = math.isqrt(x.shape[1])
    padding = -side % window
    grid = F.pad(torch.unflatten(x, 1, (side, side)), (0, 0, 0, padding, 0, padding))
    inside = torch.arange(side + padding, device=x.device) < side
    real = _to_windows((inside[:, None] & inside)[None, :, :, None], window)
    return _to_windows(grid, window), real[0, :, :, 0]


def _to_windows(grid: Tensor, window: int) -> Tensor:
    """(B, rows * window, columns * window, F) -> (B, rows * columns, window * window, F)."""
    split = torch.unflatten(torch.unflatten(grid, 2, (-1, window)), 1, (-1, window))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _mean_of_real(windows_BMCF: Tensor, real_MC: Tensor) -> Tensor:
    """(B, M, F), summed in at least float32."""
    dtype = torch.promote_types(windows_BMCF.dtype, torch.float32)
    total_BMF = windows_BMCF.to(dtype).sum(dim=2)
    return (total_BMF / real_MC.sum(dim=1)[:, None]).to(windows_BMCF.dtype)
