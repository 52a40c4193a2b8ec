"""What a recording of any function is asked for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from shared_config.contract.initialise import stream
from shared_config.errors import UserError
from shared_config.parity.foreign.containers import CALL, call_name, in_pairs
from shared_config.parity.foreign.mapping import ACTIVATIONS, Map, matches
from shared_config.parity.selection import RefedFields, Selection
from shared_config.parity.tolerance import TOLERANCES
from shared_config.parity.traces import COTANGENT, FORWARD, GRADIENT, ROUTES, ROUTING, Summary, Trace, tensors_hash

Arrays = Mapping[str, np.ndarray]
Value = TypeVar("Value")

DTYPES = tuple(dtype for dtype in TOLERANCES if dtype != "fp8")
"""Arithmetics that a function can be asked to be recorded in."""
EXACT = "float64"
ONE_CALL = re.compile(rf"{CALL}(?:\d+|\*|\?|\[[^]]*\])")
"""What numbers a call in a pattern."""
DELTA_RUNS = 6
"""Runs with moved weights; with fewer, the delta of a scalar can come out far too small by chance."""


@dataclass(frozen=True)
class Options:
    """How to record.

    Attributes:
        dtype: of weights and floating-point inputs; "" leaves them as they are.
        backward: whether to record gradients.
        selection: names that are kept.
        above: bytes of a tensor above which a `Summary` is kept of it; None for whole tensors.
        delta_runs: runs with moved weights that deltas are measured by; 0 leaves them out.
        seed: of the moves, and of the target that a loss is made with.
        fed: name of an activation -> value that follows in its place; ``cotangent/<name>`` -> gradient that goes on
            from there, in place of what those that take the value make of it.
        refed: `TraceMeta.refed`: whose activations those are.
        names: from the names and layouts of the other side to those of the function.
    """

    dtype: str = ""
    backward: bool = True
    selection: Selection = field(default_factory=Selection)
    above: int | None = None
    delta_runs: int = DELTA_RUNS
    seed: int = 0
    fed: Arrays = field(default_factory=dict)
    refed: RefedFields = field(default_factory=RefedFields)
    names: Map = field(default_factory=Map)

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in DTYPES:
            raise UserError(
                f"dtype = {self.dtype!r}: must be one of {', '.join(DTYPES)}, or None for the function's own"
            )
        for name in ("above", "delta_runs", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} = {value}: must be 0 or more")

    def wants(self, name: str) -> bool:
        """Whether an activation of this name, or its gradient, is kept of one call or of all."""
        known = f"{FORWARD}/{name}", f"{COTANGENT}/{name}", f"{ROUTING}/{name}{ROUTES}"
        return self._of_any_call.wants_any(known)

    @functools.cached_property
    def _of_any_call(self) -> Selection:
        """`selection`, with patterns for some calls, as "norm@1", for all of them: how many there are is not known."""
        only = self.selection.only
        return dataclasses.replace(self.selection, only=(*only, *(ONE_CALL.sub("", pattern) for pattern in only)))

    def wants_gradient(self, name: str) -> bool:
        """Whether the gradient of a parameter or input of this name is kept."""
        return self.selection.wants(f"{GRADIENT}/{name}")


def make_options(
    *,
    dtype: str | None,
    backward: bool,
    only: Sequence[str],
    above: int | None,
    deltas: bool | int,
    seed: int,
    refeed: Trace | None,
    names: Map | None,
) -> Options:
    """The options of the arguments of ``record``.

    Args:
        names: from the names and layouts of the other side, and of the trace to feed, to those of the function.

    Raises:
        UserError: a value that can't be, or a trace to feed that holds nothing to feed.
    """
    if isinstance(only, str):
        raise UserError(f"only = {only!r}: must be a list of patterns, as [{only!r}]")
    runs = DELTA_RUNS if deltas is True else int(deltas)
    kept, names = Selection(None, tuple(only)), names or Map()
    options = Options(dtype or "", backward, kept, above, runs, seed, names=names)
    if refeed is None:
        return options
    given = names.apply_to_trace(refeed)
    gradients = fed_gradients(given) if backward else {}
    return dataclasses.replace(
        options,
        backward=bool(gradients),
        fed={**fed_values(given), **gradients},
        refed={**refed_fields(refeed), "backward": bool(gradients)},
    )


def fed_values(trace: Trace) -> dict[str, np.ndarray]:
    """What a trace has to feed: its activations by their names, with what routers chose.

    Raises:
        UserError: it holds none, or summaries of them, or was itself fed.
    """
    if trace.meta.refed:
        raise UserError("refeed: the other trace was itself given recorded inputs; one of a plain run is needed")
    names = [name for name in trace.tensors if name.startswith(f"{FORWARD}/")]
    if not names:
        raise UserError(f"refeed: the other trace holds no activation, as {FORWARD}/output")
    _check_whole(trace, names)
    names += [name for name in trace.tensors if name.startswith(f"{ROUTING}/") and name.endswith(ROUTES)]
    return {name.partition("/")[2].removesuffix(ROUTES): np.asarray(trace.tensors[name]) for name in names}


def fed_gradients(trace: Trace) -> dict[str, np.ndarray]:
    """What a trace has to feed backward: the gradients of its activations, by their names in the trace.

    Raises:
        UserError: summaries of them.
    """
    names = [name for name in trace.tensors if name.startswith(f"{COTANGENT}/")]
    _check_whole(trace, names)
    return {name: np.asarray(trace.tensors[name]) for name in names}


def fed_to(fed: Mapping[str, Value], name: str, call: int) -> Value | None:
    """The value that follows an activation of this name in its call of this number; None if its own does."""
    return fed.get(call_name(name, call), fed.get(name) if call == 0 else None)


def fed_back(fed: Mapping[str, Value], name: str, call: int) -> Value | None:
    """The gradient that goes on from there; None if its own does."""
    return fed_to(fed, f"{COTANGENT}/{name}", call)


def check_fed(name: str, given: Sequence[int], own: Sequence[int]) -> None:
    """Refuse a value of another shape in place of an activation.

    Raises:
        UserError: naming both shapes.
    """
    if tuple(given) != tuple(own):
        raise UserError(
            f"refeed: {name}: shape = {tuple(given)}: must be {tuple(own)}, as here; the map needs a layout for it"
        )


def _check_whole(trace: Trace, names: Iterable[str]) -> None:
    for name in names:
        if isinstance(trace.tensors[name], Summary):
            raise UserError(f"refeed: {name}: the other trace holds a summary; tensors are needed, without summaries")


def refed_fields(trace: Trace) -> RefedFields:
    """What a recording says of the trace that it was fed with, forward."""
    meta = trace.meta
    return {
        "backend": meta.backend,
        "device": meta.device,
        "dtype": meta.dtype,
        "modules": [],
        "own": [],
        "hash": values_hash(trace),
    }


def values_hash(trace: Trace) -> str:
    """Of all floating-point activations, whatever their names and places."""
    names = [name for name in trace.tensors if name.startswith(f"{FORWARD}/")]
    hashes = sorted(tensors_hash({"": trace.tensors[name]}) for name in names)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def drawn_towards(options: Options, name: str, shape: tuple[int, ...]) -> tuple[list[str], np.ndarray]:
    """What an output is drawn towards where there is no loss: the same numbers at the same places on both sides.

    Returns:
        names and shapes that were drawn, which are those of the other side where the map names this output; the target.
    """
    rules = tuple(rule for rule in options.names.activations if any(matches(pattern, [name]) for pattern in rule.b))
    if not rules:
        return [f"{name} {shape}"], target(name, shape, options.seed)
    places = Map(activations=rules).inverse().apply({name: np.arange(math.prod(shape)).reshape(shape)}, ACTIVATIONS)
    found = np.empty(math.prod(shape), np.float32)
    for drawn, own in places.items():
        found[np.asarray(own)] = target(drawn, np.shape(own), options.seed)
    return [f"{drawn} {np.shape(own)}" for drawn, own in places.items()], found.reshape(shape)


@functools.lru_cache(maxsize=4)
def target(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The same float32 bits for every framework, normal."""
    drawn = stream(seed, f"target/{name}").standard_normal(shape, dtype=np.float32)
    drawn.flags.writeable = False
    return drawn


def inputs_hash(value: np.ndarray, laid_out: bool = True) -> str:
    """Of values and shape, whatever the width of the dtype.

    Args:
        laid_out: False: of the numbers alone, whatever their places.
    """
    value = in_pairs(value) if np.iscomplexobj(value) else value
    wide = value.astype(np.float64 if value.dtype.kind not in "iub" else np.int64)
    shown = wide if laid_out else np.sort(wide, axis=None)
    return hashlib.sha256(f"{shown.shape}".encode() + np.ascontiguousarray(shown).tobytes()).hexdigest()[:16]
