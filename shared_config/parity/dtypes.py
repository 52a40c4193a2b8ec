"""The arithmetics that a config is compared in, by name."""

from __future__ import annotations

from collections.abc import Callable

from shared_config.contract.fp8 import FORWARD, is_fp8
from shared_config.parity.numerics import UNIT_ROUNDOFF
from shared_config.schema.job import JobConfig

DTYPES = ("float64", "float32", "bfloat16", "fp8")
""" "fp8" is bfloat16 with the products in FP8 that `shared_config.contract.fp8` names."""

PRECISIONS = {"float64": "fp32", "float32": "fp32", "bfloat16": "bf16", "fp8": "fp8"}
"""``train.mixed_precision`` of a trainer in each."""


def dtypes_of(config: JobConfig) -> tuple[str, ...]:
    """Those that a config can be compared in."""
    return tuple(dtype for dtype in DTYPES if dtype != "fp8" or config.train.mixed_precision == "fp8")


def narrow_dtypes(config: JobConfig) -> tuple[str, ...]:
    """Those of them that a trainer computes in with float32 masters."""
    return tuple(dtype for dtype in dtypes_of(config) if stored_dtype(dtype) == "bfloat16")


def roundoffs_of(config: JobConfig, dtype: str) -> Callable[[str], float]:
    """How far an arithmetic rounds each weight, by its name."""
    n_layers, otherwise = config.model.n_layers, UNIT_ROUNDOFF[dtype]
    if dtype != "fp8":
        return lambda _: otherwise
    return lambda name: FORWARD.unit_roundoff if is_fp8(name.removesuffix(".weight"), n_layers) else otherwise


def stored_dtype(dtype: str) -> str:
    """The dtype of activations in an arithmetic."""
    return "bfloat16" if dtype == "fp8" else dtype
