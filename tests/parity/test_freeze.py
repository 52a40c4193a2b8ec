"""Freezing: the same names, the same counts and the same marks in both backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kempnerforge_jax.model.state import split
from kempnerforge_jax.model.vlm import build_vlm_wrapper as build_jax
from kempnerforge_jax.training import freeze as jax_freeze
from kempnerforge_torch.model.vlm import build_vlm_wrapper as build_torch
from kempnerforge_torch.training import freeze as torch_freeze
from shared_config.contract.freeze import canonical_freeze_meta, effective_freeze, frozen_names, moments_under
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.contract.vision import wrapper_table
from shared_config.errors import ConfigError
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    FreezeSpec,
    FreezeStage,
    JointDecoderConfig,
    ModelConfig,
    MoMaConfig,
    MoTConfig,
    VisionEncoderConfig,
)
from shared_config.schema.freeze import DEFAULT_PATTERNS

MODEL = ModelConfig(dim=20, n_layers=2, n_heads=5, vocab_size=37, ffn_hidden_dim=26, max_seq_len=32)
VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
JOINT = JointDecoderConfig(max_text_len=8)
SPECS = (FreezeSpec("transformer"), FreezeSpec("vision_encoder"), FreezeSpec("transformer", frozen=False))
ADAPTER_SIZE = 20 * 12 + 20 + 20 * 20 + 20


@pytest.fixture(params=["torch", "jax"])
def backend(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and the module that freezes it."""
    if request.param == "torch":
        return build_torch(MODEL, VISION, None, JOINT), torch_freeze
    return build_jax(MODEL, VISION, None, JOINT, rngs=None), jax_freeze


def test_patterns_freeze_what_they_name(backend: tuple[Any, Any]) -> None:
    model, freeze = backend
    assert freeze.frozen_parameters(model) == set()
    assert freeze.freeze_params(model, "adapter.*") == ADAPTER_SIZE
    assert freeze.frozen_parameters(model) == {
        "adapter.proj1.weight", "adapter.proj1.bias", "adapter.proj2.weight", "adapter.proj2.bias"
    }  # fmt: skip
    assert freeze.freeze_params(model, "adapter.*") == 0
    assert freeze.freeze_params(model, ["adapter.proj1.bias", "nothing.*"], frozen=False) == 20
    assert len(freeze.frozen_parameters(model)) == 3


def test_specs_replace_what_was_frozen(backend: tuple[Any, Any]) -> None:
    model, freeze = backend
    flipped = freeze.apply_freeze_specs(model, SPECS, DEFAULT_PATTERNS)
    frozen = freeze.frozen_parameters(model)
    assert frozen
    assert all(name.startswith("vision_encoder.") for name in frozen)
    assert freeze.apply_freeze_specs(model, SPECS, DEFAULT_PATTERNS) == 0
    assert freeze.apply_freeze_specs(model, [FreezeSpec("adapter")], DEFAULT_PATTERNS) == flipped + ADAPTER_SIZE
    assert freeze.apply_freeze_specs(model, [], DEFAULT_PATTERNS) == ADAPTER_SIZE
    with pytest.raises(ValueError, match="freeze = 'head': must be one of adapter, transformer, vision_encoder"):
        freeze.apply_freeze_specs(model, [FreezeSpec("head")], DEFAULT_PATTERNS)


def test_names_alone_tell_the_same() -> None:
    model = build_torch(MODEL, VISION, None, JOINT)
    names = [name for name, _ in model.named_parameters()]
    torch_freeze.apply_freeze_specs(model, SPECS, DEFAULT_PATTERNS)
    assert frozen_names(names, SPECS, DEFAULT_PATTERNS) == torch_freeze.frozen_parameters(model)


def test_torch_gives_frozen_parameters_no_gradient() -> None:
    model = build_torch(MODEL, VISION, None, JOINT)
    torch_freeze.apply_freeze_specs(model, [FreezeSpec("vision_encoder")], DEFAULT_PATTERNS)
    logits, _ = model(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.long))
    logits.sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {name for name, _ in model.named_parameters() if not name.startswith("vision_encoder.")}


def test_compiled_models_keep_their_names() -> None:
    model = build_torch(MODEL, VISION, None, JOINT)
    model.adapter = torch.compile(model.adapter, backend="eager")  # type: ignore[assignment]
    assert torch_freeze.freeze_params(model, "adapter.proj?.bias") == 40
    assert torch_freeze.frozen_parameters(model) == {"adapter.proj1.bias", "adapter.proj2.bias"}


def test_marks_survive_the_way_through_jit() -> None:
    model = build_jax(MODEL, VISION, None, JOINT, rngs=None)
    jax_freeze.freeze_params(model, "adapter.*")
    graphdef, params, _ = split(model)
    assert hash(graphdef) == hash(split(model)[0])
    assert jax_freeze.frozen_parameters(model) < set(params)


def test_the_stage_in_force() -> None:
    base = (FreezeSpec("vision_encoder"),)
    schedule = (FreezeStage(5, (FreezeSpec("adapter"),)), FreezeStage(9))
    assert effective_freeze(0, base, ()) == base
    assert effective_freeze(4, base, schedule) == base
    assert effective_freeze(5, base, schedule) == schedule[0].specs
    assert effective_freeze(8, base, schedule) == schedule[0].specs
    assert effective_freeze(9, base, schedule) == ()
    with pytest.raises(ValueError, match="freeze = 'adapter'"):
        effective_freeze(0, base, schedule, valid_modules=["vision_encoder"])


def test_metadata_knows_no_order() -> None:
    assert canonical_freeze_meta(SPECS) == [{"module": "vision_encoder", "frozen": True}]
    assert canonical_freeze_meta(SPECS[1:2]) == canonical_freeze_meta(SPECS)
    both = [FreezeSpec("b"), FreezeSpec("a")]
    assert canonical_freeze_meta(both) == canonical_freeze_meta(both[::-1])
    assert canonical_freeze_meta(both) != canonical_freeze_meta(both[:1])


def test_moments_follow_what_is_frozen_when_a_run_goes_on() -> None:
    """Of what is frozen now they are left out; of what was frozen they start at 0, after no update."""
    spec = ParameterSpec((2, 3), Constant(1.0), (None, None))
    parts = ("adapter.w", "transformer.w", "vision_encoder.w")
    table = dict.fromkeys(parts, spec) | {"transformer.b": ParameterSpec((1,), Constant(0.0), (None,), is_buffer=True)}
    trained = {f"{kind}.{name}": np.full((2, 3), 0.5, np.float32) for kind in "mv" for name in parts[:2]}
    trained |= {f"t.{name}": np.array(7, np.int32) for name in parts[:2]}
    moved = moments_under(JOINT.replace(freeze=(FreezeSpec("transformer"),)), table, trained)
    assert sorted(moved) == [f"{kind}.{name}" for kind in "mtv" for name in ("adapter.w", "vision_encoder.w")]
    for kind, dtype, shape in (("m", np.float32, (2, 3)), ("v", np.float32, (2, 3)), ("t", np.int32, ())):
        assert moved[f"{kind}.adapter.w"] is trained[f"{kind}.adapter.w"]
        fresh = moved[f"{kind}.vision_encoder.w"]
        assert (fresh.dtype, fresh.shape, fresh.any()) == (dtype, shape, False)
    assert moments_under(None, table, trained) == trained
    assert moments_under(JOINT, table, {}) == {}


OWN_PARTS = {
    "cross_attention": (
        CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=2),
        "cross_attention_layers.",
    ),
    "mot": (MoTConfig(max_text_len=8), "layers.", "mot_norms."),
    "moma": (MoMaConfig(max_text_len=8), "layers.0.mlp.experts.", "layers.1.mlp.experts."),
}


@pytest.mark.parametrize("arch", OWN_PARTS)
def test_an_architecture_has_a_name_for_its_own_parts(arch: str) -> None:
    vlm, *parts = OWN_PARTS[arch]
    vlm = vlm.replace(freeze=[FreezeSpec(arch)])
    names = list(wrapper_table(MODEL, vlm, AdapterConfig(), VISION, 12))
    expected = {name for name in names if name.startswith(tuple(f"transformer.{part}" for part in parts))}
    assert expected
    assert frozen_names(names, vlm.freeze, vlm.module_patterns) == expected
    with pytest.raises(ConfigError, match=f"freeze = '{arch}': must be a key of module_patterns"):
        JointDecoderConfig(freeze=(FreezeSpec(arch),))


@pytest.mark.parametrize("kind", [list, tuple])
def test_patterns_may_be_several_or_stand_for_themselves(backend: tuple[Any, Any], kind: Any) -> None:
    model, freeze = backend
    several = {"both": kind(["adapter.proj1.*", "adapter.proj2.bias"])}
    vlm = JointDecoderConfig(
        freeze=kind([FreezeSpec("both"), FreezeSpec("adapter.*.bias", False)]), module_patterns=several
    )
    assert freeze.effective_freeze(0, vlm.freeze, (), vlm.module_patterns) == vlm.freeze
    for patterns in (several, vlm.module_patterns):
        freeze.apply_freeze_specs(model, kind(vlm.freeze), patterns)
        assert freeze.frozen_parameters(model) == {"adapter.proj1.weight"}
    freeze.apply_freeze_specs(model, [], {})
    assert freeze.freeze_params(model, kind(["adapter.proj1.bias", "adapter.proj2.*"])) == 20 + 20 * 20 + 20
