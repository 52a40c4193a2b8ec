"""Trace files: what one run computed, tensor by tensor, in execution order, to be compared on any machine.

A trace is one safetensors file whose metadata says where it comes from. Names are paths whose first part is the group:

    forward/<activation>   output of a module, in the order of execution
    routing/<name>         decisions and counts of routers; integers are compared exactly
    loss                   the scalar that was differentiated
    cotangent/<activation> gradient of the loss by the output of a module
    gradient/<parameter>   its gradient
    updated/<parameter>    parameters after one optimiser step
    decode/<chunking>      logits of cached decoding; decode/whole: of a forward without capacity limits
    losses                 one loss per step of a short training run

A tensor too large to keep can be replaced by a `Summary`: statistics, a hash, and a sketch from which distances are
estimated.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike
from shared_config.interchange.former import current_toml, former
from shared_config.interchange.reading import parse_json, parse_toml
from shared_config.interchange.tensors import TRACE, write_tensors
from shared_config.interchange.toml import number_of
from shared_config.interchange.weights import is_floating
from shared_config.parity.chunks import CHUNKS, TraceFile
from shared_config.parity.numerics import UNIT_ROUNDOFF
from shared_config.parity.selection import RefedFields, Selection, SelectionFields
from shared_config.parity.summaries import Summary, summarize, tensors_hash

__all__ = [
    "Summary",
    "Trace",
    "TraceMeta",
    "group_of",
    "read_trace",
    "summarize",
    "tensors_hash",
    "write_trace",
]

FORWARD, ROUTING, LOSS, COTANGENT, GRADIENT, UPDATED, DECODE, LOSSES = GROUPS = (
    "forward",
    "routing",
    "loss",
    "cotangent",
    "gradient",
    "updated",
    "decode",
    "losses",
)
REFED_BACKWARD = (COTANGENT, GRADIENT)
"""Groups that a run lacks if its layers are given recorded inputs, and no recorded gradients of their outputs."""
NOT_REFED = (UPDATED, DECODE, LOSSES)
"""Groups that a run lacks if each of its layers is given a recorded input."""

FORMAT = "4"
FORMER = ("1", "2", "3")
"""In the first, deltas of updates were those of the parameters themselves, those of routes RMS distances. The first two
had other names, all three sketches of 1024 numbers, which can't be compared with those of now."""
FORMER_STEP = 0.03
"""Largest delta of an update of that format, relative to the learning rate."""
ROUTES = ".indices"
"""End of the names of what routers chose."""
FOREIGN = "foreign"
"""Key of what a trace of any function says of itself in `TraceMeta.extra`."""
ZEROS = "zeros"
"""The same, for names of gradients that are 0 by mathematics: noise in float64."""
META_KEY = "meta"
SKETCH_SUFFIX = "#sketch"
PARTS_SUFFIX = "#parts."


@dataclass(frozen=True)
class TraceMeta:
    """Where a trace comes from.

    Attributes:
        backend: "torch", "jax", or whatever computed it.
        device: "cpu", "cuda", a card's name ...
        dtype: of the arithmetic: "float64", "float32", "float16", "bfloat16" or "fp8".
        seed: of weights and tokens.
        config: the whole `JobConfig` as TOML.
        machine: platform, for people to read.
        versions: library -> version.
        weights: where the weights came from: "validation", "init", "given" ...
        weights_hash, tokens_hash: of what went in; traces of different inputs are not compared. "" if unknown.
        initial_hash: of the seeded initial weights, which both backends must draw alike. "" if unknown.
        deltas: dtype -> tensor name -> how far rounding the weights to that dtype moves the float64 result: RMS; of an
            update, that of the step; of routes, the number of choices.
        parts: dtype -> tensor name -> the same of its rows and columns, as `compare.parts` packs it.
        selection: "layers" and "only" of the `Selection` of tensors that were asked for; {} for all.
        refed: of a run whose layers were given what another had recorded as their inputs: "backend", "device" and
            "dtype" of that other, "modules" whose recorded outputs went on, "own" layers without a record, whose own
            outputs went on, "hash" of what was fed, and "backward", whether recorded gradients of outputs were fed as
            well: without them such a run has no gradients. It has no updates and no decoding. {} if none.
        extra: anything else worth keeping, as JSON values.
    """

    backend: str
    device: str
    dtype: str
    seed: int
    config: str
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    weights: str = ""
    weights_hash: str = ""
    tokens_hash: str = ""
    initial_hash: str = ""
    deltas: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    selection: SelectionFields = field(default_factory=SelectionFields)
    refed: RefedFields = field(default_factory=RefedFields)
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def config_fields(self) -> dict[str, object]:
        """The config as nested dicts."""
        return parse_toml(self.config)

    def wants(self, name: str) -> bool:
        """Whether a run of this kind was to record a tensor of this name."""
        layers, only = self.selection.get("layers"), self.selection.get("only", ())
        selection = Selection(None if layers is None else tuple(layers), tuple(only))
        return selection.wants(name) and not (self.refed and group_of(name) in self._not_refed)

    @property
    def _not_refed(self) -> tuple[str, ...]:
        return NOT_REFED if self.refed.get("backward") else (*REFED_BACKWARD, *NOT_REFED)


@dataclass(frozen=True, eq=False)
class Trace:
    """Tensors (or their summaries) by name, in execution order, and where they come from."""

    tensors: Mapping[str, np.ndarray | Summary]
    meta: TraceMeta

    def array(self, name: str) -> np.ndarray:
        """The values of a tensor that is held as a whole."""
        tensor = self.tensors[name]
        assert isinstance(tensor, np.ndarray)
        return tensor

    def summarized(self, above_bytes: int) -> Trace:
        """The same trace with every tensor of more bytes than this replaced by its summary."""
        kept = {name: _summarized(tensor, above_bytes) for name, tensor in self.tensors.items()}
        return Trace(kept, self.meta)


def group_of(name: str) -> str:
    """First part of a tensor's name."""
    return name.partition("/")[0]


def write_trace(path: PathLike, trace: Trace, chunks: Mapping[str, str] | None = None) -> None:
    """Write a trace to one file, atomically.

    Args:
        chunks: tensors that files of their own hold already: name -> path relative to the folder of the trace.

    Raises:
        UserError: if the file can't be written or a dtype has no place in it.
    """
    summaries = {name: tensor for name, tensor in trace.tensors.items() if isinstance(tensor, Summary)}
    arrays = {name: tensor for name, tensor in trace.tensors.items() if name not in {*summaries, *(chunks or ())}}
    sketches = {name + SKETCH_SUFFIX: summary.sketch for name, summary in summaries.items()}
    parts = {
        f"{name}{PARTS_SUFFIX}{dtype}": part for dtype, own in trace.meta.parts.items() for name, part in own.items()
    }
    described = {CHUNKS: json.dumps(dict(chunks))} if chunks else {}
    content = {
        "order": list(trace.tensors),
        "summaries": {name: _summary_fields(summary) for name, summary in summaries.items()},
        **dataclasses.asdict(dataclasses.replace(trace.meta, parts={})),
        "parts": {dtype: list(own) for dtype, own in trace.meta.parts.items()},
    }
    write_tensors(path, {**arrays, **sketches, **parts}, {TRACE: FORMAT, META_KEY: json.dumps(content), **described})


def read_trace(path: PathLike) -> Trace:
    """Read a trace; tensors stay on disk until they are looked at.

    Raises:
        UserError: if the file is missing, truncated, or no trace.
    """
    file = TraceFile(path)
    if TRACE not in file.metadata:
        raise UserError(f"{file.path}: is a safetensors file, but no trace; `kempnerforge trace` writes traces")
    found = file.metadata[TRACE]
    if found not in (FORMAT, *FORMER):
        raise UserError(f"{file.path}: trace format = {found}: must be {', '.join(FORMER)} or {FORMAT}")
    try:
        content: Any = parse_json(file.metadata[META_KEY])
        order, summaries, parts = content.pop("order"), content.pop("summaries"), content.pop("parts", {})
        meta = _checked(TraceMeta(**content, parts=_read_parts(file, parts)))
        trace = Trace({name: _read(file, name, summaries) for name in order}, meta)
        trace = _with_deltas_of_now(trace) if found == FORMER[0] else trace
        return _with_names_of_now(trace) if found in FORMER[:2] else trace
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file.path}: the description of the trace is damaged: {error!r}") from error


def _checked(meta: TraceMeta) -> TraceMeta:
    """The same, once its fields are known to be of their types.

    Raises:
        TypeError, ValueError: naming the field.
    """
    types = {"str": str, "int": int}
    for field_ in dataclasses.fields(TraceMeta):
        value, wanted = getattr(meta, field_.name), types.get(str(field_.type), Mapping)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise TypeError(f"{field_.name} = {str(value)[:100]!r}: must be of type {field_.type}")
    if meta.dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"dtype = {meta.dtype!r}: must be one of {', '.join(UNIT_ROUNDOFF)}")
    for dtype, deltas in meta.deltas.items():
        if dtype not in UNIT_ROUNDOFF or not isinstance(deltas, Mapping):
            raise TypeError(
                f"deltas = {dtype!r}: must be numbers by the name of a tensor, for {', '.join(UNIT_ROUNDOFF)}"
            )
        for name, delta in deltas.items():
            if isinstance(delta, bool) or not isinstance(delta, int | float):
                raise TypeError(f"delta of {name} in {dtype} = {str(delta)[:100]!r}: must be a number")
    for dtype, parts in meta.parts.items():
        for name, part in parts.items():
            if dtype not in UNIT_ROUNDOFF or part.ndim != 1 or not is_floating(part.dtype):
                raise TypeError(
                    f"parts of {name} in {dtype}: must be a list of numbers, for {', '.join(UNIT_ROUNDOFF)}"
                )
    layers, only = meta.selection.get("layers"), meta.selection.get("only", ())
    if not isinstance(layers, list | None) or not all(isinstance(pattern, str) for pattern in only):
        raise TypeError(f"selection = {meta.selection}: must be lists of layers and of patterns")
    _ = meta.config_fields
    return meta


def _summarized(tensor: np.ndarray | Summary, above_bytes: int) -> np.ndarray | Summary:
    return summarize(tensor) if not isinstance(tensor, Summary) and tensor.nbytes > above_bytes else tensor


def _summary_fields(summary: Summary) -> dict[str, Any]:
    """All but the sketch, which is stored as a tensor."""
    fields = {name.name: getattr(summary, name.name) for name in dataclasses.fields(summary)}
    return {name: value for name, value in fields.items() if name != "sketch"}


def _read_parts(file: TraceFile, names: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    return {dtype: {name: file.read(f"{name}{PARTS_SUFFIX}{dtype}") for name in own} for dtype, own in names.items()}


def _with_names_of_now(trace: Trace) -> Trace:
    """A trace of a former format with the names of tensors and modules, and the config, of now."""
    meta, then = trace.meta, former((), trace.meta.config_fields)
    fields: dict[str, Any] = {name: then.listed(getattr(meta, name)) for name in ("selection", "refed")}
    for name in ("deltas", "parts"):
        fields[name] = {dtype: then.named(own) for dtype, own in getattr(meta, name).items()}
    return Trace(then.named(trace.tensors), dataclasses.replace(meta, config=current_toml(meta.config), **fields))


def _with_deltas_of_now(trace: Trace) -> Trace:
    """A trace of the first format with deltas as they are measured now, or bounds of them."""
    lr = number_of(trace.meta.config_fields, "optimizer", "lr", 0.0)

    def converted(name: str, delta: float) -> float:
        tensor = trace.tensors.get(name)
        if group_of(name) == UPDATED:
            return min(delta, FORMER_STEP * lr)
        if name.endswith(ROUTES) and tensor is not None:  # each distance is at least 1
            return math.prod(tensor.shape) * min(delta * delta, 1.0)
        return delta

    deltas = {dtype: {name: converted(name, own[name]) for name in own} for dtype, own in trace.meta.deltas.items()}
    return Trace(trace.tensors, dataclasses.replace(trace.meta, deltas=deltas))


def _read(file: TraceFile, name: str, summaries: Mapping[str, Any]) -> np.ndarray | Summary:
    if name not in summaries:
        return file.read(name)
    fields = summaries[name] | {"shape": tuple(summaries[name]["shape"])}
    return Summary(**fields, sketch=file.read(name + SKETCH_SUFFIX))
