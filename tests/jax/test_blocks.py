"""What blocks keep for their backward pass, read off the residuals that JAX lists."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from kempnerforge_jax.model.state import merge, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.training.blocks import REMATERIALISATION
from shared_config.schema.model import ModelConfig

CONFIG = ModelConfig(
    dim=40, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=10, ffn_hidden_dim=56, vocab_size=9, max_seq_len=8
)
ATTENTION, WIDENING = [10, 10, 40, 40], [56, 56]
KEPT = {"none": WIDENING, "full": [], "narrow": ATTENTION, "selective": [*ATTENTION, *WIDENING]}
"""Widths of the products with weights. (Unless they are recomputed, some results of attention's stand for them.)"""


def loss(parameters: dict[str, jax.Array], mode: str) -> jax.Array:
    graphdef, _, buffers = split(Transformer(CONFIG, rngs=None))
    model = merge(graphdef, parameters, buffers)
    return model.run(jnp.ones((3, 7), jnp.int32), remat=REMATERIALISATION[mode]).logits.sum()


@pytest.mark.parametrize("mode", REMATERIALISATION)
def test_a_mode_keeps_what_it_says(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = split(Transformer(CONFIG, rngs=nnx.Rngs(0)))[1]
    print_saved_residuals(lambda parameters: loss(parameters, mode), parameters)
    products = re.findall(r"f32\[3,7,(\d+)\] output of dot_general", capsys.readouterr().out)
    assert sorted(map(int, products)) == sorted(KEPT[mode])


def test_modes_have_the_same_gradients() -> None:
    """Operation by operation: compiled, XLA may fuse them differently."""
    parameters = split(Transformer(CONFIG, rngs=nnx.Rngs(0)))[1]
    with jax.disable_jit():
        found = {mode: jax.grad(loss)(parameters, mode) for mode in REMATERIALISATION}
    for mode, gradients in found.items():
        for name, gradient in gradients.items():
            assert np.array_equal(gradient, found["none"][name]), (mode, name)
