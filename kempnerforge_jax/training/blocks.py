"""Blocks of a model made ready for training: recomputed in the backward pass."""

from __future__ import annotations

import jax

REMATERIALISATION = {
    "none": False,
    "full": True,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What of a block is recomputed in the backward pass: nothing, all, or all but matrix products with weights."""
