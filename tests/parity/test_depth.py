"""Layers and experts of two digits: their order is that of the numbers, however a model was taken apart and merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from shared_config.contract.parameters import parameter_table
from shared_config.contract.validation import validation_weights
from shared_config.schema.model import ModelConfig
from tests.oracle.transformer import transformer
from tests.parity.backends import BACKENDS
from tests.tolerance import assert_same_function

CONFIG = ModelConfig(
    dim=12, n_layers=13, n_heads=2, vocab_size=13, ffn_hidden_dim=10, max_seq_len=16, num_experts=11, moe_top_k=2,
    moe_frequency=12, moe_aux_loss_weight=0.0,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 8), dtype=np.int32)
WEIGHTS = {
    name: np.asarray(value, np.float64) for name, value in validation_weights(parameter_table(CONFIG), 1).items()
}


def test_deep_models_are_one_function() -> None:
    truth = transformer(WEIGHTS, CONFIG, TOKENS).logits
    for backend in BACKENDS:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            model = backend.model(CONFIG, WEIGHTS)
            logits = backend.run(lambda tokens, model=model: model.run(tokens).logits, TOKENS)
        assert_same_function(logits, truth, "logits", context=backend)


def test_what_crosses_jit_keeps_the_order_of_layers_and_experts() -> None:
    """Taken apart and merged, with layers one by one and stacked."""
    truth, jax_backend = transformer(WEIGHTS, CONFIG, TOKENS).logits, BACKENDS[1]
    state, hooks = jax_backend.module("model.state"), jax_backend.module("model.hooks")
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        model = jax_backend.model(CONFIG, WEIGHTS)
        for scan_layers in (False, True):
            graphdef, params, buffers = state.split(model, scan_layers=scan_layers)

            @jax.jit
            def run(params: dict, buffers: dict, tokens: jax.Array, graphdef: object = graphdef) -> jax.Array:
                return state.merge(graphdef, params, buffers).run(tokens).logits

            logits = np.asarray(run(params, buffers, jnp.asarray(TOKENS)))
            assert_same_function(logits, truth, "logits", context=f"scan_layers = {scan_layers}")
        merged = state.merge(*state.split(model))
        assert hooks.activation_names(merged).index("layers.2") < hooks.activation_names(merged).index("layers.10")
