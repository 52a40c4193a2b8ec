"""What training computes in: the compute dtype, casts of the masters to it, products in FP8, and the precision of
float32 products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kempnerforge_torch.model.linear import Linear
from shared_config.contract.fp8 import is_fp8
from shared_config.schema.job import JobConfig


class _CastContext(torch.autograd.function.FunctionCtx):
    """What `Cast` remembers: the dtypes of the tensors."""

    dtypes: list[torch.dtype]


class Cast(torch.autograd.Function):
    """All tensors in another dtype, and their gradients back, all at once: one by one they keep the host busy."""

    @staticmethod
    def forward(
        ctx: _CastContext, dtype: torch.dtype, *tensors: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "..."], ...]:
        """The tensors in ``dtype``."""
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(
        ctx: _CastContext, *gradients: Float[Tensor, "..."] | None
    ) -> tuple[None, *tuple[Float[Tensor, "..."] | None, ...]]:
        """The gradients in the dtypes of the tensors."""
        found = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        cast = dict(zip(found, _cast(list(found.values()), [ctx.dtypes[i] for i in found]), strict=True))
        return None, *(cast.get(i) for i in range(len(gradients)))


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    results = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if results:
        torch._foreach_copy_(results, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return results


@contextlib.contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """How float32 matrices are multiplied: "highest" as float32, "high" as TF32 or as three bfloat16 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compute_dtype(config: JobConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, given that of the masters."""
    return torch.bfloat16 if config.train.casts and dtype == torch.float32 else dtype


def use_fp8(model: nn.Module, config: JobConfig) -> None:
    """Let the linear modules that `shared_config.contract.fp8` names compute in FP8, where the config asks for it."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and config.train.mixed_precision == "fp8":
            module.fp8 = is_fp8(path, config.model.n_layers)
