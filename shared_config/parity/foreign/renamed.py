"""What is known of the rounding of tensors, once a map has renamed them, laid them out anew or put them together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from shared_config.parity.foreign.site import renamed_readers
from shared_config.parity.numerics import rms
from shared_config.parity.parts import has_parts, only_scale
from shared_config.parity.traces import UPDATED, ZEROS, Summary, Trace, TraceMeta, group_of

Values = Mapping[str, np.ndarray | Summary]


def renamed_meta(trace: Trace, tensors: Values, sources: Mapping[str, tuple[str, ...]]) -> TraceMeta:
    """The description of a trace whose tensors were moved: deltas by the new names, the root of the mean of squares
    where several tensors became one.

    Args:
        tensors: by their new names.
        sources: new name -> names of what it was made of.
    """
    meta = trace.meta
    deltas: dict[str, dict[str, float]] = {}
    for dtype, own in meta.deltas.items():
        known = {new: [own[name] for name in names if name in own] for new, names in sources.items()}
        deltas[dtype] = {new: rms(found) for new, found in known.items() if found}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for dtype, own in meta.parts.items():
        moved = {
            new: _parts_of(tensors[new], names, trace, own, deltas.get(dtype, {}).get(new))
            for new, names in sources.items()
            if all(name in own for name in names)
        }
        parts[dtype] = {new: found for new, found in moved.items() if found is not None}
    return dataclasses.replace(
        meta, deltas=deltas, parts=parts, extra=_renamed_zeros(renamed_readers(meta.extra, sources), sources)
    )


def _renamed_zeros(extra: dict[str, object], sources: Mapping[str, tuple[str, ...]]) -> dict[str, object]:
    """What a trace says of itself, with the new names of gradients that are 0: all that they were made of is."""
    known = extra.get(ZEROS)
    if not isinstance(known, list):
        return extra
    return {**extra, ZEROS: [new for new, names in sources.items() if names and set(names) <= {*known}]}


def _parts_of(
    tensor: np.ndarray | Summary, names: Sequence[str], trace: Trace, own: Mapping[str, np.ndarray], delta: float | None
) -> np.ndarray | None:
    """Deltas of parts of a tensor that holds what others held: its own if it is one of them as it was, else no more
    than the scale, of several the largest, which bounds that of all; None if nothing is known.
    """
    if len(names) == 1 and tensor is trace.tensors[names[0]]:
        return own[names[0]]
    sizes = [math.prod(trace.tensors[name].shape) for name in names]
    of_step = group_of(names[0]) == UPDATED
    if of_step or delta is None or sum(sizes) != math.prod(tensor.shape) or not has_parts(tensor.shape):
        return None
    size = math.hypot(*(math.sqrt(count / sum(sizes)) * own[name][0] for count, name in zip(sizes, names, strict=True)))
    return only_scale(size, max(float(own[name][1]) for name in names), delta, tensor.shape)
