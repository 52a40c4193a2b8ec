"""The trainer of one device, or of a mesh of them: the gradient of a whole step's loss, the update, evaluation, and the
state of it all.

Shapes: N micro-batches of each data rank, R data ranks, B batch, S sequence, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped
from rich.console import Console

from kempnerforge_jax.device import device_kind, find_device, peak_memory
from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.distributed.health import check_health
from kempnerforge_jax.distributed.mesh import drawing_device, open_mesh, own_devices
from kempnerforge_jax.distributed.processes import joined, processes
from kempnerforge_jax.distributed.ranks import Ranks
from kempnerforge_jax.distributed.sharding import (
    abstract_initial_state,
    initial_state,
    is_abstract,
    keep_sharded,
    place,
    place_batches,
)
from kempnerforge_jax.distributed.states import host_copies, own_parts
from kempnerforge_jax.model.build import build_model
from kempnerforge_jax.model.fused import of_segments, segments_of
from kempnerforge_jax.model.lora import add_adapters, init_adapters
from kempnerforge_jax.model.state import State, merge, own_variables, set_state, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.vlm import VLMWrapper
from kempnerforge_jax.training.averaging import evaluated_weights
from kempnerforge_jax.training.mixed_precision import matmul_precision
from kempnerforge_jax.training.objective import Recipe, gradients_of, summed_loss
from kempnerforge_jax.training.optimizer import (
    OptimizerState,
    arrays_by_kind,
    build_optimizer,
    clip_by_global_norm,
    set_optimizer_state,
    states_of,
    stays_finite,
    update,
    with_states,
)
from kempnerforge_jax.training.profile import profile, step_span
from kempnerforge_jax.training.sampling import continued
from kempnerforge_jax.training.scheduler import build_rates
from kempnerforge_jax.training.terms import routing_metrics, taken_metric
from shared_config.contract.bias_schedule import training_progress
from shared_config.contract.freeze import moments_under, trained_parameters
from shared_config.contract.labels import label_count
from shared_config.contract.lora import trained_with, with_adapters
from shared_config.contract.schedule import Rates
from shared_config.data import open_data
from shared_config.data.images import with_noise_seeds
from shared_config.evaluation.samples import sample_loggers
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.parts import Parts, StateParts
from shared_config.schema.job import JobConfig
from shared_config.training.loop import run_training
from shared_config.training.resume import has_weights
from shared_config.training.speed import Devices
from shared_config.training.trainer import Batch, TrainingSummary

_Copy = TypeVar("_Copy", np.ndarray, Parts)
_Batches = Mapping[str, np.ndarray] | State
_Step = Callable[
    [State, State, OptimizerState, _Batches, np.ndarray, Rates, np.ndarray],
    tuple[State, State, OptimizerState, dict[str, Shaped[Array, ""]]],
]
_Evaluation = Callable[[State, State, _Batches], Shaped[Array, ""]]


def train(
    config: JobConfig,
    *,
    device: Device | str | None = None,
    console: Console | None = None,
    overridden: Collection[str] = (),
) -> TrainingSummary:
    """Train the job on all devices, in the layout of ``[distributed]``, from where its folder left it, and return how
    it ended.

    Where a launcher started several processes, or a library has joined some, they train together on the devices of
    all; the first writes the files and the console.

    Args:
        overridden: dotted fields that the command line sets: see `shared_config.training.resume.restore`.

    Raises:
        UserError: what can't be used, of data, folders, checkpoints and layouts; devices that fail the check that
            ``train.health_check_seconds`` asks for.
    """
    with joined(device) as devices:
        check_health(config, devices)
        trainer = Trainer(config, devices, draws=not has_weights(config))
        own = trainer.ranks.own
        data = open_data(config, rank=own.start, world_size=trainer.ranks.count, together=len(own))
        loggers = sample_loggers(config, functools.partial(continued, trainer), trainer.devices.count)
        return run_training(
            config, trainer, data, console=console, processes=processes(), overridden=overridden, loggers=loggers
        )


class Trainer:
    """A model, its optimiser, and what `shared_config.training.loop` asks of them.

    Masters, moments and sums of gradients are of ``dtype``. With ``train.mixed_precision`` "bf16" or "fp8" a float32
    trainer computes in bfloat16, on copies of the masters that are made once for each update. ``device`` is a
    `jax.Device`, the name of a platform, None for the default one, or a list of devices in the order of the mesh.

    Of several processes each has a trainer with the micro-batches of its own data ranks, and all take each step
    together: R data ranks with N micro-batches each do what one device does with the N * R, ordered rank by rank within
    each of the N.

    Attributes:
        devices: what all ranks compute on.
        ranks: those that see different micro-batches.
        parameters: the masters, by name; those of layers in a scan are stacked (see `split`).
        buffers: all other arrays of the model.
        updates: optimiser steps done.
    """

    backend = "jax"

    def __init__(
        self,
        config: JobConfig,
        device: Device | str | list[Device] | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        draws: bool = True,
        trains: bool = True,
    ):
        """``draws``: initial weights; False where `load_state` gives all next. ``trains``: whether it has moments."""
        self.config = config
        devices = list(device) if isinstance(device, list) else [find_device(device)]
        self._own_devices, self.mesh = own_devices(devices), open_mesh(config, devices)
        self.device = self._own_devices[0]
        self.devices = Devices(len(devices), device_kind(self.device))
        self.ranks = Ranks(self.mesh)
        with jax.default_device(drawing_device(self.mesh, self.device)):
            self.recipe, parameters, buffers = Recipe.of(config, self.mesh, _build_model(config, dtype, draws), dtype)
        self.table = dict(self.recipe.table)
        self.parameters, self.buffers = (
            place(self.mesh, self.device, self.table, arrays) for arrays in (parameters, buffers)
        )
        self._trains = trains
        self.optimizer_state = self._optimizer_state(initial_state if draws else abstract_initial_state)
        self.rates = build_rates(config)
        self.updates = 0

    @property
    def model(self) -> Transformer | VLMWrapper:
        """The masters as a model. The next step donates their memory: a copy outlives it, this does not."""
        return merge(self.recipe.graphdef, self.parameters, self.buffers)

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Shaped[Array, "..."] | float]:
        """One update from the mean loss over all labels of the micro-batches.

        Args:
            micro_batches: each has ``tokens`` and ``labels``, int (B, S), and may have ``doc_ids`` and ``text_mask``,
                bool (B, S), False at padding; for images, what
                `shared_config.data.images.collate` gives. On a mesh, with the rows of all data ranks of this
                process, rank by rank.

        Returns:
            loss (cross entropy), grad_norm (before clipping), lr, tokens (labels that counted). With experts also
            aux_loss and z_loss (unweighted, averaged over the micro-batches), routing_entropy (of a token's
            distribution over experts, in nats, averaged over the routers) and dead_experts (that no token chose, over
            all routers). Where updates may be skipped, taken (whether this one was applied).
            Results of the device stay there, as scalar arrays.
        """
        count, rates = self.ranks.number(label_count(micro_batches)), self.rates(self.updates)
        self._freeze()
        by_rank = [
            with_noise_seeds(self.config, own, self.updates, rank, self.ranks.count)
            for rank, own in zip(self.ranks.own, self.ranks.divided(micro_batches), strict=True)
        ]
        with step_span(self.updates), matmul_precision(self.config.train.matmul_precision):
            segments = segments_of(micro_batches) if self.mesh is None else None
            self.parameters, self.buffers, self.optimizer_state, metrics = compiled_step(self.recipe, segments)(
                self.parameters,
                self.buffers,
                self.optimizer_state,
                self._stacked(by_rank),
                np.asarray(max(count, 1), self._scalar),
                Rates(*(np.asarray(rate, self._scalar) for rate in rates)),
                np.asarray(training_progress(self.updates, self.config.train.max_steps), self._scalar),
            )
        self.updates += 1
        return {**metrics, "lr": rates.lr, "tokens": count}

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Shaped[Array, "..."] | float]:
        """``loss``: mean cross entropy over all labels of the batches, of all ranks; ``tokens``: their number. Changes
        nothing.
        """
        total, count = 0.0, self.ranks.number(label_count(batches))
        parameters = evaluated_weights(self.config, self.parameters, self.optimizer_state)
        with matmul_precision(self.config.train.matmul_precision):
            for batch in batches:
                total = total + compiled_evaluation(self.recipe)(
                    parameters, self.buffers, self._stacked(self.ranks.divided([batch]))
                )
        return {"loss": total / max(count, 1), "tokens": count}

    def state(self) -> TrainingState:
        """Copies, on the host, of weights, buffers, moments and counts of updates. With several processes all must call
        it, and the first gets the arrays.
        """
        return TrainingState(self.updates, *self._held(host_copies))

    def parts(self) -> StateParts:
        """Copies, on the host, of what this process is to write of the state: together all processes give each part
        once.
        """
        return StateParts(self.updates, *self._held(own_parts))

    def _held(self, copies: Callable[[State], dict[str, _Copy]]) -> tuple[dict[str, _Copy], dict[str, _Copy]]:
        """Copies of weights and buffers, and of moments, in the order of the parameter table (jit has its own)."""
        weights = copies({name: variable.get_value() for name, variable in own_variables(self.model).items()})
        kept = {kind: copies(arrays) for kind, arrays in arrays_by_kind(self.optimizer_state).items()}
        moments = {f"{kind}.{name}": own[name] for kind, own in kept.items() for name in self.table if name in own}
        return {name: weights[name] for name in self.table if name in weights}, moments

    def load_state(self, state: TrainingState | StateParts) -> None:
        """Continue from a state of either backend; without moments, only the weights are taken. A parameter that was
        frozen there and is not here starts with moments and a count of 0.

        Each device reads what it holds.

        Raises:
            UserError: names or shapes that do not fit.
        """
        model = self.model
        set_state(model, with_adapters(state.weights, self.config))
        _, self.parameters, self.buffers = split(model)
        if state.optimizer or state.step:
            moments = moments_under(self.config.vlm, self.table, state.optimizer, self.config.optimizer)
            self.optimizer_state = set_optimizer_state(self.optimizer_state, moments, state.step)
        elif is_abstract(self.optimizer_state):
            self.optimizer_state = self._optimizer_state(initial_state)
        self.updates = state.step

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """Trace the steps taken within it, to new files of a folder."""
        return profile(folder, self._wait)

    def peak_memory(self) -> int | None:
        """The most bytes that a device of this process has held at once; see `kempnerforge_jax.device.peak_memory`."""
        return max(peak_memory(device) or 0 for device in self._own_devices) or None

    def _wait(self) -> None:
        jax.block_until_ready((self.parameters, self.buffers, self.optimizer_state))

    def _stacked(self, by_rank: Sequence[Sequence[Batch]]) -> _Batches:
        """Arrays (N, B, ...), on a mesh (N, R, B, ...), from the N batches of each rank of this process."""
        batches, ranks = [batch for several in zip(*by_rank, strict=True) for batch in several], len(by_rank)
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        if self.mesh is None:
            return stacked
        own = {name: array.reshape(-1, ranks, *array.shape[1:]) for name, array in stacked.items()}
        return place_batches(self.mesh, self.ranks.own, own)

    def _freeze(self) -> None:
        """Apply the freeze schedule at this step."""
        self.recipe = self.recipe.at_step(self.parameters, self.updates)

    def _optimizer_state(self, made: Callable[..., OptimizerState]) -> OptimizerState:
        """That of the parameters which are trained, before a step."""
        trained = trained_with(self.config.lora, trained_parameters(self.parameters, self.config.vlm))
        trained = trained if self._trains else {}
        optimizer = build_optimizer(trained, self.table, self.config.optimizer)
        return made(self.mesh, self.device, self.table, optimizer.init, trained)

    @property
    def _scalar(self) -> np.dtype:
        return jnp.promote_types(self.recipe.compute_dtype, jnp.float32)


@functools.lru_cache(maxsize=8)
def compiled_step(recipe: Recipe, segments: int | None = None) -> _Step:
    """A jitted ``(parameters, buffers, optimizer_state, batches, count, rates, progress)`` -> the first three, metrics.

    The first three are donated. ``batches`` are arrays (N, B, S) by name, ``count`` is the number of labels in all of
    them, ``progress`` the share of the training that is done. ``segments``: see `of_segments`.
    """
    return jax.jit(functools.partial(_step, recipe, segments=segments), donate_argnums=(0, 1, 2))


@functools.lru_cache(maxsize=8)
def compiled_evaluation(recipe: Recipe) -> _Evaluation:
    """A jitted ``(parameters, buffers, batches) -> sum of the cross entropy`` of one micro-batch; see `summed_loss`."""
    return jax.jit(functools.partial(summed_loss, recipe))


def _step(
    recipe: Recipe,
    parameters: State,
    buffers: State,
    optimizer_state: OptimizerState,
    batches: State,
    count: jax.Array,
    rates: Rates,
    progress: jax.Array,
    segments: int | None = None,
) -> tuple[State, State, OptimizerState, dict[str, jax.Array]]:
    with of_segments(segments):
        gradients, total = gradients_of(recipe, parameters, buffers, batches, count)
    gradients, norm = clip_by_global_norm(gradients, recipe.train.grad_clip_norm)
    optimizer = build_optimizer(gradients, dict(recipe.table), recipe.optimizer)
    trained = {name: parameters[name] for name in gradients}
    own_state, taken = states_of(optimizer_state, trained), None
    if recipe.train.on_nonfinite == "skip":
        taken = jnp.isfinite(total.loss) & jnp.isfinite(norm)
        taken &= stays_finite(optimizer, gradients, own_state, trained, rates)
    trained, state = update(optimizer, gradients, own_state, trained, rates, taken)
    parameters, optimizer_state = {**parameters, **trained}, with_states(optimizer_state, state)
    buffers = recipe.balanced(parameters, buffers, total.expert_counts, progress, taken)
    parameters, buffers = (
        keep_sharded(recipe.shards and recipe.shards.mesh, dict(recipe.table), each) for each in (parameters, buffers)
    )
    metrics = {"loss": total.loss, "grad_norm": norm, **routing_metrics(total), **taken_metric(taken)}
    return parameters, buffers, optimizer_state, metrics


def _build_model(config: JobConfig, dtype: DTypeLike, draws: bool) -> Transformer | VLMWrapper:
    """The model, seeded if it ``draws``, else abstract. It is built without arrays, and drawn in float32."""
    model = nnx.eval_shape(lambda: build_model(config, rngs=None))
    if draws:
        model.init_weights_and_freqs(config.train.seed)
    else:
        model.init_freqs()
    add_adapters(model, config)
    init_adapters(model, config)
    return model.to(dtype)
