"""Sections are strict, frozen and hashable, report all problems at once, and derive what was left open."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import TypeAdapter

from shared_config import ConfigError, JobConfig, ModelConfig, VLMConfig
from shared_config.contract.function import differences, function_of
from shared_config.interchange.toml import json_schema
from shared_config.registry import Registry, temporary
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    DistributedConfig,
    FreezeSpec,
    FreezeStage,
    MoMaConfig,
    MoTConfig,
    RopeScaling,
    VideoConfig,
    VisionEncoderConfig,
    pooled_token_count,
)
from shared_config.schema.base import EXECUTION, NESTED, Section, function_names, section

RANDOM_ENCODER = {"type": "random", "feature_dim": 8, "num_tokens": 16}
VIT: dict[str, Any] = {"type": "vit", "feature_dim": 24, "image_size": 32, "patch_size": 8, "n_heads": 3, "n_layers": 1}


@section
class Added(Section):
    scale: float = 1.0
    workers: Annotated[int, EXECUTION] = 1


@section
class AddedJob(JobConfig):
    added: Annotated[Added, NESTED] = Added()
    tuning: Annotated[Added, NESTED, EXECUTION] = Added()


def refused(build: Any, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**fields)
    return str(caught.value)


def test_derived_fields_read_as_numbers_and_follow_changes() -> None:
    config = ModelConfig(dim=64, n_heads=8)
    assert (config.n_kv_heads, config.head_dim) == (8, 8)
    changed = config.replace(n_heads=4)
    assert (changed.n_kv_heads, changed.head_dim) == (4, 16)
    assert ModelConfig(dim=64, n_heads=8, n_kv_heads=2).replace(n_heads=4).n_kv_heads == 2


def test_all_problems_are_reported_at_once_with_field_value_and_rule() -> None:
    message = refused(
        JobConfig,
        model={"dim": -1, "activation": "tanh", "dmi": 3},
        train={"seq_len": "long"},
        vlm={"arch": "nope"},
        optimizer={"betas": [0.9, 1.5]},
    )
    assert message.splitlines() == [
        "model.dim = -1: must be greater than 0",
        "model.activation = 'tanh': must be one of geglu_tanh, gelu, relu, silu, or registered first",
        "model.dmi = 3: unknown key",
        "train.seq_len = 'long': must be a valid integer",
        "optimizer.betas.1 = 1.5: must be less than 1",
        f"vlm.arch = 'nope': must be one of {', '.join(VLMConfig.architectures())}",
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_heads": 7, "dim": 64}, "n_heads = 7"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"dim": 32, "n_heads": 32}, "head_dim = 1"),
        ({"dim": True}, "dim = True"),
        ({"norm_eps": float("nan")}, "norm_eps = nan"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.original_max_seq_len = None"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor = 2.0"),
        ({"rope_scaling": 3}, "rope_scaling = 3"),
        ({"num_experts": 2, "moe_top_k": 3}, "moe_top_k = 3"),
        ({"num_experts": 2, "moe_frequency": 33}, "moe_frequency = 33"),
        ({"num_experts": 2, "moe_sequence_aux_loss_weight": 0.1}, "moe_sequence_aux_loss_weight = 0.1"),
        ({"num_experts": 2, "moe_bias_schedule": "cosine_decay"}, "moe_bias_schedule = 'cosine_decay'"),
        ({"moe_router": "hash"}, "moe_router = 'hash'"),
        ({"sliding_window": 0}, "sliding_window = 0"),
    ],
)
def test_model_values_no_backend_can_run_are_refused(fields: dict[str, Any], expected: str) -> None:
    assert expected in refused(ModelConfig, **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"vlm": {"arch": "mot"}}, "vision_encoder = None"),
        ({"video": {}}, "video ="),
        ({"vlm": {}, "vision_encoder": RANDOM_ENCODER}, "vlm.arch: required"),
        ({"vlm": {"arch": {}}, "vision_encoder": RANDOM_ENCODER}, "vlm.arch = {}: must be one of"),
        ({"vlm": {"arch": "mot", "max_text_len": 2040}, "vision_encoder": RANDOM_ENCODER}, "16 image tokens must fit"),
        (
            {
                "vlm": {"arch": "mot"},
                "vision_encoder": {**RANDOM_ENCODER, "num_tokens": 10},
                "adapter": {"type": "avgpool"},
            },
            "adapter.type = 'avgpool': num_input_tokens = 10: must be a square number",
        ),
        (
            {"vlm": {"arch": "mot", "mot_image_n_heads": 4}, "vision_encoder": RANDOM_ENCODER},
            "vlm.mot_image_n_heads = 4",
        ),
        (
            {"vlm": {"arch": "mot", "mot_image_n_kv_heads": 5}, "vision_encoder": RANDOM_ENCODER},
            "vlm.mot_image_n_kv_heads = 5: must divide model.n_heads = 32",
        ),
        (
            {
                "vlm": {"arch": "cross_attention", "cross_attention_every_n_layers": 33},
                "vision_encoder": RANDOM_ENCODER,
            },
            "vlm.cross_attention_every_n_layers = 33",
        ),
        (
            {"vlm": {"arch": "moma"}, "vision_encoder": RANDOM_ENCODER, "model": {"num_experts": 4}},
            "model.num_experts = 4",
        ),
        (
            {
                "vlm": {"arch": "mot"},
                "vision_encoder": RANDOM_ENCODER,
                "adapter": {"type": "attentional_pool", "pool_heads": 7},
            },
            "adapter.pool_heads = 7",
        ),
        (
            {"vlm": {"arch": "mot"}, "vision_encoder": {**RANDOM_ENCODER, "image_size": 32}, "video": {}},
            "video.frame_size = 224",
        ),
        ({"train": {"seq_len": 4096}}, "train.seq_len = 4096"),
        ({"scheduler": {"decay_steps": 10}}, "scheduler.decay_steps = 10"),
        ({"eval": {"steps": 0, "interval": 5}}, "eval.steps = 0"),
        ({"profiling": {"start_step": 5}}, "profiling.end_step = 0"),
        ({"distributed": {"pp_schedule": "1f1b"}}, "distributed.pp_schedule = '1f1b': unknown key"),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(fields: dict[str, Any], expected: str) -> None:
    assert expected in refused(JobConfig, **fields)


def test_sequence_budget_counts_frames_and_pooled_tokens() -> None:
    fields = {
        "vision_encoder": RANDOM_ENCODER,
        "adapter": {"type": "avgpool", "pool_window": 3},
        "video": {"max_frames": 16},
    }
    model = {"max_seq_len": 128}
    train = {"seq_len": 64}
    JobConfig(vlm={"arch": "mot", "max_text_len": 64}, model=model, train=train, **fields)  # type: ignore[arg-type]
    assert "64 image tokens" in refused(
        JobConfig, vlm={"arch": "mot", "max_text_len": 65}, model=model, train=train, **fields
    )
    JobConfig(vlm={"arch": "cross_attention", "max_text_len": 128}, model=model, train=train, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "window", "expected"), [(16, 2, 4), (16, 3, 4), (49, 2, 16), (1, 5, 1)])
def test_pooled_token_count(tokens: int, window: int, expected: int) -> None:
    assert pooled_token_count(tokens, window) == expected


@pytest.mark.parametrize(("tokens", "window"), [(15, 2), (16, 3), (0, 1)])
def test_pooled_token_count_refuses_what_forms_no_grid(tokens: int, window: int) -> None:
    with pytest.raises(ValueError, match="must"):
        pooled_token_count(tokens, window, require_divisible=True)


def test_vlm_sections() -> None:
    assert VLMConfig.for_arch("mot", max_text_len=7) == MoTConfig(max_text_len=7)
    assert "arch = 'x'" in refused(lambda: VLMConfig.for_arch("x"))
    assert CrossAttentionConfig().residual_stream_image_tokens(9) == 0
    assert MoTConfig().residual_stream_image_tokens(9) == 9
    assert CrossAttentionConfig().resolved_heads(8) == (8, 8)
    assert CrossAttentionConfig(cross_attention_n_heads=4, cross_attention_n_kv_heads=2).resolved_heads(8) == (4, 2)
    assert MoMaConfig().effective_capacity_factor("text") == 0.25
    assert MoMaConfig(moma_capacity_factor=0.5).effective_capacity_factor("text") == 0.5
    assert "moma_experts_per_modality" in refused(MoMaConfig, moma_experts_per_modality={"image": 4})
    assert "freeze = 'ears'" in refused(MoTConfig, freeze=[FreezeSpec("ears")])
    stages = [FreezeStage(5, (FreezeSpec("adapter"),)), FreezeStage(5)]
    assert "strictly increasing" in refused(MoTConfig, freeze_schedule=stages)
    assert "path = ''" in refused(VisionEncoderConfig, type="siglip2")
    assert "num_tokens = 0" in refused(VisionEncoderConfig)
    assert "min_frames = 20" in refused(VideoConfig, min_frames=20)
    assert "moma_capacity_factor = 1e-05: must be 0 or" in refused(MoMaConfig, moma_capacity_factor=1e-5)
    for modalities in (("image",), ("text", "text"), ("image", "sound")):
        assert "'image' and 'text', each once" in refused(MoTConfig, mot_modalities=modalities)
    assert "high_freq_factor" in refused(RopeScaling, type="llama3", original_max_seq_len=8, high_freq_factor=1.0)


def test_a_new_architecture_is_one_class() -> None:
    @section
    class LateFusionConfig(VLMConfig, arch="late_fusion"):
        arch: Literal["late_fusion"] = "late_fusion"
        fusion_layer: int = 3
        image_tokens_in_stream: ClassVar[bool] = False

    try:
        job = JobConfig(vlm={"arch": "late_fusion", "fusion_layer": 2}, vision_encoder=RANDOM_ENCODER)  # type: ignore[arg-type]
        assert isinstance(job.vlm, LateFusionConfig)
        assert job.vlm.fusion_layer == 2
        assert "late_fusion" in json.dumps(json_schema())
    finally:
        VLMConfig.forget("late_fusion")


def test_registered_names_become_valid_config_values() -> None:
    registry = Registry()
    with pytest.raises(KeyError, match="Unknown adapter: 'perceiver'"):
        registry.get("adapter", "perceiver")
    assert "type = 'perceiver'" in refused(AdapterConfig, type="perceiver")
    with temporary():
        registry.register("adapter", "perceiver")(lambda: None)
        assert AdapterConfig(type="perceiver").type == "perceiver"
        with pytest.raises(ValueError, match="registered already"):
            registry.register("adapter", "perceiver")(lambda: None)
    assert "type = 'perceiver'" in refused(AdapterConfig, type="perceiver")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "vit"}, "feature_dim = 0"),
        ({"type": "random", "feature_dim": 4, "num_tokens": 4, "n_layers": 1}, "n_layers = 1"),
        ({**VIT, "patch_size": 5}, "patch_size = 5"),
        ({**VIT, "num_tokens": 9}, "num_tokens = 9"),
        ({**VIT, "n_heads": 5}, "n_heads = 5"),
        ({"type": "clip"}, "path = ''"),
    ],
)
def test_encoders_that_can_not_be_built_are_refused(fields: dict[str, Any], expected: str) -> None:
    assert expected in refused(VisionEncoderConfig, **fields)


def test_encoders_say_what_they_know() -> None:
    vit = VisionEncoderConfig(**VIT)
    assert (vit.known_num_tokens, vit.known_image_size) == (16, 32)
    assert VisionEncoderConfig(**RANDOM_ENCODER).known_image_size == 32
    folder = VisionEncoderConfig(type="clip", path="here")
    assert (folder.known_num_tokens, folder.known_image_size) == (0, 0)


def test_configs_are_frozen_hashable_and_copy() -> None:
    job = JobConfig(vlm={"arch": "moma"}, vision_encoder=RANDOM_ENCODER)  # type: ignore[arg-type]
    assert len({job, copy.deepcopy(job), pickle.loads(pickle.dumps(job))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.model.dim = 3  # type: ignore[misc]
    assert isinstance(job.vlm, MoMaConfig)
    with pytest.raises(TypeError, match="item assignment"):
        job.vlm.moma_experts_per_modality["text"] = 9  # type: ignore[index]


@pytest.mark.parametrize(
    ("layout", "world_size", "expected"),
    [
        ({"dp_shard": 2, "tp": 2}, 8, "dp_shard = 2"),
        ({"tp": 3}, 3, "tp = 3"),
        ({"ep": 2}, 2, "ep = 2"),
        ({"ep": 3}, 2, "ep = 3"),
        ({"pp": 33}, 33, "pp = 33"),
    ],
)
def test_layouts_are_checked_against_the_number_of_devices(
    layout: dict[str, int], world_size: int, expected: str
) -> None:
    job = JobConfig(distributed=DistributedConfig(**layout))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=expected):
        job.validate(world_size)


def test_layouts_that_fit() -> None:
    JobConfig().validate(8)
    JobConfig(distributed=DistributedConfig(tp=4, pp=2)).validate(8)
    JobConfig(distributed=DistributedConfig(ep=4), model=ModelConfig(num_experts=8)).validate(8)


def test_json_schema_knows_every_field() -> None:
    schema: Any = json_schema()
    assert schema["$defs"]["ModelConfig"]["properties"]["dim"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["ModelConfig"]["additionalProperties"] is False
    assert {entry.name for entry in dataclasses.fields(JobConfig)} == set(schema["properties"])  # type: ignore[arg-type]
    plain = TypeAdapter(JobConfig).json_schema()
    for part in (*schema["$defs"].values(), *plain["$defs"].values()):
        for field in part.get("properties", {}).values():
            field.pop("description", None)
    assert plain == schema


def test_importing_the_config_loads_no_framework() -> None:
    code = (
        "import shared_config, shared_config.loader, sys; sys.exit(bool({'torch', 'jax', 'flax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ffn_widths() -> None:
    assert ModelConfig().computed_ffn_hidden_dim == 11008
    assert ModelConfig(ffn_hidden_dim=100).computed_ffn_hidden_dim == 100
    assert ModelConfig(ffn_hidden_dim=100, moe_expert_ffn_multiplier=0.5).computed_expert_ffn_hidden_dim == 48
    assert ModelConfig(ffn_hidden_dim=100, moe_expert_ffn_multiplier=0.01).computed_expert_ffn_hidden_dim == 16
    halves = [ModelConfig(ffn_hidden_dim=width, moe_expert_ffn_multiplier=0.5) for width in (80, 81, 112, 144)]
    assert [config.computed_expert_ffn_hidden_dim for config in halves] == [32, 48, 64, 64]
    assert ModelConfig(dim=96, n_heads=4).computed_ffn_hidden_dim == 256
    assert ModelConfig(dim=100, n_heads=5, ffn_dim_multiplier=1.5).computed_ffn_hidden_dim == 512


def test_which_layers_have_experts() -> None:
    config = ModelConfig(num_experts=4, moe_frequency=3, n_layers=8)
    assert [layer for layer in range(8) if config.is_moe_layer(layer)] == [2, 5]
    assert not ModelConfig().is_moe_layer(0)


def test_a_new_section_or_field_belongs_to_the_function_unless_it_is_marked() -> None:
    assert set(function_names(AddedJob)) - set(function_names(JobConfig)) == {"added"}
    one = AddedJob()
    for other, found in (
        (one.replace(added=Added(scale=2.0)), ["added.scale"]),
        (one.replace(added=Added(workers=2)), []),
        (one.replace(tuning=Added(scale=2.0)), []),
    ):
        assert [difference.field for difference in differences(one, other)] == found


def test_sections_of_a_model_and_of_what_it_is_shown_belong_to_the_function() -> None:
    job = JobConfig(
        vlm=VLMConfig.for_arch("joint_decoder"),
        vision_encoder=VisionEncoderConfig(**RANDOM_ENCODER),
        video=VideoConfig(),
    )
    assert function_names(JobConfig) == ("model", "vision_encoder", "adapter", "vlm", "video")
    assert {name.partition(".")[0] for name in function_of(job)} == set(function_names(JobConfig))
    assert function_of(JobConfig())["vlm.arch"] is None


def test_a_name_that_no_backend_knows_is_refused_without_importing_one() -> None:
    code = (
        "import sys\n"
        "from shared_config import ModelConfig\n"
        "from shared_config.registry import names_in_backends\n"
        "try: ModelConfig(moe_router='sofmax_topk')\n"
        "except ValueError as error: print(error)\n"
        "print([name for name in ('torch', 'jax', 'kempnerforge_torch', 'kempnerforge_jax') if name in sys.modules])\n"
        "print(('router', 'softmax_topk') in names_in_backends(), ('optimizer', 'adamw') in names_in_backends())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, imported, known = done.stdout.splitlines()
    assert message == ("moe_router = 'sofmax_topk': must be one of sigmoid_topk, softmax_topk, or registered first")
    assert (imported, known) == ("[]", "True True")
