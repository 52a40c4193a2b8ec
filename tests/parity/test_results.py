"""Each level gives one struct from `run`, whatever it is called with, which keeps nothing; documented calls give what
is documented, and keep what the getters show.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax.core import Tracer
from torch.utils._pytree import tree_leaves

from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import MoMaConfig, MoTConfig
from tests.parity.backends import on_both

CONFIG = ModelConfig(
    dim=8, n_layers=1, n_heads=2, vocab_size=11, max_seq_len=16, ffn_hidden_dim=16, num_experts=3, moe_top_k=2,
    moe_router="sigmoid_topk", moe_sequence_aux_loss_weight=0.5, moe_capacity_factor=1.0,
)  # fmt: skip
VLM = {"text": None, "mot": MoTConfig(max_text_len=8), "moma": MoMaConfig(max_text_len=8, moma_gumbel_noise=False)}
TOKENS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
REAL = np.array([[True, True, True, False], [True, True, False, False]])
on_all = pytest.mark.parametrize("arch", VLM)


def model_of(backend: Any, arch: str) -> Any:
    """A transformer, or the wrapper around one, with experts in its one layer."""
    if VLM[arch] is None:
        return backend.build(backend.module("model.transformer").Transformer, CONFIG, dtype="float32")
    config = CONFIG.replace(num_experts=0, moe_sequence_aux_loss_weight=0.0) if arch == "moma" else CONFIG
    builder = backend.module("model.vlm").build_vlm_wrapper
    tower = VisionEncoderConfig(num_tokens=2, feature_dim=4)
    return backend.build(builder, config, tower, AdapterConfig(type="linear"), VLM[arch], dtype="float32")


def inputs_of(backend: Any, arch: str) -> tuple[Any, ...]:
    images = () if arch == "text" else (backend.array(PIXELS, "float32"),)
    return (*images, backend.array(TOKENS))


def transformer_of(backend: Any, model: Any) -> Any:
    return backend.module("model.vlm").inner_transformer(model)


def mixtures_of(layer: Any, arch: str) -> dict[str, Any]:
    """The mixtures of experts of a layer by modality, "" for the only one."""
    mixtures = {"text": lambda: {"": layer.mlp}, "mot": lambda: layer.mlp, "moma": lambda: layer.mlp.experts}[arch]()
    return dict(mixtures.items())


def held(model: Any) -> list[str]:
    """What modules hold besides their state: tensors with a graph in torch; in JAX arrays, tracers, kept values."""
    if isinstance(model, torch.nn.Module):
        return [
            f"{path or 'model'}.{name}"
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if name not in ("_parameters", "_modules")
            and any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(value))
        ]
    modules = importlib.import_module("kempnerforge_jax.model.module")
    loose = [
        f"{path or 'model'}.{name}"
        for path, module in modules.named_modules(model)
        for name, value in vars(module).items()
        if not isinstance(value, (nnx.Variable, nnx.Module))
        and any(isinstance(leaf, (jax.Array, Tracer)) for leaf in jax.tree.leaves(value))
    ]
    kept = [
        f"{path or 'model'}.{name}"
        for path, module in modules.named_modules(model)
        for name in modules._kept.get(module, {})
    ]
    return loose + kept


def stats_of(output: Any, arch: str) -> dict[str, Any]:
    (stats,) = output.stats.values()
    return {"": stats} if arch == "text" else stats


@on_both
@on_all
def test_run_keeps_nothing_and_a_documented_call_what_getters_show(backend: Any, arch: str) -> None:
    model, inputs = model_of(backend, arch), inputs_of(backend, arch)
    transformer = transformer_of(backend, model)
    output = model.run(*inputs)
    assert type(output) is backend.module("model.stats").TransformerOutput
    assert held(model) == []
    assert (transformer.get_moe_aux_loss(), transformer.get_expert_counts()) == (0, {})
    assert backend.numpy(transformer.get_moe_aux_loss()).dtype == np.float32

    given = model(*inputs)
    logits = given if arch == "text" else given[0]
    np.testing.assert_array_equal(backend.numpy(logits), backend.numpy(output.logits))
    assert held(model) or arch == "moma", "its experts have no losses, so no graph"
    mixtures, stats = mixtures_of(transformer.layers["0"], arch), stats_of(output, arch)
    assert mixtures.keys() == stats.keys()
    for name, mixture in mixtures.items():
        for holder in (mixture, mixture.router)[: 1 if arch == "moma" else 2]:
            for getter in ("aux_loss", "z_loss", "expert_counts"):
                found, truth = (backend.numpy(getattr(each, getter)) for each in (holder, stats[name]))
                np.testing.assert_array_equal(found, truth, f"{name} {getter}")
    total = sum(float(backend.numpy(each.aux_loss)) for each in stats.values())
    assert float(backend.numpy(transformer.get_moe_aux_loss())) == pytest.approx(total, rel=1e-6)
    assert (total > 0) == (arch != "moma")

    before = {name: backend.numpy(mixture.expert_counts) for name, mixture in mixtures.items()}
    model.run(*(array[:1] for array in inputs))
    for name, mixture in mixtures.items():
        np.testing.assert_array_equal(backend.numpy(mixture.expert_counts), before[name])


@on_both
def test_evaluation_never_counts(backend: Any) -> None:
    model, tokens = model_of(backend, "text"), backend.array(TOKENS)
    router = model.layers["0"].mlp.router
    model.eval()
    model(tokens)
    model.train()
    model.run(tokens)
    bias = _values(backend, router.expert_bias)
    model.update_moe_bias()
    np.testing.assert_array_equal(_values(backend, router.expert_bias), bias)
    model(tokens)
    counts = model.get_expert_counts()
    model.eval()
    model(tokens[:1])
    model.update_moe_bias()
    moved = _values(backend, router.expert_bias)
    assert (moved != bias).any()
    other = model_of(backend, "text")
    other.update_moe_bias(counts)
    np.testing.assert_array_equal(moved, _values(backend, other.layers["0"].mlp.router.expert_bias))


def _values(backend: Any, buffer: Any) -> np.ndarray:
    return np.array(backend.numpy(buffer if isinstance(buffer, torch.Tensor) else buffer.get_value()))


@on_both
def test_every_level_gives_one_type(backend: Any) -> None:
    """Routers, mixtures and blocks of each architecture, with the arguments that might change what comes back."""
    given = list(levels(backend))
    for name, module, arguments, options, kind in given:
        for extra in ({}, *options):
            found = module.run(*arguments, **extra)
            assert type(found) is getattr(backend.module("model.stats"), kind), (name, sorted(extra))
            if kind == "BlockOutput":
                assert written(backend, found.kv_cache) == ([4, 4] if "kv_cache" in extra else None), name
    modules = {id(module): module for _, module, *_ in given}
    assert [place for module in modules.values() for place in held(module)] == []


@on_both
def test_run_gives_the_caches_that_were_written_to(backend: Any) -> None:
    model, kind = model_of(backend, "text"), backend.module("model.kv_cache").KVCache
    dtype = backend.array(PIXELS, "float32").dtype
    caches = [kind(2, 8, CONFIG.kv_heads, CONFIG.head_size, dtype) for _ in range(CONFIG.n_layers)]
    output = model.run(backend.array(TOKENS), kv_caches=tuple(caches))
    assert [written(backend, cache) for cache in output.kv_caches or ()] == [[TOKENS.shape[1]] * 2] * CONFIG.n_layers
    assert model.run(backend.array(TOKENS)).kv_caches is None


def written(backend: Any, cache: Any) -> list[int] | None:
    """The lengths of the rows of a cache; None without one."""
    return None if cache is None else backend.numpy(cache.lengths).tolist()


def levels(backend: Any) -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[dict[str, Any], ...], str]]:
    """A name, a module, its arguments, further ones to be given, and the type of what `run` gives."""
    x = backend.array(np.random.default_rng(1).standard_normal((2, 4, CONFIG.dim)), "float32")
    real, ids = backend.array(REAL), backend.array(np.array([[0, 0, 1, 1]] * 2))
    rope = backend.module("model.position").precompute_rope_frequencies(CONFIG.head_size, 4)
    layers = {arch: transformer_of(backend, model_of(backend, arch)).layers["0"] for arch in VLM}
    cache = backend.module("model.kv_cache").KVCache(2, 8, 2, CONFIG.head_size, x.dtype)
    block, mixture, by_modality = layers["text"], layers["text"].mlp, layers["moma"].mlp
    flat = x.reshape(8, CONFIG.dim)
    yield "router", mixture.router, (flat,), ({"valid": real.reshape(8)}, {"batch_size": 2}), "RouterOutput"
    yield "mixture", mixture, (x,), ({"valid": real}, {"members": real}, {"limit_capacity": False}), "MoEOutput"
    yield "block", block, (x, *rope), ({"kv_cache": cache}, {"key_padding_mask": real}), "BlockOutput"
    dense = type(block)(CONFIG.replace(num_experts=0), 0, **({} if backend.name == "torch" else {"rngs": None}))
    yield "dense block", dense, (x, *rope), ({"limit_capacity": False},), "BlockOutput"
    streams = {"image": x[:, :2], "text": x[:, 2:]}
    half = (rope[0][:2], rope[1][:2])
    yield "mot", layers["mot"], (streams, dict.fromkeys(streams, half)), ({"key_padding_mask": real},), "BlockOutput"
    router = by_modality.experts["text"].router
    yield "choosing router", router, (flat,), ({"valid": real.reshape(8)},), "ExpertChoiceOutput"
    yield "choosing experts", by_modality.experts["text"], (x,), ({"valid": real},), "MoEOutput"
    yield "moma", by_modality, (x, ids), ({"key_padding_mask": real},), "MoMaOutput"
    yield "moma block", layers["moma"], (x, *rope, ids), ({"key_padding_mask": real},), "BlockOutput"
