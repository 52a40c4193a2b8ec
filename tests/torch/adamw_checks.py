"""What the fused step of AdamW must do, in plain operations of torch, and steps that are drawn to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge_torch.training.optimizer import build_optimizer, set_optimizer_state
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.schema.optimizer import OptimizerConfig

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.97), eps=1e-6)
SMALLEST = 2.0**-6
"""Of second moments: a first moment that cancels, over the root of less, would have errors of many roundings."""


def plain_kernel(
    tensors: Sequence[Sequence[Tensor]],
    numbers: Tensor,
    factor: Tensor,
    verdict: Tensor,
    betas: tuple[float, float],
    eps: float,
    *,
    has_copies: bool,
    writes: bool,
) -> None:
    """`adamw_kernel.run_adamw` in float64."""
    if not verdict:
        return
    for (parameter, gradient, m, v, copy), (kept, rate, scale) in zip(tensors, numbers.double(), strict=True):
        g = gradient.double() * factor.double()
        new_m = betas[0] * m.double() + (1 - betas[0]) * g
        new_v = betas[1] * v.double() + (1 - betas[1]) * g**2
        moved = parameter.double() * kept - rate * new_m / (new_v.sqrt() * scale + eps)
        if not writes:
            largest = torch.finfo(torch.float32).max
            verdict *= bool((moved.abs() <= largest).all()) and bool((new_v <= largest).all())
            continue
        for held, new in ((parameter, moved), (m, new_m), (v, new_v), *([(copy, parameter)] if has_copies else [])):
            held.detach().copy_(new)


@dataclass
class Drawn:
    """Parameters with an optimiser in the middle of a run, the gradients of a step, and copies of some."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    gradients: dict[Tensor, Tensor]
    copies: dict[Tensor, Tensor]

    def state(self) -> dict[str, Tensor]:
        """All that a step may change, by name, as it is now."""
        kept = {f"{key}.{name}": self.optimizer.state[p][key] for name, p in self.parameters.items()
                for key in ("exp_avg", "exp_avg_sq", "step")}  # fmt: skip
        copies = {f"copy.{name}": self.copies[p] for name, p in self.parameters.items() if p in self.copies}
        tensors: dict[str, Any] = {**self.parameters, **kept, **copies}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def drawn(
    sizes: Sequence[tuple[int, ...]],
    narrow: Sequence[bool],
    has_copy: Sequence[bool],
    counts: Sequence[int],
    *,
    seed: int,
    device: str = "cpu",
) -> Drawn:
    """Tensors of these shapes, whether their gradients are narrow, which have copies, and their updates so far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    names = [f"p{place}" for place in range(len(sizes))]
    parameters = {name: nn.Parameter(normal(size).to(device)) for name, size in zip(names, sizes, strict=True)}
    table: Mapping[str, ParameterSpec] = {
        name: ParameterSpec(size, Constant(0.0), (None,) * len(size), decay=place % 2 == 0)
        for place, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    optimizer = build_optimizer(parameters, table, CONFIG)
    moments = {f"m.{name}": normal(size) for name, size in zip(names, sizes, strict=True)}
    moments |= {f"v.{name}": normal(size).square() + SMALLEST for name, size in zip(names, sizes, strict=True)}
    moments |= {f"t.{name}": torch.tensor(count) for name, count in zip(names, counts, strict=True)}
    set_optimizer_state(optimizer, parameters, moments, 0)
    dtypes = [torch.bfloat16 if is_narrow else torch.float32 for is_narrow in narrow]
    gradients: dict[Tensor, Tensor] = {
        p: normal(tuple(p.shape)).to(device, dtype) for p, dtype in zip(parameters.values(), dtypes, strict=True)
    }
    copies: dict[Tensor, Tensor] = {
        p: p.detach().bfloat16() for p, has in zip(parameters.values(), has_copy, strict=True) if has
    }
    return Drawn(parameters, optimizer, gradients, copies)
