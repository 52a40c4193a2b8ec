"""The training step, compiled ahead of time for devices that needn't be present, on arrays without values."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.topologies import get_topology_desc

from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.distributed.flops import product_flops
from kempnerforge_jax.distributed.hlo import collectives_of
from kempnerforge_jax.distributed.mesh import open_mesh
from kempnerforge_jax.distributed.sharding import abstract, abstract_batches, abstract_initial_state
from kempnerforge_jax.model.build import build_model
from kempnerforge_jax.training.mixed_precision import matmul_precision
from kempnerforge_jax.training.objective import Recipe
from kempnerforge_jax.training.optimizer import build_optimizer
from kempnerforge_jax.training.train import compiled_step
from shared_config.contract.freeze import trained_parameters
from shared_config.contract.programs import Program
from shared_config.contract.schedule import Rates
from shared_config.contract.slices import Slice
from shared_config.data import open_data
from shared_config.data.images import with_noise_seeds
from shared_config.errors import UserError
from shared_config.schema.job import JobConfig


def compile_step(config: JobConfig, topology: Slice) -> Program:
    """What a training step costs each chip of a slice of TPUs, in the layout of ``[distributed]``.

    Raises:
        UserError: as `devices_of_slice`, `traced_step` and `compiled_program`.
    """
    return compiled_program(traced_step(config, devices_of_slice(topology)), topology.chips, "tpu")


def devices_of_slice(topology: Slice) -> list[Device]:
    """The chips of a slice, as libtpu describes them.

    Raises:
        UserError: libtpu knows no such slice.
    """
    try:
        return list(get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"--topology = {topology.name!r}: libtpu refuses it: {_first_line(error)}") from error


def traced_step(config: JobConfig, devices: Sequence[Device]) -> jax.stages.Traced:
    """The step of a trainer on these devices, of which there are several, traced for its arguments.

    Raises:
        ConfigError: a layout that does not fit the devices or the model, with each reason.
        UserError: data that can't be used; nothing is trained.
    """
    mesh = open_mesh(config, devices)
    assert mesh is not None
    dtype = jnp.dtype(jnp.float32)
    model = nnx.eval_shape(lambda: build_model(config, rngs=None)).to(dtype)
    recipe, parameters, buffers = Recipe.of(config, mesh, model, dtype)
    table = dict(recipe.table)
    parameters, buffers = (abstract(mesh, table, arrays) for arrays in (parameters, buffers))
    trained = trained_parameters(parameters, config.vlm)
    state = abstract_initial_state(
        mesh, devices[0], table, build_optimizer(trained, table, config.optimizer).init, trained
    )
    (batch,) = with_noise_seeds(config, [open_data(config).batch(0)], 0)
    count = config.train.grad_accum_steps * mesh.layout.data_ranks
    batches = abstract_batches(mesh, {name: ((count, *array.shape), array.dtype) for name, array in batch.items()})
    scalar = jax.ShapeDtypeStruct((), dtype)
    with matmul_precision(config.train.matmul_precision):
        return compiled_step(recipe.at_step(parameters, 0)).trace(
            parameters, buffers, state, batches, scalar, Rates(scalar, scalar, scalar), scalar
        )


def compiled_program(traced: jax.stages.Traced, devices: int, platform: str) -> Program:
    """The cost of a traced step that is compiled for this many devices.

    Raises:
        UserError: the compiler refuses it, as it does where the memory is too small.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the step can't be compiled: {_first_line(error)}") from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    collectives, unknown_loops = collectives_of(text)
    return Program(
        flops=product_flops(traced.jaxpr.jaxpr, platform) // devices,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=collectives,
        unknown_loops=unknown_loops,
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
