"""Memory of a long extraction of activations. Prints one JSON line for each measurement.

    python -m tests.benchmarks.bench_extract [--backend torch|jax|both] [--samples 1000,10000]

Each extraction is a process of its own, which reports its largest resident size; that of 10,000 samples must be that of
1,000, while the file is ten times as large.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIM, LENGTH, VOCABULARY, BATCH = 64, 64, 64, 32
LAYERS = ["layers.0.attention", "layers.1", "norm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backend", choices=["torch", "jax", "both"], default="both")
    parser.add_argument("--samples", default="1000,10000")
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "SAMPLES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(extraction(arguments.one[0], int(arguments.one[1]))))
        return
    for backend in ["torch", "jax"] if arguments.backend == "both" else [arguments.backend]:
        for samples in arguments.samples.split(","):
            command = [sys.executable, "-m", "tests.benchmarks.bench_extract", "--one", backend, samples]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def extraction(backend: str, samples: int) -> dict[str, Any]:
    """Run one in this process."""
    model, extract = load(backend)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.npz"
        extract(model, tokens(BATCH), LAYERS, batch_size=BATCH, path=path)
        before, began = peak(), time.perf_counter()
        extract(model, tokens(samples), LAYERS, batch_size=BATCH, path=path)
        return {
            "backend": backend,
            "samples": samples,
            "file_MB": round(path.stat().st_size / 1e6, 1),
            "peak_MB": round(peak() / 1e6, 1),
            "grown_MB": round((peak() - before) / 1e6, 1),
            "samples_per_s": round(samples / (time.perf_counter() - began)),
        }


def load(backend: str) -> tuple[Any, Any]:
    """A small model, and the function that is measured."""
    from shared_config.schema.model import ModelConfig

    config = ModelConfig(
        dim=DIM, n_layers=2, n_heads=2, vocab_size=VOCABULARY, ffn_hidden_dim=2 * DIM, max_seq_len=LENGTH
    )
    if backend == "torch":
        from kempnerforge_torch.model.hooks import extract_representations
        from kempnerforge_torch.model.transformer import Transformer

        return Transformer(config), extract_representations
    from flax import nnx

    from kempnerforge_jax.model.hooks import extract_representations
    from kempnerforge_jax.model.transformer import Transformer

    return Transformer(config, rngs=nnx.Rngs(0)), extract_representations


def tokens(samples: int) -> Iterator[list[int]]:
    return ([(sample + place) % VOCABULARY for place in range(LENGTH)] for sample in range(samples))


def peak() -> int:
    """Largest resident size of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
