"""Forward and backward of a micro-batch as a CUDA graph, which the host launches at once. It may need longer to launch
kernels one by one than a GPU to run them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from kempnerforge_torch.device import to_device
from kempnerforge_torch.model import cuda_graph
from kempnerforge_torch.model.cuda_graph import is_hooked, state_of_torch
from kempnerforge_torch.training.terms import Terms
from shared_config.schema.job import JobConfig

Inputs = Mapping[str, Shaped[Tensor, "..."]]
COUNT = "count of labels"
RECORDED = frozenset({"tokens", "labels", "doc_ids", "text_mask", COUNT})
"""Inputs of a call that may be recorded; not what differs from step to step without being a tensor, such as a seed."""
WARM_UP = 2
"""Calls in a row that are alike, before such a call is recorded: they compile, and allocate what libraries need."""

_log = logging.getLogger(__name__)


def can_record(config: JobConfig, device: torch.device, is_alone: bool) -> bool:
    """Whether calls may be recorded: of compiled blocks of a text model, on one NVIDIA GPU."""
    suits = config.train.compile_model and config.vlm is None
    return suits and is_alone and device.type == "cuda" and torch.version.hip is None


def has_room(device: torch.device) -> bool:
    """Whether twice as much memory is free as calls have taken so far: what is recorded keeps it, and others, say an
    evaluation, take their own.
    """
    torch.cuda.empty_cache()
    taken = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] >= 2 * taken


@dataclass(frozen=True)
class _Recording:
    """A call that can be repeated.

    Attributes:
        key: what calls that it stands for have in common.
        gradients: of each leaf; None of one that has none.
    """

    key: tuple[object, ...]
    inputs: Inputs
    terms: Terms
    gradients: Sequence[Tensor | None]
    graph: torch.cuda.CUDAGraph


class RecordedCalls:
    """Calls of a function, forward and backward, whose gradients go to leaves of the graph; the last kind of call that
    came `WARM_UP` times in a row is recorded, and replayed from then on.
    """

    def __init__(
        self,
        call: Callable[..., Terms],
        model: nn.Module,
        masters: Mapping[str, Shaped[Tensor, "..."]],
        copies: Mapping[str, Shaped[Tensor, "..."]],
    ):
        """
        Args:
            call: takes ``inputs``, ``count`` as a scalar tensor, and ``micro_batches``.
            model: what it calls. While a hook hangs on a part of it, nothing is recorded or replayed.
            masters: leaves of the graph, on which the gradients of several calls add up.
            copies: of some of them: leaves in their place, whose gradients are moved before the next call.
        """
        self._call, self._modules = call, list(model.modules())
        self._passing = list(copies.values())
        self._leaves = [*self._passing, *(master for name, master in masters.items() if name not in copies)]
        self._dtype = np.float64 if self._leaves[0].dtype == torch.float64 else np.float32
        self._last: tuple[object, ...] | None = None
        self._times = 0
        self._recording: _Recording | None = None
        self._may_record = True

    def __call__(self, inputs: Inputs, count: int, micro_batches: int, is_only: bool) -> Terms:
        """The terms of a micro-batch.

        Args:
            is_only: whether its gradients are taken before the next call.
        """
        inputs = {**inputs, COUNT: to_device(np.array(count, self._dtype), self._leaves[0].device)}
        key = self._key(inputs, micro_batches)
        self._times, self._last = self._times + 1 if key == self._last else 0, key
        if self._recording is None or self._recording.key != key or self._has_hooks():
            suits = self._times >= WARM_UP and inputs.keys() <= RECORDED and not self._has_hooks()
            if not (suits and self._may_record and self._record(key, inputs, micro_batches)):
                return self._called(inputs, micro_batches)
        assert self._recording is not None
        return self._replay(self._recording, inputs, is_only)

    def _called(self, inputs: Inputs, micro_batches: int) -> Terms:
        own = dict(inputs)
        return self._call(count=own.pop(COUNT), inputs=own, micro_batches=micro_batches)

    def _key(self, inputs: Inputs, micro_batches: int) -> tuple[object, ...]:
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        buffers = [buffer for module in self._modules for buffer in module._buffers.values() if buffer is not None]
        places = tuple(tensor.data_ptr() for tensor in (*self._leaves, *buffers))
        return state_of_torch(), shapes, micro_batches, places, tuple(leaf.requires_grad for leaf in self._leaves)

    def _has_hooks(self) -> bool:
        of_leaves = (leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in self._leaves)
        return is_hooked(self._modules) or any(of_leaves)

    def _record(self, key: tuple[object, ...], inputs: Inputs, micro_batches: int) -> bool:
        """Whether that worked."""
        self._recording = None  # and with it the memory of the last
        if not has_room(self._leaves[0].device):
            _log.info("no room to record training steps: their kernels are launched one by one")
            self._may_record = False
            return False
        own = {name: tensor.clone() for name, tensor in inputs.items()}

        try:
            (terms, gradients), graph = cuda_graph.recorded(functools.partial(self._differentiated, own, micro_batches))
        except RuntimeError as error:
            _log.warning("training steps can't be recorded, their kernels are launched one by one: %s", error)
            self._may_record = False
            return False
        self._recording = _Recording(key, own, terms, gradients, graph)
        return True

    def _differentiated(self, inputs: Inputs, micro_batches: int) -> tuple[Terms, list[Tensor | None]]:
        """The terms, and the gradients of this call alone, by leaf; the leaves keep those that they have."""
        before = [leaf.grad for leaf in self._leaves]
        self._set_gradients([None] * len(before))
        try:
            return self._called(inputs, micro_batches), [leaf.grad for leaf in self._leaves]
        finally:
            self._set_gradients(before)

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for leaf, gradient in zip(self._leaves, gradients, strict=True):
            leaf.grad = gradient

    def _replay(self, recording: _Recording, inputs: Inputs, is_only: bool) -> Terms:
        for name, tensor in recording.inputs.items():
            tensor.copy_(inputs[name])
        recording.graph.replay()
        for place, (leaf, gradient) in enumerate(zip(self._leaves, recording.gradients, strict=True)):
            if gradient is not None:
                is_free = is_only or place < len(self._passing)
                _add_gradient(leaf, gradient if is_free else gradient.clone())
        return _own(recording.terms)


def _add_gradient(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _own(value: Any) -> Any:
    """The same in memory of its own, which the next replay leaves alone."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Terms):
        return Terms(*map(_own, value))
    return {name: _own(each) for name, each in value.items()} if isinstance(value, dict) else value
