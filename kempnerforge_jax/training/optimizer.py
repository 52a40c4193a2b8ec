"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and clipping by the global norm.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)        t = 1, 2, ...

t counts the updates of each parameter: a frozen one gets none. The decay acts where the parameter table says so.
Checkpoints hold the moments as ``m.<parameter>`` and ``v.<parameter>``, the counts as ``t.<parameter>``.

Another optimiser is registered in category "optimizer" under the name that ``optimizer.name`` gives. It is called with
the config and gives an `optax.GradientTransformation` of one array, to whose steps the decay is added before they are
subtracted times the learning rate, or a `WholeUpdate` that does both itself. Its state is a named tuple of ``count``,
updates taken, and the moments that `shared_config.registry.declare` names: "m" as ``mu``, "v" as ``nu``, others under
their names; without a declaration these two, as in `optax.ScaleByAdamState`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Shaped

from kempnerforge_jax.model.stack import Stack, in_first_layer, stack_layers, stacks_of, unstack_layers, unstack_shapes
from kempnerforge_jax.model.state import State, like
from kempnerforge_jax.registry import registry
from kempnerforge_jax.training import lion, muon, schedule_free  # noqa: F401 (they register)
from kempnerforge_jax.training.whole import WholeUpdate
from shared_config.contract.moments import AVERAGE, UPDATES, declared_moments, optimizer_of, optimizers_of
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import ParameterTable, check_names
from shared_config.interchange.parts import Parts
from shared_config.schema.optimizer import OptimizerConfig

OptimizerState = Mapping[str, object]
"""What optax, or an optimiser of ours, keeps of each parameter: a named tuple; with an average, `Averaged`."""


class Averaged(NamedTuple):
    """The state of an optimiser, and the average of the weights less the weights."""

    own: object
    ema: Float[Array, "..."]


class Optimizer(NamedTuple):
    """The optimiser of several parameters, each by itself.

    Attributes:
        init: parameters -> state.
        update: (gradients, state, parameters, rates) -> (new parameters, state).
    """

    init: Callable[[State], OptimizerState]
    update: Callable[[State, OptimizerState, State, Rates], tuple[State, OptimizerState]]


def build_optimizer(parameters: Mapping[str, object], table: ParameterTable, config: OptimizerConfig) -> Optimizer:
    """The optimiser of the named parameters (arrays, or anything else: only names matter)."""
    built = {kind: registry.get("optimizer", kind)(config) for kind in optimizers_of(config)}
    whole = {}
    for kind, own in built.items():
        _check_state(own, kind)
        whole[kind] = _averaged(own if isinstance(own, WholeUpdate) else _decayed(own), config.ema_decay)
    specs = {name: table[in_first_layer(name)] for name in parameters}
    own_of = {name: whole[optimizer_of(config, in_first_layer(name), spec)] for name, spec in specs.items()}

    def init(parameters: Mapping[str, Any]) -> OptimizerState:
        return {name: _by_layer(own_of[name].init, name)(parameter) for name, parameter in parameters.items()}

    def step(gradients: State, state: OptimizerState, parameters: State, rates: Rates) -> tuple[State, OptimizerState]:
        both = {}
        for name, gradient in gradients.items():
            own_rates = rates if specs[name].decay else rates._replace(decay=0.0)
            one = functools.partial(own_of[name].update, rates=own_rates)
            both[name] = _by_layer(one, name)(gradient, state[name], parameters[name])
        return {name: moved for name, (moved, _) in both.items()}, {name: new for name, (_, new) in both.items()}

    return Optimizer(init, step)


@registry.register("optimizer", "adamw")
def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW, but for the decay."""
    return optax.scale_by_adam(*config.betas, eps=config.eps, eps_root=0.0, mu_dtype=None, nesterov=False)


def update(
    optimizer: Optimizer,
    gradients: State,
    state: OptimizerState,
    parameters: State,
    rates: Rates,
    finite: Bool[Array, ""] | None = None,
) -> tuple[State, OptimizerState]:
    """One step: the new parameters and the new state, those from before where ``finite`` (a bool scalar) is false."""
    moved, new_state = optimizer.update(gradients, state, parameters, rates)
    if finite is None:
        return moved, new_state
    return jax.tree.map(functools.partial(jnp.where, finite), (moved, new_state), (dict(parameters), dict(state)))


def stays_finite(
    optimizer: Optimizer, gradients: State, state: OptimizerState, parameters: State, rates: Rates
) -> Bool[Array, ""]:
    """Whether the next step leaves parameters and moments finite, a bool scalar."""
    leaves = jax.tree.leaves(optimizer.update(gradients, state, parameters, rates))
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def states_of(state: OptimizerState, parameters: Mapping[str, object]) -> OptimizerState:
    """The state of some of the parameters; see `with_states`."""
    return {name: state[name] for name in parameters}


def with_states(state: OptimizerState, some: OptimizerState) -> OptimizerState:
    """The state with that of some parameters put in its place."""
    return {**state, **some}


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
    for name, one in state.items():
        for kind, array in _kept(one).items():
            kinds.setdefault(kind, {})[name] = array
    order = sorted(kinds, key=lambda kind: (kind == UPDATES, -len(kinds[kind])))
    return {kind: kinds[kind] for kind in order}


def set_optimizer_state(
    state: OptimizerState, moments: Mapping[str, Shaped[Array, "..."] | np.ndarray | Parts], step: int
) -> OptimizerState:
    """The state with these moments and counts (JAX or NumPy arrays, or their parts); counts that are not given are
    ``step``.

    Raises:
        UserError: lists every missing, unknown and misshapen name.
    """
    own = arrays_by_kind(state)
    values = {f"t.{name}": np.asarray(step) for name in unstack_shapes(own.get(UPDATES, {}))} | dict(moments)
    check_names(
        {f"{kind}.{name}": one.shape for kind in own for name, one in unstack_shapes(own[kind]).items()},
        {name: tuple(value.shape) for name, value in values.items()},
    )
    filled = {kind: _filled(arrays, values, f"{kind}.") for kind, arrays in own.items()}
    return {name: _filled_with(one, {kind: filled[kind][name] for kind in _kept(one)}) for name, one in state.items()}


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


def _decayed(own: optax.GradientTransformation) -> WholeUpdate:
    """The steps of a transformation with decay and learning rate."""

    def step(gradient: Any, state: Any, parameter: Any, rates: Rates) -> tuple[jax.Array, Any]:
        direction, new_state = own.update(gradient, state, parameter)
        return parameter - rates.lr * (direction + rates.decay * parameter), new_state

    return WholeUpdate(own.init, step)  # type: ignore[arg-type]


def _averaged(own: WholeUpdate, decay_rate: float) -> WholeUpdate:
    """With an average of the weights, where its rate is not 0: ema <- d (ema + p before) - d p after."""

    def init(parameter: Any) -> Averaged:
        return Averaged(own.init(parameter), jnp.zeros_like(parameter))

    def step(gradient: Any, state: Averaged, parameter: Any, rates: Rates) -> tuple[jax.Array, Averaged]:
        moved, new_state = own.update(gradient, state.own, parameter, rates)
        return moved, Averaged(new_state, decay_rate * (state.ema + parameter - moved))

    return WholeUpdate(init, step) if decay_rate else own


def _by_layer(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, applied to each layer where the parameter is a stack of layers."""
    stack = Stack.of(name)
    return function if stack is None else stack.map(function)


def _kept(one: Any) -> State:
    """Kind -> array of the state of one parameter, the moments before the counts."""
    if isinstance(one, Averaged):
        own = _kept(one.own)
        return {**{kind: own[kind] for kind in own if kind != UPDATES}, AVERAGE: one.ema, UPDATES: own[UPDATES]}
    return {_kind(field): getattr(one, field) for field in sorted(one._fields, key="count".__eq__)}


def _filled_with(one: Any, values: State) -> Any:
    """The state of one parameter, with these arrays by kind."""
    if isinstance(one, Averaged):
        return Averaged(_filled_with(one.own, values), values[AVERAGE])
    return one._replace(**{field: values[_kind(field)] for field in one._fields})


def _kind(field: str) -> str:
    """What a field of a state is called in checkpoints."""
    return {"mu": "m", "nu": "v", "count": UPDATES}.get(field, field)


def _check_state(own: optax.GradientTransformation | WholeUpdate, name: str) -> None:
    """Refuse an optimiser whose state is not what was declared."""
    init: Any = own.init
    state = jax.eval_shape(init, jax.ShapeDtypeStruct((1, 1), jnp.float32))
    kinds = [_kind(field) for field in getattr(state, "_fields", ())]
    wanted = [UPDATES, *declared_moments(name)]
    if sorted(kinds) != sorted(wanted):
        raise ValueError(f"optimizer {name!r}: its state holds {kinds}: must be a named tuple of {wanted}, as declared")


def _filled(own: State, values: Mapping[str, Any], prefix: str) -> State:
    """The values whose names start with ``prefix``, stacked as ``own`` is, in its dtypes and shardings."""
    single = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    whole = stack_layers(single, stacks_of(own))
    return {name: like(array, whole[name]) for name, array in own.items()}
