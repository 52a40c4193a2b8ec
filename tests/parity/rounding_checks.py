"""Parts of the models in bfloat16, against themselves in float64 on the same numbers: a few roundings per row, no more.

What they give in float32, of narrow inputs, is as exact as float32. Rows are those of the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

from shared_config.parity.numerics import UNIT_ROUNDOFF, as_float64
from tests.parity import precision_jax, precision_torch
from tests.parity.backends import BACKENDS
from tests.parity.precision import Operation

Arrays = dict[str, np.ndarray]
NARROW_ROUNDINGS, WIDE_ROUNDINGS = 4.0, 8.0
"""Of what is given in bfloat16, and in float32; the most that was seen is 2.3 (JAX 0.11: 3.6) and 4.9."""
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
    function, full = backend.module("model.attention").attend, backend.module("model.mask").FULL
    return lambda q, k, v: function(q, k, v, full)


def attend_to_some(backend: Any, dtype: str) -> Callable[..., Any]:
    function = backend.module("model.attention").attend
    seen = np.tril(np.ones((20, 20), bool)) & (np.arange(20) % 5 != 3)
    return lambda q, k, v: function(q, k, v, backend.array(seen[None, None]))


def attend_capped(backend: Any, dtype: str) -> Callable[..., Any]:
    function = backend.module("model.attention").attend
    return lambda q, k, v: function(q, k, v, softcap=2.0)


def soft_cap(backend: Any, dtype: str) -> Callable[..., Any]:
    function = backend.module("model.softcap").soft_capped
    return lambda x: function(x, 1.5)


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
    return lambda x: tables(places, x.dtype)[0]


def module_of(path: str, name: str, *sizes: Any, **options: Any) -> Callable[[Any, str], Callable[..., Any]]:
    """A module with drawn weights."""

    def build(backend: Any, dtype: str) -> Callable[..., Any]:
        return with_weights(backend, backend.build(getattr(backend.module(path), name), *sizes, dtype=dtype, **options))

    return build


def with_weights(backend: Any, module: Any) -> Any:
    state, rng = backend.module("model.state"), np.random.default_rng(9)
    state.set_state(module, {key: drawn(rng, tuple(value.shape)) for key, value in state.get_state(module).items()})
    return module


def drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def experts_that_choose(backend: Any, dtype: str) -> Callable[..., Any]:
    moe = backend.module("model.moma").ExpertChoiceMoE
    return with_weights(backend, backend.build(moe, WIDTH, 48, 3, 0.0, gumbel_noise=False, dtype=dtype))


def draw(backend: Any, dtype: str) -> Callable[..., Any]:
    """Sampling, as one function of the logits and of uniform numbers."""
    function = backend.module("model.sampling").draw
    return lambda logits, uniforms: function(logits, uniforms, 0.7, 5, 0.9)


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
    layer = backend.build(backend.module("model.embedding").TokenEmbedding, VOCAB, WIDTH, dtype=dtype)
    ids = backend.array(np.arange(REPEATS, dtype=np.int32) % VOCAB)
    return lambda table: with_parameter(backend, layer, "embedding.weight", table)(ids)


def with_parameter(backend: Any, module: Any, name: str, value: Any) -> Callable[..., Any]:
    """The module as a function of its inputs, with another value of a parameter."""
    if backend.name == "torch":
        return lambda *inputs: torch.func.functional_call(module, {name: value}, inputs)
    state = backend.module("model.state")
    graphdef, params, buffers = state.split(module)
    return state.merge(graphdef, {**params, name: value}, buffers)


def biased(backend: Any, dtype: str) -> Callable[..., Any]:
    """Hundreds of rows with one bias, as functions of it."""
    layer: Any = module_of("model.linear", "Linear", WIDTH, WIDTH, True)(backend, dtype)
    rows = np.random.default_rng(3).standard_normal((REPEATS, WIDTH)).astype(ml_dtypes.bfloat16)
    rows = backend.array(rows.astype(np.float64), dtype)
    return lambda bias: with_parameter(backend, layer, "bias", bias)(rows)


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
    "attend with a soft cap": Part(attend_capped, HEADS, 2.0),
    "soft cap": Part(soft_cap, ROWS),
    "probabilities": Part(probabilities, HEADS[:2], 2.0),
    "rotation": Part(rotation, ((2, TOKENS, HEAD),)),
    "rotary tables": Part(rotary_tables, ROWS, has_gradient=False),
    "RMSNorm": Part(module_of("model.norm", "RMSNorm", WIDTH), ROWS, 3.0),
    "RMSNorm by 1 + weight": Part(module_of("model.norm", "UnitRMSNorm", WIDTH), ROWS, 3.0),
    "LayerNorm": Part(module_of("model.norm", "LayerNorm", WIDTH), ROWS, 3.0),
    "SwiGLU": Part(module_of("model.mlp", "SwiGLUMLP", WIDTH, 48), ROWS),
    "GEGLU": Part(module_of("model.mlp", "GEGLUMLP", WIDTH, 48), ROWS),
    "gelu": Part(module_of("model.mlp", "StandardMLP", WIDTH, 48, "gelu"), ROWS),
    "experts": Part(module_of("model.moe", "build_moe", WIDTH, 48, EXPERTS, 2, shared_experts=1), ((1, *ROWS[0]),)),
    "packed experts": Part(
        module_of("model.moe", "build_moe", WIDTH, 48, EXPERTS, 2, packed_experts=True, gradient_scale=True),
        ((1, *ROWS[0]),),
    ),
    "experts that choose": Part(experts_that_choose, ((1, *ROWS[0]),)),
    "quick_gelu": Part(module_of("model.vision", "VisionMLP", WIDTH, 48, "quick_gelu"), ROWS),
    "gelu_tanh": Part(module_of("model.vision", "VisionMLP", WIDTH, 48, "gelu_pytorch_tanh"), ROWS),
    "combine weights": Part(combine_weights, ROWS),
    "balanced weights": Part(balanced_weights, ROWS),
    "losses of routers": Part(losses_of_routers, ROWS),
    "loss": Part(loss, ROWS, 3.0),
    "look-up": Part(look_up, ((VOCAB, WIDTH),)),
    "bias": Part(biased, ((WIDTH,),)),
    "pooled": Part(module_of("model.adapter", "AvgPoolAdapter", WIDTH, WIDTH, 4), ((2, 64, WIDTH),)),
    "tiled_outer": Part(grouped("tiled_outer"), MANY, has_gradient=False),
    "looped_outer": Part(grouped("looped_outer"), MANY, has_gradient=False),
    "grouped_matmul": Part(grouped("grouped_matmul"), (MANY[0], (3, WIDTH, 16)), has_gradient=False),
    "tiled_matmul": Part(grouped("tiled_matmul"), (MANY[0], (3, WIDTH, 16)), has_gradient=False),
}
DRAW = Part(draw, ((2, 3, WIDTH), (2, 3)), 2.0, has_gradient=False)
"""Gives integers."""


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


def narrow_operations(backend: Any, part: str, *, with_gradient: bool = True) -> list[Operation]:
    """Of a part, and its gradient, in bfloat16."""
    chosen = {**PARTS, "draw": DRAW}[part]
    chosen = replace(chosen, has_gradient=chosen.has_gradient and with_gradient)
    function, name = chosen.build(backend, "bfloat16"), backend.name
    inputs = [backend.array(array, "bfloat16") for array in chosen.inputs()]
    if name == "torch":
        return precision_torch.narrow_operations(lambda: differentiated(backend, chosen, function, inputs))
    with jax.default_matmul_precision("bfloat16"):
        return precision_jax.narrow_operations(lambda *given: differentiated(backend, chosen, function, given), *inputs)


def evaluate(backend: Any, names: Sequence[str], dtype: str) -> Arrays:
    """Outputs, and gradients under "d NAME i"."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        functions = {name: PARTS[name].build(backend, dtype) for name in names}
        inputs = {name: [backend.array(array, dtype) for array in PARTS[name].inputs()] for name in names}

        def program(inputs: dict[str, list[Any]]) -> dict[str, Any]:
            results: dict[str, Any] = {}
            for name in names:
                output, *gradients = differentiated(backend, PARTS[name], functions[name], inputs[name])
                results |= {name: output, **{f"d {name} {i}": gradient for i, gradient in enumerate(gradients)}}
            return results

        return backend.numpy(program(inputs) if backend.name == "torch" else jax.jit(program)(inputs))


def differentiated(backend: Any, part: Part, function: Callable[..., Any], inputs: Sequence[Any]) -> list[Any]:
    """The output, and the gradient of each input."""
    if not part.has_gradient:
        return [function(*inputs)]
    if backend.name == "jax":
        output, backward = jax.vjp(function, *inputs)
        return [output, *backward(jax.numpy.asarray(cotangent(output.shape), output.dtype))]
    for tensor in inputs:
        tensor.requires_grad_()
    output = function(*inputs)
    given = backend.array(cotangent(output.shape).astype(str(output.dtype).removeprefix("torch.")))
    return [output, *torch.autograd.grad(output, list(inputs), given)]


def cotangent(shape: Sequence[int]) -> np.ndarray:
    """Positive, so that sums of many don't cancel."""
    drawn = np.random.default_rng(4).uniform(0.5, 1.5, shape)
    return drawn.astype(ml_dtypes.bfloat16).astype(np.float64)


SIDES = {backend.name: backend for backend in BACKENDS}


def check_roundings(name: str, parts: Sequence[str] = tuple(PARTS)) -> None:
    """No row is further from the truth than the roundings of its dtype allow."""
    backend = SIDES[name]
    truth, found = (evaluate(backend, parts, dtype) for dtype in ("float64", "bfloat16"))
    for part, value in found.items():
        allowed = NARROW_ROUNDINGS if value.dtype == ml_dtypes.bfloat16 else WIDE_ROUNDINGS
        error = worst_row(value, truth[part], is_gradient=part.startswith("d "))
        assert error <= allowed, f"{part} of {name}: {error:.2f} roundings of {value.dtype}, {allowed} allowed"


def check_factors(name: str) -> None:
    """A number that bfloat16 does not hold multiplies and divides, forward and backward, as the number that it is."""
    backend = SIDES[name]
    factors = backend.module("model.factors")
    x = np.arange(1, 2, 2**-7).astype(ml_dtypes.bfloat16)
    for number in (0.3, 1 + 2**-8, 55.4256, 1 / 3):
        for function, operation in ((factors.scaled, np.multiply), (factors.divided, np.divide)):
            part = Part(attend, (x.shape,))
            given = [backend.array(x.astype(np.float64), "bfloat16")]
            output, gradient = differentiated(backend, part, lambda x, f=function, n=number: f(x, n), given)
            for found, of in ((output, x), (gradient, cotangent(x.shape))):
                expected = operation(of.astype(np.float32), np.float32(number)).astype(ml_dtypes.bfloat16)
                difference = as_float64(backend.numpy(found)) - as_float64(expected)
                assert not difference.any(), f"{function.__name__} by {number} in {name}: {difference}"
