"""Checks of one backend beyond short sequences and small counts: every mask mode at 600 positions, sizes around the
edges of tiles and buckets, caches of 2^n + 1 tokens, tables as long as a preset's.

The truth is the oracle, or a formula written out here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import torch

from shared_config.contract.noise import gumbel_noise
from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import TowerConfig, tower_table
from shared_config.loader import load_config, preset_names
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig, RopeScaling
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.attention import attend as oracle_attend
from tests.oracle.generate import generate, kept_distribution, sample
from tests.oracle.position import rope_at
from tests.oracle.transformer import transformer
from tests.oracle.vision import vision_tower
from tests.oracle.vlm import cross_attention_decoder, joint_decoder, moma_decoder, mot_decoder
from tests.oracle.weights import draw
from tests.parity.backends import BACKENDS, Torch
from tests.parity.head_checks import HEAD_CHECKS
from tests.parity.runners import assert_same_runs, run_jax, run_oracle, run_torch
from tests.strategies import Inputs
from tests.tolerance import assert_same_function

LONG, WINDOW, SEED = 601, 130, 5
MODEL = ModelConfig(
    dim=12, head_dim=6, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=37, ffn_hidden_dim=10, max_seq_len=1024,
    rope_theta=500.0,
)  # fmt: skip
WINDOWED = MODEL.replace(sliding_window=WINDOW)
CROSS = CrossAttentionConfig(max_text_len=LONG, cross_attention_every_n_layers=1)
MOT = MoTConfig(max_text_len=LONG)
MOMA = MoMaConfig(max_text_len=LONG, moma_experts_per_modality={"image": 2, "text": 3})
TOWER = TowerConfig(
    image_size=75, patch_size=3, dim=6, n_layers=1, n_heads=2, ffn_hidden_dim=10, activation="quick_gelu",
    norm_eps=1e-2, class_token=True, pre_norm=True,
)  # fmt: skip


def backend_of(name: str) -> Torch:
    return next(backend for backend in BACKENDS if backend.name == name)


def checked_runs(name: str, config: ModelConfig, inputs: Inputs, jit: bool) -> None:
    """Every activation and gradient against the oracle."""
    weights = validation_weights(parameter_table(config), SEED)
    truth = run_oracle(config, weights, inputs)
    run = run_torch(config, weights, inputs) if name == "torch" else run_jax(config, weights, inputs, jit=jit)
    assert_same_runs(run, truth, f"{config}, {inputs}")


def drawn_inputs(config: ModelConfig, batch: int, length: int, seed: int = SEED, **masks: Any) -> Inputs:
    rng = np.random.default_rng(seed)
    tokens, labels = (rng.integers(0, config.vocab_size, (batch, length), dtype=np.int32) for _ in range(2))
    labels[:, ::5] = -100
    return Inputs(tokens, labels, **masks)


# 600 positions

SPANS = np.array([[20, 260, 300, 21], [601, 0, 0, 0]])
DOCUMENTS = np.stack([np.repeat(np.arange(4, dtype=np.int32), row) for row in SPANS])
"""One document that crosses position 256, one that goes on for 300, and one of everything."""
REAL = (np.arange(LONG) >= np.array([[290], [0]])) & (np.arange(LONG) < np.array([[LONG], [570]]))
IDS = np.random.default_rng(3).integers(0, 2, (1, LONG), dtype=np.int32)

MASKS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "causal": (MODEL, {}),
    "window": (WINDOWED, {}),
    "documents": (MODEL, {"doc_ids": DOCUMENTS}),
    "padding": (MODEL, {"key_padding_mask": REAL}),
    "documents, padding and a window": (WINDOWED, {"doc_ids": DOCUMENTS, "key_padding_mask": REAL}),
}


def check_long_text(name: str, mode: str | None = None, jit: bool = True) -> None:
    """Forward and gradients in every mode of self-attention."""
    for key, (config, masks) in MASKS.items():
        if mode is None or key == mode:
            checked_runs(name, config, drawn_inputs(config, 2, LONG, **masks), jit)


def long_model(backend: Torch, vlm: VLMConfig) -> tuple[Any, dict[str, np.ndarray]]:
    weights = draw({key: spec.shape for key, spec in parameter_table(MODEL, vlm).items()}, SEED)
    return backend.model(MODEL, weights, vlm_config=vlm), weights


def check_long_prefix(name: str) -> None:
    """An image of 300 tokens, some of them missing, before 301 of text."""
    backend, vlm, rng = backend_of(name), JointDecoderConfig(max_text_len=LONG), np.random.default_rng(1)
    model, weights = long_model(backend, vlm)
    tokens, image = rng.integers(0, 37, (2, 301)), rng.standard_normal((2, 300, MODEL.dim))
    real = np.concatenate([np.arange(300) >= np.array([[0], [257]]), np.ones((2, 301), bool)], axis=1)
    context = backend.module("model.modality").ModalityContext

    def run(tokens: Any, image: Any, real: Any) -> Any:
        inside = context(prefix_embeds=image, output_slice=slice(300, None), key_padding_mask=real)
        return model.run(tokens, modality=inside).logits

    truth = joint_decoder(weights, MODEL, tokens, image, real).logits
    assert_same_function(backend.run(run, tokens, image, real), truth, "prefix")


def check_long_cross_attention(name: str) -> None:
    """An image of 577 tokens, some of them missing, beside 601 of text."""
    backend, rng = backend_of(name), np.random.default_rng(2)
    model, weights = long_model(backend, CROSS)
    tokens, image = rng.integers(0, 37, (2, LONG)), rng.standard_normal((2, 577, MODEL.dim))
    mask = np.arange(577) < np.array([[577], [259]])
    context = backend.module("model.modality").ModalityContext
    for given in ((image, mask), (image,)):

        def run(tokens: Any, image: Any, mask: Any = None) -> Any:
            return model.run(tokens, modality=context(image_features=image, image_mask=mask)).logits

        truth = cross_attention_decoder(weights, MODEL, CROSS, tokens, *given).logits
        assert_same_function(backend.run(run, tokens, *given), truth, f"mask {len(given) == 2}")


def check_long_tower(name: str) -> None:
    """Attention of 625 patches and the class token to all others."""
    backend, pixels = backend_of(name), np.random.default_rng(4).standard_normal((1, 3, 75, 75))
    weights = draw({key: spec.shape for key, spec in tower_table(TOWER).items()}, SEED)
    tower = backend.build(backend.module("model.vision").VisionTower, TOWER)
    backend.module("model.state").set_state(tower, weights)
    assert_same_function(backend.run(tower, pixels), vision_tower(pixels, weights, TOWER), "tower")


def check_long_modalities(name: str) -> None:
    """Mixtures by modality over 601 positions in any order, with the noise of the choice."""
    backend, embeds = backend_of(name), np.random.default_rng(6).standard_normal((1, LONG, MODEL.dim))
    context = backend.module("model.modality").ModalityContext

    def run(embeds: Any, ids: Any, seed: Any) -> Any:
        inside = context(inputs_embeds=embeds, modality_ids=ids, noise_seed=seed)
        return model.run(modality=inside).logits

    model, weights = long_model(backend, MOT)
    truth = oracle_modalities("mot", weights, embeds)
    assert_same_function(backend.run(run, embeds, IDS, np.int32(4)), truth, "mot")
    model, weights = long_model(backend, MOMA)
    truth = oracle_modalities("moma", weights, embeds)
    assert_same_function(backend.run(run, embeds, IDS, np.int32(4)), truth, "moma")


def oracle_modalities(arch: str, weights: Mapping[str, np.ndarray], embeds: np.ndarray) -> np.ndarray:
    if arch == "mot":
        return mot_logits(tuple(weights), embeds.tobytes())
    noise = {
        key: gumbel_noise(4, 0, group, LONG, MOMA.moma_experts_per_modality[key])[np.equal(IDS, group).ravel()]
        for group, key in enumerate(MOMA.moma_modalities)
    }
    return moma_decoder(dict(weights), MODEL, MOMA, embeds, IDS, noise={0: noise}).logits


@functools.cache
def mot_logits(names: tuple[str, ...], embeds: bytes) -> np.ndarray:
    """Once for both backends: the oracle goes token by token."""
    weights = draw({key: spec.shape for key, spec in parameter_table(MODEL, MOT).items()}, SEED)
    assert names == tuple(weights)
    return mot_decoder(weights, MODEL, MOT, np.frombuffer(embeds).reshape(1, LONG, MODEL.dim), IDS).logits


def check_long_attention(name: str) -> None:
    """The function by itself, and its probabilities: causal, aligned to the end, and everyone sees everyone."""
    backend, rng = backend_of(name), np.random.default_rng(12)
    attention, full = backend.module("model.attention"), backend.module("model.mask").FULL
    whole, few = (rng.standard_normal((1, 2, length, 6)) for length in (LONG, 3))
    k, v = (rng.standard_normal((1, 1, LONG, 6)) for _ in range(2))
    place = np.arange(LONG)
    causal = (place[:, None] >= place[None, :])[None]

    def run(whole: Any, few: Any, k: Any, v: Any) -> Any:
        outs = [attention.attend(whole, k, v), attention.attend(few, k, v), attention.attend(whole, k, v, full)]
        return *outs, attention.attention_weights(whole, k), attention.attention_weights(few, k)

    found = backend.run(run, whole, few, k, v)
    truth, probabilities = oracle_attend(whole, k, v, causal)
    ends, last = oracle_attend(few, k, v, causal[:, -3:])
    everyone, _ = oracle_attend(whole, k, v, np.ones_like(causal))
    for out, expected in zip(found, (truth, ends, everyone, probabilities, last), strict=True):
        assert_same_function(out, expected, "attention")


# Edges of tiles and buckets


def around(*powers: int) -> list[int]:
    """2^n - 1, 2^n, 2^n + 1."""
    return [2**power + step for power in powers for step in (-1, 0, 1)]


def edge_cases() -> list[tuple[ModelConfig, int, int]]:
    """Models with batch and length; each size goes through its own edges while the others go through theirs."""
    lengths, vocabularies = around(7, 8, 9), around(10, 7, 12)
    dims, widths, experts = around(5, 7, 6), around(8, 5, 7), (0, 3, 0, 0, 0, 9, 0, 0, 17)
    cases = []
    for place, length in enumerate(lengths):
        fields: dict[str, Any] = {
            "dim": dims[place], "ffn_hidden_dim": widths[-1 - place], "vocab_size": vocabularies[place],
        }  # fmt: skip
        if experts[place]:
            fields |= {"num_experts": experts[place], "moe_top_k": 2, "moe_packed_experts": place == 5}
        cases.append((MODEL.replace(**fields), 1, length))
    many = (
        (MODEL.replace(n_heads=33, head_dim=2), 257, 3),
        (MODEL.replace(n_heads=1, head_dim=130), 129, 3),
        (MODEL.replace(num_experts=129, moe_top_k=11, moe_router="sigmoid_topk", moe_packed_experts=True), 127, 3),
    )
    return [*cases, *many]


EDGE_CASES = edge_cases()


def check_edges(name: str, place: int | None = None, jit: bool = True) -> None:
    """Forward, loss and gradients at sizes that divide nothing, and at those that divide exactly."""
    for config, batch, length in EDGE_CASES if place is None else [EDGE_CASES[place]]:
        checked_runs(name, config, drawn_inputs(config, batch, length), jit)


def check_sampling(name: str) -> None:
    """Draws from vocabularies above 1,024, of one row and of many."""
    backend, rng = backend_of(name), np.random.default_rng(9)
    source = backend.module("model.generate")
    for rows, size, top_k, top_p in ((1, 1025, 0, 0.999), (130, 2049, 1500, 0.97)):
        logits, uniforms = np.round(rng.standard_normal((rows, size)), 2), rng.random(rows)
        options: dict[str, Any] = {"temperature": 1.5, "top_k": top_k, "top_p": top_p}
        drawn = source.sample(backend.array(logits), uniforms=backend.array(uniforms), **options)
        clear = [not is_close(row, uniform, **options) for row, uniform in zip(logits, uniforms, strict=True)]
        truth = [sample(row, uniform, **options) for row, uniform in zip(logits, uniforms, strict=True)]
        assert np.mean(clear) > 0.9
        np.testing.assert_array_equal(np.asarray(drawn)[clear], np.array(truth)[clear])
        greedy = source.sample(backend.array(logits), temperature=0.0)
        np.testing.assert_array_equal(np.asarray(greedy), logits.argmax(axis=1))


def is_close(row: np.ndarray, uniform: float, **options: Any) -> bool:
    """Whether rounding decides which token is drawn or kept."""
    _, whole = kept_distribution(row, options["temperature"], options["top_k"])
    _, kept = kept_distribution(row, **options)
    return min(np.abs(np.cumsum(whole) - options["top_p"]).min(), np.abs(np.cumsum(kept) - uniform).min()) < 1e-9


# Tables and masks


def tables() -> Iterator[tuple[int, int, float, RopeScaling]]:
    """Head size, positions, theta and scaling of every preset, and of each scaling at 32,769 positions."""
    longest: dict[tuple[int, float, RopeScaling], int] = {}
    for preset in preset_names():
        model = load_config(preset).model
        key = model.head_size, model.rope_theta, model.rope_scaling
        longest[key] = max(longest.get(key, 0), model.max_seq_len)
    for (head_size, theta, scaling), length in longest.items():
        yield head_size, length, theta, scaling
    for kind in ("linear", "llama3", "yarn"):
        yield (
            10, 2**15 + 1, 1e4,
            RopeScaling(type=kind, factor=8.0, original_max_seq_len=None if kind == "linear" else 4096),
        )  # fmt: skip


def check_tables(name: str) -> None:
    """Rotary tables at every position that a model may have, in order, backwards, and row by row."""
    backend = backend_of(name)
    for head_dim, length, theta, scaling in tables():
        kind = backend.module("model.position").RotaryTables
        table = backend.build(kind, head_dim, length, theta, scaling)
        positions = np.arange(length)
        truth = rope_at(positions, head_dim, theta, scaling)
        few = np.unique(np.clip([*around(*range(1, 18)), length - 1], 0, length - 1))[None, ::-1].copy()
        dtype = backend.array(np.zeros(0)).dtype
        found = [backend.numpy(part) for part in table(backend.array(positions), dtype)]
        rows = [backend.numpy(part)[0, 0] for part in table(backend.array(few), dtype)]
        for part, row, expected in zip(found, rows, truth, strict=True):
            assert np.abs(part - expected).max() < 1e-9, (head_dim, length, theta, scaling)
            np.testing.assert_array_equal(row, part[few[0]])


def check_masks(name: str, length: int = 257) -> None:
    """The mask of a whole sequence, and of the last tokens of a cache, as a formula says."""
    backend, rng = backend_of(name), np.random.default_rng(7)
    attention = backend.module("model.attention")
    documents = np.cumsum(rng.random((2, length)) < 0.01, axis=1)
    real, place = rng.random((2, length)) < 0.9, np.arange(length)
    causal = place[None, :, None] >= place[None, None, :]
    near = place[None, :, None] - place[None, None, :] < WINDOW
    same = documents[:, :, None] == documents[:, None, :]

    def masks(documents: Any, real: Any) -> Any:
        whole = {"doc_ids": documents, "key_padding_mask": real}
        of = attention.self_attention_mask
        windowed = of(length, sliding_window=WINDOW, **whole), of(length, sliding_window=WINDOW)
        dense = backend.module("model.mask").dense_mask
        return tuple(dense(mask, length, length) for mask in (of(length, **whole), *windowed))

    allowed = (causal & same & real[:, None, :], causal & near & same & real[:, None, :], causal & near)
    for mask, truth in zip(backend.run(masks, documents, real), allowed, strict=True):
        np.testing.assert_array_equal(mask[:, 0], truth)
    ring = {"sliding_window": WINDOW, "spare": 140}
    for options in ({}, ring) if name == "jax" else ({}, ring, {"static": True}, {**ring, "static": True}):
        check_cache_masks(backend, attention.KVCache, length, options, rng)


def check_cache_masks(
    backend: Torch, kind: Any, length: int, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Rows of ``length`` and 130 fewer tokens in caches of ``length + 3`` slots: which keys 3 more tokens may see."""
    keys, new = rng.standard_normal((2, 1, length, 2)), rng.standard_normal((2, 1, 3, 2))
    lengths, window = np.array([length, length - 130]), options.get("sliding_window")

    def fill(keys: Any, new: Any, lengths: Any) -> Any:
        cache = kind(2, length + 3, 1, 2, keys.dtype, **options)
        for part in (keys[:, :, :100], keys[:, :, 100:]):
            cache = appended(cache, part)[0]
        cache = cache.truncate(lengths) or cache
        dense = backend.module("model.mask").dense_mask
        mask = dense(cache.mask(3, sliding_window=window), 3, cache.keys(3))
        return cache.positions(3), mask, appended(cache, new)[1]

    positions, mask, held = backend.run(fill, keys, new, lengths)
    np.testing.assert_array_equal(positions, lengths[:, None] + np.arange(3))
    for row, count in enumerate(lengths):
        whole = np.concatenate([keys[row, 0, :count], new[row, 0]])
        for query in range(3):
            last = count + query + 1
            expected = whole[max(0, last - window) if window else 0 : last]
            seen = held[row, 0][mask[row, 0, query]]
            assert sorted(map(tuple, seen)) == sorted(map(tuple, expected)), (options, row, query)


def appended(cache: Any, new: Any) -> tuple[Any, Any]:
    """The cache with ``new`` as keys and values, and all keys."""
    out = cache.update(new, new)
    return (cache, out[0]) if len(out) == 2 else out[:2]


# Caches


def check_generation(name: str) -> None:
    """Ragged prompts and 13 new tokens, in caches of 2^n + 1 tokens, across edges up to 256, in chunks and rings."""
    backend, rng = backend_of(name), np.random.default_rng(8)
    source = backend.module("model.generate")
    for config, longest, chunk in ((MODEL, 245, 64), (WINDOWED, 245, 100), (MODEL, 5, 512)):
        config = config.replace(vocab_size=1031, max_seq_len=512)
        prompts = [rng.integers(0, 1031, size).tolist() for size in (longest, max(1, longest - 117), 1)]
        weights = validation_weights(parameter_table(config), SEED)
        truth = generate(weights, config, prompts, 13)
        steps = source.stream(backend.model(config, weights), prompts, 13, temperature=0.0, prefill_chunk=chunk)
        np.testing.assert_array_equal(np.stack(list(steps), axis=1), truth)


def check_chunks(name: str) -> None:
    """Appended to a cache, 301 tokens in chunks of 150, 1 and 150 give the full forward, in every mode."""
    backend = backend_of(name)
    kind, context = backend.module("model.attention").KVCache, backend.module("model.modality").ModalityContext
    length, ends = 301, (0, 150, 151, 301)
    masks = {"doc_ids": DOCUMENTS[:, :length], "key_padding_mask": REAL[:, :length]}
    ring = {"sliding_window": WINDOW, "spare": 5}
    for config, given, options in ((MODEL, {}, {}), (WINDOWED, masks, {}), (WINDOWED, {}, ring)):
        weights = draw({key: spec.shape for key, spec in parameter_table(config).items()}, SEED)
        fed = {"embeds": np.random.default_rng(11).standard_normal((2, length, config.dim)), **given}
        truth = transformer(weights, config, inputs_embeds=fed["embeds"], **given).logits
        model = backend.model(config, weights)

        def step(fed: Any, caches: Any, model: Any = model) -> Any:
            inside = context(inputs_embeds=fed["embeds"], key_padding_mask=fed.get("key_padding_mask"))
            out = model.run(modality=inside, kv_caches=caches, doc_ids=fed.get("doc_ids"))
            return out.logits, getattr(out, "kv_caches", caches)

        run = step if name == "torch" else jax.jit(step)
        caches: Any = [kind(2, length, 1, 6, backend.array(fed["embeds"]).dtype, **options)]
        parts = []
        for start, stop in pairwise(ends):
            with torch.no_grad():
                part = {key: backend.array(value[:, start:stop]) for key, value in fed.items()}
                logits, caches = run(part, caches)
            parts.append(backend.numpy(logits))
        assert_same_function(np.concatenate(parts, axis=1), truth, f"{config.sliding_window}, {options}")


def edges(place: int) -> Callable[[str], None]:
    """`check_edges` of one case, which a mutant need not compile."""

    def check(name: str) -> None:
        check_edges(name, place)

    return check


def check_long_causal(name: str) -> None:
    check_long_text(name, "causal", jit=False)


LENGTH_CHECKS: Mapping[str, tuple[Callable[[str], None], ...]] = {
    "model.mask": (check_masks,),
    "model.attention": (check_long_attention, check_long_causal, check_masks),
    "model.position": (check_tables,),
    "model.decode_state": (check_masks, check_chunks),
    "model.decode": (check_generation,),
    "model.sampling": (check_sampling,),
    "model.cross_attention": (check_long_cross_attention,),
    "model.vision": (check_long_tower,),
    "model.mot": (check_long_modalities,),
    "model.moma": (check_long_modalities,),
    "model.transformer": (check_long_causal, check_long_prefix),
    "model.moe": (edges(5),),
    "model.dispatch": (edges(5),),
    "model.router": (edges(11),),
    "model.grouped": (edges(5),),
    "model.embedding": (edges(2),),
    "training.loss": (edges(2),),
    **HEAD_CHECKS,
}
"""What bugs that begin beyond some length or size must not pass, by the module that they are in."""
