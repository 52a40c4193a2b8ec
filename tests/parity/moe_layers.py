"""One mixture-of-experts layer of each implementation, on the same weights and inputs: everything that is compared.

Backends are reached through their modules at call time, so that a mutated backend can stand in for the real one.

Shapes: B batch, S sequence, T = B * S tokens, D model dim, F expert width, E experts, k choices of each token.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from shared_config.parity.numerics import as_float64, perturb, rms, unit_roundoff
from tests.oracle import moe as oracle_moe
from tests.oracle import router as oracle_router
from tests.oracle.linear import below
from tests.oracle.weights import draw

Arrays = dict[str, np.ndarray]
BACKENDS = ("torch", "jax")
GATE = "router.gate.weight"
AUX_WEIGHT, Z_WEIGHT = 0.7, 0.3


@dataclass(frozen=True)
class Layer:
    """What a layer is built from: sizes without square matrices, and the options of `build_moe`."""

    num_experts: int = 5
    top_k: int = 2
    activation: str = "silu"
    router_type: str = "softmax_topk"
    shared_experts: int = 0
    capacity_factor: float = 0.0
    gradient_scale: bool = False
    sequence_aux_loss_weight: float = 0.0
    bias_schedule: str = "constant"
    packed_experts: bool = False
    norm_topk_prob: bool = True
    routed_scaling: float = 1.0
    dim: int = 10
    hidden_dim: int = 6

    def build(self, backend: str) -> Any:
        """The module of one backend, float32."""
        options = {name: value for name, value in vars(self).items() if name not in ("dim", "hidden_dim")}
        extra = {"rngs": None} if backend == "jax" else {}
        return module(backend, "moe").build_moe(self.dim, self.hidden_dim, **options, **extra)

    @property
    def oracle_options(self) -> oracle_moe.MoEOptions:
        """The same options for the specification."""
        return oracle_moe.MoEOptions(
            top_k=self.top_k,
            activation=self.activation,
            router=self.router_type,
            capacity_factor=self.capacity_factor,
            gradient_scale=self.gradient_scale,
            sequence_aux_loss_weight=self.sequence_aux_loss_weight,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling=self.routed_scaling,
        )

    def weights(self, seed: int = 1) -> Arrays:
        """float64 weights and buffers under which nothing hides."""
        E, D, F = self.num_experts, self.dim, self.hidden_dim
        shapes: dict[str, tuple[int, ...]] = {GATE: (E, D)}
        if self.router_type == "sigmoid_topk":
            shapes |= {"router.expert_bias": (E,), "router.expert_ema": (E,)}
        if self.packed_experts:
            shapes |= {"gate_w": (E, D, F), "up_w": (E, D, F), "down_w": (E, F, D)}
        for e in range(0 if self.packed_experts else E):
            shapes |= below(f"experts.{e}", _mlp_shapes(D, F))  # type: ignore[arg-type]
        if self.shared_experts:
            shapes |= below("shared_expert", _mlp_shapes(D, F * self.shared_experts))  # type: ignore[arg-type]
        if self.activation != "silu":
            shapes = {name: shape for name, shape in shapes.items() if "gate_proj" not in name and name != "gate_w"}
        return draw(shapes, seed)

    def unpacked(self, weights: Mapping[str, np.ndarray]) -> Arrays:
        """The weights of a packed layer under the names of an unpacked one."""
        found = {name: value for name, value in weights.items() if not name.endswith("_w")}
        for name in ("gate", "up", "down"):
            for e, matrix in enumerate(weights.get(f"{name}_w", ())):
                found[f"experts.{e}.{name}_proj.weight"] = matrix.T
        return found


@dataclass(frozen=True)
class Run:
    """What one forward and backward gave.

    Attributes:
        values: output, routing weights, aux_loss, z_loss, entropy.
        gradients: of sum(output * cotangent) + AUX_WEIGHT aux_loss + Z_WEIGHT z_loss, by weight, and of "x".
        indices_Tk: the experts chosen.
        counts_E: choices of each expert.
        dropped: choices without room.
    """

    values: Arrays
    gradients: Arrays
    indices_Tk: np.ndarray
    counts_E: np.ndarray
    dropped: int

    def __getattr__(self, name: str) -> np.ndarray:
        values = object.__getattribute__(self, "values")
        if name in values:
            return values[name]
        raise AttributeError(name)

    @property
    def named(self) -> Arrays:
        """Values and gradients, these under "gradient/..."."""
        return self.values | {f"gradient/{name}": value for name, value in self.gradients.items()}


def run_oracle(layer: Layer, weights: Mapping[str, np.ndarray], x_BSD: Any, valid_BS: Any = None) -> Run:
    """The executable specification, in float64."""
    wide = {name: as_float64(value) for name, value in weights.items()}
    x_BSD = as_float64(x_BSD)
    y_BSD, saved = oracle_moe.moe(x_BSD, wide, layer.oracle_options, valid_BS)
    dx, gradients = oracle_moe.moe_backward(
        cotangent(y_BSD.shape), x_BSD, saved, wide, layer.oracle_options, AUX_WEIGHT, Z_WEIGHT
    )
    routing = saved.routing
    shares_TE = routing.scores_TE / routing.scores_TE.sum(axis=-1, keepdims=True)
    entropy_T = -(shares_TE * np.log(shares_TE)).sum(axis=-1)[routing.valid_T]
    values = {
        "output": y_BSD,
        "weights": routing.weights_Tk,
        "aux_loss": np.asarray(routing.aux_loss, np.float64),
        "z_loss": np.asarray(routing.z_loss, np.float64),
        "entropy": np.asarray(entropy_T.mean() if len(entropy_T) else 0.0),
    }
    return Run(values, {**gradients, "x": dx}, routing.indices_Tk, routing.counts_E, saved.dropped)


def run(
    backend: str,
    layer: Layer,
    weights: Mapping[str, np.ndarray],
    x_BSD: Any,
    valid_BS: Any = None,
    dtype: str = "float64",
) -> Run:
    """One backend: torch eagerly, JAX under one jit. In bfloat16 gate and buffers are float32."""
    found = (_run_torch if backend == "torch" else _run_jax)(layer, weights, x_BSD, valid_BS, dtype)
    values, gradients, (indices_Tk, counts_E, dropped) = found
    return Run(values, gradients, indices_Tk, counts_E, int(dropped))


def cotangent(shape: Any) -> np.ndarray:
    """Weights of the output's elements in the loss, of values that bfloat16 holds exactly."""
    values = np.random.default_rng(17).uniform(0.5, 1.5, tuple(shape))
    values = values * np.where(np.arange(values.size).reshape(values.shape) % 3 == 0, -1.0, 1.0)
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


@contextlib.contextmanager
def replaying(*indices_Tk: np.ndarray) -> Iterator[None]:
    """Let the specification's routers choose these experts, call by call, over and over."""
    calls = iter(range(10**9))

    def recorded(scores: np.ndarray, k: int) -> np.ndarray:
        return indices_Tk[next(calls) % len(indices_Tk)]

    with mock.patch.object(oracle_router, "top_k_lowest_first", recorded):
        yield


def deltas(layer: Layer, weights: Arrays, x_BSD: Any, valid_BS: Any, dtype: str, runs: int = 3) -> dict[str, float]:
    """RMS change of each value and gradient when every weight moves by a rounding of the dtype that it is held in."""
    truth, rng = run_oracle(layer, weights, x_BSD, valid_BS).named, np.random.default_rng(0)
    found = dict.fromkeys(truth, 0.0)
    for _ in range(runs):
        full = {name: value for name, value in weights.items() if is_full_precision(name)}
        rest = {name: value for name, value in weights.items() if name not in full}
        roundoffs = {"bfloat16": (2.0**-24, 2.0**-8)}.get(dtype, (unit_roundoff(dtype),) * 2)
        moved = {**perturb(full, roundoffs[0], rng), **perturb(rest, roundoffs[1], rng)}
        other = run_oracle(layer, moved, x_BSD, valid_BS).named
        found = {name: max(found[name], rms(other[name] - truth[name])) for name in truth}
    return found


def is_full_precision(name: str) -> bool:
    """Whether a weight or buffer stays float32 when the rest is bfloat16."""
    return ".router." in f".{name}"


def route_margins(layer: Layer, weights: Arrays, x_BSD: Any, indices_Tk: np.ndarray) -> float:
    """By how much the chosen experts fall short of the best ones in float64, at most; 0 for the exact routes, order
    included.
    """
    wide = {name: as_float64(value) for name, value in weights.items()}
    x_TD = as_float64(x_BSD).reshape(-1, layer.dim)
    routing = oracle_moe.route(
        x_TD,
        {name.removeprefix("router."): value for name, value in wide.items() if name.startswith("router.")},
        layer.oracle_options,
        np.ones(len(x_TD), bool),
        np.zeros(len(x_TD), int),
    )
    preference_TE = routing.scores_TE + wide.get("router.expert_bias", 0.0)
    best_Tk = np.take_along_axis(preference_TE, routing.indices_Tk, axis=1)
    return float(np.max(best_Tk - np.take_along_axis(preference_TE, indices_Tk, axis=1), initial=0.0))


def module(backend: str, name: str) -> ModuleType:
    """A module of one backend as it is loaded now."""
    return importlib.import_module(f"kempnerforge_{backend}.model.{name}")


def build_with(backend: str, layer: Layer, weights: Mapping[str, np.ndarray], dtype: str = "float64") -> Any:
    """The module of one backend with these weights, cast as a training step casts them."""
    built = layer.build(backend)
    held = "float32" if dtype == "bfloat16" else dtype
    if backend == "torch":
        built.to(getattr(torch, dtype))
        built.router.to(getattr(torch, held))
    else:
        built.to(jnp.dtype(dtype))
        built.router.to(jnp.dtype(held))
    module(backend, "state").set_state(built, weights)
    return built


def _mlp_shapes(dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {"gate_proj.weight": (hidden, dim), "up_proj.weight": (hidden, dim), "down_proj.weight": (dim, hidden)}


def _run_torch(
    layer: Layer, weights: Mapping[str, np.ndarray], x_BSD: Any, valid_BS: Any, dtype: str
) -> tuple[Arrays, Arrays, Sequence[Any]]:
    built = build_with("torch", layer, weights, dtype)
    routes: list[Any] = []
    built.router.register_forward_hook(lambda _, __, output: routes.append(output))
    x = torch.from_numpy(as_float64(x_BSD)).to(getattr(torch, dtype)).requires_grad_()
    valid = None if valid_BS is None else torch.from_numpy(valid_BS)
    y, stats = built(x, valid, return_stats=True)
    ((routing_weights, indices, _),) = routes
    parameters = dict(built.named_parameters())
    loss = (y * torch.from_numpy(cotangent(y.shape)).to(y.dtype)).sum().to(stats.aux_loss.dtype)
    loss = loss + AUX_WEIGHT * stats.aux_loss + Z_WEIGHT * stats.z_loss
    gradients = torch.autograd.grad(loss, [*parameters.values(), x])
    to_numpy = module("torch", "state").to_numpy
    values = {"output": y, "weights": routing_weights, **_scalars(stats)}
    named = dict(zip([*parameters, "x"], gradients, strict=True))
    return (
        {name: to_numpy(value) for name, value in values.items()},
        {name: to_numpy(value) for name, value in named.items()},
        [to_numpy(value) for value in (indices, stats.expert_counts, stats.dropped)],
    )


def _run_jax(
    layer: Layer, weights: Mapping[str, np.ndarray], x_BSD: Any, valid_BS: Any, dtype: str
) -> tuple[Arrays, Arrays, Sequence[Any]]:
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        function, params, buffers = _compiled(layer, dtype, fingerprint())
        own = {name: jnp.asarray(weights[name], array.dtype) for name, array in params.items()}
        held = {name: jnp.asarray(weights[name], array.dtype) for name, array in buffers.items()}
        valid = None if valid_BS is None else jnp.asarray(valid_BS)
        values, gradients, rest = function(own, held, jnp.asarray(as_float64(x_BSD), dtype), valid)
        to_numpy = module("jax", "state").to_numpy
        return (
            {name: to_numpy(value) for name, value in values.items()},
            {name: to_numpy(value) for name, value in gradients.items()},
            [to_numpy(value) for value in rest],
        )


@lru_cache(maxsize=64)
def _compiled(layer: Layer, dtype: str, identity: tuple[int, ...]) -> tuple[Callable[..., Any], Any, Any]:
    state = module("jax", "state")
    graphdef, params, buffers = state.split(build_with("jax", layer, layer.weights(), dtype))

    def forward(trained: Any, buffers: Any, valid: Any) -> Any:
        built = state.merge(graphdef, {name: value for name, value in trained.items() if name != "x"}, buffers)
        routes: list[Any] = []

        def observe(observed: Any, output: Any) -> None:
            if observed is built.router:
                routes.append(output)

        with module("jax", "module").observing(observe):
            y, stats = built(trained["x"], valid, return_stats=True)
        ((routing_weights, indices, _),) = routes
        loss = (y * jnp.asarray(cotangent(y.shape), y.dtype)).sum().astype(stats.aux_loss.dtype)
        loss = loss + AUX_WEIGHT * stats.aux_loss + Z_WEIGHT * stats.z_loss
        values = {"output": y, "weights": routing_weights, **_scalars(stats)}
        return loss, (values, (indices, stats.expert_counts, stats.dropped))

    @jax.jit
    def function(params: Any, buffers: Any, x: Any, valid: Any) -> Any:
        gradients, (values, rest) = jax.grad(forward, has_aux=True)({**params, "x": x}, buffers, valid)
        return values, gradients, rest

    return function, params, buffers


def fingerprint() -> tuple[int, ...]:
    """Tells one state of the JAX modules from another: identities of all functions in them."""
    found: list[int] = []
    for name in ("router", "grouped", "moe", "mlp", "linear"):
        for value in vars(module("jax", name)).values():
            members = vars(value).values() if isinstance(value, type) else [value]
            found += [id(member) for member in members if callable(member)]
    return tuple(found)


def _scalars(stats: Any) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in ("aux_loss", "z_loss", "entropy")}


def with_fields(layer: Layer, **fields: Any) -> Layer:
    """The layer with other options."""
    return replace(layer, **fields)
