"""Initial weights by seed: the same bits in both backends and in every sharding layout.

Each tensor has its own stream, a Philox generator (Salmon et al. 2011) keyed by the seed and the tensor's name, so no
value depends on what else the model holds or on who draws first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from shared_config.contract.specs import Constant, ParameterSpec, ParameterTable


def initial_value(name: str, spec: ParameterSpec, seed: int) -> np.ndarray:
    """The initial float32 value of one tensor, whole."""
    if isinstance(spec.initializer, Constant):
        return np.full(spec.shape, spec.initializer.value, dtype=np.float32)
    values = stream(seed, name).standard_normal(spec.shape, dtype=np.float32)
    return values * np.float32(spec.initializer.std)


def initial_values(table: ParameterTable, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor of the table, one at a time."""
    for name, spec in table.items():
        yield name, initial_value(name, spec, seed)


def stream(seed: int, name: str) -> np.random.Generator:
    """The random stream of ``name`` under ``seed``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def state_hash(state: Mapping[str, npt.ArrayLike]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the order of the mapping."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name])
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.view(np.uint8).data if value.size else b"")
    return digest.hexdigest()
