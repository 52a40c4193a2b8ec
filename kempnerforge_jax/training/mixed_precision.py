"""What training computes in: the compute dtype, products in FP8, and the precision of float32 products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.model.module import named_modules
from shared_config.contract.fp8 import is_fp8
from shared_config.schema.job import JobConfig


def matmul_precision(level: str) -> AbstractContextManager[object]:
    """How float32 matrices are multiplied: "highest" as float32, "high" as TF32 or as three bfloat16 products."""
    return jax.default_matmul_precision(level)


@contextmanager
def arithmetic(dtype: str) -> Iterator[np.dtype]:
    """In which arrays may be of the dtype of this name, which it yields; of 64 bits they may only where JAX is told."""
    with jax.enable_x64(True) if dtype == "float64" else nullcontext():
        yield jnp.dtype(dtype)


def compute_dtype(config: JobConfig, dtype: DTypeLike) -> np.dtype:
    """The dtype of the arithmetic, given that of the masters."""
    narrow = config.train.casts and dtype == jnp.float32
    return jnp.dtype(jnp.bfloat16 if narrow else dtype)


def use_fp8(model: nnx.Module, config: JobConfig) -> None:
    """Let the linear modules that `shared_config.contract.fp8` names compute in FP8, where the config asks for it."""
    for path, module in named_modules(model):
        if isinstance(module, Linear) and config.train.mixed_precision == "fp8":
            module.fp8 = is_fp8(path, config.model.n_layers)
