"""Feed-forward layers.

Shapes: ... any leading axes, D model dim, F hidden dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.registry import registry


def _widened(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Compute in at least float32 and cast once, as torch's activations do."""
    return lambda x: function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]

ACTIVATIONS: dict[str, Activation] = registry.builders("activation")
"""What is registered in category "activation": functions of an array that work on each element."""

registry.register("activation", "silu")(_widened(jax.nn.silu))
registry.register("activation", "gelu")(_widened(functools.partial(jax.nn.gelu, approximate=False)))
registry.register("activation", "relu")(jax.nn.relu)


GATES: dict[str, Activation] = {
    "silu": ACTIVATIONS["silu"],
    "geglu_tanh": _widened(functools.partial(jax.nn.gelu, approximate=True)),
}
"""What the gates of gated layers go through, by the name of the layer."""


@registry.register("mlp", "silu")
class SwiGLUMLP(Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False, rngs: nnx.Rngs | None):
        self.gate_proj = Linear(dim, hidden_dim, bias, rngs=rngs)
        self.up_proj = Linear(dim, hidden_dim, bias, rngs=rngs)
        self.down_proj = Linear(hidden_dim, dim, bias, rngs=rngs)

    def forward(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """(..., D) -> (..., D)."""
        return self.down_proj(ACTIVATIONS["silu"](self.gate_proj(x)) * self.up_proj(x))


@registry.register("mlp", "geglu_tanh")
class GEGLUMLP(SwiGLUMLP):
    """down(gelu(gate(x)) * up(x)) (Shazeer 2020), gelu in its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def forward(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """(..., D) -> (..., D)."""
        return self.down_proj(GATES["geglu_tanh"](self.gate_proj(x)) * self.up_proj(x))


class StandardMLP(Module):
    """down(activation(up(x))); gelu is the exact erf form."""

    def __init__(
        self, dim: int, hidden_dim: int, activation: str = "gelu", *, bias: bool = False, rngs: nnx.Rngs | None
    ):
        self.activation = registry.check("activation", activation)
        self.up_proj = Linear(dim, hidden_dim, bias, rngs=rngs)
        self.down_proj = Linear(hidden_dim, dim, bias, rngs=rngs)

    def forward(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """(..., D) -> (..., D)."""
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


registry.register("mlp", "gelu")(functools.partial(StandardMLP, activation="gelu"))
registry.register("mlp", "relu")(functools.partial(StandardMLP, activation="relu"))


def build_mlp(
    dim: int, hidden_dim: int, activation: str = "silu", *, bias: bool = False, rngs: nnx.Rngs | None
) -> Module:
    """The feed-forward layer registered as ``activation``: silu is SwiGLU, geglu_tanh is GEGLU, others are standard.

    A builder registered under another name is called with ``(dim, hidden_dim, rngs=rngs)``, and with ``bias=True`` if
    there are to be biases; a name that is registered as an activation alone is a standard layer with it.

    Raises:
        KeyError, ValueError: "activation: Unknown mlp: ..." with the names that exist.
    """
    if activation in ACTIVATIONS and not registry.has("mlp", activation):
        return StandardMLP(dim, hidden_dim, activation, bias=bias, rngs=rngs)
    options = {"bias": True} if bias else {}
    return registry.get("mlp", activation, "activation")(dim, hidden_dim, **options, rngs=rngs)
