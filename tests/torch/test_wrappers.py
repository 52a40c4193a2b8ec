"""Wrapped models do what the plain ones do: `torch.compile`, data parallelism, averaging, around any parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from kempnerforge_torch.model.generate import generate
from kempnerforge_torch.model.hooks import ActivationStore, activation_names, capture, extract_representations
from kempnerforge_torch.model.init import init_weights
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.state import get_state, set_state, to_numpy
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import build_vlm_wrapper
from kempnerforge_torch.training.freeze import freeze_params, frozen_parameters
from shared_config.contract.parameters import parameter_table
from shared_config.errors import UserError
from shared_config.interchange.huggingface import load_huggingface, save_huggingface
from shared_config.interchange.states import plain_name
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=2, vocab_size=32, max_seq_len=16, ffn_hidden_dim=16, num_experts=2, moe_frequency=2
)
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
QUERIES = "layers.0.attention.q_proj.weight"
PROCESSES = 2
LAYERS = ["layers.0.attention.q_proj", "layers.1.mlp", "norm"]


def data_parallel(module: nn.Module) -> nn.Module:
    """On the CPU, whatever else there is."""
    with mock.patch("torch.nn.parallel.data_parallel._get_available_device_type", return_value=None):
        return nn.DataParallel(module)


WRAPS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "parallel": data_parallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
}


def wrapped_at(model: nn.Module, places: dict[str, str]) -> Any:
    """The model with the modules of these paths wrapped, inner ones first; "" is the whole."""
    for path in sorted(filter(None, places), key=lambda path: -path.count(".")):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, WRAPS[places[path]](model.get_submodule(path)))
    return WRAPS[places[""]](model) if "" in places else model


def plain_model(**changes: Any) -> Transformer:
    config = CONFIG.replace(**changes)
    model = Transformer(config).eval()
    init_weights(model, config, seed=3)
    return model


WRAPPED_PATHS = [
    path
    for path, module in plain_model().named_modules()
    if path.startswith(("layers.", "token_embedding", "norm", "output_head")) and not isinstance(module, nn.ModuleList)
]
inner_places = st.dictionaries(st.sampled_from(WRAPPED_PATHS), st.sampled_from(["compiled", "parallel"]), max_size=4)
outer_places = st.sampled_from([{}, *({"": wrap} for wrap in WRAPS)])
places = st.builds(lambda inner, outer: inner | outer, inner_places, outer_places)


@given(places=places, tied=st.booleans())
@settings(max_examples=25, deadline=None)
def test_wrapped_models_do_what_plain_ones_do(places, tied, tmp_path_factory):
    plain = plain_model(tie_embeddings=tied)
    model = wrapped_at(copy.deepcopy(plain), places)
    state = get_state(plain)
    assert list(get_state(model)) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in get_state(model).items())

    assert activation_names(model) == activation_names(plain)
    samples = list(TOKENS.numpy())
    expected = extract_representations(plain, samples, LAYERS)
    found = extract_representations(model, samples, LAYERS)
    assert expected is not None
    assert found is not None
    assert all(np.array_equal(found[name], expected[name]) for name in LAYERS)
    assert torch.equal(generate(model, TOKENS, 3, seed=1), generate(plain, TOKENS, 3, seed=1))

    init_weights(model, plain.config, seed=4)
    assert not torch.equal(
        get_state(model)["layers.0.attention.q_proj.weight"], state["layers.0.attention.q_proj.weight"]
    )
    set_state(model, state)
    set_state(model, model.state_dict())
    set_state(plain, model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in get_state(model).items())

    assert freeze_params(model, "layers.0.*") == freeze_params(plain, "layers.0.*") > 0
    assert frozen_parameters(model) == frozen_parameters(plain)

    folder = tmp_path_factory.mktemp("weights")
    save_weights(folder, model.state_dict())
    loaded = load_weights(folder, parameter_table(plain.config))
    assert all(np.array_equal(array, to_numpy(state[name])) for name, array in loaded.items())


@pytest.mark.parametrize("wrap", sorted(WRAPS))
def test_hooks_see_the_parts_of_a_model_that_was_compiled_and_run_before(wrap):
    plain = plain_model()
    model = WRAPS[wrap](copy.deepcopy(plain)).eval()
    model.get_submodule("module.layers.0" if wrap != "compiled" else "_orig_mod.layers.0").compile(backend="eager")
    with torch.no_grad():
        model(TOKENS)
        stores = [ActivationStore(plain, LAYERS), ActivationStore(model, LAYERS)]
        for store, which in zip(stores, (plain, model), strict=True):
            store.enable()
            which(TOKENS)
            store.disable()
        assert all(torch.equal(stores[0].get(name), stores[1].get(name)) for name in LAYERS)
        with capture(model, LAYERS) as activations:
            model(TOKENS)
        assert sorted(activations) == sorted(LAYERS)
        model(TOKENS)
    assert plain_name("module._orig_mod.layers.0.module.attention") == "layers.0.attention"


@pytest.mark.parametrize("wrap", sorted(WRAPS))
def test_a_wrapped_model_continues_pictures(wrap: str) -> None:
    vision = VisionEncoderConfig(type="random", feature_dim=6, num_tokens=2, image_size=2)
    config = CONFIG.replace(num_experts=0, moe_frequency=1)
    plain = build_vlm_wrapper(config, vision, AdapterConfig(type="linear"), JointDecoderConfig(max_text_len=8)).eval()
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 2)).astype(np.float32)
    model = WRAPS[wrap](copy.deepcopy(plain)).eval()
    expected = generate(plain, TOKENS, 3, seed=1, pixel_values=pixels)
    assert torch.equal(generate(model, TOKENS, 3, seed=1, pixel_values=pixels), expected)
    with pytest.raises(ValueError, match="pixel_values is given: model = Transformer has no encoder"):
        generate(WRAPS[wrap](plain_model()), TOKENS, 3, pixel_values=pixels)


@pytest.mark.parametrize("wrap", sorted(WRAPS))
def test_wrapped_blocks_read_the_image_once(wrap: str) -> None:
    vision = VisionEncoderConfig(type="random", feature_dim=6, num_tokens=2, image_size=2)
    vlm = CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1)
    config = CONFIG.replace(num_experts=0, moe_frequency=1)
    plain = build_vlm_wrapper(config, vision, AdapterConfig(type="linear"), vlm).eval()
    for parameter in plain.transformer.cross_attention_layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    pixels = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(plain)
    blocks = model.transformer.cross_attention_layers
    blocks.add_module("0", WRAPS[wrap](blocks.get_submodule("0")))
    features = torch.rand(2, 2, CONFIG.dim, generator=torch.Generator().manual_seed(1))
    found, expected = (
        each.transformer.precompute_image_kv(ModalityContext(image_features=features)).image_keys_values or ()
        for each in (model, plain)
    )
    assert len(found) == len(expected) == config.n_layers
    assert all(torch.equal(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True))
    tokens = generate(plain, TOKENS, 3, temperature=0.0, pixel_values=pixels)
    assert torch.equal(generate(model, TOKENS, 3, temperature=0.0, pixel_values=pixels), tokens)


def test_a_wrapper_is_compiled_again_after_the_hooks_are_gone():
    model: Any = torch.compile(plain_model(), backend="eager")
    forward = model.forward
    with capture(model, LAYERS):
        assert model.forward is not forward
    assert model.forward is forward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_take_tensors_of_any_kind(dtype, tmp_path):
    values = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "parameter": nn.Parameter(values.to(dtype), requires_grad=dtype.itemsize > 1),
        "transposed": values.to(dtype).T,
        "sliced": values.to(dtype)[:, 1:3],
        "expanded": values[:1].to(dtype).expand(5, 4),
        "scalar": torch.tensor(2.0, dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    save_weights(tmp_path, tensors, max_shard_bytes=64)
    loaded = load_weights(tmp_path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == to_numpy(tensor).dtype
        assert np.array_equal(loaded[name], to_numpy(tensor))


@pytest.mark.parametrize("packed", [False, True])
def test_hugging_face_folders_take_tensors_and_wrapped_names(packed, tmp_path):
    config = CONFIG.replace(moe_frequency=1, moe_packed_experts=packed)
    model: Any = torch.compile(Transformer(config).to(torch.bfloat16), backend="eager")
    save_huggingface(tmp_path, model.state_dict(), config)
    _, loaded = load_huggingface(tmp_path, moe_packed_experts=packed)
    assert all(np.array_equal(loaded[name], to_numpy(tensor)) for name, tensor in get_state(model).items())


def test_states_that_cannot_be_meant_are_refused(tmp_path):
    state = get_state(plain_model())
    name = "norm.weight"
    with pytest.raises(UserError, match=r"both of which name 'norm\.weight'"):
        save_weights(tmp_path, {**state, f"module.{name}": state[name]})
    with pytest.raises(UserError, match=r"norm\.weight"):
        save_weights(tmp_path, {name: torch.empty(3, device="meta")})
    tied = plain_model(tie_embeddings=True)
    both = tied.state_dict()
    set_state(tied, both)
    with pytest.raises(UserError, match="ties it"):
        set_state(tied, {**both, "output_head.proj.weight": both["output_head.proj.weight"] + 1})


def test_a_tensor_may_have_the_name_of_a_wrapper(tmp_path):
    save_weights(tmp_path, {"module": torch.ones(2), "module._orig_mod.norm.module": torch.zeros(3)})
    assert set(load_weights(tmp_path)) == {"module", "norm.module"}


def sharded(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_models_of_several_processes_are_written_and_run_as_plain_ones(tmp_path):
    """By a fork server: its processes skip the end of an interpreter, in which threads of gloo may abort."""
    start_processes(check_processes, (str(tmp_path),), nprocs=PROCESSES, start_method="forkserver")


def check_processes(rank: int, folder: str) -> None:
    """In each of the processes; each writes files of its own."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES, init_method=f"file://{folder}/group")
    try:
        for wrap in (DistributedDataParallel, sharded):
            check_spread(wrap, Path(folder, f"{wrap.__name__}-{rank}"))
    finally:
        torch.distributed.destroy_process_group()


def check_spread(wrap: Any, folder: Path) -> None:
    plain, model = plain_model(), wrap(plain_model()).eval()
    state = {name: tensor.clone() for name, tensor in get_state(plain).items()}
    assert has_values(model, state)
    save_weights(folder, model.state_dict())
    loaded = load_weights(folder, parameter_table(plain.config))
    assert all(np.array_equal(array, to_numpy(state[name])) for name, array in loaded.items())
    assert torch.equal(generate(model, TOKENS, 3, seed=1), generate(plain, TOKENS, 3, seed=1))
    expected = extract_representations(plain, list(TOKENS.numpy()), LAYERS)
    found = extract_representations(model, list(TOKENS.numpy()), LAYERS)
    assert expected is not None
    assert found is not None
    assert all(np.array_equal(found[name], expected[name]) for name in LAYERS)

    init_weights(plain, plain.config, seed=4)
    init_weights(model, plain.config, seed=4)
    assert has_values(model, get_state(plain))
    assert not has_values(model, state)
    set_state(model, state)
    assert has_values(model, state)
    set_state(plain, get_state(model))
    set_state(model, model.state_dict())
    assert has_values(plain, state)
    assert has_values(model, state)


def has_values(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = get_state(model)
    assert list(found) == list(state)
    return all(np.array_equal(to_numpy(found[name]), to_numpy(value)) for name, value in state.items())
