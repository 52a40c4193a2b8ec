"""What is differentiated: the loss of a micro-batch, with the terms of the routers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from kempnerforge_jax.distributed.context_parallel import check_spread, of_all_parts, spreading
from kempnerforge_jax.distributed.expert_parallel import gather_tokens
from kempnerforge_jax.distributed.fsdp import (
    Shards,
    gather_outside_blocks,
    mark_blocks,
    over_ranks,
    shards_of,
    whole_block,
)
from kempnerforge_jax.distributed.mesh import Mesh
from kempnerforge_jax.model.balancing import balance
from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.scan import preparing
from kempnerforge_jax.model.stack import in_first_layer
from kempnerforge_jax.model.state import State, get_state, merge, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.vlm import VLMWrapper
from kempnerforge_jax.model.within_map import gathering
from kempnerforge_jax.training.blocks import REMATERIALISATION
from kempnerforge_jax.training.loss import cross_entropy, router_losses, router_stats
from kempnerforge_jax.training.mixed_precision import compute_dtype, use_fp8
from kempnerforge_jax.training.terms import Terms, expert_counts, model_inputs
from shared_config.contract.freeze import effective_freeze, frozen_names
from shared_config.contract.labels import loss_terms
from shared_config.contract.lora import adapter_table, beside_adapters, trained_with
from shared_config.contract.routing import RouterId
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.vision import job_table
from shared_config.interchange.vision import tower_of
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.schema.training import TrainConfig
from shared_config.schema.vlm import VLMConfig


@dataclass(frozen=True)
class Recipe:
    """What is static in a step: trainers that share it share what was compiled.

    ``frozen`` are the parameters that get no gradient and no update; ``shards`` are those of a mesh.
    """

    graphdef: nnx.GraphDef[Transformer | VLMWrapper]
    model: ModelConfig
    vlm: VLMConfig | None
    train: TrainConfig
    optimizer: OptimizerConfig
    compute_dtype: np.dtype
    table: tuple[tuple[str, ParameterSpec], ...]
    frozen: frozenset[str] = frozenset()
    shards: Shards | None = None

    @staticmethod
    def of(
        config: JobConfig, mesh: Mesh | None, model: Transformer | VLMWrapper, dtype: DTypeLike
    ) -> tuple[Recipe, State, State]:
        """What a step needs of a model whose masters, which may be abstract, are of ``dtype``: the recipe, the
        parameters, and all other arrays.
        """
        shapes = {name: tuple(array.shape) for name, array in get_state(model).items()}
        table = job_table(config, tower_of(config), shapes) | adapter_table(config)
        narrow = compute_dtype(config, dtype)
        check_spread(model, mesh)
        use_fp8(model, config)
        mark_blocks(model, mesh, table, narrow)
        graphdef, parameters, buffers = split(model, scan_layers=config.train.scan_layers and config.vlm is None)
        recipe = Recipe(
            graphdef,
            config.model,
            config.vlm,
            config.train,
            config.optimizer,
            narrow,
            tuple(table.items()),
            frozenset(parameters.keys() - trained_with(config.lora, parameters).keys()),
            shards=shards_of(mesh, table, parameters, narrow),
        )
        return recipe, parameters, buffers

    def at_step(self, parameters: Collection[str], step: int) -> Recipe:
        """With those of the parameters frozen that the freeze schedule then freezes."""
        vlm = self.vlm
        if vlm is None:
            return self
        specs = effective_freeze(step, vlm.freeze, vlm.freeze_schedule)
        frozen = frozen_names(parameters, specs, vlm.module_patterns) | beside_adapters(parameters)
        return dataclasses.replace(self, frozen=frozenset(frozen))

    def balanced(
        self,
        parameters: State,
        buffers: State,
        counts: Mapping[RouterId, Num[Array, "_E"]],
        progress: Float[Array, ""],
        taken: Bool[Array, ""] | None,
    ) -> State:
        """The buffers, with the balancing buffers of routers updated from the counts (_E,) of the whole step, unless it
        is skipped.
        """
        if not counts:
            return buffers
        model = merge(self.graphdef, parameters, buffers)
        balance(model, counts, progress, taken)
        return {name: variable.get_value() for name, variable in named_variables(model) if name in buffers}


def gradients_of(
    recipe: Recipe, parameters: State, buffers: State, batches: State, count: Num[Array, ""]
) -> tuple[State, Terms]:
    """Gradients of what is not frozen, and terms, summed over the micro-batches: arrays (N, B, ...), on a mesh
    (N, R, B, ...) for R data ranks.
    """
    trained = [name for name in parameters if name not in recipe.frozen]
    return _of_all_ranks(recipe, _own_gradients, trained)(parameters, buffers, batches, count)


def summed_loss(recipe: Recipe, parameters: State, buffers: State, batches: State) -> Float[Array, ""]:
    """The sum of the cross entropy over the labels of one micro-batch (1, B, ...), on a mesh (1, R, B, ...)."""
    return _of_all_ranks(recipe, _own_loss, [])(parameters, buffers, batches, jnp.ones(()))[1]


def _of_all_ranks(recipe: Recipe, own: Callable[..., Any], given: Collection[str]) -> Callable[..., Any]:
    """``own(recipe, parameters, buffers, batches, count) -> (arrays of these names, sums)``, which computes the part of
    one data rank, for all of them.
    """
    of_rank = functools.partial(own, recipe)
    return of_rank if recipe.shards is None else over_ranks(of_rank, recipe.shards, given)


def _own_loss(
    recipe: Recipe, parameters: State, buffers: State, batches: State, count: jax.Array
) -> tuple[State, jax.Array]:
    batch = {name: array[0] for name, array in batches.items()}
    with _computing_model(recipe, _weights(recipe, parameters), buffers) as model:
        output = model.run(**model_inputs(batch), factored_logits=True)
    total = cross_entropy(output.factors or output.logits, batch["labels"])[0]
    return {}, of_all_parts(recipe.shards and recipe.shards.mesh, total) / count


def _own_gradients(
    recipe: Recipe, parameters: State, buffers: State, batches: State, count: jax.Array
) -> tuple[State, Terms]:
    """Of the micro-batches (N, B, ...) of one data rank, whose masters are cast once for all of them; gradients are
    summed in the dtype of the masters.
    """
    micro_batches = batches["labels"].shape[0]
    ranks = 1 if recipe.shards is None else recipe.shards.ranks
    differentiated = functools.partial(_objective, recipe, count=count, micro_batches=micro_batches * ranks)
    weights = _weights(recipe, parameters)
    trained = {name: array for name, array in weights.items() if name not in recipe.frozen}
    frozen = {name: array for name, array in weights.items() if name in recipe.frozen}

    def one(batch: State) -> tuple[State, Terms]:
        gradients, terms = jax.grad(differentiated, has_aux=True)(trained, frozen, buffers, batch)
        return {name: array.astype(parameters[name].dtype) for name, array in gradients.items()}, terms

    if micro_batches == 1:
        return one({name: array[0] for name, array in batches.items()})

    def add(total: Any, batch: State) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(batch)), None

    shapes = jax.eval_shape(one, {name: array[0] for name, array in batches.items()})
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, batches)[0]


def _objective(
    recipe: Recipe,
    trained: State,
    frozen: State,
    buffers: State,
    batch: State,
    *,
    count: jax.Array,
    micro_batches: int,
) -> tuple[jax.Array, Terms]:
    """A micro-batch's share of the loss, and its terms."""
    options = {"scan_layers": True} if recipe.train.scan_layers and recipe.vlm is not None else {}
    with _computing_model(recipe, {**trained, **frozen}, buffers) as model:
        output = model.run(
            **model_inputs(batch),
            **options,
            factored_logits=True,
            remat=REMATERIALISATION[recipe.train.activation_checkpointing],
        )
    total = cross_entropy(output.factors or output.logits, batch["labels"], **loss_terms(recipe.train))[0]
    loss = of_all_parts(recipe.shards and recipe.shards.mesh, total) / count
    aux_loss, z_loss = (jnp.asarray(term / micro_batches, loss.dtype) for term in router_losses(output.stats))
    weighted = loss + recipe.model.moe_aux_loss_weight * aux_loss + recipe.model.moe_router_z_loss_weight * z_loss
    entropies = [router.entropy / micro_batches for router in router_stats(output.stats)]
    entropy = jnp.asarray(sum(entropies) / max(len(entropies), 1), loss.dtype)
    return weighted, Terms(loss, aux_loss, z_loss, entropy, expert_counts(output.stats))


def _weights(recipe: Recipe, parameters: State) -> State:
    """What `_computing_model` takes of the masters: copies in the compute dtype; on a mesh they are cast as they are
    gathered.
    """
    return compute_copy(recipe, parameters) if recipe.shards is None else parameters


@contextlib.contextmanager
def _computing_model(recipe: Recipe, weights: State, buffers: State) -> Iterator[Any]:
    """The model in the compute dtype; on a mesh, sharded, with each block gathered when it runs."""
    model = merge(recipe.graphdef, weights, buffers)
    if recipe.shards is None:
        yield model
        return
    gather_outside_blocks(model, dict(recipe.shards.parts))
    with preparing(whole_block), gathering(gather_tokens), spreading(recipe.shards.mesh):
        yield model


def compute_copy(recipe: Recipe, parameters: State) -> State:
    """The masters cast to the compute dtype, but for what decides a route."""
    table = dict(recipe.table)
    return {
        name: master if table[in_first_layer(name)].full_precision else master.astype(recipe.compute_dtype)
        for name, master in parameters.items()
    }
