"""What a recording keeps of tensors, and their moments, computed where they are.

Shapes: G pieces, R rows of a piece, C columns of the sketch, M moments.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from kempnerforge_torch.model.state import to_numpy, whole
from kempnerforge_torch.moments_kernel import DTYPES as KERNEL_DTYPES
from kempnerforge_torch.moments_kernel import HAS_TRITON, run_moments
from shared_config.parity import summaries
from shared_config.parity.foreign.recorder import Store
from shared_config.parity.summaries import LOW, NAN, NEGATIVE, PIECE, POSITIVE, ROWS, SKETCH_SIZE, Summary

Key = TypeVar("Key")
_LOW = int(LOW)
"""As a number that compilers know."""


@dataclass(frozen=True)
class Pending:
    """A summary whose moments are still on the device."""

    moments: Float[Tensor, "M"]
    shape: tuple[int, ...]
    dtype: str


Kept = np.ndarray | Summary | Pending


class AddedToError(Exception):
    """A gradient was added to after it was let go."""


class Keeper:
    """Decides what is kept of one tensor after another."""

    def __init__(self, store: Store):
        self._store = store
        self._last: tuple[Callable[[], object], tuple[object, ...], Kept] | None = None

    def __call__(self, tensor: Shaped[Tensor, "..."]) -> Kept:
        """What is kept of a tensor, of a sharded or sparse one of all of it, whatever happens to it later.

        What a module and the last one within it put out is one tensor, which is summarised once.
        """
        full = whole(tensor.detach())
        full = full if full.layout == torch.strided else full.to_dense()
        if not (full.is_floating_point() and self._store.summarizes(full.nbytes)):
            return self._store(np.array(to_numpy(full)))
        if full.is_inference():  # nothing tells whether it was written to
            return _pending(full)
        memory, last = full.untyped_storage(), self._last
        known = full.data_ptr(), full._version, full.dtype, full.shape, full.stride()
        if last is None or last[0]() is not memory or last[1] != known:
            last = self._last = weakref.ref(memory), known, _pending(full)
        return last[2]

    def let_go(self, leaves: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, Kept]:
        """What is kept of gradients of which there is a summary, once they are known: they go as soon as they come.

        Raises:
            AddedToError: in the backward pass, where one comes in parts, as from a checkpoint that is reentrant.
        """
        found: dict[str, Kept] = {}

        def known(leaf: Tensor, name: str) -> None:
            if name in found:
                raise AddedToError
            found[name], leaf.grad = self(leaf.grad), None  # type: ignore[arg-type]

        for name, leaf in leaves.items():
            if leaf.requires_grad and self._store.summarizes(leaf.nbytes):
                leaf.register_post_accumulate_grad_hook(functools.partial(known, name=name))
        return found


def _pending(tensor: Tensor) -> Pending:
    return Pending(moments(tensor), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def fetched(found: Mapping[Key, Kept]) -> dict[Key, np.ndarray | Summary]:
    """The same on the host, where all moments go at once."""
    pending = {id(value): value for value in found.values() if isinstance(value, Pending)}
    first = next((value.moments.device for value in pending.values()), None)
    rows = torch.stack([value.moments.to(first) for value in pending.values()]).cpu().numpy() if pending else ()
    known = {
        key: summaries.summary_of_moments(row, value.shape, value.dtype)
        for (key, value), row in zip(pending.items(), rows, strict=True)
    }
    return {key: known[id(value)] if isinstance(value, Pending) else value for key, value in found.items()}


def moments(tensor: Shaped[Tensor, "..."]) -> Float[Tensor, "M"]:
    """What `shared_config.parity.summaries.moments` gives, on the tensor's device, without waiting for it.

    On a CPU the host's own function sees the tensor where it is.
    """
    if tensor.device.type == "cpu":
        return torch.from_numpy(summaries.moments(to_numpy(tensor)))
    return reduced(tensor) if tensor.numel() else torch.from_numpy(summaries.moments(np.empty(0))).to(tensor.device)


def reduced(tensor: Shaped[Tensor, "..."]) -> Float[Tensor, "M"]:
    """`moments` of a tensor that is not empty, in operations of the device; on an NVIDIA GPU in a kernel."""
    device, flat = tensor.device, tensor.reshape(-1)
    pieces = -(-flat.numel() // PIECE)
    first, times = _starts(device, 1 << (pieces - 1).bit_length())
    if device.type == "cuda" and HAS_TRITON and tensor.dtype in KERNEL_DTYPES:
        return run_moments(flat, _narrow_signs(device), first, times)
    rows = torch.arange(pieces * ROWS, device=device)  # in int64 also where a compiler would find 32 bits enough
    operations = _compiled() if device.type == "cuda" else _reduced
    return operations(flat, _signs(device), rows, first[:pieces], times[:pieces])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_reduced, dynamic=True)


@functools.cache
def _signs(device: torch.device) -> Tensor:
    return torch.from_numpy(summaries.signs()).to(device)


@functools.cache
def _narrow_signs(device: torch.device) -> Tensor:
    return _signs(device).to(torch.int8)


@functools.cache
def _starts(device: torch.device, pieces: int) -> tuple[Tensor, Tensor]:
    first, times = summaries.starts(pieces)
    return torch.from_numpy(first).to(device), torch.from_numpy(times).to(device)


def _reduced(flat: Tensor, signs: Tensor, rows: Tensor, first: Tensor, times: Tensor) -> Tensor:
    pieces = first.shape[0]
    shape = (pieces, ROWS, SKETCH_SIZE)
    x_GRC = pad(flat, (0, pieces * PIECE - flat.shape[0])).view(shape)
    wide_GRC, finite_GRC = x_GRC.double(), torch.isfinite(x_GRC)
    counted_GRC = finite_GRC & (torch.arange(pieces * PIECE, device=flat.device).view(shape) < flat.shape[0])
    known_GRC = torch.where(finite_GRC, wide_GRC, 0.0)
    low = torch.where(counted_GRC, wide_GRC, torch.inf).amin()
    high = torch.where(counted_GRC, wide_GRC, -torch.inf).amax()
    largest = torch.maximum(high, -low).clamp(torch.finfo(torch.float64).tiny, torch.finfo(torch.float64).max)
    norm = largest * (known_GRC / largest).square().sum().sqrt()
    signed_GRC = signs.unfold(0, PIECE, 1)[first].view(shape) * times[:, None, None]
    columns_C = (known_GRC * signed_GRC).sum((0, 1))
    key_GR = rows.view(pieces, ROWS) * NAN & _LOW
    key_GR = (key_GR ^ (key_GR >> 15)) | 1
    kinds_GRC = torch.where(torch.isnan(x_GRC), NAN, torch.where(x_GRC > 0, POSITIVE, NEGATIVE))
    gaps_C = torch.where(finite_GRC, 0, kinds_GRC * key_GR[..., None]).sum((0, 1))
    scalars = torch.stack([low, high, known_GRC.sum(), norm, counted_GRC.sum().double()])
    return torch.cat([scalars, columns_C, (gaps_C & _LOW).double()])
