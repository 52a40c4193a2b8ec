"""Elementwise operations of both backends in float32: at most 8 units in the last place from the float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import erf, expit

from kempnerforge_jax.model import mlp as jax_mlp
from kempnerforge_jax.model import norm as jax_norm
from kempnerforge_jax.model import position as jax_position
from kempnerforge_torch.model import mlp as torch_mlp
from kempnerforge_torch.model import norm as torch_norm
from kempnerforge_torch.model import position as torch_position
from tests.tolerance import MAX_ULP, assert_ulp

GELU_FROM = -1.0
"""Further left 1 + erf cancels: both backends lose the same digits to the formula, which no tolerance in ULP
describes.
"""

floats = st.floats(-20, 20, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)
TRUTHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("name", sorted(TRUTHS))
@given(arrays(np.float32, 16, elements=floats))
def test_activations(name: str, x: np.ndarray) -> None:
    x = np.maximum(x, np.float32(GELU_FROM)) if name == "gelu" else x
    truth = TRUTHS[name](x.astype(np.float64))
    assert_ulp(torch_mlp.ACTIVATIONS[name](torch.from_numpy(x)).numpy(), truth, name=f"torch {name}")
    assert_ulp(np.asarray(jitted(jax_mlp.ACTIVATIONS[name])(x)), truth, name=f"jax {name}")


@given(arrays(np.float32, (3, 24), elements=floats), st.sampled_from([1e-5, 1e-2]))
def test_rms_norm(x: np.ndarray, eps: float) -> None:
    wide = x.astype(np.float64)
    weight = np.linspace(0.5, 1.5, 24, dtype=np.float32)
    truth = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * weight
    ours = torch_norm.RMSNorm(24, eps)
    ours.weight.data = torch.from_numpy(weight)
    assert_ulp(ours(torch.from_numpy(x)).detach().numpy(), truth, name="torch")
    twin = jax_norm.RMSNorm(24, eps, rngs=nnx.Rngs(0))
    twin.weight.set_value(jnp.asarray(weight))
    assert_ulp(np.asarray(twin(jnp.asarray(x))), truth, name="jax")


@given(arrays(np.float32, (2, 5, 6), elements=floats), st.integers(0, 500))
def test_rotation(x: np.ndarray, start: int) -> None:
    """In units of the larger operand: where the two products cancel, the sum has no small relative error."""
    cos, sin = (table[start : start + 5] for table in torch_position.precompute_rope_frequencies(6, 512))
    wide, half = x.astype(np.float64), 3
    x1, x2 = wide[..., :half], wide[..., half:]
    truth = np.concatenate([x1 * cos.numpy() - x2 * sin.numpy(), x2 * cos.numpy() + x1 * sin.numpy()], axis=-1)
    size = np.tile(np.maximum(abs(x1), abs(x2)), 2)
    unit = np.spacing(np.maximum(size, np.finfo(np.float32).tiny).astype(np.float32))
    for name, value in {
        "torch": torch_position.apply_rope(torch.from_numpy(x), cos, sin).numpy(),
        "jax": np.asarray(jitted(jax_position.apply_rope)(x, cos.numpy(), sin.numpy())),
    }.items():
        assert np.all(abs(value - truth) <= MAX_ULP * unit), name


_jitted: dict[Any, Any] = {}


def jitted(function: Any) -> Any:
    """One compiled function per operation, for all examples."""
    return _jitted.setdefault(function, jax.jit(function))
