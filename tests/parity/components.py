"""One module of both backends on the same weights and inputs: its output, and the gradients of every weight and input.

A `Component` is run through `run_torch` (eagerly) and `run_jax` (under jit). Modules are built when a run asks for
them, so that a mutated backend can stand in for the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from kempnerforge_jax.model import state as jax_state
from kempnerforge_torch.model import state as torch_state
from shared_config.contract.specs import ParameterTable
from shared_config.parity.numerics import perturbation_delta, unit_roundoff
from tests.oracle.gradient import directional_derivative, random_direction
from tests.oracle.weights import draw
from tests.tolerance import (
    BFLOAT16_K,
    FORWARD_K,
    GRADIENT_K,
    assert_all_same_function,
    assert_all_within,
    assert_same_function,
    rms,
)

Arrays = dict[str, np.ndarray]
GRADIENT = "gradient/"


@dataclass(frozen=True, eq=False)
class Component:
    """What is compared.

    Attributes:
        torch, jax: build the module; JAX's builder is given ``rngs``.
        table: its parameters.
        call: (module, named inputs) -> output, the same code for both backends.
        oracle: (weights, named inputs) -> the same output.
        fixed: names of weights and inputs without a gradient.
        vanishing: name -> namesake, where the gradient is 0 but for rounding (a key bias, which moves all scores of a
            query alike), and what its size is compared to.
    """

    torch: Callable[[], Any]
    jax: Callable[..., Any]
    table: ParameterTable
    call: Callable[[Any, Mapping[str, Any]], Any]
    oracle: Callable[[Arrays, Arrays], np.ndarray] | None = None
    fixed: tuple[str, ...] = ()
    vanishing: Mapping[str, str] = field(default_factory=dict)

    def weights(self, seed: int = 1) -> Arrays:
        """float64 weights under which nothing hides."""
        return draw({name: spec.shape for name, spec in self.table.items()}, seed)


def run_torch(component: Component, weights: Arrays, inputs: Arrays, dtype: str = "float64") -> Arrays:
    """Output, and gradients of sum(output * cotangent) under "gradient/..."."""
    kind = getattr(torch, dtype)
    module = component.torch().eval()
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(_held_in(component, name, kind, torch.float32))
    torch_state.set_state(module, weights)
    given = {name: _as_torch(value, kind) for name, value in inputs.items()}
    moving = {name: value for name, value in given.items() if _moves(component, name, inputs[name])}
    for value in moving.values():
        value.requires_grad_()
    output = component.call(module, given)
    parameters = {name: p for name, p in module.named_parameters() if name not in component.fixed}
    loss = (output * _as_torch(cotangent(output.shape), output.dtype)).sum()
    sources = {**parameters, **moving}
    gradients = torch.autograd.grad(loss, list(sources.values())) if sources else ()
    named = {GRADIENT + name: gradient for name, gradient in zip(sources, gradients, strict=True)}
    return {name: torch_state.to_numpy(value) for name, value in {"output": output, **named}.items()}


def run_jax(component: Component, weights: Arrays, inputs: Arrays, dtype: str = "float64") -> Arrays:
    """The same from JAX, under one jit; 64 bits are on for float64 only."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        function, own, buffers = _compiled(component, dtype)
        trained = {name: jnp.asarray(weights[name], array.dtype) for name, array in own.items()}
        arrays = {name: _as_jax(value, dtype) for name, value in inputs.items()}
        held = {name: trained.pop(name) for name in list(trained) if name in component.fixed}
        trained |= {f"input/{name}": arrays.pop(name) for name in list(arrays) if _moves(component, name, inputs[name])}
        output, gradients = function(trained, {**buffers, **held}, arrays)
        named = {GRADIENT + name.removeprefix("input/"): value for name, value in gradients.items()}
        return {name: jax_state.to_numpy(value) for name, value in {"output": output, **named}.items()}


def assert_parity(
    component: Component,
    inputs: Arrays,
    *,
    rounded: tuple[str, ...] = ("float32", "bfloat16"),
    context: Any = None,
) -> None:
    """Both backends and the oracle: float64 at 1e-12, the dtypes of ``rounded`` at K * delta.

    Where experts are chosen, a rounding may change a choice; bfloat16 is then compared where nothing is left to choose.
    """
    weights = component.weights()
    truth, other = run_torch(component, weights, inputs), run_jax(component, weights, inputs)
    for found in (truth, other):
        _drop_vanishing(component, found, unit_roundoff("float64"))
    assert_all_same_function(other, truth, context=context)
    if component.oracle is not None:
        _assert_oracle(component, weights, inputs, truth)
    for dtype in rounded:
        assert_rounded_parity(component, weights, inputs, dtype, context)


def assert_rounded_parity(component: Component, weights: Arrays, inputs: Arrays, dtype: str, context: Any) -> None:
    """Both backends in ``dtype`` against the float64 truth."""
    roundoff = unit_roundoff(_numpy(dtype))
    moving = {name: value for name, value in inputs.items() if _moves(component, name, value)}

    def outputs(moved: Mapping[str, np.ndarray]) -> Arrays:
        own = {name: moved[name] for name in weights}
        found = run_torch(component, own, {**inputs, **{name: moved[f"input/{name}"] for name in moving}})
        _drop_vanishing(component, found, unit_roundoff("float64"))
        return found

    everything = {**weights, **{f"input/{name}": value for name, value in moving.items()}}
    truth, deltas = outputs(everything), perturbation_delta(outputs, everything, roundoff)
    for run in (run_torch, run_jax):
        found = run(component, weights, inputs, dtype)
        _drop_vanishing(component, found, roundoff)
        for forward in (True, False):
            K = BFLOAT16_K if dtype == "bfloat16" else FORWARD_K if forward else GRADIENT_K
            part = {name: value for name, value in truth.items() if (name == "output") == forward}
            assert_all_within(
                {name: found[name] for name in part},
                part,
                deltas,
                K,
                roundoff=roundoff,
                context=f"{run.__name__} {dtype} {context}",
            )


def cotangent(shape: Any) -> np.ndarray:
    """Weights of the output's elements in the loss: far from 0, of both signs."""
    values = np.random.default_rng(17).uniform(0.5, 1.5, tuple(shape))
    return values * np.where(np.arange(values.size).reshape(values.shape) % 3 == 0, -1.0, 1.0)


def _drop_vanishing(component: Component, found: Arrays, roundoff: float) -> None:
    """Check that they are of rounding's size, and take them out of the comparison of relative errors."""
    for name, namesake in component.vanishing.items():
        gradient = rms(found.pop(GRADIENT + name))
        assert gradient <= 100 * roundoff * rms(found[GRADIENT + namesake]), f"{name}: gradient {gradient}, must be 0"


def _assert_oracle(component: Component, weights: Arrays, inputs: Arrays, truth: Arrays) -> None:
    oracle = component.oracle
    assert oracle is not None
    output = oracle(weights, inputs)
    assert_same_function(truth["output"], output, "output")
    scale = cotangent(output.shape)
    sources = {**weights, **inputs}

    def loss(moved: Mapping[str, np.ndarray]) -> Any:
        split = [{name: moved[name] for name in part} for part in (weights, inputs)]
        return np.sum(oracle(*split) * scale)

    claimed = {name.removeprefix(GRADIENT): value for name, value in truth.items() if name.startswith(GRADIENT)}
    direction = random_direction(claimed, np.random.default_rng(5))
    parts = [float(np.sum(gradient * direction[name])) for name, gradient in claimed.items()]
    gap = abs(sum(parts) - float(directional_derivative(loss, sources, direction)))
    assert gap <= 1e-11 * float(np.linalg.norm(parts)), f"gradients against a complex step: off by {gap}, of {parts}"


@lru_cache(maxsize=64)
def _compiled(component: Component, dtype: str) -> tuple[Callable[..., Any], Any, Any]:
    module = component.jax(rngs=None)
    graphdef, params, buffers = jax_state.split(module)
    own = {
        name: jax.ShapeDtypeStruct(array.shape, _held_in(component, name, jnp.dtype(dtype), jnp.dtype("float32")))
        for name, array in params.items()
    }

    def loss(trained: Any, held: Any, arrays: Any) -> Any:
        named = {name: value for name, value in trained.items() if not name.startswith("input/")}
        own = {name: value for name, value in held.items() if name in params}
        rest = {name: value for name, value in held.items() if name not in params}
        given = {name.removeprefix("input/"): value for name, value in trained.items() if name.startswith("input/")}
        output = component.call(jax_state.merge(graphdef, {**named, **own}, rest), {**arrays, **given})
        return (output * jnp.asarray(cotangent(output.shape), output.dtype)).sum(), output

    @jax.jit
    def run(trained: Any, held: Any, arrays: Any) -> Any:
        gradients, output = jax.grad(loss, has_aux=True)(trained, held, arrays)
        return output, gradients

    return run, own, buffers


def _held_in(component: Component, name: str, dtype: Any, full: Any) -> Any:
    """What decides a route stays float32 when the rest is bfloat16."""
    is_bfloat16 = str(dtype).endswith("bfloat16")
    return full if is_bfloat16 and component.table[name].full_precision else dtype


def _moves(component: Component, name: str, value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating) and name not in component.fixed


def _as_torch(value: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(value)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _as_jax(value: np.ndarray, dtype: str) -> jax.Array:
    if np.issubdtype(value.dtype, np.floating):
        return jnp.asarray(value, dtype)
    return jnp.asarray(value, jnp.int32 if value.dtype.kind in "iu" else None)


def _numpy(dtype: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
