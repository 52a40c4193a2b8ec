"""A step of AdamW on an NVIDIA GPU in one pass over memory: gradients, narrow or wide, are scaled as they are read, and
the copies that the next forward computes with are written along with the masters. `optimizer.Step` is the same step in
the operations of PyTorch.

Of a parameter with a bfloat16 gradient and a copy 28 bytes are moved: 14 are read, 14 written.

Shapes: T tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kempnerforge_torch.training.adamw_kernel import HAS_TRITON, run_adamw
from kempnerforge_torch.training.optimizer import AdamW, set_rates
from shared_config.contract.moments import AVERAGE
from shared_config.contract.schedule import Rates

ALIGNMENT = 16
"""Bytes, of which the address of every tensor must be a multiple."""


def can_fuse(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `FusedStep` takes the steps of an optimiser: AdamW of whole float32 tensors on an NVIDIA GPU, without an
    average of the weights.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return (
        type(optimizer) is AdamW
        and not optimizer.defaults[AVERAGE]
        and torch.version.hip is None
        and HAS_TRITON
        and all(type(each) is torch.nn.Parameter and each.is_cuda and each.dtype == torch.float32 for each in tensors)
    )


class _Launch(NamedTuple):
    """Tensors whose gradients are of one dtype, and which all have copies, or none: see `adamw_kernel`."""

    has_copies: bool
    tensors: list[list[Tensor]]
    numbers: Tensor


class FusedStep:
    """What `optimizer.Step` is; it also writes the copies of the parameters that have some."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Mapping[Float[Tensor, "..."], Float[Tensor, "..."]],
        rates: Rates,
        factor: Float[Tensor, ""] | None = None,
        copies: Mapping[Float[Tensor, "..."], Float[Tensor, "..."]] | None = None,
    ):
        """
        Args:
            gradients: by parameter, float32 or bfloat16.
            factor: of all gradients; 1 if None.
            copies: by parameter, bfloat16.
        """
        copies = {} if copies is None else copies
        set_rates(optimizer, rates)
        self._optimizer, self._parameters = optimizer, list(gradients)
        one = torch.ones((), device=self._parameters[0].device)
        self._factor = one if factor is None else factor.to(torch.float32)
        alike: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
        for parameter, gradient in gradients.items():
            alike.setdefault((gradient.dtype, parameter in copies), []).append(parameter)
        self._launches = [
            _Launch(
                has_copies,
                [self._tensors(parameter, gradients[parameter], copies.get(parameter)) for parameter in some],
                self._numbers(some, rates.lr),
            )
            for (_, has_copies), some in alike.items()
        ]

    @torch.no_grad()
    def stays_finite(self) -> Bool[Tensor, ""]:
        """Whether the step leaves parameters and moments finite, a bool scalar."""
        verdict = torch.ones_like(self._factor, dtype=torch.int32)
        self._run(verdict, writes=False)
        return verdict.bool()

    @torch.no_grad()
    def take(self, finite: Bool[Tensor, ""] | None = None) -> None:
        """Take the step; where ``finite`` (a bool scalar) is false nothing changes."""
        verdict = torch.ones_like(self._factor, dtype=torch.int32)
        if finite is not None:
            verdict = verdict * finite
        self._run(verdict, writes=True)
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        steps = [state["step"] for state in states]
        counts = [verdict.to(torch.float32)] * len(steps)  # a tensor alone would be read by the host
        torch._foreach_add_(steps, counts)  # pyright: ignore[reportPrivateImportUsage]
        moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
        torch.autograd.graph.increment_version([*self._parameters, *moments])

    def _tensors(self, parameter: Tensor, gradient: Tensor, copy: Tensor | None) -> list[Tensor]:
        """Parameter, gradient, moments, and the copy, or the parameter where there is none."""
        state = self._optimizer.state[parameter]
        if not _is_plain(gradient):
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        tensors = [parameter, gradient, state["exp_avg"], state["exp_avg_sq"], parameter if copy is None else copy]
        assert all(map(_is_plain, tensors)), "parameters, moments and copies lie in memory as they were allocated"
        return tensors

    def _numbers(self, parameters: Sequence[Tensor], lr: float) -> Tensor:
        """Float32 (T, 3), computed in float64."""
        b1, b2 = self._optimizer.defaults["betas"]
        decays = {
            id(tensor): group["weight_decay"] for group in self._optimizer.param_groups for tensor in group["params"]
        }
        t = torch.stack([self._optimizer.state[parameter]["step"] for parameter in parameters]).double() + 1
        kept = 1 - lr * torch.tensor([decays[id(parameter)] for parameter in parameters], dtype=torch.float64)
        scales = [kept.to(t.device, non_blocking=True), lr / (1 - b1**t), (1 - b2**t).rsqrt()]
        return torch.stack(scales, dim=1).float()

    def _run(self, verdict: Tensor, *, writes: bool) -> None:
        betas, eps = self._optimizer.defaults["betas"], self._optimizer.defaults["eps"]
        with torch.cuda.device(verdict.device) if verdict.is_cuda else contextlib.nullcontext():
            for has_copies, tensors, numbers in self._launches:
                run_adamw(tensors, numbers, self._factor, verdict, betas, eps, has_copies=has_copies, writes=writes)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
