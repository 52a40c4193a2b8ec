"""Recording activations: what stores see of eager and compiled calls, and extraction, which is that of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from kempnerforge_jax.model.hooks import ActivationStore, capture, extract_representations, replacing, save_activations
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.state import get_state, merge, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_torch.model import hooks as torch_hooks
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.model.transformer import Transformer as TorchTransformer
from shared_config.interchange.activations import read_activations
from shared_config.schema.model import ModelConfig

CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=19, ffn_hidden_dim=24, max_seq_len=16)
NAMES = ["layers.1.attention", "layers.0", "norm"]
TOKENS = jnp.arange(12).reshape(2, 6)


def new_model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def test_a_store_records_while_it_is_enabled() -> None:
    model = new_model()
    store, other = ActivationStore(model, NAMES), ActivationStore(model, ["norm"])
    model(TOKENS)
    assert not store.enabled
    assert store.activations == {}
    store.enable()
    store.enable()
    other.enable()
    with capture(model, NAMES) as expected:
        model(TOKENS)
    assert list(store.activations) == ["layers.0", "layers.1.attention", "norm"], "in the order of calls"
    for name in NAMES:
        assert isinstance(store.get(name), np.ndarray)
        np.testing.assert_array_equal(store.get(name), expected[name])
    store.disable()
    model(TOKENS[:1])
    assert store.get("norm").shape == (2, 6, 16)
    assert other.get("norm").shape == (1, 6, 16), "stores don't depend on each other"
    other.disable()
    store.clear()
    assert store.get("norm") is None
    assert list(other.activations) == ["norm"]


def test_an_output_can_be_replaced_for_what_follows() -> None:
    """Also inside jit, where a scan over the layers gives way."""
    model = new_model()
    graphdef, params, buffers = split(model)
    given = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)), jnp.bfloat16)

    @jax.jit
    def run(params: Any, outputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        merged = merge(graphdef, params, buffers)
        with capture(merged) as activations, replacing(merged, outputs):
            logits = merged.run(TOKENS, scan_layers=True).logits
        return logits, dict(activations)

    logits, expected = run(params, {})
    outputs = {"layers.0": given, "norm": expected["norm"]}
    replaced, found = run(params, outputs)
    np.testing.assert_array_equal(found["layers.0"], expected["layers.0"], "what it put out itself")
    wanted = model.layers["1"].attention_norm(given.astype(jnp.float32))
    np.testing.assert_allclose(found["layers.1.attention_norm"], wanted, atol=1e-6)
    assert not np.allclose(found["norm"], expected["norm"], atol=1e-3)
    np.testing.assert_array_equal(replaced, logits)
    gradients = jax.grad(lambda params: run(params, outputs)[0].sum())(params)
    assert not gradients["layers.1.mlp.up_proj.weight"].any(), "no gradient flows through"
    with pytest.raises(ValueError, match=r"did you mean 'layers\.0'"), replacing(model, {"layer.0": given}):
        pass
    message = r"layers\.0: puts out \(2, 6, 16\); its replacement is \(2, 5, 16\)"
    with pytest.raises(ValueError, match=message), replacing(model, {"layers.0": given[:, :5]}):
        model(TOKENS)


def test_a_call_inside_jit_is_refused_and_another_model_is_not_seen() -> None:
    model = new_model()
    store = ActivationStore(model, ["norm"])
    store.enable()
    try:
        with pytest.raises(ValueError, match="norm was called inside jit"):
            jax.jit(lambda tokens: model.run(tokens).logits)(TOKENS)
        new_model()(TOKENS)
        assert store.activations == {}
    finally:
        store.disable()


def test_unknown_names_are_refused_with_what_exists() -> None:
    message = "name = 'layer.0': no such module; did you mean 'layers.0'"
    with pytest.raises(ValueError, match=message):
        ActivationStore(new_model(), ["layer.0"])
    with pytest.raises(ValueError, match=message):
        extract_representations(new_model(), [[1]], ["layer.0"])
    with pytest.raises(ValueError, match=r"Modules: layers\.0"):
        ActivationStore(new_model(), ["layers.0"]).get("norm")


def test_dicts_are_recorded_by_modality() -> None:
    class Split(Module):
        def forward(self, x: jax.Array) -> dict[str, jax.Array]:
            return {"image": 2 * x, "text": 3 * x}

    class Outer(Module):
        def __init__(self) -> None:
            self.inner = Split()

        def forward(self, x: jax.Array) -> jax.Array:
            return self.inner(x)["text"]

    model = Outer()
    store = ActivationStore(model)
    store.enable()
    model(jnp.ones(2))
    store.disable()
    assert {name: value.tolist() for name, value in store.get("inner").items()} == {"image": [2, 2], "text": [3, 3]}


def test_extraction_is_that_of_torch(tmp_path: Path) -> None:
    model, twin = new_model(), TorchTransformer(CONFIG)
    set_state(twin, {name: np.asarray(value) for name, value in get_state(model).items()})
    samples = list(np.random.default_rng(0).integers(0, 19, (7, 6)))
    names = [*NAMES, "output_head"]
    found = extract_representations(model, samples, names, jax.devices()[0], batch_size=3, max_samples=5)
    expected = torch_hooks.extract_representations(twin, samples, names, batch_size=2, max_samples=5)
    assert found is not None
    assert expected is not None
    assert set(found) == set(expected) == set(names)
    for name in names:
        assert isinstance(found[name], jax.Array)
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    assert extract_representations(model, samples[:5], names, batch_size=3, path=tmp_path / "all.npz") is None
    for name, array in read_activations(tmp_path / "all.npz").items():
        np.testing.assert_array_equal(array, found[name])


def test_saved_activations_are_those_of_torch(tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3)
    save_activations({"a": jnp.asarray(values, jnp.bfloat16), "b": {"text": jnp.ones(2)}}, tmp_path / "jax.npz")
    torch_hooks.save_activations(
        {"a": torch.from_numpy(values).bfloat16(), "b": {"text": torch.ones(2)}}, tmp_path / "torch.npz"
    )
    assert (tmp_path / "jax.npz").read_bytes()[:2] == b"PK"
    first, second = (read_activations(tmp_path / name) for name in ("jax.npz", "torch.npz"))
    assert first["a"].dtype == second["a"].dtype == ml_dtypes.bfloat16
    assert list(first) == list(second) == ["a", "b/text"]
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
