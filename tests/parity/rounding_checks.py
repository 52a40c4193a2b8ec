"""Parts of the models in bfloat16, against themselves in float64 on the same numbers: a few roundings a row, no more.

What they give in float32, of narrow inputs, is as exact as float32. Rows are those of the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

from shared_config.numerics import UNIT_ROUNDOFF, as_float64
from tests.parity.backends import BACKENDS

Arrays = dict[str, np.ndarray]
NARROW_ROUNDINGS, WIDE_ROUNDINGS = 3.0, 8.0
"""Of what is given in bfloat16, and in float32; the most that was seen is 2.3 and 4.9."""
WIDTH, HEAD, TOKENS, EXPERTS, VOCAB, REPEATS = 24, 32, 40, 5, 7, 700


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        build: (backend, dtype) -> a function of the inputs.
        shapes: of the inputs, which are drawn normally; a gradient is taken with respect to each.
        scale: of the first input.
        has_gradient: False for what autograd is not to see, as another function is its gradient.
    """

    build: Callable[[Any, str], Callable[..., Any]]
    shapes: tuple[tuple[int, ...], ...]
    scale: float = 1.0
    has_gradient: bool = True

    def inputs(self) -> list[np.ndarray]:
        """Numbers that bfloat16 holds."""
        rng = np.random.default_rng(len(self.shapes))
        drawn = [rng.standard_normal(shape) for shape in self.shapes]
        drawn[0] = drawn[0] * self.scale
        return [array.astype(ml_dtypes.bfloat16).astype(np.float64) for array in drawn]


def attend(backend: Any, dtype: str) -> Callable[..., Any]:
    return backend.module("model.attention").attend


def attend_to_all(backend: Any, dtype: str) -> Callable[..., Any]:
    function = backend.module("model.attention").attend
    return lambda q, k, v: function(q, k, v, causal=False)


def attend_to_some(backend: Any, dtype: str) -> Callable[..., Any]:
    function = backend.module("model.attention").attend
    seen = np.tril(np.ones((20, 20), bool)) & (np.arange(20) % 5 != 3)
    return lambda q, k, v: function(q, k, v, backend.array(seen[None, None]))


def probabilities(backend: Any, dtype: str) -> Callable[..., Any]:
    return backend.module("model.attention").attention_weights


def rotation(backend: Any, dtype: str) -> Callable[..., Any]:
    """At positions that bfloat16 can't tell apart."""
    position = backend.module("model.position")
    tables = backend.build(position.RotaryTables, HEAD, 600, dtype=dtype)
    places = backend.array(np.arange(600 - TOKENS, 600))

    def rotate(x: Any) -> Any:
        return position.apply_rope(x, *tables(places, x.dtype))

    return rotate


def rotary_tables(backend: Any, dtype: str) -> Callable[..., Any]:
    tables = backend.build(backend.module("model.position").RotaryTables, HEAD, 600, dtype=dtype)
    places = backend.array(np.arange(600 - TOKENS, 600))
    return lambda x: tables(places, x.dtype)[0] * (1 + 0 * x.sum())


def module_of(path: str, name: str, *sizes: Any, **options: Any) -> Callable[[Any, str], Callable[..., Any]]:
    """A module with drawn weights."""

    def build(backend: Any, dtype: str) -> Callable[..., Any]:
        module = backend.build(getattr(backend.module(path), name), *sizes, dtype=dtype, **options)
        state = backend.module("model.state")
        rng = np.random.default_rng(9)
        weights = {key: drawn(rng, key, tuple(value.shape)) for key, value in state.get_state(module).items()}
        state.set_state(module, weights)
        return module

    return build


def drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def combine_weights(backend: Any, dtype: str) -> Callable[..., Any]:
    router = module_of("model.router", "SoftmaxTopKRouter", WIDTH, EXPERTS, 2)(backend, dtype)
    return lambda x: router(x)[0]


def balanced_weights(backend: Any, dtype: str) -> Callable[..., Any]:
    router = module_of("model.router", "SigmoidTopKRouter", WIDTH, EXPERTS, 2)(backend, dtype)
    return lambda x: router(x)[0]


def losses_of_routers(backend: Any, dtype: str) -> Callable[..., Any]:
    router = module_of("model.router", "SoftmaxTopKRouter", WIDTH, EXPERTS, 2)(backend, dtype)

    def losses(x: Any) -> Any:
        stats = router(x, return_stats=True)[2]
        return (stats.aux_loss + stats.z_loss).reshape(1)

    return losses


def loss(backend: Any, dtype: str) -> Callable[..., Any]:
    labels = backend.array(np.arange(TOKENS, dtype=np.int32)[None] % WIDTH)
    return lambda logits: backend.module("training.loss").cross_entropy(logits[None], labels)[0].reshape(1)


def look_up(backend: Any, dtype: str) -> Callable[..., Any]:
    """Few rows, each hundreds of times, as functions of the table."""
    ids = np.arange(REPEATS, dtype=np.int32) % VOCAB
    if backend.name == "jax":
        function = backend.module("model.linear")._look_up
        return lambda table: function(table, backend.array(ids))
    function = backend.module("model.embedding")._LookUp
    return lambda table: function.apply(table, backend.array(ids))


def biased(backend: Any, dtype: str) -> Callable[..., Any]:
    """Hundreds of rows with one bias, as functions of it."""
    path = "model.linear" if backend.name == "jax" else "model.matvec"
    layer: Any = module_of(path, "Linear", WIDTH, WIDTH, True)(backend, dtype)
    rows = np.random.default_rng(3).standard_normal((REPEATS, WIDTH)).astype(ml_dtypes.bfloat16)
    rows = backend.array(rows.astype(np.float64), dtype)
    if backend.name == "torch":
        return lambda bias: torch.func.functional_call(layer, {"bias": bias}, (rows,))
    state = backend.module("model.state")
    graphdef, params, buffers = state.split(layer)
    return lambda bias: state.merge(graphdef, {**params, "bias": bias}, buffers)(rows)


def grouped(name: str) -> Callable[[Any, str], Callable[..., Any]]:
    """A product over groups, one of them without rows, and rows of none."""

    def build(backend: Any, dtype: str) -> Callable[..., Any]:
        ends = backend.array(np.array([300, 300, 640], np.int32))
        return lambda x, y: getattr(backend.module("model.grouped"), name)(x, y, ends)

    return build


HEADS = ((2, 4, 20, HEAD), (2, 2, 20, HEAD), (2, 2, 20, HEAD))
FEW = ((2, 4, 6, HEAD), (2, 2, 9, HEAD), (2, 2, 9, HEAD))
ROWS = ((TOKENS, WIDTH),)
MANY = ((REPEATS, WIDTH), (REPEATS, WIDTH))
PARTS = {
    "attend": Part(attend, HEADS, 2.0),
    "attend to all": Part(attend_to_all, FEW, 2.0),
    "attend to some": Part(attend_to_some, HEADS, 2.0),
    "probabilities": Part(probabilities, HEADS[:2], 2.0),
    "rotation": Part(rotation, ((2, TOKENS, HEAD),)),
    "rotary tables": Part(rotary_tables, ROWS),
    "RMSNorm": Part(module_of("model.norm", "RMSNorm", WIDTH), ROWS, 3.0),
    "LayerNorm": Part(module_of("model.norm", "LayerNorm", WIDTH), ROWS, 3.0),
    "SwiGLU": Part(module_of("model.mlp", "SwiGLUMLP", WIDTH, 48), ROWS),
    "gelu": Part(module_of("model.mlp", "StandardMLP", WIDTH, 48, "gelu"), ROWS),
    "experts": Part(module_of("model.moe", "build_moe", WIDTH, 48, EXPERTS, 2, shared_experts=1), ((1, *ROWS[0]),)),
    "packed experts": Part(
        module_of("model.moe", "build_moe", WIDTH, 48, EXPERTS, 2, packed_experts=True, gradient_scale=True),
        ((1, *ROWS[0]),),
    ),
    "combine weights": Part(combine_weights, ROWS),
    "balanced weights": Part(balanced_weights, ROWS),
    "losses of routers": Part(losses_of_routers, ROWS),
    "loss": Part(loss, ROWS, 3.0),
    "look-up": Part(look_up, ((VOCAB, WIDTH),)),
    "bias": Part(biased, ((WIDTH,),)),
    "pooled": Part(module_of("model.adapter", "AvgPoolAdapter", WIDTH, WIDTH, 4), ((2, 64, WIDTH),)),
    "tiled_outer": Part(grouped("tiled_outer"), MANY, has_gradient=False),
    "looped_outer": Part(grouped("looped_outer"), MANY, has_gradient=False),
    "grouped_matmul": Part(grouped("grouped_matmul"), (MANY[0], (3, WIDTH, 16))),
    "tiled_matmul": Part(grouped("tiled_matmul"), (MANY[0], (3, WIDTH, 16)), has_gradient=False),
}


def worst_row(found: np.ndarray, truth: np.ndarray, *, is_gradient: bool) -> float:
    """Of gradients a row that cancels is measured by the size of the others."""
    roundoff = UNIT_ROUNDOFF[found.dtype.name]
    error, exact = (np.atleast_2d(as_float64(array)) for array in (as_float64(found) - truth, truth))
    size = np.sqrt(np.square(exact).mean(axis=-1))
    if is_gradient:
        size = np.maximum(size, np.sqrt(np.square(exact).mean()))
    distance = np.sqrt(np.square(error).mean(axis=-1))
    assert not distance[size == 0].any()
    return float((distance[size > 0] / size[size > 0]).max(initial=0.0) / roundoff)


def evaluate(backend: Any, names: Sequence[str], dtype: str) -> Arrays:
    """Outputs, and gradients under "d NAME i"."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        functions = {name: PARTS[name].build(backend, dtype) for name in names}
        inputs = {name: [backend.array(array, dtype) for array in PARTS[name].inputs()] for name in names}

        def program(inputs: dict[str, list[Any]]) -> dict[str, Any]:
            results: dict[str, Any] = {}
            for name in names:
                results |= differentiated(backend, name, functions[name], inputs[name])
            return results

        return backend.numpy(program(inputs) if backend.name == "torch" else jax.jit(program)(inputs))


def differentiated(backend: Any, name: str, function: Callable[..., Any], inputs: list[Any]) -> dict[str, Any]:
    if not PARTS[name].has_gradient:
        return {name: function(*inputs)}
    if backend.name == "jax":
        output, backward = jax.vjp(function, *inputs)
        gradients = backward(jax.numpy.asarray(cotangent(output.shape), output.dtype))
    else:
        for tensor in inputs:
            tensor.requires_grad_()
        output = function(*inputs)
        gradients = torch.autograd.grad(output, inputs, torch.from_numpy(cotangent(output.shape)).to(output.dtype))
    return {name: output, **{f"d {name} {i}": gradient for i, gradient in enumerate(gradients)}}


def cotangent(shape: Sequence[int]) -> np.ndarray:
    """Positive, so that sums of many don't cancel."""
    drawn = np.random.default_rng(4).uniform(0.5, 1.5, shape)
    return drawn.astype(ml_dtypes.bfloat16).astype(np.float64)


def check_roundings(name: str, parts: Sequence[str] = tuple(PARTS)) -> None:
    """No row is further from the truth than the roundings of its dtype allow."""
    backend = next(backend for backend in BACKENDS if backend.name == name)
    truth, found = (evaluate(backend, parts, dtype) for dtype in ("float64", "bfloat16"))
    for part, value in found.items():
        allowed = NARROW_ROUNDINGS if value.dtype == ml_dtypes.bfloat16 else WIDE_ROUNDINGS
        error = worst_row(value, truth[part], is_gradient=part.startswith("d "))
        assert error <= allowed, f"{part} of {name}: {error:.2f} roundings of {value.dtype}, {allowed} allowed"
