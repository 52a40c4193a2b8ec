"""Copies of tensors and modules, and contexts after which these are as they were before."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kempnerforge_torch.model.state import to_numpy
from kempnerforge_torch.model.wrappers import uncompiled


def copied(tensor: Shaped[Tensor, "..."]) -> np.ndarray:
    """The values on the host, all of them where they are sharded, whatever happens to the tensor."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
    return np.array(to_numpy(whole.detach()))


def deep_copied(module: nn.Module, known: Mapping[int, object]) -> nn.Module:
    """`copy.deepcopy` with a memo. Empty containers, which take it most of its time, are made."""
    held = [value for part in module.modules() for value in vars(part).values()]
    empty = {id(value): type(value)() for value in held if type(value) in (OrderedDict, dict, list, set) and not value}
    return copy.deepcopy(module, {**known, **empty})


@contextlib.contextmanager
def restoring(tensors: Iterable[Shaped[Tensor, "..."]]) -> Iterator[None]:
    """Context after which tensors hold what they held before it."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


@contextlib.contextmanager
def left_as_it_is(module: nn.Module, trained: bool) -> Iterator[None]:
    """Context for running a sharded module in place, uncompiled and without gradients of before.

    Args:
        trained: whether parameters change, too.
    """
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    with uncompiled(module), restoring([*module.buffers(), *(module.parameters() if trained else ())]):
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            reshard(module)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def reshard(module: nn.Module) -> None:
    """Let FSDP free what it gathered, which a forward pass alone leaves in place of the parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
