"""Blocks of a model made ready for training: recomputed in the backward pass."""

from __future__ import annotations

import math
from typing import Any

import jax

_keeps_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _keeps_narrow_products(primitive: Any, *factors: Any, **parameters: Any) -> bool:
    if not _keeps_products(primitive, *factors, **parameters):
        return False
    x, weight = factors
    (contracted, _), _ = parameters["dimension_numbers"]
    inputs = math.prod(x.shape[axis] for axis in contracted)
    return weight.size // inputs <= inputs


REMATERIALISATION = {
    "none": False,
    "full": True,
    "narrow": _keeps_narrow_products,
    "selective": _keeps_products,
}
"""What of a block is recomputed in the backward pass (Chen et al. 2016, arXiv:1604.06174): nothing, all, all but matrix
products with weights, or of these also the ones with more outputs than inputs.

What is kept of a dense block, in numbers for each token (D model dim, H h outputs of q, K h of k and of v, F of gate
and of up), and for llama3_8b (D = H h = 4096, K h = 1024, F = 14336, 32 layers) in bfloat16 for 4 x 4096 tokens:

    mode        kept                      numbers             8b, a layer    all layers
    full        the block's input         D                        128 MiB         4 GiB
    narrow      also q, k, v and o        2 D + H h + 2 K h        448 MiB        14 GiB
    selective   also gate and up          ... + 2 F              1,344 MiB        42 GiB

Where "full" takes 45 GB in all, as on each of 4 GPUs with float32 masters, "narrow" then takes about 56 GB and
"selective" 86.
"""
