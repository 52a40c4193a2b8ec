"""A model cut into pipeline stages is the whole one, for every architecture: what an architecture does is told the
modules that a stage has.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from shared_config.contract.parameters import parameter_table
from shared_config.schema import CrossAttentionConfig, JointDecoderConfig, ModelConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.weights import draw
from tests.parity.backends import on_both

CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=19, max_seq_len=16, ffn_hidden_dim=24)
RNG = np.random.default_rng(0)
STREAM = RNG.standard_normal((2, 5, 16))
TOKENS = RNG.integers(0, 19, (2, 5))
FEATURES = RNG.standard_normal((2, 3, 16))
IDS = np.array([[0, 0, 1, 1, 1], [1, 0, 0, 1, 1]])
ARCHITECTURES: dict[str, tuple[VLMConfig, dict[str, Any]]] = {
    "joint_decoder": (JointDecoderConfig(max_text_len=8), {}),
    "cross_attention": (
        CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1), {"image_features": FEATURES}
    ),
    "mot": (MoTConfig(max_text_len=8), {"modality_ids": IDS}),
    "moma": (MoMaConfig(max_text_len=8, moma_gumbel_noise=False), {"modality_ids": IDS}),
}  # fmt: skip


@on_both
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_stages_are_the_whole_model(backend: Any, arch: str) -> None:
    vlm, given = ARCHITECTURES[arch]
    weights = draw({name: spec.shape for name, spec in parameter_table(CONFIG, vlm).items()})
    context = backend.module("model.modality").ModalityContext
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        whole, first, second = (backend.model(CONFIG, weights, vlm_config=vlm) for _ in range(3))
        for stage, layer in ((first, "1"), (second, "0")):
            del stage.layers[layer]
        first.output_head = None
        for norms in ("norm", "mot_norms"):
            setattr(first, norms, None)
        second.token_embedding = None

        def run(model: Any, x: Any) -> Any:
            options = {name: backend.array(value) for name, value in given.items()}
            if "modality_ids" in given:
                return model.run(modality=context(inputs_embeds=x, **options)).logits
            return model.run(x, modality=context(**options)).logits

        entering = backend.array(STREAM if "modality_ids" in given else TOKENS)
        found = backend.numpy(run(second, run(first, entering)))
        truth = backend.numpy(run(whole, entering))
    np.testing.assert_allclose(found, truth, rtol=1e-10, atol=1e-12)
