"""Checks that the bugs of `tests.mutants_decoding` must not pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import wrapper_table
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    JointDecoderConfig,
    ModelConfig,
    VisionEncoderConfig,
    VLMConfig,
)
from tests.oracle.attention import attention as oracle_attention
from tests.oracle.position import rope_at
from tests.oracle.transformer import transformer
from tests.outcomes import refused
from tests.parity.vlm_checks import Side, weights_of

WINDOW, DIM = 3, 12
MODEL = ModelConfig(
    dim=DIM, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=37, ffn_hidden_dim=10, max_seq_len=16
)  # fmt: skip
TIGHT = MODEL.replace(num_experts=3, moe_top_k=2, moe_capacity_factor=0.3)
VISION = VisionEncoderConfig(type="random", feature_dim=6, num_tokens=2, image_size=2)
ADAPTER, FRAMES = AdapterConfig(type="linear"), 2
NEW = 3
PIXELS = np.random.default_rng(8).uniform(-1, 1, (2, FRAMES, 3, 2, 2))
SHOWN = np.array([[True, False], [True, True]])


def check_rings(backend: str) -> None:
    """A ring of three slots: chunks that fit it and that don't, ragged rows, rows that trade places, padding."""
    side, rng = Side(backend), np.random.default_rng(7)
    source = side.module("model.attention")
    options = {"sliding_window": WINDOW, "bias": True}
    attention = side.built(source.Attention, DIM, 2, 1, 4, drawn=True, **options)
    weights = {name: side.numpy(value) for name, value in side.module("model.state").get_state(attention).items()}
    tables = rope_at(np.arange(32), 4, 10000.0)
    ring = {"sliding_window": WINDOW} | ({"static": True} if backend == "torch" else {})
    cache = source.KVCache(2, 32, 1, 4, side.array(PIXELS).dtype, **ring)
    seen: list[list[tuple[np.ndarray, bool]]] = [[], []]
    for step, size in enumerate((1, 5, 1, 2, 1, 1)):
        x, real = rng.standard_normal((2, size, DIM)), rng.random((2, size)) < 0.6
        for row in range(2):
            seen[row] += zip(x[row], real[row], strict=True)
        places_BS = np.array([len(row) - size + np.arange(size) for row in seen])
        rope = [side.array(table[places_BS][:, None]) for table in tables]
        out = attention(side.array(x), *rope, kv_cache=cache, key_padding_mask=side.array(real))
        out, cache = (out, cache) if backend == "torch" else out
        for row in range(2):
            whole, valid = (np.array(column)[None] for column in zip(*seen[row], strict=True))
            masks: dict[str, Any] = {"key_padding_mask": valid, "sliding_window": WINDOW}
            truth, _ = oracle_attention(whole, weights, tables, n_heads=2, n_kv_heads=1, **masks)
            side.same(out[row], truth[0, -size:], f"row {row} of step {step}")
        if step in (0, 3):
            lengths = np.array([len(seen[0]) - 1, len(seen[1])])
            cache = cache.truncate(side.array(lengths)) or cache
            seen = [row[:length] for row, length in zip(seen, lengths, strict=True)]
        if step in (2, 3):
            cache, seen = cache.reorder(side.array(np.array([1, 0]))) or cache, seen[::-1]
    with refused("has been overwritten"):
        cache.truncate(side.array(np.array([2, 99])))
    with refused("must be at most the cache's"):
        cache.mask(1, sliding_window=WINDOW + 1)


def check_images(backend: str) -> None:
    """Ragged prompts after clips with a frame that doesn't exist: the tokens are the most probable by full forwards."""
    cross = CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1)
    check_continuation(Side(backend), JointDecoderConfig(max_text_len=8), [[3, 1, 4], [7]])
    check_continuation(Side(backend), cross, [[9], [7]])
    check_continuation(Side(backend), JointDecoderConfig(max_text_len=8), [[3, 1, 4], [7]], [[2], [0, 0]])


def check_prefixes(backend: str) -> None:
    """Images and prompts with attention in both directions, whatever the window of causal attention."""
    vlm, windowed = JointDecoderConfig(max_text_len=8, prefix_lm=True), MODEL.replace(sliding_window=WINDOW)
    check_continuation(Side(backend), vlm, [[3, 1, 4], [7]], config=windowed)


def check_continuation(
    side: Side,
    vlm: VLMConfig,
    prompts: list[list[int]],
    positions: list[list[int]] | None = None,
    config: ModelConfig = MODEL,
) -> None:
    table = wrapper_table(config, vlm, ADAPTER, None, VISION.feature_dim)
    builder = side.module("model.vlm").build_vlm_wrapper
    model = side.filled(table, builder, config, VISION, ADAPTER, vlm, FRAMES)
    lengths = {"prompt_lengths": side.array(np.array([len(prompt) for prompt in prompts]))} if vlm.has_prefix else {}
    stream = side.module("model.generate").stream
    with contextlib.nullcontext() if side.name == "torch" else jax.disable_jit(), torch.no_grad():
        shown = SHOWN if positions is None else np.arange(FRAMES) < np.array([[len(row)] for row in positions])
        pixels = np.where(shown[..., None, None, None], PIXELS, np.nan)
        images = {"frame_mask": shown} if positions is None else {"image_positions": positions}
        options: dict[str, Any] = {"temperature": 0.0, "pixel_values": pixels, **images}
        new = np.stack(list(stream(model, prompts, NEW, **options)), axis=1)
        text = np.zeros((2, 6), np.int64)
        for row, prompt in enumerate(prompts):
            text[row, : len(prompt) + NEW] = [*prompt, *new[row]]
        ends = [token for token in range(MODEL.vocab_size) if token not in new][:1] + new[:, 0].tolist()
        ended = np.stack(list(stream(model, prompts, NEW, eos_token_id=ends, **options)), axis=1)
        np.testing.assert_array_equal(ended, new[:, :1], f"{vlm.arch}: rows end with any of {ends}")
        behind = [[*row, *[text.shape[1]] * (FRAMES - len(row))] for row in positions or []]
        places = {} if positions is None else {"image_positions": side.array(np.array(behind))}
        given = side.array(pixels), side.array(text), side.array(shown)
        likeliest = side.numpy(model.run(*given, **places, **lengths).logits).argmax(-1)
        for row, prompt in enumerate(prompts):
            expected = likeliest[row, len(prompt) - 1 :][:NEW]
            assert new[row].tolist() == expected.tolist(), f"{vlm.arch}: row {row}"


def check_capacity(backend: str) -> None:
    """Experts have a capacity in a forward, and none if the call says so, or has caches."""
    side, tokens = Side(backend), np.random.default_rng(5).integers(0, 37, (2, 12))
    table = parameter_table(TIGHT)
    weights = weights_of(table)
    run = side.compiled(side.filled(table, side.module("model.transformer").Transformer, TIGHT))
    side.same(run(side.array(tokens)).logits, transformer(weights, TIGHT, tokens).logits, "limited")
    free = transformer(weights, TIGHT.replace(moe_capacity_factor=0.0), tokens).logits
    side.same(run(side.array(tokens), limit_capacity=False).logits, free, "unlimited")
    caches: Any = [
        side.module("model.attention").KVCache(2, 16, 1, 4, side.array(PIXELS).dtype) for _ in range(TIGHT.n_layers)
    ]
    for part in (slice(0, 7), slice(7, 12)):
        out = run(side.array(tokens[:, part]), kv_caches=caches)
        side.same(out.logits, free[:, part], "cached")
        caches = caches if backend == "torch" else out.kv_caches


DECODING_CHECKS: Mapping[str, tuple[Callable[[str], None], ...]] = {
    "model.kv_cache": (check_rings,),
    "model.decode_state": (check_rings,),
    "model.slots": (check_rings,),
    "model.decode": (check_images, check_prefixes),
    "model.request": (check_images, check_prefixes),
    "model.cross_attention": (check_images,),
    "model.transformer": (check_capacity,),
    "model.block": (check_capacity,),
    "model.architecture": (check_capacity,),
}
