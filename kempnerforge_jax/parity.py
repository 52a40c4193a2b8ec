"""Records any JAX module or function, to be compared with any other implementation of it.

trace = record(model, (tokens,), dtype="float32", path="jax.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Shaped

from kempnerforge_jax.functions import Transformed, bare, is_callable_tree, taken_apart
from kempnerforge_jax.model.state import to_numpy
from kempnerforge_jax.optimizer_states import optimizer_state
from kempnerforge_jax.program import Rounded, Visit, evaluate, marked_names, path_name, readers, unmarked
from kempnerforge_jax.statistics import PutOut, compiling, described, kept, put_out
from kempnerforge_jax.taps import Taps, is_array, is_floating, tap
from shared_config.errors import UserError
from shared_config.interchange.files import PathLike
from shared_config.parity.foreign.containers import ARGUMENT, OUTPUT, map_tensors, named_leaves, tensors_in
from shared_config.parity.foreign.mapping import Map
from shared_config.parity.foreign.options import EXACT, Arrays, Options, drawn_towards, fed_back, make_options
from shared_config.parity.foreign.recorder import Noise, Recorded, Store, make_trace
from shared_config.parity.foreign.transfer import transfer
from shared_config.parity.traces import GRADIENT, Trace

__all__ = ["optimizer_state", "record", "tap"]

Inputs = Sequence[object] | Mapping[str, object]
Function = nnx.Module | linen.Module | Transformed | Callable[..., object]
Loss = Callable[[object], Shaped[Array, "..."]]
Parameters = dict[str, Shaped[Array, "..."]]


class OptimizerOf(Protocol):
    """An optimiser of optax."""

    def init(self, params: Parameters, /) -> object:
        """The state before the first step."""
        ...

    def update(self, updates: Parameters, state: object, params: Parameters, /) -> tuple[Parameters, object]:
        """What is added to the parameters, and the state after the step."""
        ...


DTYPES = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
}


def record(
    function: Function,
    inputs: Inputs,
    *,
    weights: Mapping[str, object] | None = None,
    dtype: str | None = None,
    backward: bool = True,
    loss: Loss | None = None,
    optimizer: OptimizerOf | None = None,
    batches: Sequence[Inputs] = (),
    only: Sequence[str] = (),
    above: int | None = None,
    deltas: bool | int = True,
    seed: int = 0,
    refeed: Trace | None = None,
    names: Map | None = None,
    path: PathLike | None = None,
    chunks: int | None = None,
) -> Trace:
    """Call a module or function once and record every activation by its module's path, every gradient, and a step.

    The output of a module has its path as its name, that of the whole is "output"; parts of tuples, mappings and
    dataclasses have their place or key added, unless there is only one tensor. What a module is given is recorded with
    the end "@in" where no module put it out as it is. What is recorded several times is numbered, "norm@0", "norm@1".
    Integers, as choices of routers, are compared exactly but for what rounding changes.

    The function is traced once and run under jit; what `tap` or `checkpoint_name` names inside of it, also in scans,
    rematerialised and jitted parts, is an activation; within `vmap` the new axes come first.

    Args:
        function: a module of NNX or Linen, a callable pytree (as modules of Equinox are), what `hk.transform` of Haiku
            gives, or a function, which takes the weights first, if there are some.
        inputs: positional or named arguments; arrays and anything else, in containers of any kind.
        weights: of Linen the variables, of Haiku the parameters (with a state {"params": ..., "state": ...}), of a
            function a tree; of other modules values by name, in place of their own. Slashes of names are dots here.
        dtype: of weights and floating-point inputs, of "float64", "float32", "float16", "bfloat16"; None leaves all as
            it is.
        backward: whether to record gradients.
        loss: of the output; by default half its mean squared distance from drawn values, or itself if it is a scalar.
        optimizer: of optax; the parameters after one step are recorded.
        batches: inputs of a short run with that optimiser; its losses are recorded.
        only: glob patterns of names; see `Selection`.
        above: bytes of a tensor above which statistics are kept in place of values.
        deltas: whether to measure in float64 what rounding does to each tensor; a number is that of the runs.
        seed: of drawn values.
        refeed: a trace of another implementation: what follows an activation continues from the value there, so that
            only a wrong module differs; and so do the gradients behind it from those there, so that only a module whose
            own backward pass is wrong differs.
        names: from the names and layouts of ``refeed``, or of what this is to be compared with, to those here. Where
            there is no loss, outputs that have others here are drawn towards the same.
        path: of a file to write the trace to.
        chunks: bytes above which a tensor is written to a file of its own, as soon as it is known.

    Raises:
        UserError: an argument that can't be, or weights that don't fit.
    """
    options = make_options(
        dtype=dtype, backward=backward, only=only, above=above, deltas=deltas, seed=seed, refeed=refeed, names=names
    )
    engine = _Engine(function, inputs, weights, loss, optimizer, batches, options)
    return make_trace(engine, options, path, chunks)


class _Engine:
    """A function of JAX; see `Engine`."""

    backend, packages = "jax", ("jax", "flax", "equinox", "dm-haiku")

    def __init__(
        self,
        function: Function,
        inputs: Inputs,
        weights: Mapping[str, object] | None,
        loss: Loss | None,
        optimizer: OptimizerOf | None,
        batches: Sequence[Inputs],
        options: Options,
    ):
        self._inputs, self._batches = inputs, batches
        self._loss, self._optimizer, self._options = loss, optimizer, options
        if batches and optimizer is None:
            raise UserError("batches: a run needs an optimizer")
        self._apply, tree, self._rest = taken_apart(bare(function), weights)
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = [path_name(path) for path, _ in leaves]
        own = {name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
        if len(own) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UserError(f"weights: {', '.join(twice)}: several have this name, with dots for what nests them")
        given = weights if isinstance(function, nnx.Module) or is_callable_tree(function) else None
        shapes = {name: value.shape for name, value in own.items()}
        self.weights: Arrays = own if given is None else transfer(given, None, shapes)
        self._arrays = dict(zip(names, (leaf for _, leaf in leaves), strict=True)) if given is None else self.weights
        self.inputs: Arrays = {name: np.asarray(array) for name, array in tensors_in(inputs, is_array)}
        self.device, self.drawn = jax.devices()[0].device_kind, list[str]()
        self._programs: dict[tuple[str, int | None], _Program] = {}

    def run(
        self, dtype: str, weights: Arrays, inputs: Arrays, fed: Arrays, noise: Noise | None, store: Store
    ) -> Recorded:
        """Call it once; see `Engine.run`."""
        with jax.enable_x64(dtype == EXACT or self._is_wide(dtype)):
            given = (
                self._arrays if weights is self.weights else weights
            )  # where they are, if they are the function's own
            values = {name: _cast(value, dtype) for name, value in given.items()}
            arguments = {f"{ARGUMENT}{name}": _cast(value, dtype) for name, value in inputs.items()}
            taken = {name: jnp.asarray(value) for name, value in fed.items()}
            program = self._program(dtype, store, values, arguments)
            key = None if noise is None else (jax.random.key(noise.seed), noise.roundoff)
            found = program(values, arguments, taken, key)
            losses = self._run(dtype, values) if self._batches and not fed else None
            known = program.readers({**values, **arguments}, fed) if noise is None else {}
        descriptions, groups = jax.tree.flatten(program.descriptions)
        held = jax.tree.unflatten(groups, kept(found["recorded"], descriptions, store))
        activations = list(zip(program.names, held["taps"], strict=True))
        places = program.places if self._options.backward else []
        cotangents, gradients = dict(zip(places, held["cotangents"], strict=True)), held["gradients"]
        order = [*weights, *(f"{ARGUMENT}{name}" for name in inputs)]
        ordered = {name: gradients[name] for name in order if name in gradients}
        updated = {name: to_numpy(found["updated"][name]) for name in weights if name in found["updated"]}
        if losses is not None:
            updated, losses = losses[1], losses[0]
        loss = to_numpy(found["loss"]) if self._options.backward else None
        return Recorded(activations, cotangents, loss, ordered, updated, losses, known, program.others)

    def _is_wide(self, dtype: str) -> bool:
        arrays = [*self.weights.values(), *self.inputs.values()]
        return not dtype and any(array.dtype == np.float64 for array in arrays)

    def _program(self, dtype: str, store: Store, weights: Parameters, inputs: Parameters) -> _Program:
        """The compiled recording for an arithmetic."""
        key = dtype, store.above
        if key not in self._programs:
            call = self._traced(dtype, weights, inputs)
            self._programs[key] = _Program(call, self._options, store, self._loss_of, self._step)
        return self._programs[key]

    def _traced(self, dtype: str, weights: Parameters, inputs: Parameters) -> Any:
        """(weights and inputs by name, visit) -> output, of a program that was traced once."""

        def whole(values: list[Array], arguments: list[Array]) -> object:
            tree = jax.tree_util.tree_unflatten(self._treedef, values)
            rest = jax.tree.map(lambda leaf: _widened(leaf) if dtype == EXACT else leaf, self._rest)  # a copy to change
            given = iter(arguments)
            return self._apply(tree, rest, map_tensors(lambda *_: next(given), self._inputs, "", is_array))

        order = [*weights, *inputs]
        closed, shapes = jax.make_jaxpr(whole, return_shape=True)([*weights.values()], [*inputs.values()])
        treedef, copies = jax.tree.structure(shapes), marked_names(closed, order)

        def call(values: Parameters, visit: Visit, rounded: Rounded | None = None) -> object:
            def named(name: str, value: Array) -> Array:
                known = unmarked(name, copies)
                return value if known is None else visit(known, value)

            return jax.tree.unflatten(treedef, evaluate(closed, [values[name] for name in order], named, rounded))

        return call

    def _loss_of(self, output: object) -> Array:
        if self._loss is not None:
            return self._loss(output)
        leaves = named_leaves(output, OUTPUT, lambda value: is_array(value) and is_floating(value))
        if len(leaves) == 1 and next(iter(leaves.values())).ndim == 0:
            return next(iter(leaves.values()))
        wide = {name: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for name, leaf in leaves.items()}
        drawn = {name: drawn_towards(self._options, name, leaf.shape) for name, leaf in wide.items()}
        self.drawn = [one for names, _ in drawn.values() for one in names]
        terms = [jnp.square(leaf - jnp.asarray(drawn[name][1], leaf.dtype)).mean() / 2 for name, leaf in wide.items()]
        if not terms:
            raise UserError("backward: no output depends on a weight or an input with a gradient; set backward=False")
        return jnp.stack(terms).sum()

    def _step(self, parameters: Parameters, gradients: Parameters) -> Parameters:
        if self._optimizer is None or not parameters:
            return {}
        return self._updated(parameters, gradients, self._optimizer.init(parameters))[0]

    def _updated(self, parameters: Parameters, gradients: Parameters, state: Any) -> Any:
        assert self._optimizer is not None
        updates, state = self._optimizer.update(gradients, state, parameters)
        return {name: (own + updates[name]).astype(own.dtype) for name, own in parameters.items()}, state

    def _run(self, dtype: str, weights: Parameters) -> Any:
        """Losses and parameters of a short run."""
        assert self._optimizer is not None
        parameters = {name: value for name, value in weights.items() if is_floating(value)}
        fixed = {name: value for name, value in weights.items() if name not in parameters}
        state, losses = self._optimizer.init(parameters), []
        for batch in self._batches:
            inputs = {name: _cast(np.asarray(array), dtype) for name, array in tensors_in(batch, is_array)}
            inputs = {f"{ARGUMENT}{name}": array for name, array in inputs.items()}
            call = self._traced(dtype, weights, inputs)

            def objective(values: Parameters, call: Any = call, inputs: Parameters = inputs) -> Array:
                return self._loss_of(call({**values, **fixed, **inputs}, lambda _, value: value))

            loss, gradients = jax.jit(jax.value_and_grad(objective))(parameters)
            parameters, state = self._updated(parameters, gradients, state)
            losses.append(float(loss))
        return np.asarray(losses, np.float64), {
            name: to_numpy(parameters[name]) for name in weights if name in parameters
        }


class _Program:
    """A compiled recording.

    Attributes:
        names: of what is recorded, in the order of execution.
        places: of those that have a gradient.
        others: names of what is not asked for.
        descriptions: of all arrays that were recorded, by group.
    """

    def __init__(self, call: Any, options: Options, store: Store, loss_of: Any, step: Any):
        self.names: list[str] = []
        self.places: list[int] = []
        self.others: list[str] = []
        self.descriptions: dict[str, Any] = {}
        self._call, self._options, self._store = call, options, store
        self._loss_of, self._step = loss_of, step
        self._compiled = jax.jit(self._recorded)

    def __call__(self, weights: Parameters, inputs: Parameters, fed: Parameters, key: Any) -> dict[str, Any]:
        with compiling():
            return self._compiled(weights, inputs, fed, key)

    def readers(self, given: Parameters, fed: Arrays) -> dict[str, list[str]]:
        """`Recorded.readers`."""
        if not self._options.backward or not fed:
            return {}

        def named(values: Parameters) -> object:
            return map_tensors(_marked, self._call(values, _marked), OUTPUT, is_array)

        order = [f"{GRADIENT}/{name}" for name in sorted(given)]
        return readers(jax.make_jaxpr(named)(given), order, lambda name, call: fed_back(fed, name, call) is not None)

    def _recorded(self, weights: Parameters, inputs: Parameters, fed: Parameters, key: Any) -> dict[str, Any]:
        given = {**weights, **inputs}
        varied = {name: value for name, value in given.items() if is_floating(value)}
        fixed = {name: value for name, value in given.items() if name not in varied}

        def objective(varied: Parameters, shifts: list[Array] | None) -> tuple[Any, Any]:
            taps = Taps(self._options, fed, key, shifts)
            called = self._call({**varied, **fixed}, taps.visit, None if key is None else taps.rounded)
            output = map_tensors(taps.visit, called, OUTPUT, is_array)
            self.names, self.places, self.others = taps.names, taps.places, taps.others
            loss = self._loss_of(output) if self._options.backward else jnp.zeros(())
            return (loss, taps.ends), (taps.values, taps.given)

        if not self._options.backward:
            values = objective(varied, None)[1][0]
            return {"loss": None, "updated": {}, "recorded": self._put_out(values, [], {})}
        shapes = jax.eval_shape(lambda values: objective(values, None)[1][0], varied)
        shifts = [jnp.zeros(shapes[place].shape, shapes[place].dtype) for place in self.places]
        (loss, _), pull, (values, given) = jax.vjp(objective, varied, shifts, has_aux=True)
        gradients, cotangents = pull((jnp.ones((), loss.dtype), given))
        own = {} if fed else {name: value for name, value in varied.items() if name in weights}
        updated = self._step(own, {name: gradients[name] for name in own})
        wanted = {name: own for name, own in gradients.items() if self._options.wants_gradient(name)}
        return {"loss": loss, "updated": updated, "recorded": self._put_out(values, cotangents, wanted)}

    def _put_out(self, values: list[Array], cotangents: list[Array], gradients: Parameters) -> PutOut:
        """What is recorded, and only the moments of arrays of which a summary is kept."""
        recorded = {"taps": values, "cotangents": cotangents, "gradients": gradients}
        self.descriptions = jax.tree.map(lambda array: described(array, self._store), recorded)
        return put_out(jax.tree.leaves(recorded), jax.tree.leaves(self.descriptions))


def _marked(name: str, array: Array) -> Array:
    return checkpoint_name(array, name)


def _cast(value: np.ndarray, dtype: str) -> Array:
    return jnp.asarray(value, DTYPES[dtype]) if dtype and is_floating(value) else jnp.asarray(value)


def _widened(leaf: Any) -> Any:
    return leaf.astype(jnp.float64) if is_array(leaf) and is_floating(leaf) else leaf
