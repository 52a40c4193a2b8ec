"""Weights at their beginning and on their way: seeded bits, nothing left unset, ties, shared memory, files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from kempnerforge_jax.model import state as jax_state
from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.transformer import Transformer as JaxTransformer
from kempnerforge_torch.model import state as torch_state
from kempnerforge_torch.model.transformer import Transformer as TorchTransformer
from shared_config.contract.initialise import initial_values, state_hash
from shared_config.contract.parameters import EMBEDDING, HEAD, parameter_table
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.parity.backends import BACKENDS, Torch, on_both

DENSE = ModelConfig(
    dim=20, head_dim=6, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=16,
    qk_norm=True, attention_bias=True, norm_type="layernorm",
)  # fmt: skip
EXPERTS = DENSE.replace(num_experts=3, moe_router="sigmoid_topk", moe_shared_experts=1, moe_frequency=2)
CONFIGS: dict[str, tuple[ModelConfig, VLMConfig | None]] = {
    "dense": (DENSE, None),
    "tied": (DENSE.replace(tie_embeddings=True, norm_type="rmsnorm", activation="relu"), None),
    "experts": (EXPERTS, None),
    "packed": (EXPERTS.replace(moe_packed_experts=True), None),
    "cross_attention": (DENSE, CrossAttentionConfig(cross_attention_every_n_layers=2)),
    "mot": (EXPERTS, MoTConfig()),
    "moma": (DENSE, MoMaConfig(moma_experts_per_modality={"image": 2, "text": 3})),
}
SEED = 7
each_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def built(backend: Torch, name: str, seed: int | None = SEED, dtype: str = "float32") -> Any:
    """A model as a trainer makes it: without storage, then set by the seed."""
    model = without_values(backend, name, dtype)
    model.init_weights_and_freqs(seed)
    return model


def without_values(backend: Torch, name: str, dtype: str = "float32") -> Any:
    """A model that was given memory, here full of NaN, but no values."""
    config, vlm = CONFIGS[name]
    if backend.name == "jax":
        return nnx.eval_shape(lambda: JaxTransformer(config, vlm_config=vlm, rngs=nnx.Rngs(0))).to(dtype)
    with torch.device("meta"):
        model = TorchTransformer(config, vlm_config=vlm).to(getattr(torch, dtype))
    return filled_with_nan(backend, model.to_empty(device="cpu"))


def filled_with_nan(backend: Torch, model: Any) -> Any:
    """Parameters, buffers and tables; integers are some other number."""
    if backend.name == "jax":
        for _, variable in named_variables(model):
            variable.set_value(jnp.full_like(variable.get_value(), jnp.nan))
    else:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(torch.nan if tensor.is_floating_point() else -7)
    return model


def everything(backend: Torch, model: Any) -> dict[str, np.ndarray]:
    """Copies of all arrays of a model by name: parameters, buffers and tables, in torch a tied head too."""
    if backend.name == "jax":
        named: dict[str, Any] = {name: variable.get_value() for name, variable in named_variables(model)}
    else:
        named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: np.array(value) for name, value in backend.numpy(named).items()}


def state_of(backend: Torch, model: Any) -> dict[str, np.ndarray]:
    return backend.numpy(backend.module("model.state").get_state(model))


def nans(arrays: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name, array in arrays.items() if np.isnan(array.astype(np.float64)).any()]


# Seeded bits


@each_config
def test_seeded_weights_are_the_same_bits_in_both_backends(name: str) -> None:
    hashes = [state_hash(state_of(backend, built(backend, name))) for backend in BACKENDS]
    contract = dict(initial_values(parameter_table(*CONFIGS[name]), SEED))
    assert hashes == [state_hash(contract)] * 2
    assert state_hash(state_of(BACKENDS[0], built(BACKENDS[0], name, seed=SEED + 1))) != hashes[0]


@on_both
def test_the_layout_of_experts_does_not_change_their_distribution(backend: Torch) -> None:
    """Packed or not, an expert's matrices are normal with the table's spread."""
    for layout in ("experts", "packed"):
        state = state_of(backend, built(backend, layout))
        for part, std in (("up", 0.02), ("down", 0.02 / np.sqrt(4))):
            one = {
                name: w for name, w in state.items() if ".mlp." in name and f".{part}_" in name and "shared" not in name
            }
            drawn = np.concatenate([w.ravel() for name, w in one.items() if "layers.1." in name])
            assert drawn.size == 3 * 20 * EXPERTS.computed_expert_ffn_hidden_dim
            assert drawn.std() == pytest.approx(std, rel=0.1)


# Nothing left unset


@on_both
@each_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_without_values_is_set_throughout(backend: Torch, name: str, dtype: str) -> None:
    model = built(backend, name, dtype=dtype)
    found = everything(backend, model)
    assert nans(found) == []
    assert set(found) >= {*parameter_table(*CONFIGS[name]), "rope.cos", "rope.sin"}
    assert {array.dtype.name for array in found.values()} <= {dtype, "float32", "float64", "int32"}


@on_both
@each_config
def test_setting_again_leaves_nothing_of_what_was(backend: Torch, name: str) -> None:
    model = built(backend, name)
    before = everything(backend, model)
    filled_with_nan(backend, model)
    assert len(nans(everything(backend, model))) == sum(array.dtype.kind != "i" for array in before.values())
    model.init_weights_and_freqs(SEED)
    assert state_hash(everything(backend, model)) == state_hash(before)


@on_both
def test_values_without_a_seed_leave_nothing_unset_either(backend: Torch) -> None:
    for name in ("tied", "packed"):
        model = filled_with_nan(backend, built(backend, name))
        model.init_weights_and_freqs()
        assert nans(everything(backend, model)) == []


# Ties


@on_both
def test_ties_hold_through_all_that_remakes_tensors(backend: Torch) -> None:
    model = built(backend, "tied")
    copies = [model, copy.deepcopy(model), copy.deepcopy(model).to(backend.array(np.zeros(1), "bfloat16").dtype)]
    loaded = built(backend, "tied", seed=SEED + 1)
    backend.module("model.state").set_state(loaded, backend.module("model.state").get_state(model))
    for each in (*copies, loaded):
        assert HEAD not in state_of(backend, each)
    for each in (*copies, loaded, without_values(backend, "tied")):
        assert head_of(backend, each) is embedding_of(backend, each)


def head_of(backend: Torch, model: Any) -> Any:
    """The array that the head multiplies by."""
    if backend.name == "torch":
        return model.output_head.proj.weight
    assert model.output_head.proj.weight is None
    return model._tied_weight()


def embedding_of(backend: Torch, model: Any) -> Any:
    weight = model.token_embedding.embedding.weight
    return weight if backend.name == "torch" else weight.get_value()


@on_both
def test_a_tied_model_computes_with_its_embedding(backend: Torch) -> None:
    model, tokens = built(backend, "tied"), np.arange(8, dtype=np.int32)[None]
    state = {name: np.array(value) for name, value in state_of(backend, model).items()}
    before = backend.run(model, tokens)
    state[EMBEDDING][20:] *= 3
    backend.module("model.state").set_state(model, state)
    after = backend.run(model, tokens)
    np.testing.assert_array_equal(after[..., :20], before[..., :20])
    np.testing.assert_allclose(after[..., 20:], 3 * before[..., 20:], rtol=1e-5, atol=1e-6)


# One memory for both


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_s_weights_are_shared_with_jax_without_a_copy(dtype: str) -> None:
    state = torch_state.get_state(built(BACKENDS[0], "packed", dtype=dtype))
    shared = jax_state.share(state)
    assert shared.keys() == state.keys()
    for name, array in shared.items():
        assert array.unsafe_buffer_pointer() == state[name].data_ptr(), name
        assert array.dtype.name == str(state[name].dtype).removeprefix("torch."), name
    model = built(BACKENDS[1], "packed", seed=SEED + 1, dtype=dtype)
    jax_state.set_state(model, shared)
    assert jax_state.get_state(model)[EMBEDDING].unsafe_buffer_pointer() == state[EMBEDDING].data_ptr()
    assert state_hash(state_of(BACKENDS[1], model)) == state_hash(BACKENDS[0].numpy(state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_s_weights_are_shared_with_torch_without_a_copy(dtype: str) -> None:
    state = jax_state.get_state(built(BACKENDS[1], "packed", dtype=dtype))
    shared = torch_state.share(state)
    assert shared.keys() == state.keys()
    for name, tensor in shared.items():
        assert tensor.data_ptr() == state[name].unsafe_buffer_pointer(), name
    model = built(BACKENDS[0], "packed", seed=SEED + 1, dtype=dtype)
    torch_state.set_state(model, shared)
    assert state_hash(state_of(BACKENDS[0], model)) == state_hash(BACKENDS[1].numpy(state))


def test_both_compute_the_same_from_shared_weights() -> None:
    torch_model, tokens = built(BACKENDS[0], "dense"), np.arange(8, dtype=np.int32)[None]
    jax_model = built(BACKENDS[1], "dense", seed=SEED + 1)
    jax_state.set_state(jax_model, jax_state.share(torch_state.get_state(torch_model)))
    logits = [backend.run(model, tokens) for backend, model in zip(BACKENDS, (torch_model, jax_model), strict=True)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-5 * np.abs(logits[0]).max())


# Files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "experts", "packed", "mot"])
def test_weights_go_through_files_to_the_other_backend_and_back(name: str, dtype: str, tmp_path: Path) -> None:
    table = parameter_table(*CONFIGS[name])
    first = built(BACKENDS[0], name, dtype=dtype)
    written = state_hash(state_of(BACKENDS[0], first))
    save_weights(tmp_path / "a.safetensors", state_of(BACKENDS[0], first))
    assert state_hash(load_weights(tmp_path / "a.safetensors")) == written
    second = built(BACKENDS[1], name, seed=SEED + 1, dtype=dtype)
    jax_state.set_state(second, load_weights(tmp_path / "a.safetensors", table))
    assert state_hash(state_of(BACKENDS[1], second)) == written
    save_weights(tmp_path / "shards", state_of(BACKENDS[1], second), max_shard_bytes=4096)
    third = built(BACKENDS[0], name, seed=SEED + 2, dtype=dtype)
    torch_state.set_state(third, load_weights(tmp_path / "shards", table))
    assert state_hash(state_of(BACKENDS[0], third)) == written
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    held = {value.dtype for n, value in state_of(BACKENDS[0], third).items() if not table[n].is_buffer}
    assert held == {np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)}
