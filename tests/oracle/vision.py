"""Vision towers: the pre-norm ViT (Dosovitskiy et al. 2021, arXiv:2010.11929) as SigLIP and CLIP have it.

Shapes: B images, p patch side, N patches, F feature dim.
"""

from __future__ import annotations

import numpy as np

from shared_config.contract.vision import TowerConfig
from tests.oracle.attention import attend, heads_first, heads_merged, split_heads
from tests.oracle.linear import Weights, linear, submodule
from tests.oracle.mlp import ACTIVATIONS
from tests.oracle.norm import layer_norm


def vision_tower(pixels_B3HW: np.ndarray, weights: Weights, tower: TowerConfig) -> np.ndarray:
    """(B, N, F): the patches after the last block. CLIP has a class token, dropped here unless the tower keeps it,
    and a norm before the blocks; SigLIP has a norm after them. What a tower has, its weights tell.
    """
    x_BNF = patches(pixels_B3HW, tower.patch_size) @ _patch_matrix(weights).T
    if "patch_embedding.bias" in weights:
        x_BNF = x_BNF + weights["patch_embedding.bias"]
    has_class = "class_embedding" in weights
    if has_class:
        class_B1F = np.broadcast_to(weights["class_embedding"], (len(x_BNF), 1, x_BNF.shape[-1]))
        x_BNF = np.concatenate([class_B1F, x_BNF], axis=1)
    x_BNF = x_BNF + weights["position_embedding.weight"]
    x_BNF = _optional_norm(x_BNF, weights, "pre_norm", tower.norm_eps)
    for layer in range(tower.n_layers):
        x_BNF = vision_block(x_BNF, submodule(weights, f"layers.{layer}"), tower)
    x_BNF = _optional_norm(x_BNF, weights, "norm", tower.norm_eps)
    return x_BNF[:, 1:] if has_class and not tower.keep_class_token else x_BNF


def vision_block(x_BNF: np.ndarray, weights: Weights, tower: TowerConfig) -> np.ndarray:
    """x + attention(attention_norm(x)), every patch seeing every patch; then x + mlp(mlp_norm(x))."""
    normed = _optional_norm(x_BNF, weights, "attention_norm", tower.norm_eps)
    q, k, v = (
        heads_first(split_heads(linear(normed, weights, f"attention.{name}_proj"), tower.n_heads)) for name in "qkv"
    )
    everything = np.ones((len(x_BNF), x_BNF.shape[1], x_BNF.shape[1]), dtype=bool)
    context, _ = attend(q, k, v, everything)
    x_BNF = x_BNF + linear(heads_merged(context), weights, "attention.o_proj")
    normed = _optional_norm(x_BNF, weights, "mlp_norm", tower.norm_eps)
    hidden = ACTIVATIONS[tower.activation](linear(normed, weights, "mlp.up_proj"))
    return x_BNF + linear(hidden, weights, "mlp.down_proj")


def patches(pixels_B3HW: np.ndarray, side: int) -> np.ndarray:
    """(B, N, 3 * p * p): non-overlapping squares in reading order, each flattened as (channel, row, column)."""
    batch, channels, height, width = pixels_B3HW.shape
    squares = [
        pixels_B3HW[:, :, top : top + side, left : left + side].reshape(batch, channels * side * side)
        for top in range(0, height - side + 1, side)
        for left in range(0, width - side + 1, side)
    ]
    return np.stack(squares, axis=1)


def _patch_matrix(weights: Weights) -> np.ndarray:
    """(F, 3 * p * p), also from a convolution kernel (F, 3, p, p)."""
    kernel = weights["patch_embedding.weight"]
    return kernel.reshape(len(kernel), -1)


def _optional_norm(x: np.ndarray, weights: Weights, name: str, eps: float) -> np.ndarray:
    """The LayerNorm of that name, the identity where the tower has none."""
    if f"{name}.weight" not in weights:
        return x
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
