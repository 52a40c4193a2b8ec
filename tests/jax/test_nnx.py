"""What users of NNX may do with a model; README has what works, here is what is refused, and says what to write."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kempnerforge_jax.model import Transformer
from kempnerforge_torch.model import Transformer as TorchTransformer
from tests.jobs import tiny_job

CONFIG = tiny_job({"n_layers": 2}).model
TOKENS = np.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    model.init_weights_and_freqs(seed=0)
    return model


def test_layers_have_numbers(model: Transformer) -> None:
    assert [model.layers[index] for index in range(2)] == list(model.layers.values())
    with pytest.raises(KeyError):
        model.layers[2]
    merged = nnx.merge(*nnx.split(model))
    assert merged.layers[1] is merged.layers["1"]


def test_tabulate_says_what_shows_a_model_and_leaves_it_as_it_was(model: Transformer) -> None:
    """Its wrappers would stay on the classes of a model whose call fails."""
    with pytest.raises(TypeError, match=r"nnx\.tabulate: .*; nnx\.display\(model\) shows the parameters"):
        nnx.tabulate(model, jnp.asarray(TOKENS))
    assert model(jnp.asarray(TOKENS)).shape == (2, 6, CONFIG.vocab_size)


def test_axes_of_a_mesh_have_to_be_auto(model: Transformer) -> None:
    """Those of `jax.make_mesh` are explicit, and which axis a result has must then be said in each operation."""

    def placed(*kinds: Any) -> jax.Array:
        mesh = jax.make_mesh((1,), ("data",), axis_types=kinds)
        return jax.device_put(jnp.asarray(TOKENS), NamedSharding(mesh, P("data")))

    told = r"tokens lies on a mesh with explicit axes \('data',\): they must be auto, as in jax\.make_mesh"
    for call in (model, nnx.jit(lambda tokens: model(tokens))):
        with pytest.raises(ValueError, match=told):
            call(placed(AxisType.Explicit))
    assert model(placed(AxisType.Auto)).shape == (2, 6, CONFIG.vocab_size)


def test_tokens_in_lists_are_refused_in_both_backends(model: Transformer) -> None:
    with pytest.raises(TypeError, match=r"tokens is a list: must be an array, as jnp\.asarray\(tokens\)"):
        model(TOKENS.tolist())
    with torch.device("meta"):
        other: Any = TorchTransformer(CONFIG)
    with pytest.raises(TypeError, match=r"tokens is a list: must be a tensor, as torch\.tensor\(tokens\)"):
        other(TOKENS.tolist())
