"""Sizes, weights and inputs of a small language model that is written several times, by their names in PyTorch."""

from __future__ import annotations

import numpy as np

from shared_config.parity.strategies import weight

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS, EPS = 23, 12, 3, 20, 2, 1e-5
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))


def weights() -> dict[str, np.ndarray]:
    """Drawn by name."""
    block = {
        "attention_norm.weight": (WIDTH,),
        "attention_norm.bias": (WIDTH,),
        "attention.qkv.weight": (3 * WIDTH, WIDTH),
        "attention.qkv.bias": (3 * WIDTH,),
        "attention.out.weight": (WIDTH, WIDTH),
        "attention.out.bias": (WIDTH,),
        "mlp_norm.weight": (WIDTH,),
        "mlp_norm.bias": (WIDTH,),
        "mlp.0.weight": (HIDDEN, WIDTH),
        "mlp.0.bias": (HIDDEN,),
        "mlp.2.weight": (WIDTH, HIDDEN),
        "mlp.2.bias": (WIDTH,),
    }
    table = {"embed.weight": (VOCABULARY, WIDTH)}
    table |= {f"blocks.{n}.{name}": shape for n in range(LAYERS) for name, shape in block.items()}
    table |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.weight": (VOCABULARY, WIDTH)}
    return {name: weight(name, shape, seed=3) for name, shape in table.items()}
