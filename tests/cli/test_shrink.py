"""Shrunk configs keep the architecture and lose the size; what validation feeds to models."""

from __future__ import annotations

import numpy as np
import pytest

from shared_config.contract.counts import count_parameters
from shared_config.contract.parameters import parameter_table
from shared_config.loader import load_config, preset_names
from shared_config.parity.shrink import shrink
from shared_config.parity.validation import chunkings, validation_labels, validation_tokens, validation_weights
from shared_config.schema.job import JobConfig

KEPT = ("norm_type", "activation", "attention_bias", "tie_embeddings", "qk_norm", "moe_router", "moe_packed_experts")


@pytest.mark.parametrize("preset", preset_names())
def test_shrunk_presets_are_small_and_of_the_same_kind(preset: str) -> None:
    config = load_config(preset)
    small = shrink(config)
    assert count_parameters(small.model, small.vlm) < 4e6
    assert small.model.vocab_size >= 258
    assert all(getattr(small.model, field) == getattr(config.model, field) for field in KEPT)
    assert small.model.is_moe == config.model.is_moe
    assert type(small.vlm) is type(config.vlm)
    assert _kinds(small) == _kinds(config)


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        (["--model.n_heads=16", "--model.n_kv_heads=16"], (4, 4)),
        (["--model.n_heads=16", "--model.n_kv_heads=4"], (8, 2)),
        (["--model.n_heads=16", "--model.n_kv_heads=1"], (4, 1)),
    ],
)
def test_attention_stays_multi_head_grouped_or_multi_query(overrides: list[str], heads: tuple[int, int]) -> None:
    model = shrink(load_config("llama_1b", overrides)).model
    assert (model.n_heads, model.n_kv_heads) == heads


def test_own_head_width_stays_apart_from_the_residual_width() -> None:
    config = load_config("qwen3_0_6b")
    assert config.model.n_heads * config.model.head_size == 2 * config.model.dim
    small = shrink(config).model
    assert small.n_heads * small.head_size == 2 * small.dim


def test_window_and_scaling_are_shrunk_along() -> None:
    overrides = ["--model.sliding_window=4096", "--model.rope_scaling.type=yarn", "--model.rope_scaling.factor=4.0"]
    small = shrink(load_config("llama3_8b", [*overrides, "--model.rope_scaling.original_max_seq_len=4096"])).model
    assert small.sliding_window is not None
    assert small.sliding_window < small.max_seq_len // 2
    assert small.rope_scaling.original_max_seq_len == small.max_seq_len // 2


SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "ffn_hidden_dim", "max_seq_len")
SHRUNK = {
    "llama3_8b": (128, 2, 8, 2, 16, 260, 448, 256),
    "llama_125m": (64, 2, 4, 4, 16, 260, 168, 256),
    "llama_1b": (128, 2, 8, 2, 16, 260, 512, 256),
    "qwen3_0_6b": (32, 2, 4, 2, 16, 260, 96, 256),
    "debug_moe": (64, 3, 4, 2, 16, 260, 176, 256),
    "moe_small": (64, 2, 4, 2, 16, 260, 176, 256),
    "vlm_8b_cross_attention": (128, 5, 8, 2, 16, 260, 448, 256),
}


@pytest.mark.parametrize("preset", SHRUNK)
def test_large_sizes_shrink_to_these(preset: str) -> None:
    small = shrink(load_config(preset))
    assert tuple(getattr(small.model, size) for size in SIZES) == SHRUNK[preset]


def test_large_experts_windows_images_and_batches_shrink_to_these() -> None:
    experts = ["--model.num_experts=64", "--model.moe_top_k=6", "--model.sliding_window=100", "--train.batch_size=99"]
    small = shrink(load_config("debug_moe", experts))
    assert (small.model.num_experts, small.model.moe_top_k, small.model.sliding_window) == (8, 4, 12)
    assert (small.train.batch_size, small.train.seq_len) == (8, 64)
    images = ["--video.max_frames=9", "--video.min_frames=5", "--vlm.max_text_len=500"]
    images += ["--video.frame_size=32", "--adapter.type=attentional_pool"]
    images += ["--model.max_seq_len=9000", "--train.seq_len=500"]
    small = shrink(load_config("debug_vlm_joint_decoder", images))
    assert small.vision_encoder is not None
    assert small.adapter is not None
    assert small.video is not None
    assert small.vlm is not None
    encoder = small.vision_encoder
    assert (encoder.image_size, encoder.patch_size, encoder.feature_dim, encoder.n_layers) == (32, 8, 48, 2)
    assert (small.adapter.pool_window, small.adapter.pool_heads) == (2, 2)
    assert (small.video.max_frames, small.video.min_frames, small.vlm.max_text_len) == (2, 2, 64)
    assert (
        shrink(load_config("debug_vlm_moma", ["--vlm.moma_experts_per_modality.image=9"])).vlm
        == shrink(load_config("debug_vlm_moma", ["--vlm.moma_experts_per_modality.image=8"])).vlm
    )


def test_what_is_small_stays() -> None:
    overrides = [
        "--model.dim=16", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.n_layers=2",
        "--model.ffn_hidden_dim=24",
        "--model.max_seq_len=20", "--model.sliding_window=3", "--model.num_experts=3", "--model.moe_top_k=1",
        "--model.vocab_size=258", "--train.batch_size=2", "--train.seq_len=20",
    ]  # fmt: skip
    config = load_config("debug_moe", overrides)
    small = shrink(config)
    assert small.model == config.model
    assert small.train == config.train


def test_validation_weights_hide_nothing() -> None:
    config = load_config("debug_moe", ["--model.attention_bias", "true", "--model.norm_type", "layernorm"])
    table = parameter_table(config.model)
    weights = validation_weights(table, seed=3)
    assert {name: value.shape for name, value in weights.items()} == {name: spec.shape for name, spec in table.items()}
    assert all(value.dtype == np.float32 for value in weights.values())
    assert all(np.all(value != 0) for name, value in weights.items() if name.endswith("bias"))
    norm = weights["layers.0.attention_norm.weight"]
    assert norm.min() >= 0.5
    assert norm.max() <= 1.5
    assert norm.std() > 0.2
    down = weights["layers.1.mlp.down_w"]  # (experts, in, out)
    assert abs(float(down.std()) * down.shape[1] ** 0.5 - 1) < 0.05
    again = validation_weights(table, seed=3)
    assert all(np.array_equal(again[name], weights[name]) for name in weights)
    other = validation_weights(table, seed=4)
    assert not np.array_equal(other["norm.weight"], weights["norm.weight"])


def test_labels_are_the_next_tokens_but_for_ignored_ones() -> None:
    tokens = validation_tokens(11, 2, 6, seed=0)
    labels = validation_labels(tokens)
    assert tokens.dtype == labels.dtype == np.int32
    assert np.array_equal(labels[0], [*tokens[0, 1:], -100])
    assert np.array_equal(labels[1], [-100, -100, *tokens[1, 3:], -100])


@pytest.mark.parametrize("length", [1, 2, 24])
def test_every_chunking_covers_the_sequence(length: int) -> None:
    ways = list(chunkings(length, seed=1).values())
    assert all(sum(chunks) == length and min(chunks) > 0 for chunks in ways)
    assert len({size for chunks in ways for size in chunks}) <= 4
    assert {type(size) for chunks in ways for size in chunks} == {int}  # shapes of any library


def _kinds(config: JobConfig) -> set[str]:
    """Names of parameters without numbers: the kinds of modules that a model has."""
    return {"".join(c for c in name if not c.isdigit()) for name in parameter_table(config.model, config.vlm)}
