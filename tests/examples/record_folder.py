"""What each of two machines runs: recordings of a few inputs in a folder, to be carried to where they are compared.

python -m tests.examples.record_folder torch there          # on a machine with PyTorch
python -m tests.examples.record_folder jax here              # on one with JAX
kempnerforge compare there here
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from shared_config.parity.strategies import weight

LENGTHS = (9, 17)


def inputs(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A gate, values, and the weight of a norm: the same on both machines, as they come from their names."""
    return weight("gate", (2, length, 6), 0), weight("value", (2, length, 6), 0), weight("norm.weight", (6,), 0)


def record_with_torch(folder: Path) -> None:
    """Record a gated norm."""
    import torch

    from kempnerforge_torch.parity import record, tap

    def gated_norm(gate: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gated = tap("gated", torch.nn.functional.silu(gate) * value)
        return torch.nn.functional.rms_norm(gated, (6,), weight, eps=1e-6)

    for length in LENGTHS:
        record(gated_norm, inputs(length), dtype="float32", path=folder / f"length-{length}.safetensors")


def record_with_jax(folder: Path) -> None:
    """Record the same function."""
    import jax
    import jax.numpy as jnp

    from kempnerforge_jax.parity import record, tap

    def gated_norm(gate: jax.Array, value: jax.Array, weight: jax.Array) -> jax.Array:
        gated = tap("gated", jax.nn.silu(gate) * value)
        return weight * gated * jax.lax.rsqrt(jnp.mean(gated * gated, axis=-1, keepdims=True) + 1e-6)

    for length in LENGTHS:
        record(gated_norm, inputs(length), dtype="float32", path=folder / f"length-{length}.safetensors")


def main() -> None:
    """Record with the framework, in the folder, that the command line names."""
    framework, folder = sys.argv[1:]
    {"torch": record_with_torch, "jax": record_with_jax}[framework](Path(folder))


if __name__ == "__main__":
    main()
