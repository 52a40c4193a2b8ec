"""A model of transformers against the one of this package in JAX: same weights, same names but for a table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from kempnerforge_jax.model.transformer import Transformer
from shared_config import ModelConfig
from shared_config.parity import compare_functions, make_map, transfer
from shared_config.parity.strategies import weight

NAMES = make_map(
    {
        "model.embed_tokens.weight": "token_embedding.embedding.weight",
        "model.layers.*.input_layernorm.weight": "layers.*.attention_norm.weight",
        "model.layers.*.self_attn.*.weight": "layers.*.attention.*.weight",
        "model.layers.*.post_attention_layernorm.weight": "layers.*.mlp_norm.weight",
        "model.layers.*.mlp.*.weight": "layers.*.mlp.*.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output_head.proj.weight",
    },
    {
        "model.embed_tokens": "token_embedding",
        "model.layers.*.input_layernorm": "layers.*.attention_norm",
        "model.layers.*.self_attn": "layers.*.attention",
        "model.layers.*.self_attn.*": "layers.*.attention.*",
        "model.layers.*.post_attention_layernorm": "layers.*.mlp_norm",
        "model.layers.*.mlp": "layers.*.mlp",
        "model.layers.*.mlp.*": "layers.*.mlp.*",
        "model.layers.*": "layers.*",
        "model.norm": "norm",
        "lm_head": "output_head",
    },
)


@pytest.mark.parametrize(
    "dtype", ["float32", *(["bfloat16"] if settings.get_current_profile_name() == "nightly" else [])]
)
def test_llama_of_transformers_is_ours(dtype: str) -> None:
    sizes = LlamaConfig(
        vocab_size=37, hidden_size=28, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        theirs = LlamaForCausalLM(sizes).eval()
    table = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    weights = {name: weight(name, shape, seed=3) for name, shape in table.items()}
    config = ModelConfig(
        dim=28, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=6, vocab_size=37, ffn_hidden_dim=40, max_seq_len=64,
        norm_eps=1e-6,
    )  # fmt: skip
    ours = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    ours.init_weights_and_freqs(0)
    tokens = np.random.default_rng(0).integers(0, 37, (2, 9), np.int32)
    a = of_torch.record(theirs, {"input_ids": tokens}, weights=weights, dtype=dtype)
    b = of_jax.record(ours, (tokens,), weights=transfer(weights, NAMES), dtype=dtype, deltas=False)
    found = compare_functions(a, b, NAMES, common=True)
    assert found.equal, found.failures
    assert len(found.groups["forward"]) > 15
    assert len(found.groups["gradient"]) == len(table)
