"""Feed-forward layers.

Shapes: ... any leading axes, D model dim, F hidden dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kempnerforge_torch.model.linear import Linear
from kempnerforge_torch.registry import registry

Activation = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]

ACTIVATIONS: dict[str, Activation] = registry.builders("activation")
"""What is registered in category "activation": functions of a tensor that work on each element."""

registry.register("activation", "silu")(F.silu)
registry.register("activation", "gelu")(F.gelu)
registry.register("activation", "relu")(F.relu)


GATES: dict[str, Activation] = {"silu": F.silu, "geglu_tanh": functools.partial(F.gelu, approximate="tanh")}
"""What the gates of gated layers go through, by the name of the layer."""


@registry.register("mlp", "silu")
class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=bias)
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """(..., D) -> (..., D)."""
        return self.down_proj(_kept(F.silu(self.gate_proj(x)) * self.up_proj(x)))


@registry.register("mlp", "geglu_tanh")
class GEGLUMLP(SwiGLUMLP):
    """down(gelu(gate(x)) * up(x)) (Shazeer 2020), gelu in its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """(..., D) -> (..., D)."""
        return self.down_proj(_kept(GATES["geglu_tanh"](self.gate_proj(x)) * self.up_proj(x)))


class StandardMLP(nn.Module):
    """down(activation(up(x))); gelu is the exact erf form."""

    def __init__(self, dim: int, hidden_dim: int, activation: str = "gelu", *, bias: bool = False):
        super().__init__()
        self.activation = registry.check("activation", activation)
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """(..., D) -> (..., D)."""
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


registry.register("mlp", "gelu")(functools.partial(StandardMLP, activation="gelu"))
registry.register("mlp", "relu")(functools.partial(StandardMLP, activation="relu"))


def build_mlp(dim: int, hidden_dim: int, activation: str = "silu", *, bias: bool = False) -> nn.Module:
    """The feed-forward layer registered as ``activation``: silu is SwiGLU, geglu_tanh is GEGLU, others are standard.

    A builder registered under another name is called with ``(dim, hidden_dim)``, and with ``bias=True`` if there are to
    be biases; a name that is registered as an activation alone is a standard layer with it.

    Raises:
        KeyError, ValueError: "activation: Unknown mlp: ..." with the names that exist.
    """
    if activation in ACTIVATIONS and not registry.has("mlp", activation):
        return StandardMLP(dim, hidden_dim, activation, bias=bias)
    return registry.get("mlp", activation, "activation")(dim, hidden_dim, **({"bias": True} if bias else {}))


def _kept(product: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """The product unchanged. Compiled for a GPU, that of a single vector is written to memory, by a strided view: the
    compiler would otherwise compute it anew for each output of the layer that reads it.
    """
    is_vector = product.numel() == product.shape[-1] and product.device.type != "cpu"
    if not (is_vector and torch.compiler.is_compiling()) or product.requires_grad:
        return product
    return product.as_strided(product.shape, product.stride())
