"""One of two processes of JAX, with two devices each, that write a checkpoint and read it in another layout:
``python -m tests.distributed.jax_parts RANK PORT FOLDER``. It ends with an error where something differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np

from shared_config.interchange import checkpoint
from shared_config.interchange.parts import Box, Parts, StateParts
from shared_config.interchange.together import Processes

PROCESSES = 2
SHAPES = {"rows": (8, 4), "columns": (8, 4), "grid": (8, 4), "copied": (3,), "layers.0-1.w": (2, 4, 6)}
WRITTEN = {"rows": ("a",), "columns": (None, "b"), "grid": ("b", "a"), "copied": (), "layers.0-1.w": (None, "a", "b")}
READ = {"rows": (None, "b"), "columns": (("a", "b"),), "grid": ("a",), "copied": (), "layers.0-1.w": (None, "b")}
HELD = 2 * (16 + 8 + 16 + 24) + 3
"""How many values the two devices of a process hold by `READ`; what all devices hold is read once."""


def values_of(name: str) -> np.ndarray:
    """What an array holds."""
    shape = SHAPES[name]
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(name)


def main(rank: int, port: int, folder: Path) -> None:
    """Write, read, compare."""
    import jax
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    from kempnerforge_jax.distributed.states import own_parts
    from kempnerforge_jax.model.stack import stack_layers, stacks_of
    from kempnerforge_jax.model.state import like

    jax.distributed.initialize(f"localhost:{port}", PROCESSES, rank)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))

    def lying(name: str, axes: tuple[object, ...]) -> jax.Array:
        values = values_of(name)
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(values.shape, sharding, lambda box: values[box])

    def largest(number: int) -> int:
        return int(np.max(multihost_utils.process_allgather(np.asarray(number))))

    own = Processes(rank, PROCESSES, largest)
    parts = own_parts({name: lying(name, axes) for name, axes in WRITTEN.items()})
    checkpoint.save(folder, StateParts(1, parts, {}), processes=own)
    written = checkpoint.load(folder, processes=own).parts.weights
    read: list[int] = []
    real = Parts.__getitem__

    def noted(tensor: Parts, box: Box) -> np.ndarray:
        found = real(tensor, box)
        read.append(found.size)
        return found

    with patch.object(Parts, "__getitem__", noted):
        stacked = stack_layers(written, stacks_of(SHAPES))
        for name, axes in READ.items():
            blank = lying(name, axes) * 0
            for shard in like(blank, stacked[name]).addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), values_of(name)[shard.index])
    assert sum(read) == HELD, f"{sum(read)} values read"
    largest(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
