"""One way of speaking to either backend: NumPy arrays in and out, modules by name, functions jitted where there is jit.

Modules are imported when a test asks for them, so that a mutated backend can stand in for the real one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch.utils._pytree import tree_map_only

from shared_config.schema.model import ModelConfig


class Torch:
    """The torch backend, run eagerly."""

    name = "torch"

    def __repr__(self) -> str:
        return self.name

    def module(self, path: str) -> Any:
        """The module of this backend at a path, "model.norm"."""
        return importlib.import_module(f"kempnerforge_{self.name}.{path}")

    def array(self, value: Any, dtype: str | None = None) -> Any:
        """A tensor that shares nothing with ``value``."""
        copied = np.array(value)
        return self.module("model.state").from_numpy(copied, None if dtype is None else getattr(torch, dtype))

    def numpy(self, value: Any) -> Any:
        """Every tensor in a dict, list or tuple as NumPy, detached."""
        return tree_map_only(torch.Tensor, self.module("model.state").to_numpy, value)

    def build(self, builder: Any, *args: Any, dtype: str = "float64", **options: Any) -> Any:
        """A module in ``dtype``, with weights as it draws them: zeros would hide what is done with them."""
        return builder(*args, **options).to(getattr(torch, dtype))

    def model(self, config: ModelConfig, weights: Mapping[str, Any], dtype: str = "float64", **options: Any) -> Any:
        """A `Transformer` with these weights."""
        model = self.build(self.module("model.transformer").Transformer, config, dtype=dtype, **options)
        self.module("model.state").set_state(model, weights)
        return model

    def run(self, function: Callable[..., Any], *values: Any) -> Any:
        """What a function of arrays gives for these NumPy arrays."""
        with torch.no_grad():
            return self.numpy(function(*(self.array(value) for value in values)))

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a call gives; in JAX as one program, which compiles in the time of a few operators by themselves."""
        return function(*arguments, **options)

    def gradients(self, function: Callable[..., Any], *values: Any) -> list[np.ndarray]:
        """Of the sum of what the function gives, with respect to each array."""
        arrays = [self.array(value).requires_grad_() for value in values]
        return [self.numpy(gradient) for gradient in torch.autograd.grad(function(*arrays).sum(), arrays)]


class Jax(Torch):
    """The JAX backend, run under jit."""

    name = "jax"

    def array(self, value: Any, dtype: str | None = None) -> Any:
        return self.module("model.state").from_numpy(np.asarray(value), dtype)

    def numpy(self, value: Any) -> Any:
        return jax.tree.map(self.module("model.state").to_numpy, value)

    def build(self, builder: Any, *args: Any, dtype: str = "float64", **options: Any) -> Any:
        return builder(*args, rngs=nnx.Rngs(0), **options).to(dtype)

    def model(self, config: ModelConfig, weights: Mapping[str, Any], dtype: str = "float64", **options: Any) -> Any:
        transformer = self.module("model.transformer").Transformer
        model = nnx.eval_shape(lambda: transformer(config, rngs=None, **options).to(dtype))
        model.init_weights_and_freqs(seed=0)
        self.module("model.state").set_state(model, weights)
        return model

    def run(self, function: Callable[..., Any], *values: Any) -> Any:
        def traced_anew(*arrays: Any) -> Any:  # the function may hold a model, whose weights may have changed
            return function(*arrays)

        return self.numpy(jax.jit(traced_anew)(*(self.array(value) for value in values)))

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten((arguments, options))
        own = {id(leaf): leaf for leaf in leaves if isinstance(leaf, jax.Array)}  # what is given twice stays the same

        def traced(arrays: Sequence[jax.Array]) -> Any:
            given = dict(zip(own, arrays, strict=True))
            arguments, options = tree.unflatten(given.get(id(leaf), leaf) for leaf in leaves)
            return function(*arguments, **options)

        return jax.jit(traced)(list(own.values()))

    def gradients(self, function: Callable[..., Any], *values: Any) -> list[np.ndarray]:
        gradient = jax.grad(lambda *arrays: function(*arrays).sum(), argnums=tuple(range(len(values))))
        return list(self.run(gradient, *values))


BACKENDS = (Torch(), Jax())
on_both = pytest.mark.parametrize("backend", BACKENDS, ids=str)
