"""The native towers against the SigLIP and CLIP of transformers: random models, saved to disk and loaded by ours."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import settings
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from kempnerforge_jax.model import hooks as jax_hooks
from kempnerforge_jax.model import state as jax_state
from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.vision import build_vision_encoder as build_jax
from kempnerforge_torch.model import hooks as torch_hooks
from kempnerforge_torch.model.vision import build_vision_encoder as build_torch
from shared_config.contract.vision import tower_table
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.vision import hugging_face_name, load_tower_weights, read_tower, resolve_tower
from shared_config.interchange.weights import WeightsError
from shared_config.parity.numerics import perturbation_delta, unit_roundoff
from shared_config.schema import VisionEncoderConfig
from tests.tolerance import FORWARD_K, assert_all_same_function, assert_all_within

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 18,
    "patch_size": 4,
}
TEXT = {**SIZES, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 1}
PIXELS = np.random.default_rng(2).standard_normal((2, 3, 18, 18))
NIGHTLY = settings.get_current_profile_name() == "nightly"
HUB = ("transformers", "huggingface_hub")
KINDS = {"siglip2": (SiglipVisionConfig, SiglipVisionModel), "clip": (CLIPVisionConfig, CLIPVisionModel)}


def random_weights(model: Any) -> Any:
    """Weights under which nothing hides: fan-in matrices, norms in (0.5, 1.5), biases that are not 0."""
    rng = np.random.default_rng(7)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("bias"):
            values = rng.uniform(-0.2, 0.2, shape)
        elif parameter.ndim == 1 and "norm" in name:
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) if parameter.ndim > 1 else 1)
        parameter.data = torch.from_numpy(np.asarray(values)).float()
    return model.eval()


def saved(folder: Path, kind: str, **changes: Any) -> tuple[Any, VisionEncoderConfig]:
    """A model of transformers, and the config that loads it from ``folder``."""
    config_class, model_class = KINDS[kind]
    model = random_weights(model_class(config_class(**{**SIZES, **changes})))
    model.save_pretrained(folder)
    return model, VisionEncoderConfig(type=kind, path=str(folder))


def theirs(model: Any, is_clip: bool) -> dict[str, np.ndarray]:
    """All hidden states of transformers, in float64, by our names."""
    with torch.no_grad():
        out = model.double()(torch.from_numpy(PIXELS), output_hidden_states=True)
    named = {f"layers.{i}": state for i, state in enumerate(out.hidden_states[1:])}
    first = {"pre_norm": out.hidden_states[0]} if is_clip else {}
    final = out.last_hidden_state[:, 1:] if is_clip else out.last_hidden_state
    return {name: state.numpy() for name, state in {**first, **named, "features": final}.items()}


def ours_in_torch(config: VisionEncoderConfig, names: list[str], dtype: str) -> dict[str, np.ndarray]:
    encoder = build_torch(config).to(getattr(torch, dtype))
    with torch.no_grad(), torch_hooks.capture(encoder, names[:-1]) as states:
        features = encoder(torch.from_numpy(PIXELS))
    return {name: value.numpy() for name, value in {**states, "features": features}.items()}


def ours_in_jax(config: VisionEncoderConfig, names: list[str], dtype: str) -> dict[str, np.ndarray]:
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        graphdef, params, buffers = jax_state.split(build_jax(config, rngs=None).to(jnp.dtype(dtype)))

        @jax.jit
        def run(params: Any, pixels: jax.Array) -> Any:
            encoder = jax_state.merge(graphdef, params, buffers)
            with jax_hooks.capture(encoder, names[:-1]) as states:
                features = encoder(pixels)
            return {**states, "features": features}

        return {name: np.asarray(value) for name, value in run(params, jnp.asarray(PIXELS, dtype)).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_all_hidden_states_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model, config = saved(tmp_path, kind)
    truth = theirs(model, kind == "clip")
    weights = load_tower_weights(tmp_path, read_tower(tmp_path, kind))

    def states_of(moved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        state = {hugging_face_name(name): torch.from_numpy(value) for name, value in moved.items()}
        own = model.state_dict()
        own.update({name: value.reshape(own[name].shape) for name, value in state.items()})
        model.load_state_dict(own)
        return theirs(model, kind == "clip")

    deltas = perturbation_delta(states_of, weights, unit_roundoff("float32"))
    for run in (ours_in_torch, ours_in_jax):
        assert_all_same_function(run(config, list(truth), "float64"), truth, context=run.__name__)
        assert_all_within(run(config, list(truth), "float32"), truth, deltas, FORWARD_K, context=run.__name__)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Of a product with drawn numbers; those of biases of keys are 0, to rounding. JAX's run nightly."""
    model, config = saved(tmp_path, kind)
    scales = np.random.default_rng(5).standard_normal((len(PIXELS), 16, SIZES["hidden_size"]))
    output = model.double()(torch.from_numpy(PIXELS)).last_hidden_state
    ((output[:, 1:] if kind == "clip" else output) * torch.from_numpy(scales)).sum().backward()
    theirs: dict[str, Any] = dict(model.named_parameters())
    ours = build_torch(config).double()
    (ours(torch.from_numpy(PIXELS)) * torch.from_numpy(scales)).sum().backward()
    found: dict[str, Any] = {name: parameter.grad for name, parameter in ours.named_parameters() if not is_zero(name)}
    truth = {name: theirs[hugging_face_name(name)].grad.reshape(grad.shape).numpy() for name, grad in found.items()}
    assert_all_same_function({name: grad.numpy() for name, grad in found.items()}, truth)
    if NIGHTLY:
        in_jax = gradients_in_jax(config, scales)
        assert_all_same_function({name: in_jax[name] for name in truth}, truth)


def is_zero(name: str) -> bool:
    """Softmax does not change where all scores of a query move alike."""
    return name.endswith("k_proj.bias")


def gradients_in_jax(config: VisionEncoderConfig, scales: np.ndarray) -> dict[str, np.ndarray]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        graphdef, params, buffers = jax_state.split(build_jax(config, rngs=None).to(jnp.float64))

        def product(params: Any) -> jax.Array:
            return (jax_state.merge(graphdef, params, buffers)(jnp.asarray(PIXELS)) * scales).sum()

        return {name: np.asarray(value) for name, value in jax.jit(jax.grad(product))(params).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_towers_need_no_network_and_no_transformers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = saved(tmp_path, kind)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in [*(name for name in sys.modules if name.partition(".")[0] in HUB), *HUB]:
        monkeypatch.setitem(sys.modules, name, None)
    assert build_torch(config).num_tokens == build_jax(config, rngs=None).num_tokens == 16


@pytest.mark.parametrize("kind", KINDS)
def test_towers_beside_a_text_tower(kind: str, tmp_path: Path) -> None:
    config_class, model_class = {"siglip2": (SiglipConfig, SiglipModel), "clip": (CLIPConfig, CLIPModel)}[kind]
    model = random_weights(model_class(config_class(vision_config=SIZES, text_config=TEXT)))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    truth = theirs(model.vision_model, kind == "clip")
    config = VisionEncoderConfig(type=kind, path=str(tmp_path), feature_dim=24, num_tokens=16)
    assert_all_same_function(ours_in_torch(config, list(truth), "float64"), truth)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "quick_gelu"])
def test_activations(activation: str, tmp_path: Path) -> None:
    model, config = saved(tmp_path, "siglip2", hidden_act=activation, num_hidden_layers=1)
    truth = theirs(model, is_clip=False)
    for run in (ours_in_torch, ours_in_jax):
        assert_all_same_function(run(config, list(truth), "float64"), truth, context=run.__name__)


def test_half_precision_folders(tmp_path: Path) -> None:
    model, config = saved(tmp_path, "clip")
    model.bfloat16().save_pretrained(tmp_path)
    truth = theirs(model, is_clip=True)
    for run in (ours_in_torch, ours_in_jax):
        assert_all_same_function(run(config, list(truth), "float64"), truth, context=run.__name__)


def test_fields_left_out_mean_what_transformers_says(tmp_path: Path) -> None:
    for kind, (config_class, _) in KINDS.items():
        model_type = config_class().model_type
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 96}))
        tower, default = read_tower(tmp_path, kind), config_class(hidden_size=96)
        assert (tower.dim, tower.n_layers, tower.n_heads) == (
            96,
            default.num_hidden_layers,
            default.num_attention_heads,
        )
        assert (tower.image_size, tower.patch_size) == (default.image_size, default.patch_size)
        assert (tower.activation, tower.norm_eps) == (default.hidden_act, default.layer_norm_eps)
        assert tower.ffn_hidden_dim == default.intermediate_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "siglip2_vision_model"}, "NaFlex"),
        ({"model_type": "siglip2"}, "can't be run"),
        ({"model_type": "clip"}, "type 'siglip2' needs siglip or siglip_vision_model"),
        ({"model_type": "siglip", "vision_config": {"num_channels": 1}}, "num_channels = 1: must be 3"),
        ({"model_type": "siglip", "vision_config": {"hidden_act": "mish"}}, "hidden_act = 'mish'"),
        ({"model_type": "siglip", "vision_config": {"hidden_size": 100}}, "num_attention_heads = 12: must divide"),
        ({"model_type": "siglip", "vision_config": {"image_size": [224, 224]}}, "whole number"),
        ({"model_type": "siglip", "vision_config": {"patch_size": 300}}, "patch_size = 300"),
    ],
)
def test_what_can_not_be_run_is_refused_by_name(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    for build in (build_torch, lambda config: build_jax(config, rngs=None)):
        with pytest.raises(UserError, match=message):
            build(VisionEncoderConfig(type="siglip2", path=str(tmp_path)))


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    config = VisionEncoderConfig(type="clip", path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere/config\.json: can't be read"):
        build_torch(config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_tower(tmp_path, "clip")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        read_tower(tmp_path, "clip")
    model, config = saved(tmp_path, "clip")
    with pytest.raises(ConfigError, match=r"feature_dim = 23: must be 0 or what .* says, 24"):
        resolve_tower(VisionEncoderConfig(type="clip", path=str(tmp_path), feature_dim=23))
    deeper = read_tower(tmp_path, "clip")
    with pytest.raises(WeightsError, match=r"encoder\.layers\.3\.layer_norm1\.weight: missing"):
        load_tower_weights(tmp_path, type(deeper)(**{**vars(deeper), "n_layers": 4}))
    with pytest.raises(WeightsError, match=r"position_embedding\.weight: shape"):
        load_tower_weights(tmp_path, type(deeper)(**{**vars(deeper), "image_size": 24}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        build_torch(config)
    assert model.config.model_type == "clip_vision_model"


def test_a_tower_without_arrays_needs_no_weights(tmp_path: Path) -> None:
    """So that a step is compiled ahead of time without them."""
    _, config = saved(tmp_path, "siglip2")
    (tmp_path / "model.safetensors").unlink()
    shapes = {name: spec.shape for name, spec in tower_table(read_tower(tmp_path, "siglip2")).items()}
    with torch.device("meta"):
        in_torch = build_torch(config)
    assert {name: tuple(tensor.shape) for name, tensor in in_torch.state_dict().items()} == shapes
    in_jax = nnx.eval_shape(lambda: build_jax(config, rngs=None))
    assert {name: variable.get_value().shape for name, variable in named_variables(in_jax)} == shapes


def test_names_of_all_tensors_are_those_of_transformers(tmp_path: Path) -> None:
    for kind in KINDS:
        model, _ = saved(tmp_path / kind, kind)
        table = tower_table(read_tower(tmp_path / kind, kind))
        left = {name for name in model.state_dict() if not name.startswith("head.")}
        unused = {"post_layernorm.weight", "post_layernorm.bias"} if kind == "clip" else set()
        assert {hugging_face_name(name) for name in table} == left - unused
