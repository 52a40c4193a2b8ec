"""Units that tanh, sigmoid or expm1 saturate: the backward pass computes their derivatives from rounded results, of
which 1 - y leaves few digits. No correct pair is called wrong for it, and what is wrong beside them is found.

Shapes: B batch, S sequence, D width. ``HYPOTHESIS_PROFILE=nightly`` draws 8 pairs of each kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import settings
from jax import Array
from torch import Tensor, nn

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from kempnerforge_jax.parity import tap
from shared_config.parity import Trace, compare_functions

NIGHTLY = settings.get_current_profile_name() == "nightly"
WIDTH, SATURATED = 12, 4
B, S = 2, 5
KINDS = ("pooler", "gate", "elu", "cell")
KERNEL = "gradient/act.weight"


class Model(nn.Module):
    """LayerNorm, a product whose first outputs are large, and one of `KINDS` of what saturates."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        if kind == "cell":
            self.given, self.held = (nn.Parameter(torch.empty(3 * WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        z = self.act(x[:, 0] if self.kind == "pooler" else x)
        if self.kind == "cell":
            return self.cells(z)
        return {
            "pooler": lambda: torch.tanh(z),
            "gate": lambda: x * torch.sigmoid(z),
            "elu": lambda: torch.where(z > 0, z, torch.expm1(z.clamp(max=0))),
        }[self.kind]()

    def cells(self, z: Tensor) -> Tensor:
        """A gated recurrent unit (arXiv:1406.1078), without biases."""
        h, found = torch.zeros_like(z[:, 0]), []
        for part in (z @ self.given.T).unbind(1):
            (r, u, n), (r_h, u_h, n_h) = part.chunk(3, -1), (h @ self.held.T).chunk(3, -1)
            u = torch.sigmoid(u + u_h)
            h = (1 - u) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + u * h
            found.append(h)
        return torch.stack(found, 1)


def ported(kind: str, tanh: Callable[[Array], Array], weights: Any, x: Array) -> Array:
    """The same in JAX, with weights by the names of PyTorch."""
    x = tap("norm", normed(x, weights["norm.weight"], weights["norm.bias"]))
    z = x[:, 0] if kind == "pooler" else x
    z = tap("act", z @ weights["act.weight"].T + weights["act.bias"])
    if kind == "pooler":
        return tanh(z)
    if kind == "gate":
        return x * jax.nn.sigmoid(z)
    if kind == "elu":
        return jnp.where(z > 0, z, jnp.expm1(jnp.minimum(z, 0)))

    def step(h: Array, part: Array) -> tuple[Array, Array]:
        (r, u, n), (r_h, u_h, n_h) = (jnp.split(x, 3, axis=-1) for x in (part, h @ weights["held"].T))
        u = jax.nn.sigmoid(u + u_h)
        h = (1 - u) * tanh(n + jax.nn.sigmoid(r + r_h) * n_h) + u * h
        return h, h

    given = (z @ weights["given"].T).swapaxes(0, 1)
    return jax.lax.scan(step, jnp.zeros_like(z[:, 0]), given)[1].swapaxes(0, 1)


def normed(x: Array, scale: Array, bias: Array) -> Array:
    """LayerNorm (arXiv:1607.06450), in at least float32."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)
    return (y * scale + bias).astype(x.dtype)


@functools.cache
def pair(kind: str, dtype: str, seed: int) -> tuple[Trace, Model, np.ndarray]:
    """What a model of PyTorch computes of what."""
    rng = np.random.default_rng(seed)
    model = Model(kind)
    for name, own in model.named_parameters():
        drawn = rng.standard_normal(tuple(own.shape)) / max(1, own[0].numel()) ** 0.5
        drawn = drawn * 0.3 + 1 if name == "norm.weight" else drawn
        if name == "act.weight":
            drawn[:SATURATED] *= 4
        own.data = torch.from_numpy(drawn.astype(np.float32))
    x = rng.standard_normal((B, S, WIDTH)).astype(np.float32)
    return of_torch.record(model, (x,), dtype=dtype, seed=seed), model, x


def port(
    kind: str, dtype: str, seed: int, refeed: Trace | None = None, tanh: Callable[[Array], Array] = jnp.tanh
) -> Trace:
    """What the port computes."""
    _, model, x = pair(kind, dtype, seed)
    weights = {name: own.detach().numpy() for name, own in model.named_parameters()}
    function = functools.partial(ported, kind, tanh)
    return of_jax.record(function, (x,), weights=weights, dtype=dtype, seed=seed, refeed=refeed)


CASES = [(kind, dtype) for kind in KINDS for dtype in ("bfloat16", "float16")]
BY_DAY = [("pooler", "bfloat16"), ("gate", "float16")]


@pytest.mark.parametrize(("kind", "dtype"), CASES if NIGHTLY else BY_DAY)
def test_a_correct_pair_raises_no_alarm(kind: str, dtype: str) -> None:
    for seed in range(8) if NIGHTLY else (1,):
        a, model, x = pair(kind, dtype, seed)
        b = port(kind, dtype, seed)
        fed = port(kind, dtype, seed, a), of_torch.record(model, (x,), dtype=dtype, seed=seed, refeed=b)
        for pairs in ((a, b), (a, fed[0]), (b, fed[1])):
            found = compare_functions(*pairs, common=True)
            assert found.equal, (seed, [(row.full_label, row.share) for row in found.failures])


@jax.custom_jvp
def wrong_tanh(z: Array) -> Array:
    """tanh with a derivative of 1 - |y|."""
    return jnp.tanh(z)


@wrong_tanh.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = jnp.tanh(primals[0])
    return y, (1 - jnp.abs(y)) * tangents[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"] if NIGHTLY else ["bfloat16"])
def test_a_wrong_derivative_and_a_wrong_row_beside_saturated_units_are_found(dtype: str) -> None:
    a = pair("pooler", dtype, 0)[0]
    wrong = compare_functions(a, port("pooler", dtype, 0, a, wrong_tanh), common=True)
    assert {row.name for row in wrong.failures} == {"cotangent/act"}
    right = port("pooler", dtype, 0, a)
    for unit in range(SATURATED, WIDTH):
        kernel = right.array(KERNEL).copy()
        kernel[unit] *= 1.3
        changed = Trace({**right.tensors, KERNEL: kernel.astype(right.tensors[KERNEL].dtype)}, right.meta)
        found = compare_functions(a, changed, common=True)
        assert [row.name for row in found.failures] == [KERNEL]
        position = found.failures[0].position
        assert position is not None
        assert position[0] == unit
