"""Wrapped models, and states in all shapes that Flax gives them, do what the plain ones do."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kempnerforge_jax.model.generate import generate
from kempnerforge_jax.model.hooks import ActivationStore, activation_names, extract_representations
from kempnerforge_jax.model.init import init_weights
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.state import get_state, set_state
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.training.freeze import freeze_params, frozen_parameters
from shared_config.contract.parameters import parameter_table
from shared_config.errors import UserError
from shared_config.interchange.huggingface import load_huggingface, save_huggingface
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.schema.model import ModelConfig

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=2, vocab_size=32, max_seq_len=16, ffn_hidden_dim=16, num_experts=2, moe_frequency=2
)
TOKENS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
LAYERS = ["layers.0.attention.q_proj", "layers.1.mlp", "norm"]


class Holder(Module):
    def __init__(self, module: Any):
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def wrapped_inside(model: Any) -> Any:
    for path in ("layers.0.attention", "layers.1.mlp_norm", "norm"):
        *parents, name = path.split(".")
        owner = functools.reduce(
            lambda node, part: node[part] if part.isdigit() else getattr(node, part), parents, model
        )
        setattr(owner, name, Holder(getattr(owner, name)))
    return Holder(model)


WRAPS = {
    "nnx.jit": nnx.jit,
    "jax.jit": jax.jit,
    "remat": nnx.remat,
    "partial": lambda model: functools.partial(model, doc_ids=None),
    "module": Holder,
    "modules": wrapped_inside,
}


def plain_model(**changes: Any) -> Transformer:
    config = CONFIG.replace(**changes)
    model = Transformer(config, rngs=nnx.Rngs(0))
    init_weights(model, config, seed=3)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrap", sorted(WRAPS))
def test_wrapped_models_do_what_plain_ones_do(wrap, tied, tmp_path):
    plain = plain_model(tie_embeddings=tied)
    model = WRAPS[wrap](plain_model(tie_embeddings=tied))
    state = get_state(plain)
    assert list(get_state(model)) == list(state)
    assert all(np.array_equal(value, state[name]) for name, value in get_state(model).items())

    assert activation_names(model) == activation_names(plain)
    expected, found = (extract_representations(m, list(TOKENS), LAYERS) for m in (plain, model))
    assert expected is not None
    assert found is not None
    assert all(np.array_equal(found[name], expected[name]) for name in LAYERS)
    assert np.array_equal(generate(model, TOKENS, 3, seed=1), generate(plain, TOKENS, 3, seed=1))

    init_weights(model, plain.config, seed=4)
    name = "layers.0.attention.q_proj.weight"
    assert not np.array_equal(get_state(model)[name], state[name])
    set_state(model, state)
    assert all(np.array_equal(value, state[name]) for name, value in get_state(model).items())
    assert freeze_params(model, "layers.0.*") == freeze_params(plain, "layers.0.*") > 0
    assert frozen_parameters(model) == frozen_parameters(plain)

    save_weights(tmp_path, {f"module._orig_mod.{name}": array for name, array in get_state(model).items()})
    loaded = load_weights(tmp_path, parameter_table(plain.config))
    assert all(np.array_equal(array, state[name]) for name, array in loaded.items())


@pytest.mark.parametrize("wrap", ["module", "modules"])
def test_hooks_see_the_parts_of_a_wrapped_model(wrap):
    plain, model = plain_model(), WRAPS[wrap](plain_model())
    stores = [ActivationStore(plain, LAYERS), ActivationStore(model, LAYERS)]
    for store, which in zip(stores, (plain, model), strict=True):
        store.enable()
        which(TOKENS)
        store.disable()
    assert all(np.array_equal(stores[0].get(name), stores[1].get(name)) for name in LAYERS)


SHAPES = {
    "state": nnx.state,
    "parameters and buffers": lambda model: nnx.split(model)[1],
    "flat state": lambda model: dict(nnx.to_flat_state(nnx.state(model))),
    "nested dict": lambda model: nnx.to_pure_dict(nnx.split(model, lambda _, v: getattr(v, "saved", True), ...)[1]),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_states_are_taken_as_flax_gives_them(shape, dtype, tmp_path):
    model = plain_model().to(dtype)
    state = get_state(model)
    given = SHAPES[shape](model)
    save_weights(tmp_path, given, max_shard_bytes=1000)
    loaded = load_weights(tmp_path, parameter_table(CONFIG))
    assert all(
        array.dtype == state[name].dtype and np.array_equal(array, state[name]) for name, array in loaded.items()
    )
    other = plain_model().to(dtype)
    init_weights(other, CONFIG, seed=9)
    set_state(other, given)
    assert all(np.array_equal(array, state[name]) for name, array in get_state(other).items())


def test_hugging_face_folders_take_states_as_flax_gives_them(tmp_path):
    config = CONFIG.replace(moe_frequency=1, moe_packed_experts=True)
    model = Transformer(config, rngs=nnx.Rngs(0)).to(jnp.bfloat16)
    save_huggingface(tmp_path, nnx.state(model), config)
    _, loaded = load_huggingface(tmp_path, moe_packed_experts=True)
    assert all(np.array_equal(loaded[name], array) for name, array in get_state(model).items())


def test_states_that_cannot_be_meant_are_refused(tmp_path):
    state = get_state(plain_model())
    with pytest.raises(UserError, match=r"both of which name 'norm\.weight'"):
        save_weights(tmp_path, {**state, "module.norm.weight": state["norm.weight"]})
    tied = plain_model(tie_embeddings=True)
    embedding = get_state(tied)["token_embedding.embedding.weight"]
    set_state(tied, {**get_state(tied), "output_head.proj.weight": embedding})
    with pytest.raises(UserError, match="ties it"):
        set_state(tied, {**get_state(tied), "output_head.proj.weight": embedding + 1})
