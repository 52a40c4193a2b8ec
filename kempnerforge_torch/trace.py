"""One forward, backward and optimiser step of a config, with every named activation: a recording to be compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from kempnerforge_torch.device import find_device
from kempnerforge_torch.model.attention import KVCache
from kempnerforge_torch.model.build import build_model
from kempnerforge_torch.model.expert_choice import ExpertChoiceSigmoidRouter
from kempnerforge_torch.model.hooks import activation_names, capture, replacing
from kempnerforge_torch.model.state import from_numpy, get_state, own_tensors, to_numpy
from kempnerforge_torch.model.stats import LayerStats, MoEStats, TransformerOutput
from kempnerforge_torch.model.vlm import inner_transformer
from kempnerforge_torch.training.loss import mean_cross_entropy, router_losses
from kempnerforge_torch.training.mixed_precision import matmul_precision, use_fp8
from kempnerforge_torch.training.optimizer import (
    build_optimizer,
    clip_by_global_norm,
    set_optimizer_state,
    set_rates,
)
from shared_config.contract.initialise import state_hash
from shared_config.contract.labels import loss_terms
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

Tensors = dict[str, Shaped[Tensor, "..."]]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
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
        device: as "cpu" or "cuda:1"; None is the accelerator, if there is one.
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
    with matmul_precision(config.train.matmul_precision):
        recorder = Recorder(request, target)
        recording = recorder.run(request.weights)
        recording.decoded |= recorder.decode(request.weights) if request.decodes else {}
        exact = recorder if dtype == EXACT else Recorder(dataclasses.replace(request, dtype=EXACT), target)
        return make_trace(
            request,
            recording,
            exact.run if deltas else None,
            backend="torch",
            device=device_name(target),
            initial_hash=recorder.initial_hash,
        )


class Recorder:
    """A model that is run with given weights.

    Attributes:
        initial_hash: of the seeded initial weights that the model came with.
    """

    def __init__(self, request: Request, device: torch.device):
        config = request.config
        with torch.random.fork_rng(devices=[]):
            model = build_model(config).eval()
        model.init_weights_and_freqs(request.seed)
        self.initial_hash = state_hash({name: to_numpy(tensor) for name, tensor in get_state(model).items()})
        if request.dtype == "fp8":
            use_fp8(model, config)
        self.config = config
        self.request = request
        self.table = job_table(config, tower_of(config))
        self.compute_dtype = DTYPES[request.dtype]
        self.master_dtype = torch.float64 if request.dtype == EXACT else torch.float32
        self.trained = [name for name, tensor in own_tensors(model).items() if isinstance(tensor, nn.Parameter)]
        self.moments = {}
        if request.updates(self.trained):
            self.moments = validation_moments(self.table, request.seed, config.optimizer)
        names = activation_names(model)
        check_selection(request, names, MoEStats._fields)
        self._modules = request.modules(names)
        self._refed = (request.refeed.outputs, request.refeed.losses) if request.refeed else ({}, {})
        self._device = device
        self._model = model.to(device)

    def run(self, weights: Arrays) -> Recording:
        """Forward with every activation, loss, gradients and one update: as much of it as the request asks for."""
        request, state = self.request, self._masters(weights)
        masters = {name: state[name].requires_grad_() for name in request.differentiated(self.trained)}
        with torch.set_grad_enabled(bool(masters)):
            loss, activations, routing = self._forward(state)
        gradients = _gradients(loss, masters)
        copies = {name: to_numpy(tensor).copy() for name, tensor in request.kept(GRADIENT, gradients).items()}
        unlimited = {WHOLE: to_numpy(self._unlimited(state))} if request.unlimited else {}
        updated = self._update(masters, gradients) if request.updates(self.trained) else {}
        return Recording(
            loss=to_numpy(loss),
            activations={name: to_numpy(tensor) for name, tensor in activations.items()},
            routing={name: to_numpy(tensor) for name, tensor in routing.items()},
            gradients=copies,
            updated={name: to_numpy(tensor) for name, tensor in request.kept(UPDATED, updated).items()},
            decoded=unlimited,
        )

    @torch.no_grad()
    def decode(self, weights: Arrays) -> Arrays:
        """Logits of the same tokens, fed to a cache in chunks."""
        state = self._masters(weights)
        tokens = self._integers(self.request.tokens)
        wanted = self.request.kept(DECODE, decode_chunks(self.request))
        return {name: to_numpy(self._decode(state, tokens, chunks)) for name, chunks in wanted.items()}

    def _forward(self, state: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """The loss, and the activations and routing that are recorded."""
        request, prefix = self.request, transformer_path(self.config)
        outputs, losses = ({name: self._tensor(array) for name, array in part.items()} for part in self._refed)
        routes = {name: self._integers(array) for name, array in request.routes.items()}
        with (
            capture(self._model, self._modules) as activations,
            chosen_experts(self._model) as choices,
            rerouting(self._model, routes),
            replacing(self._model, outputs),
        ):
            output = self._call(state, self._integers(request.tokens))
        activations.pop("transformer", None)  # JAX calls what is within; both have it as "transformer.output_head"
        loss = self._loss(output.logits, with_losses(output.stats, losses, prefix), self._integers(request.labels))
        forced = {f"{name}{ROUTES}": tokens for name, tokens in routes.items()}
        routing = {**choices, **forced, **routing_values(output.stats, self.config)}
        return loss, request.kept(FORWARD, flatten(activations)), request.kept(ROUTING, routing)

    @torch.no_grad()
    def _unlimited(self, state: Tensors) -> Tensor:
        """The logits where experts take any number of assignments, as in cached decoding."""
        return self._call(state, self._integers(self.request.tokens), limit_capacity=False).logits

    def _decode(self, state: Tensors, tokens: Tensor, chunks: Sequence[int]) -> Tensor:
        transformer = inner_transformer(self._model)
        size = cache_size(self.request, transformer.num_image_tokens)
        caches = [KVCache(*size, self.compute_dtype, self._device) for _ in transformer.layers]
        in_stream = transformer.num_image_tokens > 0
        pieces = [
            self._call(state, piece, kv_caches=caches, with_image=not (in_stream and index)).logits
            for index, piece in enumerate(tokens.split(list(chunks), dim=1))
        ]
        return torch.cat(pieces, dim=1)

    def _call(self, state: Tensors, tokens: Tensor, with_image: bool = True, **arguments: Any) -> TransformerOutput:
        """Logits, stats and caches. An image in the stream comes with the first tokens only."""
        for name in ("image_positions", "prompt_lengths"):
            if with_image and (given := getattr(self.request, name)) is not None:
                arguments[name] = self._integers(given)
        copy = {name: tensor.to(self._compute_dtype_of(name)) for name, tensor in state.items()}
        inputs: tuple[Any, ...] = (tokens,)
        if self.request.pixels is not None:
            inputs = (self._pixels() if with_image else None, tokens)
        return torch.func.functional_call(self._model, copy, inputs, {**arguments, "return_stats": True})

    def _pixels(self) -> Tensor:
        assert self.request.pixels is not None
        return from_numpy(self.request.pixels).to(self._device, self.compute_dtype)

    def _loss(self, logits: Tensor, stats: dict[int, LayerStats], labels: Tensor) -> Tensor:
        """The training objective: cross entropy and, with experts, the weighted losses of routers."""
        aux_loss, z_loss = router_losses(stats)
        model = self.config.model
        return (
            mean_cross_entropy(logits, labels, **loss_terms(self.config.train))
            + model.moe_aux_loss_weight * aux_loss
            + model.moe_router_z_loss_weight * z_loss
        )

    def _update(self, masters: Tensors, gradients: Tensors) -> Tensors:
        """The parameters after one step from drawn moments, at the peak learning rate."""
        optimizer = build_optimizer(masters, self.table, self.config.optimizer)
        set_optimizer_state(optimizer, masters, self.moments, MOMENT_STEPS)
        set_rates(optimizer, validation_rates(self.config.optimizer))
        clipped, _ = clip_by_global_norm(gradients, self.config.train.grad_clip_norm)
        for name, master in masters.items():
            master.grad = clipped[name]
        optimizer.step()
        return masters

    def _masters(self, weights: Arrays) -> Tensors:
        return {name: from_numpy(weights[name]).to(self._device, self.master_dtype, copy=True) for name in self.table}

    def _compute_dtype_of(self, name: str) -> torch.dtype:
        spec = self.table[name]
        return self.master_dtype if spec.full_precision or spec.is_buffer else self.compute_dtype

    def _tensor(self, array: np.ndarray) -> Tensor:
        return from_numpy(array).to(self._device)

    def _integers(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, torch.long)


def _gradients(loss: Tensor, masters: Tensors) -> Tensors:
    if not masters:
        return {}
    gradients = torch.autograd.grad(loss, list(masters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(masters, gradients, strict=True))


def device_name(device: torch.device) -> str:
    """The model of an accelerator, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def flatten(activations: Mapping[str, object]) -> Tensors:
    """Outputs by modality get their own names."""
    flat: Tensors = {}
    for name, value in activations.items():
        if isinstance(value, Mapping):
            flat.update(flatten({f"{name}.{key}": part for key, part in value.items()}))
        elif isinstance(value, Tensor):
            flat[name] = value
    return flat


@contextlib.contextmanager
def chosen_experts(model: nn.Module) -> Iterator[Tensors]:
    """Collect the second output of each router, the experts chosen, under "<path of the router>.indices"."""
    choices: Tensors = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, tuple):
            choices[f"{name}{ROUTES}"] = output[1]

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith(".router"):
                handle = module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
                hooks.callback(handle.remove)
        yield choices


@contextlib.contextmanager
def rerouting(model: nn.Module, routes: Mapping[str, Shaped[Tensor, "..."]]) -> Iterator[None]:
    """Make experts that choose tokens take given ones: path of their router -> tokens (C, E)."""

    def take(output: Any, tokens_CE: Tensor) -> Any:
        return ExpertChoiceSigmoidRouter.rerouted(output, tokens_CE)

    with contextlib.ExitStack() as hooks:
        for name, tokens_CE in routes.items():
            handle = model.get_submodule(name).register_forward_hook(
                lambda _router, _inputs, output, tokens_CE=tokens_CE: take(output, tokens_CE)
            )
            hooks.callback(handle.remove)
        yield
