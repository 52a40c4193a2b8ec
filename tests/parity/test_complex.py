"""Complex numbers inside functions, as of Fourier transforms and rotations, in every recorder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.errors import UserError
from shared_config.parity import DifferentError, assert_same_function, compare_functions, record, tap

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
TURNS = np.exp(1j * np.arange(5)).astype(np.complex64)


def in_torch(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    spectrum = tap("spectrum", torch.fft.rfft(x))
    return torch.fft.irfft(tap("turned", spectrum * turns), n=8)


def in_jax(x: jax.Array, turns: jax.Array) -> jax.Array:
    spectrum = of_jax.tap("spectrum", jnp.fft.rfft(x))
    return jnp.fft.irfft(of_jax.tap("turned", spectrum * turns), n=8)


def wrong_in_jax(x: jax.Array, turns: jax.Array) -> jax.Array:
    return in_jax(x, turns.conj())


def in_numpy(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    spectrum = tap("spectrum", np.fft.rfft(x))
    return np.fft.irfft(tap("turned", spectrum * turns), n=8)


def test_complex_activations_and_their_gradients_are_compared() -> None:
    for dtype in ("float64", "float32"):
        assert_same_function(in_torch, in_jax, (X, TURNS), dtypes=(dtype,))
        with pytest.raises(DifferentError, match="forward: made in turned"):
            assert_same_function(in_torch, wrong_in_jax, (X, TURNS), dtypes=(dtype,))
    assert_same_function(in_torch, in_numpy, (X, TURNS), dtypes=("float64",), frameworks=("torch", "numpy"))


def test_a_complex_activation_is_pairs_of_real_numbers_and_is_fed_as_such() -> None:
    a = of_torch.record(in_torch, (torch.from_numpy(X), torch.from_numpy(TURNS)), dtype="float32")
    expected = np.fft.rfft(X.astype(np.float64))
    assert np.allclose(
        np.asarray(a.tensors["forward/spectrum"]), np.stack([expected.real, expected.imag], -1), atol=1e-5
    )
    assert np.asarray(a.tensors["cotangent/spectrum"]).shape == (3, 5, 2)
    wrong = ["forward/spectrum", "gradient/input.0"]
    for recorder, function, names in ((of_jax.record, in_jax, wrong), (record, in_numpy, wrong[:1])):
        fed: Any = recorder(lambda x, turns, own=function: own(1.1 * x, turns), (X, TURNS), dtype="float32", refeed=a)
        assert [row.name for row in compare_functions(a, fed, common=True).failures] == names


class Turned(nn.Module):
    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * turns, n=8)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turned = Turned()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.turned(x, torch.polar(torch.ones(5), torch.arange(5.0)))


def test_complex_numbers_that_a_module_is_given_are_recorded() -> None:
    found = of_torch.record(Outer(), (torch.from_numpy(X),), deltas=False)
    assert np.allclose(np.asarray(found.tensors["forward/turned@in"]), np.stack([TURNS.real, TURNS.imag], -1))


def test_complex_weights_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="weights: turns: dtype = complex64: must be real"):
        of_jax.record(lambda weights, x: in_jax(x, weights["turns"]), (X,), weights={"turns": TURNS})
