"""The parameter table, RoPE tables, initial weights and counts, against figures worked out another way."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from shared_config import JobConfig, ModelConfig, VLMConfig, load_config
from shared_config.contract.counts import (
    count_active_parameters,
    count_parameters,
    flops_per_token,
    kv_cache_bytes,
    mean_visible_keys,
    training_memory,
)
from shared_config.contract.initialise import initial_value, initial_values, state_hash
from shared_config.contract.parameters import aliases, parameter_table
from shared_config.contract.rope import inverse_frequencies, rope_tables
from shared_config.contract.specs import Constant, Normal, ParameterSpec
from shared_config.schema import DistributedConfig, MoMaConfig, MoTConfig, RopeScaling

SMALL = ModelConfig(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=31, ffn_hidden_dim=80)


def test_dense_table() -> None:
    table = parameter_table(SMALL)
    assert next(iter(table)) == "token_embedding.embedding.weight"
    assert list(table)[-2:] == ["norm.weight", "output_head.proj.weight"]
    assert table["layers.2.attention.k_proj.weight"].shape == (24, 48)
    assert table["layers.0.attention.o_proj.weight"].initializer == Normal(0.02 / math.sqrt(6))
    assert table["layers.0.mlp.down_proj.weight"].axes == ("embed", "mlp")
    assert table["norm.weight"].initializer == Constant(1.0)
    assert not table["norm.weight"].decay
    assert table["layers.0.mlp.up_proj.weight"].decay
    assert all(len(spec.axes) == len(spec.shape) for spec in table.values())
    per_layer = 48 * 48 * 2 + 24 * 48 * 2 + 3 * 48 * 80 + 2 * 48
    assert count_parameters(SMALL) == 3 * per_layer + 48 + 2 * 31 * 48


def test_options_of_the_dense_table() -> None:
    tied = SMALL.replace(tie_embeddings=True)
    assert "output_head.proj.weight" not in parameter_table(tied)
    assert aliases(tied) == {"output_head.proj.weight": "token_embedding.embedding.weight"}
    assert aliases(SMALL) == {}
    table = parameter_table(SMALL.replace(qk_norm=True, attention_bias=True, norm_type="layernorm", activation="gelu"))
    assert table["layers.1.attention.q_norm.weight"].shape == (12,)
    assert table["layers.1.attention.k_proj.bias"].shape == (24,)
    assert table["norm.bias"].initializer == Constant(0.0)
    assert "layers.0.mlp.gate_proj.weight" not in table


def test_expert_table_counts_each_expert_once() -> None:
    config = SMALL.replace(num_experts=5, moe_frequency=2, moe_router="sigmoid_topk", moe_shared_experts=2)
    table, packed = parameter_table(config), parameter_table(config.replace(moe_packed_experts=True))
    assert "layers.0.mlp.gate_proj.weight" in table
    assert table["layers.1.mlp.experts.4.up_proj.weight"].shape == (80, 48)
    assert table["layers.1.mlp.shared_expert.up_proj.weight"].shape == (160, 48)
    assert packed["layers.1.mlp.gate_w"].shape == (5, 48, 80)
    assert packed["layers.1.mlp.down_w"].shape == (5, 80, 48)
    assert table["layers.1.mlp.router.gate.weight"].full_precision
    assert table["layers.1.mlp.router.expert_bias"].is_buffer
    assert count_parameters(config) == count_parameters(config.replace(moe_packed_experts=True))
    assert count_parameters(config) - count_active_parameters(config) == 3 * (3 * 80 * 48)


@pytest.mark.parametrize("arch", VLMConfig.architectures())
def test_vision_tables(arch: str) -> None:
    config, vlm = SMALL.replace(n_layers=4), VLMConfig.for_arch(arch)
    table = parameter_table(config, vlm)
    if arch == "joint_decoder":
        assert table == parameter_table(config)
    elif arch == "cross_attention":
        assert table["cross_attention_layers.0.attn.o_proj.weight"].initializer == Constant(0.0)
        assert set(parameter_table(config)) < set(table)
    elif arch == "mot":
        assert table["layers.1.attn.o_proj.image.weight"].initializer == Constant(0.0)
        assert table["mot_norms.text.weight"].shape == (48,)
        assert "norm.weight" not in table
        narrow = parameter_table(config, MoTConfig(mot_image_n_kv_heads=1))
        assert narrow["layers.0.attn.k_proj.image.weight"].shape == (12, 48)
        assert narrow["layers.0.attn.k_proj.text.weight"].shape == (24, 48)
    else:
        three = parameter_table(config, MoMaConfig(moma_experts_per_modality={"image": 3, "text": 1}))
        assert "layers.0.mlp.experts.image.experts.2.up_proj.weight" in three
        assert "layers.0.mlp.experts.text.experts.1.up_proj.weight" not in three


def test_rope_tables_against_complex_rotation() -> None:
    cos, sin = rope_tables(8, 50, theta=500.0)
    turn = np.exp(1j * np.outer(np.arange(50), [500.0 ** (-2 * pair / 8) for pair in range(4)]))
    np.testing.assert_allclose(cos + 1j * sin, turn, rtol=0, atol=1e-14)
    assert cos.dtype == np.float64
    for bad in (7, 0, -2):
        with pytest.raises(ValueError, match="head_dim"):
            rope_tables(bad, 4)


def test_rope_scalings() -> None:
    plain = inverse_frequencies(64, 500000.0)
    linear = inverse_frequencies(64, 500000.0, RopeScaling(type="linear", factor=4.0))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-15)
    llama3 = inverse_frequencies(64, 500000.0, RopeScaling(type="llama3", factor=8.0, original_max_seq_len=8192))
    wavelength = 2 * math.pi / plain
    np.testing.assert_array_equal(llama3[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(llama3[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-15)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    smooth = (8192 / wavelength - 1) / 3
    np.testing.assert_allclose(llama3[between], ((1 - smooth) / 8 + smooth)[between] * plain[between], rtol=1e-13)
    yarn = RopeScaling(type="yarn", factor=16.0, original_max_seq_len=4096)
    stretched = inverse_frequencies(128, 10000.0, yarn)
    assert stretched[0] == 1.0
    assert stretched[-1] == pytest.approx(inverse_frequencies(128, 10000.0)[-1] / 16, rel=1e-14)
    assert np.all(np.diff(stretched) < 0)
    cos, _ = rope_tables(128, 2, 10000.0, yarn)
    np.testing.assert_allclose(cos[0], 0.1 * math.log(16) + 1, rtol=1e-15)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    spec = ParameterSpec((300, 200), Normal(0.02), (None, None))
    value = initial_value("a", spec, 1)
    assert value.dtype == np.float32
    assert abs(value.mean()) < 5e-4
    assert value.std() == pytest.approx(0.02, rel=0.02)
    assert not np.array_equal(value, initial_value("b", spec, 1))
    assert not np.array_equal(value, initial_value("a", spec, 2))
    np.testing.assert_array_equal(value, initial_value("a", spec, 1))


def test_initial_weights_are_the_same_in_another_process() -> None:
    code = (
        "from shared_config import load_config; from shared_config.contract.parameters import parameter_table;"
        "from shared_config.contract.initialise import initial_values, state_hash;"
        "print(state_hash(dict(initial_values(parameter_table(load_config('debug').model), 7))))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    state = dict(initial_values(parameter_table(load_config("debug").model), 7))
    assert printed == state_hash(state)
    state["norm.weight"] = state["norm.weight"].copy()
    state["norm.weight"][3] = np.nextafter(np.float32(1), np.float32(2))
    assert printed != state_hash(state)


def test_flops_of_llama3_8b() -> None:
    config = load_config("llama3_8b").model
    flops = flops_per_token(config, 8192)
    assert flops.matmul == 2 * (8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096)
    assert flops.attention == int(4 * 32 * 4096 * 8193 / 2)
    assert flops.training == 3 * (flops.matmul + flops.attention)


def test_flops_count_active_experts_only() -> None:
    config = ModelConfig(dim=64, n_layers=1, n_heads=4, vocab_size=10, ffn_hidden_dim=64, num_experts=8, moe_top_k=2)
    more = config.replace(num_experts=16)
    assert flops_per_token(more, 8).matmul - flops_per_token(config, 8).matmul == 2 * 8 * 64


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 3), (7, 7), (7, 20), (1, 1)])
def test_visible_keys_by_enumeration(length: int, window: int | None) -> None:
    seen = sum(query - key < (window or length) for query in range(length) for key in range(query + 1))
    assert mean_visible_keys(length, window) == pytest.approx(seen / length, rel=1e-15)


def test_memory_shrinks_with_the_layout() -> None:
    job = load_config("llama3_8b")
    alone = training_memory(job, 1)
    assert alone.optimizer == 2 * 4 * 8_030_261_248
    spread = training_memory(job.replace(distributed=DistributedConfig(tp=2)), 8)
    assert spread.parameters == pytest.approx(alone.parameters / 8, rel=1e-3)
    assert kv_cache_bytes(job.model, 2, 100) == 2 * 32 * 2 * 100 * 8 * 128 * 2
    assert kv_cache_bytes(job.model.replace(sliding_window=10), 2, 100) == 2 * 32 * 2 * 10 * 8 * 128 * 2
    assert isinstance(job, JobConfig)
