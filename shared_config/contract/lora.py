"""Low-rank adapters: which matrices have them, their tensors and initial values, and how they go into the weights.

Shapes: O outputs, I inputs, R rank.

y = W x + scale * B (A x), scale = alpha / rank (Hu et al. 2021, arXiv:2106.09685, section 4.1); A begins with normal
values of deviation 1 / sqrt(I), B with 0, so that a run begins with the function of its weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np

from shared_config.contract.initialise import initial_value
from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import Constant, Normal, ParameterSpec, ParameterTable
from shared_config.contract.warm_start import TRANSFORMER
from shared_config.errors import ConfigError
from shared_config.schema.job import JobConfig
from shared_config.schema.lora import LoraConfig

A, B = "lora_a", "lora_b"
ADAPTABLE = re.compile(r"layers\.\d+\.(?:attention\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")
"""Linear maps of one weight that no kernel of its own reads."""

Kept = TypeVar("Kept")


def adapted_modules(config: JobConfig) -> list[str]:
    """The linear maps that have an adapter, in model order; none without [lora].

    Raises:
        ConfigError: a target that is no such map.
    """
    if config.lora is None:
        return []
    names = [name.removesuffix(".weight") for name in parameter_table(config.model, config.vlm)]
    able = [name for name in names if ADAPTABLE.fullmatch(name)]
    idle = [target for target in config.lora.targets if not any(fnmatchcase(name, target) for name in able)]
    if idle:
        known = ", ".join(sorted({name.split(".", 2)[2] for name in able})) or "none of this model"
        raise ConfigError(
            [f"lora.targets = {target!r}: must fit the name of a map, as layers.0.{known}" for target in idle]
        )
    chosen = [name for name in able if any(fnmatchcase(name, target) for target in config.lora.targets)]
    return [_path(config) + name for name in chosen]


def adapter_table(config: JobConfig) -> ParameterTable:
    """The tensors of all adapters: A (R, I) and B (O, R)."""
    if config.lora is None:
        return {}
    table, found, rank = parameter_table(config.model, config.vlm), {}, config.lora.rank
    for name in adapted_modules(config):
        outputs, inputs = table[f"{name.removeprefix(_path(config))}.weight"].shape
        drawn = Normal(1 / math.sqrt(inputs))
        found[f"{name}.{A}"] = ParameterSpec((rank, inputs), drawn, (None, None), decay=True)
        found[f"{name}.{B}"] = ParameterSpec((outputs, rank), Constant(0.0), (None, None), decay=True)
    return found


def is_adapter(name: str) -> bool:
    """Whether a tensor is part of an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def beside_adapters(names: Iterable[str]) -> frozenset[str]:
    """Those of a model's parameters that are frozen since it has adapters; none of one without."""
    found = list(names)
    return frozenset(name for name in found if not is_adapter(name)) if any(map(is_adapter, found)) else frozenset()


def trained_with(lora: LoraConfig | None, parameters: Mapping[str, Kept]) -> dict[str, Kept]:
    """Those of the parameters that are trained: adapters alone, if there are any."""
    return {name: value for name, value in parameters.items() if lora is None or is_adapter(name)}


def with_adapters(weights: Mapping[str, Kept], config: JobConfig) -> Mapping[str, Kept | np.ndarray]:
    """Weights of a model for one with adapters: with those that they lack, as a run begins."""
    if any(map(is_adapter, weights)):
        return weights
    seed = config.train.seed
    return {**weights, **{name: initial_value(name, spec, seed) for name, spec in adapter_table(config).items()}}


def _path(config: JobConfig) -> str:
    """What the names of the language model's maps begin with; targets are without."""
    return "" if config.vlm is None else TRANSFORMER


def without_adapters(weights: Mapping[str, Kept], lora: LoraConfig | None) -> dict[str, Kept | np.ndarray]:
    """The weights with their adapters in them, the same bits everywhere: W + scale * sum over r of B[:, r] A[r, :], in
    float64, term by term in the order of r, and rounded once to the dtype of W.
    """
    merged: dict[str, Kept | np.ndarray] = {name: value for name, value in weights.items() if not is_adapter(name)}
    for name in weights:
        if lora is None or not name.endswith(f".{A}"):
            continue
        module = name.removesuffix(f".{A}")
        a_RI, b_OR = (np.asarray(weights[f"{module}.{part}"], np.float64) for part in (A, B))
        weight_OI = np.asarray(merged[f"{module}.weight"])
        sum_OI = np.zeros(weight_OI.shape, np.float64)
        for a_I, b_O in zip(a_RI, b_OR.T, strict=True):
            sum_OI += b_O[:, None] * a_I
        whole = np.asarray(weight_OI, np.float64) + lora.scale * sum_OI
        merged[f"{module}.weight"] = whole.astype(weight_OI.dtype)
    return merged
