"""What the recorders of all frameworks share: runs with moved values, deltas, and the trace that comes of them."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np
import tomli_w

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike
from shared_config.interchange.weights import is_floating
from shared_config.parity.cancellation import vanishing
from shared_config.parity.chunks import Spill
from shared_config.parity.foreign.containers import ARGUMENT, numbered
from shared_config.parity.foreign.options import EXACT, Arrays, Options, inputs_hash
from shared_config.parity.foreign.site import READERS
from shared_config.parity.numerics import UNIT_ROUNDOFF, as_float64, difference, perturb, rms
from shared_config.parity.recording import delta_and_parts
from shared_config.parity.routes import is_routes, unequal_choices
from shared_config.parity.tolerance import PARTS
from shared_config.parity.traces import (
    COTANGENT,
    FOREIGN,
    FORWARD,
    GRADIENT,
    LOSS,
    LOSSES,
    ROUTES,
    ROUTING,
    UPDATED,
    ZEROS,
    Summary,
    Trace,
    TraceMeta,
    group_of,
    summarize,
    write_trace,
)

FINE = 2.0**-44
"""A move that float64 resolves, and no narrower dtype does."""
LINEAR = 64.0
"""Factor by which the effect of a fine move may differ from its share of that of a coarse one."""

Tensors = Mapping[str, np.ndarray | Summary]


@dataclass(frozen=True)
class Store:
    """What is kept of the arrays that a run computes.

    Attributes:
        above: bytes of an array of real numbers above which a `Summary` is kept of it; None for whole arrays.
        spill: where large arrays go.
    """

    above: int | None = None
    spill: Spill | None = None

    def summarizes(self, size: int) -> bool:
        """Whether of so many bytes a summary is kept: a framework may compute it where the array is."""
        return self.above is not None and size > self.above

    def __call__(self, array: np.ndarray) -> np.ndarray | Summary:
        """What is kept of an array on the host."""
        if self.summarizes(array.nbytes):
            return summarize(array, hashed=False)
        return array if self.spill is None else self.spill.put(array)


@dataclass(frozen=True)
class Noise:
    """Every recorded activation is moved by a relative uniform(-1, 1) * ``roundoff`` before it goes on.

    Attributes:
        seed: of the moves.
    """

    roundoff: float
    seed: int


@dataclass(frozen=True)
class Recorded:
    """What one run of a function computed, on the host.

    Attributes:
        activations: names, as often as they occurred, and values, in the order of execution.
        cotangents: gradients of those that have one, by the place in ``activations``.
        others: names of activations that were not asked for.
        loss: what was differentiated; None without a backward pass.
        gradients, updated: by parameter; ``updated`` after one step of an optimiser.
        losses: of each step of a short run.
        readers: with recorded gradients given, name of a gradient in a trace -> the activations that are computed from
            what it is of, with no other recorded one between: in making these it is made.
    """

    activations: list[tuple[str, np.ndarray | Summary]]
    cotangents: Mapping[int, np.ndarray | Summary] = field(default_factory=dict)
    loss: np.ndarray | None = None
    gradients: Tensors = field(default_factory=dict)
    updated: Tensors = field(default_factory=dict)
    losses: np.ndarray | None = None
    readers: Mapping[str, list[str]] = field(default_factory=dict)
    others: Sequence[str] = ()

    def tensors(self) -> dict[str, np.ndarray | Summary]:
        """Every value by its name in a trace: activations in execution order, their gradients in the opposite one."""
        names = numbered([name for name, _ in self.activations])
        found: dict[str, np.ndarray | Summary] = {}
        for name, (_, value) in zip(names, self.activations, strict=True):
            found[f"{FORWARD}/{name}" if _is_floating(value) else f"{ROUTING}/{name}{ROUTES}"] = value
        if self.loss is not None:
            found[LOSS] = self.loss
        found |= {f"{COTANGENT}/{names[place]}": self.cotangents[place] for place in sorted(self.cotangents)[::-1]}
        found |= {f"{GRADIENT}/{name}": value for name, value in self.gradients.items()}
        found |= {f"{UPDATED}/{name}": value for name, value in self.updated.items()}
        return found if self.losses is None else found | {LOSSES: self.losses}


class Engine(Protocol):
    """A function in a framework, with its weights, ready to be run."""

    @property
    def backend(self) -> str:
        """Name of the framework."""
        ...

    @property
    def device(self) -> str:
        """Where it runs."""
        ...

    @property
    def weights(self) -> Arrays:
        """Its parameters, as they are."""
        ...

    @property
    def inputs(self) -> Arrays:
        """Arrays that it is called with, by name, in order."""
        ...

    @property
    def drawn(self) -> list[str]:
        """Names and shapes of the targets that outputs were drawn towards; [] with a loss of another kind."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Those whose versions matter."""
        ...

    def run(
        self, dtype: str, weights: Arrays, inputs: Arrays, fed: Arrays, noise: Noise | None, store: Store
    ) -> Recorded:
        """Call it once, in an arithmetic ("" for its own), and record what was asked for.

        Args:
            fed: activations that go on in place of those of the same name.
            store: what is kept of arrays.
        """
        ...


def make_trace(engine: Engine, options: Options, path: PathLike | None = None, chunks: int | None = None) -> Trace:
    """Run a function and measure its deltas.

    Args:
        path: file that the trace is also written to.
        chunks: bytes above which a tensor is written to a file of its own as soon as it is known; needs ``path``.

    Raises:
        UserError: complex weights, a pattern that matches nothing, chunks without a path, or the file can't be written.
    """
    if chunks is not None and path is None:
        raise UserError(
            f"chunks = {chunks}: needs path, beside which large tensors are written; leave it out, or give both"
        )
    for name, value in engine.weights.items():
        if np.iscomplexobj(value):
            raise UserError(f"weights: {name}: dtype = {value.dtype}: must be real, as with a last axis of 2")
    spill = None if path is None or chunks is None else Spill(path, chunks)
    with contextlib.nullcontext() if spill is None else spill.whole():
        return _made(engine, options, path, spill)


def _made(engine: Engine, options: Options, path: PathLike | None, spill: Spill | None) -> Trace:
    """`make_trace`, with what takes large tensors."""
    store = Store(options.above, spill)
    recorded = engine.run(options.dtype, engine.weights, engine.inputs, options.fed, None, store)
    options.selection.check(names_of(recorded, engine, options), 0)
    tensors = {name: tensor for name, tensor in recorded.tensors().items() if options.selection.wants(name)}
    dtype = options.dtype or dtype_of(engine.weights, engine.inputs)
    meta = TraceMeta(
        backend=engine.backend,
        device=engine.device,
        dtype=dtype,
        seed=options.seed,
        config=tomli_w.dumps({"optimizer": {"lr": largest_step(recorded.updated, engine.weights)}}),
        machine=platform.platform(),
        versions=_versions(engine.packages),
        selection={"only": list(options.selection.only)} if options.selection.only else {},
        refed=options.refed,
        extra={
            FOREIGN: True,
            "inputs": [inputs_hash(value) for value in engine.inputs.values()],
            "numbers": [inputs_hash(value, laid_out=False) for value in engine.inputs.values()],
            "drawn": engine.drawn,
            **({READERS: recorded.readers} if recorded.readers else {}),
        },
    )
    if options.delta_runs:
        meta = _with_deltas(meta, engine, options, dtype)
    trace = Trace(tensors, meta)
    if path is not None:
        write_trace(path, trace, None if spill is None else spill.files(tensors))
    return trace


def names_of(recorded: Recorded, engine: Engine, options: Options) -> list[str]:
    """Names of all that a run computed, whether it was asked for or not."""
    found = dict.fromkeys(recorded.tensors())
    others = numbered([*recorded.others])
    found |= dict.fromkeys(f"{FORWARD}/{name}" for name in others)
    if options.backward:
        given = [*engine.weights, *(f"{ARGUMENT}{name}" for name in engine.inputs)]
        found |= dict.fromkeys([f"{COTANGENT}/{name}" for name in others])
        found |= dict.fromkeys(f"{GRADIENT}/{name}" for name in given)
    return list(found)


def dtype_of(weights: Arrays, inputs: Arrays) -> str:
    """The coarsest floating dtype of some arrays, "float32" if there is none."""
    floating = [value.dtype.name for arrays in (weights, inputs) for value in arrays.values() if _is_floating(value)]
    known = [dtype for dtype in floating if dtype in UNIT_ROUNDOFF]
    return max(known, key=lambda dtype: UNIT_ROUNDOFF[dtype], default="float32")


def largest_step(updated: Tensors, weights: Arrays) -> float:
    """The largest change of a parameter, which stands for a learning rate; 0 without an update."""
    changes = [
        float(np.max(np.abs(as_float64(value) - as_float64(weights[name])), initial=0.0))
        for name, value in updated.items()
        if isinstance(value, np.ndarray)
    ]
    return max(changes, default=0.0)


def _with_deltas(meta: TraceMeta, engine: Engine, options: Options, dtype: str) -> TraceMeta:
    """The metadata with deltas for the dtype, or of a float64 recording for all dtypes, and whether they are exact."""

    def moved(roundoff: float, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([options.seed, seed])
        values = [perturb(arrays, roundoff, rng) for arrays in (engine.weights, _floats(engine.inputs), options.fed)]
        noise = Noise(roundoff, options.seed + seed) if roundoff else None
        inputs = {**engine.inputs, **values[1]}
        recorded = engine.run(EXACT, values[0], inputs, values[2], noise, Store())
        return _steps(recorded, values[0], options)

    truth = moved(0.0, 0)
    dtypes = [other for other in UNIT_ROUNDOFF if other != "fp8"] if dtype == EXACT else [dtype]
    deltas: dict[str, dict[str, float]] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    first: dict[str, np.ndarray] = {}
    for other in dtypes:
        largest: dict[str, np.ndarray] = {}
        for run in range(options.delta_runs):
            found = moved(UNIT_ROUNDOFF[other], run + 1)
            first = first or found
            truth = _alike(truth, found)
            for name, value in truth.items():
                measured = _measured(name, found[name], value)
                largest[name] = np.maximum(largest.get(name, 0.0), measured)
        largest = {name: found for name, found in largest.items() if name in truth}
        deltas[other] = {name: float(found.flat[0]) for name, found in largest.items()}
        parts[other] = {name: found[1:] for name, found in largest.items() if found.size > 1}
    coarse = UNIT_ROUNDOFF[dtypes[0]] if dtypes[0] != EXACT else 0.0
    exact = is_exact(truth, moved(FINE, 1), moved(2.0**-24, 1) if not coarse else first, coarse or 2.0**-24)
    sizes = {name: rms(as_float64(value)) for name, value in truth.items() if group_of(name) == GRADIENT}
    zeros = [name for name in vanishing(sizes) if sizes[name] or any(found[name] for found in deltas.values())]
    extra = {**meta.extra, "exact": exact, ZEROS: zeros}  # what never moves is no sum that cancels: nothing reaches it
    return dataclasses.replace(meta, deltas=deltas, parts=parts, extra=extra)


def is_exact(
    truth: Mapping[str, np.ndarray], fine: Mapping[str, np.ndarray], coarse: Mapping[str, np.ndarray], roundoff: float
) -> bool:
    """Whether a function computes in float64 throughout: then a fine move has the effect that its size should have.

    Args:
        fine, coarse: results of values moved by `FINE` and by ``roundoff``.
    """
    for name, value in _alike(_alike(truth, fine), coarse).items():
        if group_of(name) != FORWARD:
            continue
        small, large = (difference(moved[name], value).rms_error for moved in (fine, coarse))
        floor = 4 * UNIT_ROUNDOFF[EXACT] * difference(value, value).truth_rms
        expected = large * FINE / roundoff
        if small > LINEAR * max(expected, floor) or (small < expected / LINEAR and expected > floor):
            return False
    return True


def _alike(truth: Mapping[str, np.ndarray], moved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What has its shape in another run, too: rounding may send other tokens to an expert, or none."""
    return {name: value for name, value in truth.items() if name in moved and moved[name].shape == value.shape}


def _steps(recorded: Recorded, weights: Arrays, options: Options) -> dict[str, np.ndarray]:
    """Results by name, of updates the step alone."""
    found: dict[str, np.ndarray] = {}
    for name, value in recorded.tensors().items():
        if options.selection.wants(name):
            assert isinstance(value, np.ndarray)
            own = weights.get(name.partition("/")[2]) if group_of(name) == UPDATED else None
            found[name] = value if own is None else as_float64(value) - as_float64(own)
    return found


def _measured(name: str, moved: np.ndarray, truth: np.ndarray) -> np.ndarray:
    if is_routes(name):
        return np.sum(unequal_choices(moved, truth, False), keepdims=True).reshape(1).astype(np.float64)
    if group_of(name) in PARTS:
        return delta_and_parts(name, moved, truth)
    return np.array([difference(moved, truth).rms_error])


def _floats(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: value for name, value in arrays.items() if _is_floating(value)}


def _is_floating(value: np.ndarray | Summary) -> bool:
    return bool(value.sketch.size) if isinstance(value, Summary) else is_floating(value.dtype)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"numpy": np.__version__}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
