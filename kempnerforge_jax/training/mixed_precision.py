"""What training computes in: the compute dtype, and the precision of float32 products."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from shared_config.schema.job import JobConfig


def matmul_precision(level: str) -> AbstractContextManager[object]:
    """How float32 matrices are multiplied: "highest" as float32, "high" as TF32 or as three bfloat16 products."""
    return jax.default_matmul_precision(level)


def compute_dtype(config: JobConfig, dtype: DTypeLike) -> np.dtype:
    """The dtype of the arithmetic, given that of the masters."""
    narrow = config.train.mixed_precision == "bf16" and dtype == jnp.float32
    return jnp.dtype(jnp.bfloat16 if narrow else dtype)
