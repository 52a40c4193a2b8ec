"""What the recorders of both backends share: the inputs of a trace, its perturbation deltas and its metadata.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared_config.parity import traces
from shared_config.parity.dtypes import dtypes_of, roundoffs_of
from shared_config.parity.numerics import as_float64, difference, finite_gap, perturbation_maxima
from shared_config.parity.parts import has_parts, part_errors
from shared_config.parity.request import (
    Arrays,
    Request,
    decode_names,
    decode_reference,
    request_meta,
)
from shared_config.parity.routes import is_routes, unequal_choices
from shared_config.parity.tolerance import PARTS
from shared_config.parity.traces import Trace

DELTA_RUNS = 6
"""With fewer, the delta of a scalar can come out far too small by chance."""


@dataclass
class Recording:
    """What one forward, backward and optimiser step computed, on the host.

    Attributes:
        activations: in execution order.
        routing: what routers decided and counted; empty without experts.
        gradients: of every parameter.
        updated: parameters after the step.
        decoded: logits of cached decoding, by chunking, and under `WHOLE` those of a forward that they must equal.
    """

    loss: np.ndarray
    activations: Arrays
    routing: Arrays
    gradients: Arrays
    updated: Arrays
    decoded: Arrays = field(default_factory=dict)

    def tensors(self) -> Arrays:
        """Every array by its name in a trace, in execution order."""
        groups = {
            traces.FORWARD: self.activations,
            traces.ROUTING: self.routing,
            traces.LOSS: {"": self.loss},
            traces.GRADIENT: self.gradients,
            traces.UPDATED: self.updated,
            traces.DECODE: self.decoded,
        }
        return {
            f"{group}/{name}".rstrip("/"): array for group, arrays in groups.items() for name, array in arrays.items()
        }


def make_trace(
    request: Request,
    recording: Recording,
    run: Callable[[Arrays], Recording] | None,
    *,
    backend: str,
    device: str,
    initial_hash: str,
) -> Trace:
    """The trace of a recording, and where it comes from.

    Args:
        run: gives the float64 recording of other weights; None to leave the deltas out.
        initial_hash: of the seeded initial weights as this backend drew them.
    """
    deltas, parts = ({}, {}) if run is None else perturbation_deltas(run, request)
    meta = dataclasses.replace(
        request_meta(request),
        backend=backend,
        device=device,
        initial_hash=initial_hash,
        deltas=deltas,
        parts=parts,
    )
    return Trace(recording.tensors(), meta)


def perturbation_deltas(
    run: Callable[[Arrays], Recording], request: Request
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, np.ndarray]]]:
    """Dtype -> name of a tensor -> how far rounding the weights to that dtype moves the float64 result, and its parts.

    Of updates it is the step that is moved: rounding the weights themselves would hide any step. A float64 trace has
    deltas for every dtype of the config, as it is the truth for all; another has those of its own. Cached decoding is
    the same function as the forward without capacity limits, and has the delta of its logits.
    """

    def tensors(weights: Arrays) -> Arrays:
        found = run(weights).tensors()
        steps = {name: _step(name, array, weights) for name, array in found.items() if _is_update(name)}
        return found | steps

    def measure(name: str, moved: np.ndarray, truth: np.ndarray) -> Any:
        if is_routes(name):
            return np.sum(unequal_choices(moved, truth, request.config.experts_choose), keepdims=True)
        judged = traces.group_of(name) in PARTS
        return delta_and_parts(name, moved, truth) if judged else [difference(moved, truth).rms_error]

    dtypes = dtypes_of(request.config) if request.dtype == "float64" else (request.dtype,)
    measured = {
        dtype: perturbation_maxima(
            tensors, request.weights, roundoffs_of(request.config, dtype), measure, DELTA_RUNS, seed=request.seed
        )
        for dtype in dtypes
    }
    names = list(filter(request.selection.wants, decode_names(request))) if request.decodes else []
    if names:
        reference = decode_reference(request.config)
        measured = {dtype: own | dict.fromkeys(names, own[reference]) for dtype, own in measured.items()}
    deltas = {dtype: {name: float(found.flat[0]) for name, found in own.items()} for dtype, own in measured.items()}
    parts = {
        dtype: {name: found[1:] for name, found in own.items() if found.size > 1} for dtype, own in measured.items()
    }
    return deltas, parts


def _is_update(name: str) -> bool:
    return traces.group_of(name) == traces.UPDATED


def _step(name: str, updated: np.ndarray, weights: Arrays) -> np.ndarray:
    return as_float64(updated) - as_float64(weights[name.partition("/")[2]])


def delta_and_parts(name: str, moved: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """RMS by which a tensor moved and, where it has parts, what moved them: float64, of one axis."""
    delta = [difference(moved, truth).rms_error]
    if not has_parts(truth.shape):
        return np.array(delta)
    finite = np.where(np.isfinite(truth), truth, 0.0)
    return np.concatenate([delta, part_errors(finite_gap(moved, truth), finite).packed()])
