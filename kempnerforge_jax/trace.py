"""One forward, backward and optimiser step of a config, with every named activation: a recording to be compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Shaped

from kempnerforge_jax.device import find_device
from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.model.attention import KVCache
from kempnerforge_jax.model.build import build_model
from kempnerforge_jax.model.expert_choice import ExpertChoiceSigmoidRouter
from kempnerforge_jax.model.hooks import activation_names, capture, replacing
from kempnerforge_jax.model.module import Module, named_modules, observing, substituting
from kempnerforge_jax.model.state import from_numpy, get_state, merge, split, to_numpy
from kempnerforge_jax.model.stats import LayerStats, MoEStats
from kempnerforge_jax.model.vlm import inner_transformer
from kempnerforge_jax.training.loss import mean_cross_entropy, router_losses
from kempnerforge_jax.training.mixed_precision import matmul_precision, use_fp8
from kempnerforge_jax.training.optimizer import build_optimizer, clip_by_global_norm, set_optimizer_state, update
from shared_config.contract.initialise import state_hash
from shared_config.contract.labels import loss_terms
from shared_config.contract.schedule import Rates
from shared_config.contract.vision import job_table
from shared_config.interchange.vision import tower_of
from shared_config.interchange.weights import check_tensors
from shared_config.parity.recording import Recording, make_trace
from shared_config.parity.refeed import with_losses
from shared_config.parity.request import (
    WHOLE,
    Arrays,
    Request,
    cache_size,
    check_selection,
    decode_chunks,
    make_request,
    routing_values,
    transformer_path,
)
from shared_config.parity.traces import DECODE, FORWARD, GRADIENT, ROUTES, ROUTING, UPDATED, Trace
from shared_config.parity.validation import MOMENT_STEPS, validation_moments, validation_rates
from shared_config.schema.job import JobConfig

Tensors = dict[str, Shaped[Array, "..."]]

DTYPES = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "fp8": jnp.bfloat16}
EXACT = "float64"


def record(
    config: JobConfig,
    *,
    dtype: str = "float64",
    seed: int = 0,
    weights: str | Mapping[str, np.ndarray] = "validation",
    tokens: np.ndarray | None = None,
    deltas: bool = True,
    device: str | None = None,
    layers: Sequence[int] | None = None,
    only: Sequence[str] = (),
    refeed: Trace | None = None,
    routes: Trace | None = None,
) -> Trace:
    """Run the model of a config once and record every tensor that has a name.

    Args:
        dtype: of the arithmetic; "bfloat16" computes on a rounded copy of float32 masters, "fp8" also with products
            in FP8.
        weights: "validation", "init" (the seeded initial weights), or arrays by name.
        tokens: int (B, S); drawn from the seed if None.
        deltas: also measure, in float64, how far rounding the weights moves each result.
        device: platform, as "cpu"; None is JAX's default.
        layers: keep the tensors of these layers of the language model, and no others; None for all tensors.
        only: keep the tensors whose names match one of these glob patterns; see `Selection`. () for all.
        refeed: a trace of the same run, of either backend. What follows a layer (or the embedding, the final norm, the
            head) continues from the output that is recorded there, so that only a wrong layer differs from that trace.
            Forward, routes and loss only.
        routes: a trace of the same run, of either backend and any dtype. Experts that choose tokens take those that
            they took there, so that rounding can't change a choice.

    Raises:
        UserError: unknown dtype, tokens or weights that don't fit the config, layers or names that don't exist, or a
            trace to take outputs or routes from that is of another run.
    """
    request = make_request(
        config,
        dtype=dtype,
        seed=seed,
        weights=weights,
        tokens=tokens,
        layers=layers,
        only=only,
        refeed=refeed,
        routes=routes,
    )
    check_tensors(request.weights, job_table(config, tower_of(config)))
    target = find_device(device)

    def decode(recorder: Recorder) -> Arrays:
        with jax.default_device(target), matmul_precision(config.train.matmul_precision):  # they are a thread's own
            return recorder.decode(request.weights) if request.decodes else {}

    with (
        jax.default_device(target),
        matmul_precision(config.train.matmul_precision),
        ThreadPoolExecutor(max_workers=1) as beside,
    ):
        recorder = Recorder(request)
        decoded = beside.submit(decode, recorder)  # compiling takes most of the time, and one core
        recording = recorder.run(request.weights)
        recording.decoded |= decoded.result()
        exact = recorder if dtype == EXACT else Recorder(dataclasses.replace(request, dtype=EXACT))
        return make_trace(
            request,
            recording,
            exact.run if deltas else None,
            backend="jax",
            device=device_name(target),
            initial_hash=recorder.initial_hash,
        )


class Recorder:
    """A model that is run with given weights. JAX's 64-bit mode is on while a float64 recorder works, else off.

    Attributes:
        initial_hash: of the seeded initial weights that the model came with.
    """

    def __init__(self, request: Request):
        config = request.config
        self.config = config
        self.request = request
        self.table = job_table(config, tower_of(config))
        self.compute_dtype = DTYPES[request.dtype]
        self.master_dtype = jnp.float64 if request.dtype == EXACT else jnp.float32
        with self._bits():
            model = nnx.eval_shape(lambda: build_model(config, rngs=None))
            model.init_weights_and_freqs(request.seed)
            self.initial_hash = state_hash({name: to_numpy(array) for name, array in get_state(model).items()})
            if request.dtype == "fp8":
                use_fp8(model, config)
            self._graphdef, params, buffers = split(model)
            self._image_tokens = inner_transformer(model).num_image_tokens
            names = activation_names(model)
        check_selection(request, names, MoEStats._fields)
        self._modules = request.modules(names)
        self._refed = (request.refeed.outputs, request.refeed.losses) if request.refeed else ({}, {})
        self.trained = [name for name in self.table if name in params]
        self.moments = {}
        if request.updates(self.trained):
            self.moments = validation_moments(self.table, request.seed, config.optimizer)
        self._tables = {name: array for name, array in buffers.items() if name not in self.table}
        self._optimizer = build_optimizer(dict.fromkeys(self.trained), self.table, config.optimizer)
        self._compiled_run = jax.jit(self._run)
        self._compiled_chunk = jax.jit(self._chunk, static_argnums=3)

    def run(self, weights: Arrays) -> Recording:
        """Forward with every activation, loss, gradients and one update, in one jit, as the request asks for."""
        request = self.request
        with self._bits():
            masters = self._masters(weights)
            state = None
            if request.updates(self.trained):
                trained = {name: masters[name] for name in self.trained}
                state = set_optimizer_state(self._optimizer.init(trained), self.moments, MOMENT_STEPS)
            computed = self._compiled_run(masters, state, request.tokens, request.labels, self._refed)
            return Recording(**jax.tree.map(to_numpy, computed))

    def decode(self, weights: Arrays) -> Arrays:
        """Logits of the same tokens, fed to a cache in chunks."""
        tokens = self.request.tokens
        wanted = self.request.kept(DECODE, decode_chunks(self.request))
        with self._bits():
            masters = self._masters(weights)
            return {name: self._decode(masters, tokens, chunks) for name, chunks in wanted.items()}

    def _bits(self) -> contextlib.AbstractContextManager[None]:
        return jax.enable_x64(self.request.dtype == EXACT)

    def _run(
        self,
        masters: Tensors,
        optimizer_state: Any,
        tokens: jax.Array,
        labels: jax.Array,
        refed: tuple[Tensors, Tensors],
    ) -> dict[str, Any]:
        """The fields of `Recording`, in mappings whose order JAX keeps."""
        request = self.request
        varied = {name: masters[name] for name in request.differentiated(self.trained)}
        fixed = {name: array for name, array in masters.items() if name not in varied}

        def objective(varied: Tensors) -> tuple[jax.Array, Any]:
            return self._forward({**varied, **fixed}, tokens, labels, refed)

        if varied:
            (loss, recorded), gradients = jax.value_and_grad(objective, has_aux=True)(varied)
        else:
            (loss, recorded), gradients = objective({}), {}
        updated = self._update(varied, gradients, optimizer_state) if request.updates(self.trained) else {}
        return {
            "loss": loss,
            "activations": recorded[0],
            "routing": recorded[1],
            "gradients": OrderedDict(request.kept(GRADIENT, {name: gradients[name] for name in varied})),
            "updated": OrderedDict(request.kept(UPDATED, {name: updated[name] for name in varied if updated})),
            "decoded": {WHOLE: self._unlimited(masters, tokens)} if request.unlimited else {},
        }

    def _forward(
        self, masters: Tensors, tokens: jax.Array, labels: jax.Array, refed: tuple[Tensors, Tensors]
    ) -> tuple[jax.Array, tuple[Tensors, Tensors]]:
        """The loss, and the activations and routing that are recorded."""
        request, prefix = self.request, transformer_path(self.config)
        model, (outputs, losses) = self._model(masters), refed
        routes = {name: jnp.asarray(array, jnp.int32) for name, array in request.routes.items()}
        with (
            capture(model, self._modules) as activations,
            chosen_experts(model) as choices,
            rerouting(model, routes),
            replacing(model, outputs),
        ):
            output = model.run(*self._inputs(tokens), **self._places())
        loss = self._loss(output.logits, with_losses(output.stats, losses, prefix), labels)
        forced = {f"{name}{ROUTES}": tokens for name, tokens in routes.items()}
        routing = {**choices, **forced, **routing_values(output.stats, self.config)}
        activations = OrderedDict(request.kept(FORWARD, flatten(activations)))
        return loss, (activations, OrderedDict(request.kept(ROUTING, routing)))

    def _unlimited(self, masters: Tensors, tokens: jax.Array) -> jax.Array:
        """The logits where experts take any number of assignments, as in cached decoding."""
        return self._model(masters).run(*self._inputs(tokens), **self._places(), limit_capacity=False).logits

    def _decode(self, masters: Tensors, tokens: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
        size = cache_size(self.request, self._image_tokens)
        caches = [KVCache(*size, self.compute_dtype) for _ in range(self.config.model.n_layers)]
        pieces = []
        for index, piece in enumerate(np.split(tokens, np.cumsum(chunks)[:-1], axis=1)):
            with_image = not (self._image_tokens and index)
            logits, caches = self._compiled_chunk(masters, piece, caches, with_image)
            pieces.append(logits)
        return np.concatenate([to_numpy(piece) for piece in pieces], axis=1)

    def _chunk(
        self, masters: Tensors, tokens: jax.Array, caches: list[KVCache], with_image: bool
    ) -> tuple[jax.Array, Any]:
        inputs = self._inputs(tokens, with_image)
        output = self._model(masters).run(*inputs, **self._places(with_image), kv_caches=caches)
        return output.logits, output.kv_caches

    def _inputs(self, tokens: jax.Array, with_image: bool = True) -> tuple[Any, ...]:
        """What the model is called with. An image in the stream comes with the first tokens only."""
        if self.request.pixels is None:
            return (tokens,)
        return jnp.asarray(self.request.pixels, self.compute_dtype) if with_image else None, tokens

    def _places(self, with_image: bool = True) -> dict[str, jax.Array]:
        """Where the image stands in the text, if it may stand anywhere, and how much of the text is the prompt, if that
        has attention in both directions.
        """
        given = {name: getattr(self.request, name) for name in ("image_positions", "prompt_lengths")}
        return {name: jnp.asarray(array) for name, array in given.items() if with_image and array is not None}

    def _model(self, masters: Tensors) -> Any:
        """The model with its values in the dtypes of the arithmetic."""
        copy = {name: array.astype(self._compute_dtype_of(name)) for name, array in masters.items()}
        params = {name: copy[name] for name in self.trained}
        buffers = {name: array for name, array in copy.items() if name not in params}
        return merge(self._graphdef, params, {**buffers, **self._tables})

    def _loss(self, logits: jax.Array, stats: dict[int, LayerStats], labels: jax.Array) -> jax.Array:
        """The training objective: cross entropy and, with experts, the weighted losses of routers."""
        aux_loss, z_loss = router_losses(stats)
        model = self.config.model
        return (
            mean_cross_entropy(logits, labels, **loss_terms(self.config.train))
            + model.moe_aux_loss_weight * aux_loss
            + model.moe_router_z_loss_weight * z_loss
        )

    def _update(self, masters: Tensors, gradients: Tensors, state: Any) -> Tensors:
        """The parameters after one step from drawn moments, at the peak learning rate."""
        clipped, _ = clip_by_global_norm(gradients, self.config.train.grad_clip_norm)
        rates = validation_rates(self.config.optimizer)
        own = Rates(*(jnp.asarray(rate, self.master_dtype) for rate in rates))
        return update(self._optimizer, dict(clipped), state, masters, own)[0]

    def _masters(self, weights: Arrays) -> Tensors:
        return {name: from_numpy(weights[name], self.master_dtype) for name in self.table}

    def _compute_dtype_of(self, name: str) -> Any:
        spec = self.table[name]
        return self.master_dtype if spec.full_precision or spec.is_buffer else self.compute_dtype


def device_name(device: Device) -> str:
    """The model of an accelerator, or "cpu"."""
    return device.device_kind


def flatten(activations: Mapping[str, object]) -> Tensors:
    """Outputs by modality get their own names."""
    flat: Tensors = {}
    for name, value in activations.items():
        if isinstance(value, Mapping):
            flat.update(flatten({f"{name}.{key}": part for key, part in value.items()}))
        elif isinstance(value, jax.Array):
            flat[name] = value
    return flat


@contextlib.contextmanager
def chosen_experts(model: nnx.Module) -> Iterator[Tensors]:
    """Collect the second output of each router, the experts chosen, under "<path of the router>.indices"."""
    name_of = {id(module): name for name, module in named_modules(model) if name.endswith(".router")}
    choices: Tensors = {}

    def keep(module: Module, output: Any) -> None:
        if id(module) in name_of and isinstance(output, tuple):
            choices[f"{name_of[id(module)]}{ROUTES}"] = output[1]

    with observing(keep):
        yield choices


@contextlib.contextmanager
def rerouting(model: nnx.Module, routes: Mapping[str, Shaped[Array, "..."]]) -> Iterator[None]:
    """Make experts that choose tokens take given ones: path of their router -> tokens (C, E)."""
    name_of = {id(module): name for name, module in named_modules(model) if name in routes}

    def take(module: Module, output: Any) -> Any:
        name = name_of.get(id(module))
        return output if name is None else ExpertChoiceSigmoidRouter.rerouted(output, routes[name])

    with substituting(take):
        yield
