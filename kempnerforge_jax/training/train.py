"""The trainer of one device: the gradient of a whole step's loss, the update, evaluation, and the state of it all.

Shapes: N micro-batches, B batch, S sequence, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.module import named_modules, named_variables
from kempnerforge_jax.model.router import training_progress
from kempnerforge_jax.model.scan import layer_range
from kempnerforge_jax.model.state import get_state, merge, set_state, split
from kempnerforge_jax.model.vlm import build_vlm_wrapper
from kempnerforge_jax.registry import registry
from kempnerforge_jax.training.loss import IGNORED, cross_entropy, router_losses, router_stats
from kempnerforge_jax.training.optimizer import (
    build_optimizer,
    clip_by_global_norm,
    get_optimizer_state,
    parameter_spec,
    set_optimizer_state,
    states_of,
    stays_finite,
    update,
    with_states,
)
from kempnerforge_jax.training.profile import profile, step_span
from kempnerforge_jax.training.scheduler import build_schedule
from shared_config.contract.freeze import effective_freeze, frozen_names, moments_under, never_trained
from shared_config.contract.parameters import ParameterSpec
from shared_config.contract.vision import job_table
from shared_config.data import open_data
from shared_config.data.images import with_noise_seeds
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.vision import tower_of
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.schema.training import TrainConfig
from shared_config.schema.vlm import VLMConfig
from shared_config.training.loop import refuse_other_processes, run_training
from shared_config.training.trainer import TrainingSummary

Arrays = dict[str, Any]
Batch = Mapping[str, np.ndarray]

REMATERIALISATION = {
    "none": False,
    "full": True,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What of a block is computed again in the backward pass: nothing, all, or all but matrix products with weights."""


def train(
    config: JobConfig,
    *,
    device: Any = None,
    console: Console | None = None,
    overridden: Collection[str] = (),
) -> TrainingSummary:
    """Train the job on one device, from where its folder left it, and tell how it ended.

    Args:
        overridden: dotted fields that the command line sets: see `shared_config.training.resume.restore`.

    Raises:
        UserError: what can't be used, of data, folders and checkpoints; or this is one of several processes.
    """
    refuse_other_processes(process_count())
    data = open_data(config)
    return run_training(config, Trainer(config, device), data, console=console, overridden=overridden)


class Trainer:
    """A model, its optimiser, and what `shared_config.training.loop` asks of them.

    Masters, gradients and moments are of ``dtype``. With ``train.mixed_precision`` "bf16" a float32 trainer computes in
    bfloat16, on a copy of the masters that is cast for each micro-batch. ``device`` is a `jax.Device`, the name of a
    platform, or None for the default.

    Attributes:
        parameters: the masters, by name; those of layers in a scan are stacked (see `split`).
        buffers: all other arrays of the model.
        updates: optimiser steps done.
    """

    backend = "jax"

    def __init__(self, config: JobConfig, device: Any = None, *, dtype: Any = jnp.float32):
        self.config = config
        self.device = find_device(device)
        with jax.default_device(self.device):
            model = _build_model(config, dtype)
            graphdef, parameters, buffers = split(model, scan_layers=config.train.scan_layers and config.vlm is None)
        shapes = {name: tuple(array.shape) for name, array in get_state(model).items()}
        self.table = job_table(config, tower_of(config), shapes)
        self.recipe = Recipe(
            graphdef,
            config.model,
            config.vlm,
            config.train,
            config.optimizer,
            compute_dtype(config, dtype),
            tuple(self.table.items()),
        )
        self.parameters, self.buffers = jax.device_put((parameters, buffers), self.device)
        trained = trained_parameters(self.parameters, config)
        optimizer = build_optimizer(trained, self.table, config.optimizer)
        self.optimizer_state = jax.device_put(optimizer.init(trained), self.device)
        self.learning_rate = build_schedule(config)
        self.updates = 0

    @property
    def model(self) -> Any:
        """The masters as a model. The next step gives their memory away: a copy outlives it, this does not."""
        return merge(self.recipe.graphdef, self.parameters, self.buffers)

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Any]:
        """One update from the mean loss over all labels of the micro-batches.

        Args:
            micro_batches: each has ``tokens`` and ``labels``, int (B, S), and may have ``doc_ids`` and ``text_mask``,
                bool (B, S), False at padding; for images, what
                `shared_config.data.images.collate` gives.

        Returns:
            loss (cross entropy), grad_norm (before clipping), lr, tokens (labels that counted). With experts also
            aux_loss and z_loss (unweighted, averaged over the micro-batches), routing_entropy (of a token's
            distribution over experts, in nats, averaged over the routers) and dead_experts (that no token chose, over
            all routers). Where updates may be left out, taken (whether this one was not).
            What the device computes is left there, as scalar arrays.
        """
        count, lr = label_count(micro_batches), self.learning_rate(self.updates)
        self._freeze()
        micro_batches = with_noise_seeds(self.config, micro_batches, self.updates)
        with step_span(self.updates), matmul_precision(self.config.train.matmul_precision):
            self.parameters, self.buffers, self.optimizer_state, metrics = compiled_step(self.recipe)(
                self.parameters,
                self.buffers,
                self.optimizer_state,
                {name: np.stack([batch[name] for batch in micro_batches]) for name in micro_batches[0]},
                np.asarray(max(count, 1), self._scalar),
                np.asarray(lr, self._scalar),
                np.asarray(training_progress(self.updates, self.config.train.max_steps), self._scalar),
            )
        self.updates += 1
        return {**metrics, "lr": lr, "tokens": count}

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """``loss``: mean cross entropy over all labels of the batches; ``tokens``: their number. Changes nothing."""
        total, count = jnp.zeros((), self._scalar), label_count(batches)
        with matmul_precision(self.config.train.matmul_precision):
            for batch in batches:
                total = total + compiled_evaluation(self.recipe)(self.parameters, self.buffers, dict(batch))
        return {"loss": total / max(count, 1), "tokens": count}

    def state(self) -> TrainingState:
        """Copies, on the host, of weights, buffers, moments and counts of updates."""
        weights, moments = get_state(self.model), get_optimizer_state(self.optimizer_state)
        return TrainingState(self.updates, self._host_copies(weights, ""), self._host_copies(moments, "m.", "v.", "t."))

    def load_state(self, state: TrainingState) -> None:
        """Go on from a state of either backend; without moments, only the weights are taken. What was frozen there and
        is not here starts with moments and a count of 0.

        Raises:
            UserError: names or shapes that do not fit.
        """
        model = self.model
        set_state(model, state.weights)
        if state.optimizer or state.step:
            moments = moments_under(self.config.vlm, self.table, state.optimizer)
            self.optimizer_state = set_optimizer_state(self.optimizer_state, moments, state.step)
        _, self.parameters, self.buffers = split(model)
        self.updates = state.step

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """Trace the steps taken within it, to new files of a folder."""
        return profile(folder, self._wait)

    def _wait(self) -> None:
        jax.block_until_ready((self.parameters, self.buffers, self.optimizer_state))

    def _freeze(self) -> None:
        """Apply the freeze schedule at this step."""
        vlm = self.config.vlm
        if vlm is not None:
            specs = effective_freeze(self.updates, vlm.freeze, vlm.freeze_schedule)
            frozen = frozenset(frozen_names(self.parameters, specs, vlm.module_patterns))
            self.recipe = dataclasses.replace(self.recipe, frozen=frozen)

    def _host_copies(self, arrays: Arrays, *prefixes: str) -> Arrays:
        """In the order of the parameter table, which jit does not keep."""
        names = [prefix + name for prefix in prefixes for name in self.table if prefix + name in arrays]
        return {name: np.array(arrays[name]) for name in names}

    @property
    def _scalar(self) -> Any:
        return jnp.promote_types(self.recipe.compute_dtype, jnp.float32)


class Terms(NamedTuple):
    """What a micro-batch adds to a step's metrics.

    Attributes:
        loss: its share of the mean cross entropy.
        aux_loss, z_loss, entropy: its share of their means over micro-batches; the entropy also over routers.
        expert_counts: router -> (E,) choices; {} if dense.
    """

    loss: Any
    aux_loss: Any
    z_loss: Any
    entropy: Any
    expert_counts: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is static in a step: trainers that share it share what was compiled.

    ``frozen`` are the parameters that get no gradient and no update.
    """

    graphdef: Any
    model: ModelConfig
    vlm: VLMConfig | None
    train: TrainConfig
    optimizer: OptimizerConfig
    compute_dtype: Any
    table: tuple[tuple[str, ParameterSpec], ...]
    frozen: frozenset[str] = frozenset()


@functools.lru_cache(maxsize=8)
def compiled_step(recipe: Recipe) -> Callable[..., Any]:
    """A jitted ``(parameters, buffers, optimizer_state, batches, count, lr, progress) -> (the first three, metrics)``.

    The memory of the first three is given away. ``batches`` are arrays (N, B, S) by name, ``count`` is the number of
    labels in all of them, ``progress`` the share of the training that is done.
    """
    return jax.jit(functools.partial(_step, recipe), donate_argnums=(0, 1, 2))


@functools.lru_cache(maxsize=8)
def compiled_evaluation(recipe: Recipe) -> Callable[..., Any]:
    """A jitted ``(parameters, buffers, batch) -> sum of the cross entropy``."""
    return jax.jit(functools.partial(_evaluation, recipe))


def _step(
    recipe: Recipe,
    parameters: Arrays,
    buffers: Arrays,
    optimizer_state: Any,
    batches: Arrays,
    count: jax.Array,
    lr: jax.Array,
    progress: jax.Array,
) -> tuple[Arrays, Arrays, Any, dict[str, jax.Array]]:
    gradients, total = _gradients(recipe, parameters, buffers, batches, count)
    gradients, norm = clip_by_global_norm(gradients, recipe.train.grad_clip_norm)
    optimizer = build_optimizer(gradients, dict(recipe.table), recipe.optimizer)
    trained = {name: parameters[name] for name in gradients}
    own_state, taken = states_of(optimizer_state, trained), None
    if recipe.train.on_nonfinite == "skip":
        taken = jnp.isfinite(total.loss) & jnp.isfinite(norm)
        taken &= stays_finite(optimizer, gradients, own_state, trained, lr)
    trained, state = update(optimizer, gradients, own_state, trained, lr, taken)
    parameters, optimizer_state = {**parameters, **trained}, with_states(optimizer_state, state)
    buffers = _balanced(recipe, parameters, buffers, total.expert_counts, progress, taken)
    metrics = {"loss": total.loss, "grad_norm": norm, **_routing_metrics(total), **_taken_metric(taken)}
    return parameters, buffers, optimizer_state, metrics


def _evaluation(recipe: Recipe, parameters: Arrays, buffers: Arrays, batch: Arrays) -> jax.Array:
    model = merge(recipe.graphdef, _compute_copy(recipe, parameters), buffers)
    return cross_entropy(model.run(**model_inputs(batch)).logits, batch["labels"])[0]


def _gradients(
    recipe: Recipe, parameters: Arrays, buffers: Arrays, batches: Arrays, count: jax.Array
) -> tuple[Arrays, Terms]:
    """Gradients of what is not frozen, and terms, summed over the micro-batches."""
    micro_batches = batches["labels"].shape[0]
    objective = functools.partial(_objective, recipe, count=count, micro_batches=micro_batches)
    trained = {name: array for name, array in parameters.items() if name not in recipe.frozen}
    frozen = {name: array for name, array in parameters.items() if name in recipe.frozen}

    def one(batch: Arrays) -> tuple[Arrays, Terms]:
        return jax.grad(objective, has_aux=True)(trained, frozen, buffers, batch)

    if micro_batches == 1:
        return one({name: array[0] for name, array in batches.items()})

    def add(total: Any, batch: Arrays) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(batch)), None

    shapes = jax.eval_shape(one, {name: array[0] for name, array in batches.items()})
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, batches)[0]


def _objective(
    recipe: Recipe,
    trained: Arrays,
    frozen: Arrays,
    buffers: Arrays,
    batch: Arrays,
    *,
    count: jax.Array,
    micro_batches: int,
) -> tuple[jax.Array, Terms]:
    """A micro-batch's share of the loss, and its terms."""
    model = merge(recipe.graphdef, _compute_copy(recipe, {**trained, **frozen}), buffers)
    options = {"scan_layers": True} if recipe.train.scan_layers and recipe.vlm is not None else {}
    output = model.run(**model_inputs(batch), **options, remat=REMATERIALISATION[recipe.train.activation_checkpointing])
    loss = cross_entropy(output.logits, batch["labels"])[0] / count
    aux_loss, z_loss = (jnp.asarray(term / micro_batches, loss.dtype) for term in router_losses(output.stats))
    weighted = loss + recipe.model.moe_aux_loss_weight * aux_loss + recipe.model.moe_router_z_loss_weight * z_loss
    entropies = [router.entropy / micro_batches for router in router_stats(output.stats)]
    entropy = jnp.asarray(sum(entropies) / max(len(entropies), 1), loss.dtype)
    return weighted, Terms(loss, aux_loss, z_loss, entropy, expert_counts(output.stats))


def _compute_copy(recipe: Recipe, parameters: Arrays) -> Arrays:
    """The masters cast to the compute dtype, but for what decides a route."""
    table = dict(recipe.table)
    return {
        name: master if parameter_spec(table, name).full_precision else master.astype(recipe.compute_dtype)
        for name, master in parameters.items()
    }


def _balanced(
    recipe: Recipe,
    parameters: Arrays,
    buffers: Arrays,
    counts: Mapping[str, jax.Array],
    progress: jax.Array,
    taken: jax.Array | None,
) -> Arrays:
    """The buffers, with those of routers that balance moved by the choices of the whole step, unless it is left out."""
    if not counts:
        return buffers
    modules = named_modules(merge(recipe.graphdef, parameters, buffers))
    routers = {path: module for path, module in modules if hasattr(module, "update_bias")}
    moved = dict(buffers)
    for path, module in routers.items():
        router: Any = module
        keys = router_keys(path)
        router.update_bias(counts[keys[0]] if len(keys) == 1 else jnp.stack([counts[key] for key in keys]), progress)
        moved |= {
            f"{path}.{name}": variable.get_value()
            for name, variable in named_variables(router)
            if f"{path}.{name}" in buffers
        }
    if taken is not None:
        moved = {name: jnp.where(taken, array, buffers[name]) for name, array in moved.items()}
    return moved


def matmul_precision(level: str) -> AbstractContextManager[Any]:
    """How float32 matrices are multiplied: "highest" as float32, "high" as TF32 or as three bfloat16 products."""
    return jax.default_matmul_precision(level)


def compute_dtype(config: JobConfig, dtype: Any) -> np.dtype:
    """The dtype of the arithmetic, given that of the masters."""
    narrow = config.train.mixed_precision == "bf16" and dtype == jnp.float32
    return jnp.dtype(jnp.bfloat16 if narrow else dtype)


def find_device(name: Any) -> Any:
    """The `jax.Device` of a name, as "cpu" or "cuda:1"; a device is its own, None is JAX's default.

    Raises:
        UserError: this machine has no such device.
    """
    if name is not None and not isinstance(name, str):
        return name
    platform, colon, index = ("", "", "0") if name is None else name.partition(":")
    try:
        default = jax.devices()
        devices = default if name is None else jax.devices(platform)
        known = name is None or (platform and (not colon or (index.isdecimal() and int(index[:9]) < len(devices))))
    except RuntimeError as error:
        raise UserError(f"device = {name!r}: JAX finds no such device: {str(error).splitlines()[0]}") from None
    if not known:
        allowed = ", ".join(sorted({device.platform for device in default} | {"cpu"}))
        raise UserError(f"device = {name!r}: must be one of {allowed}, or one with its index, as cpu:0")
    return devices[int(index) if colon else 0]


def process_count() -> int:
    """How many processes the framework has joined to work together; 1 without."""
    return jax.process_count()


def label_count(batches: Sequence[Batch]) -> int:
    """Labels that count in the loss, over all batches."""
    return sum(int(np.count_nonzero(batch["labels"] != IGNORED)) for batch in batches)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a batch, without its labels, as the arguments of a model; a text model is told of padding as
    `ModalityContext` does.
    """
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    if "tokens" in inputs and "text_mask" in inputs:
        inputs["modality"] = ModalityContext(key_padding_mask=inputs.pop("text_mask"))
    return inputs


def expert_counts(stats: Mapping[int, Any]) -> dict[str, Any]:
    """The choices of each expert by router: "3" for layer 3, "3.image" where each modality has a router."""
    counts: dict[str, Any] = {}
    for layer, layer_stats in stats.items():
        routers = layer_stats if isinstance(layer_stats, dict) else {"": layer_stats}
        counts |= {f"{layer}.{name}".rstrip("."): router.expert_counts for name, router in routers.items()}
    return counts


def router_keys(path: str) -> list[str]:
    """The keys in `expert_counts` of a router by its path, "layers.3.mlp.router" or "layers.3.mlp.image.router"; for
    stacked layers ("layers.0-3.mlp.router") of each. The model may lie within another.
    """
    layers, _, *modality, _ = path.partition("layers.")[2].split(".")
    return [".".join([str(layer), *modality[-1:]]) for layer in layer_range(layers)]


def build_model(config: JobConfig, *, rngs: nnx.Rngs) -> Any:
    """The model of a job: a transformer, or one with an encoder and an adapter around it."""
    if config.vlm is None or config.vision_encoder is None:
        return registry.get("model", config.model.model_type)(config.model, rngs=rngs)
    frames = config.video.max_frames if config.video is not None else 1
    return build_vlm_wrapper(config.model, config.vision_encoder, config.adapter, config.vlm, frames, rngs=rngs)


def trained_parameters(masters: Mapping[str, Any], config: JobConfig) -> dict[str, Any]:
    """The parameters that are trained at one step of the job or another.

    Raises:
        UserError: there are none.
    """
    vlm = config.vlm
    if vlm is None:
        return dict(masters)
    never = never_trained(masters, vlm.freeze, vlm.freeze_schedule, vlm.module_patterns)
    trained = {name: master for name, master in masters.items() if name not in never}
    if not trained:
        raise UserError(f"vlm.freeze = {[spec.module for spec in vlm.freeze]}: freezes all there is, always")
    return trained


def _build_model(config: JobConfig, dtype: Any) -> Any:
    """The seeded model. It comes into being without arrays, and its initial values are float32 ones."""
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    model.init_weights_and_freqs(config.train.seed)
    return model.to(dtype)


def _taken_metric(taken: Any) -> dict[str, Any]:
    return {} if taken is None else {"taken": taken}


def _routing_metrics(total: Terms) -> dict[str, Any]:
    if not total.expert_counts:
        return {}
    dead = sum((counts_E == 0).sum() for counts_E in total.expert_counts.values())
    losses = {"aux_loss": total.aux_loss, "z_loss": total.z_loss}
    return {**losses, "routing_entropy": total.entropy, "dead_experts": dead}
