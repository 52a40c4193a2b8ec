"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and clipping by the global norm.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)        t = 1, 2, ...

t counts the updates of each parameter: a frozen one gets none. The decay acts where the parameter table says so.
Checkpoints hold the moments as ``m.<parameter>`` and ``v.<parameter>``, the counts as ``t.<parameter>``.

Another optimiser is registered in category "optimizer" under the name that ``optimizer.name`` gives. It is called with
the config and gives an `optax.GradientTransformation` of one array, to whose steps the decay is added before they are
subtracted times the learning rate. Its state is a named tuple of ``count``, updates taken, and the moments that
`shared_config.registry.declare` names: "m" as ``mu``, "v" as ``nu``, others under their names; without a declaration
these two, as in `optax.ScaleByAdamState`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Shaped

from kempnerforge_jax.model.stack import Stack, in_first_layer, stack_layers, stacks_of, unstack_layers, unstack_shapes
from kempnerforge_jax.model.state import State, like
from kempnerforge_jax.registry import registry
from shared_config.contract.moments import UPDATES, moments_of
from shared_config.contract.specs import ParameterTable, check_names
from shared_config.interchange.parts import Parts
from shared_config.schema.optimizer import OptimizerConfig

OptimizerState = object
"""What optax keeps: a named tuple for each parameter, then the states of the transformations after it."""


def build_optimizer(
    parameters: Mapping[str, object], table: ParameterTable, config: OptimizerConfig
) -> optax.GradientTransformation:
    """The optimiser of the named parameters (arrays, or anything else: only names matter).

    Its output is subtracted times the learning rate, see `update`.
    """
    own = registry.get("optimizer", config.name)(config)
    _check_state(own, config.name)
    return optax.chain(
        _by_parameter(own),
        optax.add_decayed_weights(
            config.weight_decay, mask={name: table[in_first_layer(name)].decay for name in parameters}
        ),
    )


@registry.register("optimizer", "adamw")
def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW, but for the decay."""
    return optax.scale_by_adam(*config.betas, eps=config.eps, eps_root=0.0, mu_dtype=None, nesterov=False)


def update(
    optimizer: optax.GradientTransformation,
    gradients: State,
    state: OptimizerState,
    parameters: State,
    lr: Float[Array, ""] | float,
    finite: Bool[Array, ""] | None = None,
) -> tuple[State, OptimizerState]:
    """One step: the new parameters and the new state, those from before where ``finite`` (a bool scalar) is false."""
    moved, new_state = _moved(optimizer, gradients, state, parameters, lr)
    if finite is None:
        return moved, new_state
    return jax.tree.map(functools.partial(jnp.where, finite), (moved, new_state), (dict(parameters), state))


def stays_finite(
    optimizer: optax.GradientTransformation,
    gradients: State,
    state: OptimizerState,
    parameters: State,
    lr: Float[Array, ""],
) -> Bool[Array, ""]:
    """Whether the next step leaves parameters and moments finite, a bool scalar."""
    leaves = jax.tree.leaves(_moved(optimizer, gradients, state, parameters, lr))
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def states_of(state: OptimizerState, parameters: Mapping[str, object]) -> OptimizerState:
    """The state of some of the parameters; see `with_states`."""
    by_name, rest = _parts(state)
    return ({name: by_name[name] for name in parameters}, *rest)


def with_states(state: OptimizerState, some: OptimizerState) -> OptimizerState:
    """The state with that of some parameters put in its place."""
    changed, rest = _parts(some)
    return ({**_parts(state)[0], **changed}, *rest)


def get_optimizer_state(state: OptimizerState) -> State:
    """Moments and counts of updates (int32 scalars) by name; stacked layers are given one by one."""
    return {
        f"{kind}.{name}": array
        for kind, arrays in arrays_by_kind(state).items()
        for name, array in unstack_layers(arrays).items()
    }


def arrays_by_kind(state: OptimizerState) -> dict[str, State]:
    """Kind -> parameter -> array, of stacked layers one: the moments, then the counts."""
    kinds: dict[str, State] = {}
    for name, one in _parts(state)[0].items():
        for field in sorted(one._fields, key="count".__eq__):
            kinds.setdefault(_kind(field), {})[name] = getattr(one, field)
    return kinds


def set_optimizer_state(
    state: OptimizerState, moments: Mapping[str, Shaped[Array, "..."] | np.ndarray | Parts], step: int
) -> OptimizerState:
    """The state with these moments and counts (JAX or NumPy arrays, or their parts); counts that are not given are
    ``step``.

    Raises:
        UserError: lists every missing, unknown and misshapen name.
    """
    by_name, rest = _parts(state)
    own = arrays_by_kind(state)
    values = {f"t.{name}": np.asarray(step) for name in unstack_shapes(own.get(UPDATES, {}))} | dict(moments)
    check_names(
        {f"{kind}.{name}": one.shape for kind in own for name, one in unstack_shapes(own[kind]).items()},
        {name: tuple(value.shape) for name, value in values.items()},
    )
    filled = {kind: _filled(arrays, values, f"{kind}.") for kind, arrays in own.items()}
    states = {
        name: one._replace(**{field: filled[_kind(field)][name] for field in one._fields})
        for name, one in by_name.items()
    }
    return (states, *rest)


def clip_by_global_norm(gradients: State, max_norm: float) -> tuple[State, Float[Array, ""]]:
    """All gradients times max_norm / max(norm, max_norm); ``max_norm`` 0 leaves them as they are.

    Returns:
        The gradients, and their Euclidean norm before, in at least float32.
    """
    squares = [
        jnp.sum(jnp.square(gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))))
        for gradient in gradients.values()
    ]
    norm = jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
    if max_norm <= 0:
        return gradients, norm
    factor = max_norm / jnp.maximum(norm, max_norm)
    return {name: gradient * factor.astype(gradient.dtype) for name, gradient in gradients.items()}, norm


def _moved(
    optimizer: optax.GradientTransformation, gradients: State, state: Any, parameters: State, lr: jax.Array | float
) -> tuple[State, Any]:
    steps, new_state = optimizer.update(gradients, state, parameters)
    return jax.tree.map(lambda value, step: value - lr * step, parameters, steps), new_state


def _by_parameter(own: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation of each parameter by itself, and of each layer of a stack."""

    def init(parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _by_layer(own.init, name)(parameter) for name, parameter in parameters.items()}

    def step(gradients: State, state: dict[str, Any], parameters: Any = None) -> tuple[State, dict[str, Any]]:
        both = {name: _by_layer(own.update, name)(array, state[name]) for name, array in gradients.items()}
        return {name: moved for name, (moved, _) in both.items()}, {name: new for name, (_, new) in both.items()}

    return optax.GradientTransformation(init, step)  # type: ignore[arg-type]


def _by_layer(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, applied to each layer where the parameter is a stack of layers."""
    stack = Stack.of(name)
    return function if stack is None else stack.map(function)


def _parts(state: OptimizerState) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The states by parameter, and those of the transformations after."""
    parts: Any = state
    return parts[0], parts[1:]


def _kind(field: str) -> str:
    """What a field of a state is called in checkpoints."""
    return {"mu": "m", "nu": "v", "count": UPDATES}.get(field, field)


def _check_state(own: optax.GradientTransformation, name: str) -> None:
    """Refuse an optimiser whose state is not what was declared."""
    state = jax.eval_shape(own.init, jax.ShapeDtypeStruct((1,), jnp.float32))
    kinds = [_kind(field) for field in getattr(state, "_fields", ())]
    wanted = [UPDATES, *moments_of(name)]
    if sorted(kinds) != sorted(wanted):
        raise ValueError(f"optimizer {name!r}: its state holds {kinds}: must be a named tuple of {wanted}, as declared")


def _filled(own: State, values: Mapping[str, Any], prefix: str) -> State:
    """The values whose names start with ``prefix``, stacked as ``own`` is, in its dtypes and shardings."""
    single = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    whole = stack_layers(single, stacks_of(own))
    return {name: like(array, whole[name]) for name, array in own.items()}
