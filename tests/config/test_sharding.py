"""Where tensors lie on a mesh of devices: every element somewhere, heads and routers whole, and what can't be."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_groups, parameter_table
from shared_config.contract.sharding import (
    MESH_AXES,
    Layout,
    elements_held,
    layout_of,
    placement,
    refusals,
    stage_layers,
    stage_of,
)
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.errors import ConfigError
from shared_config.loader import load_config
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig

PRESETS = ("debug", "debug_moe", "debug_vlm_cross_attention", "debug_vlm_mot", "llama3_8b", "llama3_70b", "moe_small")
AXES = (None, "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "experts", "routes")


@st.composite
def specs(draw: st.DrawFn) -> ParameterSpec:
    axes = tuple(draw(st.lists(st.sampled_from(AXES), min_size=1, max_size=3, unique=True)))
    shape = tuple(draw(st.integers(1, 24)) for _ in axes)
    kind = draw(st.sampled_from(["is_buffer", "full_precision", "decay"]))
    return ParameterSpec(shape, Constant(0.0), axes, **{kind: True})


layouts = st.builds(Layout, **{axis: st.sampled_from((1, 2, 3, 4)) for axis in MESH_AXES})


def pieces(spec: ParameterSpec, layout: Layout) -> dict[tuple[int, ...], np.ndarray]:
    """The numbers of the elements that each device holds, the tensor cut as `torch.chunk` does."""
    numbers = np.arange(spec.size).reshape(spec.shape)
    places = placement(spec, layout)
    found = {}
    for device in itertools.product(*(range(layout.size(axis)) for axis in MESH_AXES)):
        at, part = dict[str, int](zip(MESH_AXES, device, strict=True)), numbers
        for axis, over in enumerate(places.splits):
            index = 0
            for name in over:
                index = index * layout.size(name) + at[name]
            size = -(-spec.shape[axis] // layout.size(*over))
            part = np.take(
                part, range(min(index * size, spec.shape[axis]), min((index + 1) * size, spec.shape[axis])), axis
            )
        found[device] = part
    return found


@given(specs(), layouts)
def test_every_element_is_held_by_as_many_devices(spec: ParameterSpec, layout: Layout) -> None:
    held = pieces(spec, layout)
    copies = Counter(number for part in held.values() for number in part.ravel().tolist())
    assert len(copies) == spec.size
    parts = math.prod(placement(spec, layout).shards(layout))
    assert set(copies.values()) == {layout.devices // parts}
    assert elements_held([(spec, 3)], layout) == 3 * max(part.size for part in held.values())


@given(specs(), layouts)
def test_what_is_split_and_by_what(spec: ParameterSpec, layout: Layout) -> None:
    splits = placement(spec, layout).splits
    used = [axis for over in splits for axis in over]
    assert len(used) == len(set(used)), "no mesh axis splits a tensor twice"
    assert not {"pp", "dp_replicate"} & set(used)
    ruled = [place for place, axis in enumerate(spec.axes) if axis in ("vocab", "heads", "kv_heads", "mlp")]
    by_tp = [place for place, over in enumerate(splits) if "tp" in over]
    assert by_tp == (ruled[:1] if layout.tp > 1 else []), "of two axes that tp may split the first is"
    for axis, size, over in zip(spec.axes, spec.shape, splits, strict=True):
        assert not over or axis not in ("head_dim", "routes")
        assert (over == ("ep",)) == (layout.ep > 1 and axis == "experts")
        if {"dp_shard", "cp"} & set(over):
            assert size % layout.size(*over) == 0, "FSDP splits evenly"
    gathered = placement(spec, layout, gathered=True).splits
    assert [over for over in gathered if over] == [over for over in splits if over in (("tp",),) or (
        over == ("ep",) and "experts" in spec.axes)]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_fsdp_leaves_no_large_tensor_of_a_preset_whole(preset: str, size: int) -> None:
    config = load_config(preset)
    layout = Layout(dp_shard=size)
    for group in parameter_groups(config.model, config.vlm):
        held = elements_held([(group.spec, 1)], layout)
        if not group.spec.is_buffer and not group.spec.full_precision and group.spec.axes != ("head_dim",):
            assert held == group.spec.size // size, group.name


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("token_embedding.embedding.weight", (("tp",), ("dp_shard", "ep", "cp"))),
        ("layers.1.attention.q_proj.weight", (("tp",), ("dp_shard", "ep", "cp"))),
        ("layers.1.attention.k_proj.weight", (("tp",), ("dp_shard", "ep", "cp"))),
        ("layers.1.attention.o_proj.weight", (("dp_shard", "ep", "cp"), ("tp",))),
        ("layers.1.attention_norm.weight", (("dp_shard", "ep", "cp"),)),
        ("layers.1.mlp.router.gate.weight", ((), ())),
        ("layers.1.mlp.router.expert_bias", ((),)),
        ("layers.1.mlp.gate_w", (("ep",), ("dp_shard", "cp"), ("tp",))),
        ("layers.1.mlp.down_w", (("ep",), ("tp",), ("dp_shard", "cp"))),
        ("output_head.proj.weight", (("tp",), ("dp_shard", "ep", "cp"))),
    ],
)
def test_a_model_of_experts_on_32_devices(name: str, splits: Any) -> None:
    config = load_config("debug_moe", ["--model.moe_router=sigmoid_topk"]).model
    layout = layout_of(DistributedConfig(dp_replicate=2, dp_shard=4, cp=2, ep=2, tp=2), 32)
    assert layout == Layout(dp_replicate=2, dp_shard=2, ep=2, cp=2, tp=2)
    assert (layout.devices, layout.data_ranks) == (32, 8)
    assert placement(parameter_table(config)[name], layout).splits == splits


def test_the_residual_width_is_what_fsdp_splits_first() -> None:
    wide = ParameterSpec((64, 8), Constant(0.0), ("mlp", "embed"))
    assert placement(wide, Layout(dp_shard=4)).splits == ((), ("dp_shard",))
    assert placement(wide, Layout(dp_shard=16)).splits == (("dp_shard",), ())
    assert placement(wide, Layout(dp_shard=128)).splits == ((), ())


@pytest.mark.parametrize("kind", ["is_buffer", "full_precision"])
def test_fsdp_leaves_whole_what_each_device_needs(kind: str) -> None:
    spec = ParameterSpec((8, 8), Constant(0.0), ("mlp", "embed"), **{kind: True})
    assert placement(spec, Layout(dp_shard=4, tp=2)).splits == (("tp",), ())


def test_mesh_axes_of_one_device_split_nothing() -> None:
    for preset in PRESETS:
        config = load_config(preset)
        for group in parameter_groups(config.model, config.vlm):
            assert set(placement(group.spec, Layout()).splits) == {()}


@given(st.integers(1, 100), st.integers(1, 16))
def test_stages_share_the_layers(n_layers: int, pp: int) -> None:
    stages = stage_layers(n_layers, pp)
    assert [layer for stage in stages for layer in stage] == list(range(n_layers))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_every_tensor_of_a_text_model_is_on_the_stage_of_its_layer(pp: int) -> None:
    model = load_config("debug").model
    stages = stage_layers(model.n_layers, pp)
    for name in parameter_table(model):
        part, _, rest = name.partition(".")
        layer = {"layers": rest.partition(".")[0], "token_embedding": 0}.get(part, model.n_layers - 1)
        assert int(layer) in stages[stage_of(name, model.n_layers, pp)]
        assert stage_of(f"m.{name}", model.n_layers, pp) == stage_of(name, model.n_layers, pp)


REFUSED: tuple[tuple[str, dict[str, int], list[str], str], ...] = (
    ("debug", {"tp": 3}, [], "distributed.tp = 3: must divide model.n_heads"),
    ("debug", {"tp": 2}, ["--model.ffn_hidden_dim=131"], "distributed.tp = 2: must divide model.ffn_hidden_dim = 131"),
    ("debug_moe", {"tp": 3}, ["--model.moe_expert_ffn_multiplier=0.1", "--model.ffn_hidden_dim=150"],
     "distributed.tp = 3: must divide width of an expert = 16"),
    ("debug_vlm_mot", {"tp": 2}, ["--vlm.mot_image_n_kv_heads=1"],
     "distributed.tp = 2: must divide vlm.mot_image_n_kv_heads = 1"),
    ("debug_vlm_cross_attention", {"tp": 2}, ["--vlm.cross_attention_n_heads=1"],
     "distributed.tp = 2: must divide vlm.cross_attention_n_heads = 1"),
    ("debug", {"ep": 2}, [], "distributed.ep = 2: must divide model.num_experts = 0"),
    ("debug_moe", {"ep": 3}, [], "distributed.ep = 3: must divide model.num_experts"),
    ("debug_moe", {"ep": 2}, ["--model.moe_packed_experts=false"],
     "model.moe_packed_experts = False: must be True for distributed.ep = 2"),
    ("debug_vlm_moma", {"ep": 2}, [], "distributed.ep = 2: must divide model.num_experts = 0"),
    ("debug", {"cp": 2}, ["--train.seq_len=127"], "distributed.cp = 2: must divide train.seq_len = 127"),
    ("debug_moe", {"cp": 2}, ["--model.moe_capacity_factor=1.25"],
     "model.moe_capacity_factor = 1.25: must be 0 for distributed.cp = 2"),
    ("debug_vlm_mot", {"cp": 2}, [], "distributed.cp = 2: must be 1 for vlm.arch = 'mot'"),
    ("debug_vlm_moma", {"cp": 2}, [], "distributed.cp = 2: must be 1 for vlm.arch = 'moma'"),
    ("debug", {"pp": 2}, ["--train.grad_accum_steps=1", "--model.tie_embeddings=false"],
     "train.grad_accum_steps = 1: must be at least distributed.pp = 2"),
    ("debug", {"pp": 2}, ["--model.tie_embeddings=true"], "model.tie_embeddings = True: must be False"),
    ("debug_moe", {"pp": 2}, [], "distributed.pp = 2: must be 1 for model.num_experts = "),
    ("debug", {"pp": 99}, [], "distributed.pp = 99: must be at most model.n_layers"),
    ("debug_vlm_joint_decoder", {"pp": 2}, [], "distributed.pp = 2: must be 1 for vlm.arch = 'joint_decoder'"),
)  # fmt: skip


@pytest.mark.parametrize(("preset", "layout", "changes", "said"), REFUSED)
def test_layouts_that_can_not_be(preset: str, layout: dict[str, int], changes: list[str], said: str) -> None:
    config = load_config(preset, changes)
    assert refusals(config) == []
    found = refusals(config.replace(distributed=DistributedConfig(**layout)))  # type: ignore[arg-type]
    assert any(line.startswith(said) for line in found), found


@pytest.mark.parametrize(
    ("preset", "layout", "changes"),
    [
        ("debug", {"tp": 2}, ["--model.vocab_size=257"]),
        ("debug", {"pp": 2}, ["--train.grad_accum_steps=2", "--data.pack_documents=true"]),
        ("debug_moe", {"ep": 2}, ["--model.moe_packed_experts=true"]),
        ("debug_moe", {"cp": 4}, ["--model.moe_capacity_factor=0"]),
        ("debug_vlm_mot", {"dp_shard": 8}, []),
        ("debug", {"tp": 2}, ["--model.qk_norm=false", "--model.qk_norm_over=width"]),
        ("debug_vlm_moma", {"tp": 2}, ["--model.ffn_hidden_dim=49"]),
    ],
)
def test_layouts_that_can_be(preset: str, layout: dict[str, int], changes: list[str]) -> None:
    config: JobConfig = load_config(preset, changes)
    assert refusals(config.replace(distributed=DistributedConfig(**layout))) == []  # type: ignore[arg-type]


def test_sizes_must_come_to_the_number_of_devices() -> None:
    assert layout_of(DistributedConfig(tp=2), 8) == Layout(dp_shard=4, tp=2)
    assert layout_of(DistributedConfig(cp=2), 8) == Layout(dp_shard=4, cp=2)
    for config, devices, said in (
        (DistributedConfig(dp_shard=2, tp=2), 8, "distributed.dp_shard = 2: .* must equal the world size 8"),
        (DistributedConfig(dp_replicate=3, ep=3), 6, "distributed.ep = 3: must divide dp_shard = 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            layout_of(config, devices)
