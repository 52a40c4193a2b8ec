"""Layers, blocks and experts of two digits: their order is that of the numbers, whatever holds them and however a model
was taken apart and merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shared_config.contract.parameters import parameter_table
from shared_config.contract.warm_start import warm_start_state
from shared_config.interchange.huggingface import from_huggingface, name_map, to_huggingface
from shared_config.parity.compare import compare_traces
from shared_config.parity.selection import Selection
from shared_config.parity.traces import Trace, TraceMeta, read_trace, write_trace
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.transformer import transformer
from tests.oracle.vlm import cross_attention_decoder, moma_decoder, mot_decoder
from tests.oracle.weights import draw
from tests.parity.backends import BACKENDS, Torch, on_both
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


DEEP = ModelConfig(dim=8, n_layers=12, n_heads=2, vocab_size=13, ffn_hidden_dim=6, max_seq_len=16)
ARCHITECTURES: dict[str, VLMConfig] = {
    "cross_attention": CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1),
    "mot": MoTConfig(max_text_len=8),
    "moma": MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 1, "text": 11}, moma_gumbel_noise=False),
}
IMAGE = np.random.default_rng(1).standard_normal((2, 11, DEEP.dim))
IDS = np.random.default_rng(2).integers(0, 2, (2, 11))


def numbers(names: Iterable[str]) -> list[tuple[int, ...]]:
    """The numbers in the names of layers and of what they hold."""
    return [tuple(map(int, re.findall(r"(?<=\.)\d+", name))) for name in names if name.startswith("layers.")]


def in_order(names: Iterable[str]) -> bool:
    """Whether layers come by number, and within each its experts."""
    found = numbers(names)
    layers, experts = [n[0] for n in found], [n for n in found if len(n) == 2]
    return len(layers) > 12 and layers == sorted(layers) and experts == sorted(experts)


def deep_model(backend: Torch, arch: str) -> tuple[Any, dict[str, np.ndarray]]:
    vlm = ARCHITECTURES[arch]
    weights = draw({name: spec.shape for name, spec in parameter_table(DEEP, vlm).items()}, 3)
    return backend.model(DEEP, weights, vlm_config=vlm), weights


def oracle_logits(arch: str, weights: dict[str, np.ndarray]) -> np.ndarray:
    vlm: Any = ARCHITECTURES[arch]
    if arch == "cross_attention":
        return cross_attention_decoder(weights, DEEP, vlm, TOKENS, IMAGE).logits
    return {"mot": mot_decoder, "moma": moma_decoder}[arch](weights, DEEP, vlm, IMAGE, IDS).logits


@on_both
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_deep_architectures(backend: Torch, arch: str) -> None:
    """Logits, and the order of state, activations and counts; in JAX also of stacked layers, eagerly: most operations
    of a deep model have been compiled for the layer before.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        model, weights = deep_model(backend, arch)
        truth, table = oracle_logits(arch, weights), list(parameter_table(DEEP, ARCHITECTURES[arch]))
        assert in_order(table)
        context = backend.module("model.modality").ModalityContext
        if arch == "cross_attention":
            inside, tokens = context(image_features=backend.array(IMAGE)), (backend.array(TOKENS),)
        else:
            inside, tokens = context(inputs_embeds=backend.array(IMAGE), modality_ids=backend.array(IDS)), ()
        hooks, state = backend.module("model.hooks"), backend.module("model.state")
        models = {"as it was built": model}
        if backend.name == "jax":
            models["merged"] = state.merge(*state.split(model))
            models["stacked"] = state.merge(*state.split(model, scan_layers=True))
        for name, other in models.items():
            state.set_state(other, dict(reversed(weights.items())))
            output = other.run(*tokens, modality=inside)
            assert_same_function(backend.numpy(output.logits), truth, "logits", context=name)
            own = state.get_state(other)
            assert in_order(own), name
            for key, value in own.items():
                np.testing.assert_array_equal(backend.numpy(value), weights[key], err_msg=f"{name}: {key}")
            assert list(output.stats) == sorted(output.stats), name
            if name != "stacked":
                assert in_order(hooks.activation_names(other)), name
                with hooks.capture(other, [f"layers.{layer}" for layer in (2, 10)]) as seen:
                    other.run(*tokens, modality=inside)
                assert list(seen) == ["layers.2", "layers.10"]


def test_names_of_two_digits_survive_interchange(tmp_path: Path) -> None:
    """Hugging Face names, layers that are selected, weights of text for a mixture, and the first tensor to diverge."""
    config = CONFIG.replace(moe_frequency=1)
    for packed in (False, True):
        own = config.replace(moe_packed_experts=packed)
        weights = draw({name: spec.shape for name, spec in parameter_table(own).items()}, 4)
        back = from_huggingface(to_huggingface(weights, own), own)
        assert set(back) == set(weights)
        for name, value in weights.items():
            np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert in_order(name_map(config))
    assert in_order(name.removeprefix("model.") for name in name_map(config).values())

    names = [f"forward/layers.{layer}.mlp" for layer in range(13)]
    for layer in (1, 10):
        assert [name for name in names if Selection(layers=(layer,)).wants(name)] == [f"forward/layers.{layer}.mlp"]

    text = {name: np.full(spec.shape, place) for place, (name, spec) in enumerate(parameter_table(DEEP).items())}
    started = warm_start_state(DEEP, MoTConfig(max_text_len=8), text)
    for layer in (1, 2, 10, 11):
        for modality in ("image", "text"):
            value = started[f"layers.{layer}.attn.q_proj.{modality}.weight"]
            np.testing.assert_array_equal(value, text[f"layers.{layer}.attention.q_proj.weight"])

    meta = TraceMeta(backend="torch", device="cpu", dtype="float64", seed=0, config="")
    whole = {name: np.full(3, 1.0 + place) for place, name in enumerate(names)}
    traces = []
    for wrong in ((), ("forward/layers.2.mlp", "forward/layers.10.mlp")):
        write_trace(tmp_path / "a.trace", Trace({n: v + (n in wrong) for n, v in whole.items()}, meta))
        traces.append(read_trace(tmp_path / "a.trace"))
    assert list(traces[0].tensors) == names
    first = compare_traces(*traces).first_forward
    assert first is not None
    assert first.name == "forward/layers.2.mlp"
