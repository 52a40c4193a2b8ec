"""A model of JAX that sees images, against what transformers' model of the same weights computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shared_config.schema.job import JobConfig
from tests.interchange.test_family_models import ALLOWED, TOLD, assert_close

Named = Mapping[str, np.ndarray]


def check_jax(
    config: JobConfig,
    state: Named,
    images: Mapping[str, Any],
    in_text: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    prompt: int,
    scales: np.ndarray,
    logits: np.ndarray,
    wanted: Named,
    decoded: np.ndarray,
) -> None:
    """Logits, gradients and greedy text.

    Args:
        images: arguments of ``generate``.
        in_text: those of the model, besides ``input_ids``.
        tokens: (B, S), of which the first ``prompt`` are continued.
        scales: of the logits, whose sum is differentiated.
        wanted: gradients by name.
    """
    import jax
    import jax.numpy as jnp

    from kempnerforge_jax.model import generate as jax_generate
    from kempnerforge_jax.model import state as jax_state
    from kempnerforge_jax.model.vlm import build_vlm_wrapper as build_jax

    assert config.vision_encoder is not None
    assert config.vlm is not None
    with jax.enable_x64(True):
        model = build_jax(config.model, config.vision_encoder, config.adapter, config.vlm, rngs=None)
        jax_state.set_state(model, state)
        graph, params, buffers = jax_state.split(model)

        def loss(params: Any) -> tuple[Any, Any]:
            whole = jax_state.merge(graph, params, buffers)
            given: dict[str, Any] = {name: jnp.asarray(array) for name, array in in_text.items()}
            found = whole.run(input_ids=jnp.asarray(tokens), **given).logits
            return (found * scales).sum(), found

        found_gradients, found = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert_close({"logits": np.asarray(found)}, {"logits": logits}, ALLOWED)
        assert_close({name: np.asarray(found_gradients[name]) for name in wanted}, wanted, TOLD)
        whole = jax_generate.generate(model, tokens[:, :prompt], decoded.shape[1], temperature=0.0, **images)
        assert np.array_equal(np.asarray(whole)[:, prompt:], decoded)
