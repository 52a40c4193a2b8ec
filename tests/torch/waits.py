"""Where the host would wait for a device: it asks for a value, or for a number of elements that depends on values."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BACKEND, OPAQUE = "kempnerforge_torch", "kempnerforge"
ASKING = {
    "_local_scalar_dense", "is_nonzero", "item", "nonzero", "nonzero_numpy", "masked_select", "equal", "unique_dim",
    "_unique2", "unique_consecutive", "bincount", "_nested_tensor_from_mask",
}  # fmt: skip
"""Operators whose results the host needs before it goes on."""
COUNTED = {"repeat_interleave": "output_size"}
"""Likewise, unless they are told a size."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
METHODS = {getattr(Tensor, name) for name in ("tolist", "numpy", "__array__", "cpu")}
ON_THE_CPU_ALONE = {
    ("model/checks.py", "check_ids"): "values are looked at where they can be seen",
    ("training/optimizer.py", "update"): "the CPU decides by itself whether to take a step",
    ("training/optimizer.py", "_step"): "of parameters on the CPU, AdamW's counts of updates are numbers",
    ("training/optimizer.py", "step"): "likewise, of several optimisers",
    ("distributed/pipeline.py", "_run"): "what the engine of torch asks is its own",
    ("distributed/ranks.py", "number"): "a number that hosts add up",
    ("distributed/mesh.py", "group"): "a mesh of ranks is the host's",
    ("distributed/context_parallel.py", "own_part"): "likewise",
}
"""Functions of the backend that ask, and why no device is waited for."""


@contextmanager
def none_on_a_gpu() -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def waits() -> Iterator[list[str]]:
    """The places of the backend at which the host asks within it, as they are found; those of `ON_THE_CPU_ALONE` left
    out, and the insides of its own operators, which a device has kernels for.
    """
    found: list[str] = []
    dispatched = _Dispatched(found)
    with dispatched, _Called(found, dispatched):
        yield found


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found, self.inside = found, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        if not self.inside and _asks(name, args, kwargs):
            _note(self.found, name)
        self.inside += func.namespace == OPAQUE
        try:
            return func(*args, **kwargs)
        finally:
            self.inside -= func.namespace == OPAQUE


class _Called(TorchFunctionMode):
    """What reads memory without an operator."""

    def __init__(self, found: list[str], dispatched: _Dispatched):
        super().__init__()
        self.found, self.dispatched = found, dispatched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS and not self.dispatched.inside:
            _note(self.found, func.__name__)
        return func(*args, **(kwargs or {}))


def _asks(name: str, args: Any, kwargs: Any) -> bool:
    if name in COUNTED:
        return kwargs.get(COUNTED[name]) is None
    masks = args[1] if name in INDEXED and len(args) > 1 else ()
    return name in ASKING or any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks)


def _note(found: list[str], name: str) -> None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and f"/{BACKEND}/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return
    path = frame.f_code.co_filename.rpartition(f"/{BACKEND}/")[2]
    name_of_function = frame.f_code.co_qualname.partition(".<locals>")[0].rpartition(".")[2]
    if (path, name_of_function) not in ON_THE_CPU_ALONE:
        found.append(f"{path}:{frame.f_lineno}: {name}")


def noting_waits(trainer: Any) -> list[str]:
    """What `waits` finds in all steps that the trainer takes from now on."""
    found, step = list[str](), trainer.step

    def watched(micro_batches: Any) -> Any:
        with waits() as own:
            result = step(micro_batches)
        found.extend(own)
        return result

    trainer.step = watched
    return found


@contextmanager
def rows_of_no_group_spoiled() -> Iterator[None]:
    """Within it, grouped products on the CPU leave NaN where those of a device leave what was in memory."""
    grouped = importlib.import_module("kempnerforge_torch.model.grouped")
    looped = grouped.looped_matmul

    def spoiled(x_RD: Tensor, w_EDF: Any, ends_E: Tensor, complete: bool = False) -> Tensor:
        out_RF = looped(x_RD, w_EDF, ends_E, complete)
        if complete:
            out_RF[int(ends_E[-1]) :] = torch.nan
        return out_RF

    with patch.object(grouped, "looped_matmul", spoiled):
        yield
