"""`kempnerforge show`: what it prints, and that it needs no framework."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from shared_config.cli import main
from shared_config.commands.show import counts_of, memory_of, readable_bytes, resolved_toml, smallest_world_size
from shared_config.contract.counts import count_active_parameters, count_parameters, flops_per_token, training_memory
from shared_config.contract.flops import micro_batch_flops
from shared_config.contract.parameters import FOLDED, fold, parameter_groups, parameter_table, unfold
from shared_config.contract.specs import Constant, ParameterSpec, ParameterTable
from shared_config.interchange.toml import config_from_toml
from shared_config.loader import load_config, preset_names
from shared_config.registry import declare, temporary
from shared_config.schema.base import section
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig
from tests.cli.processes import run_python


@pytest.mark.parametrize("preset", preset_names())
def test_printed_toml_loads_as_the_same_config(preset: str) -> None:
    config = load_config(preset)
    assert config_from_toml(resolved_toml(config)) == config


def test_derived_values_stand_in_comments() -> None:
    text = resolved_toml(load_config("debug", ["--model.n_kv_heads", "none"]))
    assert "# n_kv_heads = 4, derived\n# head_dim = 32, derived\n" in text


def folded(table: ParameterTable) -> dict[tuple[str, ParameterSpec], int]:
    """Tensors by name without numbers, and how many they are: the plain way to count."""
    return Counter((re.sub(r"\b\d+\b", "*", name), spec) for name, spec in table.items())


def assert_groups_are_the_table(config: ModelConfig, vlm: VLMConfig | None) -> None:
    groups = Counter()
    for group in parameter_groups(config, vlm):
        name = re.sub(r"layers\.\{[^}]*\}( but [^.]*(\.\.)?[^.]*)?\.", "layers.*.", group.name)
        name = re.sub(r"\{[^}]*\}|\b\d+\b", "*", name)
        groups[name, group.spec] += group.copies
    assert groups == folded(parameter_table(config, vlm))
    sizes = {name: spec.size for name, spec in parameter_table(config, vlm).items() if not spec.is_buffer}
    assert count_parameters(config, vlm) == sum(sizes.values())


@pytest.mark.parametrize("preset", preset_names())
def test_groups_of_parameters_are_the_table_of_presets(preset: str) -> None:
    config = load_config(preset)
    assert_groups_are_the_table(config.model, config.vlm)


@given(
    layers=st.integers(1, 25),
    experts=st.integers(0, 12),
    frequency=st.integers(1, 25),
    packed=st.booleans(),
    arch=st.sampled_from(("none", "cross_attention", "mot", "moma")),
)
def test_groups_of_parameters_are_the_table(layers: int, experts: int, frequency: int, packed: bool, arch: str) -> None:
    experts = 0 if arch == "moma" else experts
    overrides = [
        *("--model.n_layers", str(layers), "--model.num_experts", str(experts), "--model.moe_top_k=1"),
        *("--model.moe_frequency", str(min(layers, frequency)), f"--model.moe_packed_experts={str(packed).lower()}"),
    ]
    if arch == "cross_attention":
        overrides.append(f"--vlm.cross_attention_every_n_layers={min(layers, frequency)}")
    config = load_config("debug" if arch == "none" else f"debug_vlm_{arch}", overrides)
    assert_groups_are_the_table(config.model, config.vlm)


def numbers_of(part: str) -> list[int]:
    found = FOLDED.fullmatch(part)
    return [*unfold(found)] if found else [int(part)]


@given(widths=st.lists(st.integers(1, 3), min_size=1, max_size=14))
def test_layers_that_differ_are_grouped_by_what_they_are(widths: list[int]) -> None:
    """An architecture whose layers have each a width of their own."""

    def layer_parameters(config: ModelConfig, vlm: VLMConfig | None, layer: int) -> ParameterTable:
        return {"up.weight": ParameterSpec((widths[layer], 4), Constant(0.0), (None, None))}

    with temporary():

        @section
        class Uneven(VLMConfig, arch="uneven"):
            arch: Literal["uneven"] = "uneven"

        declare("architecture", "uneven", layer_parameters=layer_parameters)
        config = ModelConfig(n_layers=len(widths), dim=8, n_heads=2, vocab_size=5)
        found = {}
        for group in parameter_groups(config, Uneven()):
            if ".up." not in group.name:
                continue
            parts = group.name.removeprefix("layers.").removesuffix(".up.weight").split(" and ")
            layers = [number for part in parts for number in numbers_of(part)]
            assert len(layers) == group.copies
            found |= dict.fromkeys(layers, group.spec.shape[0])
        assert [found[layer] for layer in range(len(widths))] == widths
        assert len(found) == len(widths)


def test_groups_join_layers_and_experts_of_one_shape_only() -> None:
    config = load_config("debug_moe", ["--model.moe_packed_experts", "false"])
    names = [group.name for group in parameter_groups(config.model)]
    assert "layers.{0..3}.attention.q_proj.weight" in names
    assert "layers.{0,2}.mlp.up_proj.weight" in names
    assert "layers.{1,3}.mlp.experts.{0..7}.up_proj.weight" in names


@given(start=st.integers(0, 9), step=st.integers(1, 9), count=st.integers(1, 9))
def test_folded_numbers_are_read_back(start: int, step: int, count: int) -> None:
    numbers = range(start, start + step * count, step)
    found = FOLDED.fullmatch(fold(numbers))
    assert [*unfold(found)] == [*numbers] if found else fold(numbers) == str(start)


@pytest.mark.parametrize(
    "sizes",
    [
        ("--model.n_layers=1000000",),
        ("--model.num_experts=1000000", "--model.n_layers=1000000", "--model.moe_frequency=7"),
        ("--model.num_experts=1000000", "--model.n_layers=4", "--model.moe_packed_experts=true"),
        (f"--model.n_layers={2**63 - 1}", f"--model.num_experts={2**63 - 1}", f"--model.vocab_size={2**63 - 1}"),
    ],
)
def test_sizes_beyond_any_machine_are_shown_at_once(sizes: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    assert main(["show", "debug", *sizes]) == 0
    assert time.perf_counter() - began < 1
    assert len(capsys.readouterr().out) < 20_000


def test_readable_bytes() -> None:
    assert [readable_bytes(n) for n in (0, 1023, 1024, 3 * 2**29)] == ["0 B", "1023 B", "1 KiB", "1.5 GiB"]


def test_show_prints_counts_and_memory_of_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "llama3_70b", "--world-size", "64", "--distributed.tp", "8"]) == 0
    printed = capsys.readouterr().out
    assert "70,553,706,496" in printed
    assert "dp_replicate 1, dp_shard 8, cp 1, tp 8, pp 1, ep 1" in printed
    assert "4.107 GiB" in printed  # 70.55e9 / 64 in float32


def rows_of(*tables: Table) -> dict[str, str]:
    """What stands beside each label."""
    columns = [[list(column.cells) for column in table.columns] for table in tables]
    return {str(label): str(value) for labels, values in columns for label, value in zip(labels, values, strict=True)}


def test_every_number_stands_beside_its_label() -> None:
    overrides = ["--model.num_experts=4", "--train.mixed_precision=bf16", "--vlm.mot_image_n_kv_heads=1"]
    overrides += ["--distributed.tp=2", "--distributed.dp_replicate=3"]
    overrides += ['--vlm.freeze=[{module="vision_encoder"}]']
    config = load_config("debug_vlm_mot", overrides)
    model, vlm = config.model, config.vlm
    assert model.max_seq_len != config.train.seq_len
    rows = rows_of(counts_of(config), memory_of(config, 24))
    flops, memory = flops_per_token(model, config.train.seq_len, vlm), training_memory(config, 24)
    images = micro_batch_flops(config)
    assert images is not None
    numbers = (memory.parameters, memory.gradients, memory.optimizer, memory.compute_copy)
    assert len({*numbers, sum(numbers)}) == 5
    assert rows == {
        "parameters of the language model": f"{count_parameters(model, vlm):,}",
        "parameters used per token": f"{count_active_parameters(model, vlm):,}",
        f"FLOPs per text token, forward, {config.train.seq_len} positions": f"{flops.matmul + flops.attention:,}",
        "  in matrix products": f"{flops.matmul:,}",
        "  in attention": f"{flops.attention:,}",
        "FLOPs per text token, training": f"{3 * (flops.matmul + flops.attention):,}",
        f"FLOPs of {config.train.batch_size} rows with images, training": f"{images.training:,}",
        "  vision encoder": f"{images.tower.training:,}",
        "  adapter": f"{images.adapter.training:,}",
        "  language model": f"{images.model.training:,}",
        f"key/value cache per row, bfloat16, {model.max_seq_len} positions": readable_bytes(
            2 * model.n_layers * model.max_seq_len * 2 * model.head_size * 2
        ),
        "devices": "24",
        "layout": "dp_replicate 3, dp_shard 4, cp 1, tp 2, pp 1, ep 1",
        "parameters, float32": readable_bytes(memory.parameters),
        "gradients, float32": readable_bytes(memory.gradients),
        "moments, float32": readable_bytes(memory.optimizer),
        "bfloat16 copy at work": readable_bytes(memory.compute_copy),
        "total": readable_bytes(sum(numbers)),
    }


@pytest.mark.parametrize(
    ("options", "devices", "said"),
    [
        (("--train.mixed_precision=bf16",), 1, "bfloat16"),
        (("--train.mixed_precision=bf16", "--train.grad_accum_steps=2"), 1, "bfloat16 and their float32 sums"),
        (("--train.mixed_precision=bf16", "--optimizer.name=lion"), 1, "bfloat16 and their float32 sums"),
        (("--train.mixed_precision=bf16",), 2, "float32"),
        (("--train.mixed_precision=fp32",), 1, "float32"),
    ],
)
def test_gradients_are_said_in_the_dtypes_in_which_they_are_held(
    options: tuple[str, ...], devices: int, said: str
) -> None:
    config = load_config("debug", ["--distributed.dp_shard=-1", *options])
    rows = rows_of(memory_of(config, devices))
    assert [name for name in rows if name.startswith("gradients")] == [f"gradients, {said}"]
    assert rows[f"gradients, {said}"] == readable_bytes(training_memory(config, devices).gradients)


def test_an_encoder_that_is_not_here_is_not_counted_silently() -> None:
    rows = rows_of(memory_of(load_config("vlm_8b_mot"), 1))
    assert rows["vision encoder"] == "not counted: no model in models/siglip2-so400m-patch14-384"


def test_layout_without_world_size_takes_the_devices_it_needs() -> None:
    config = load_config("llama3_70b", ["--distributed.tp=8", "--distributed.pp=4", "--distributed.dp_replicate=2"])
    assert smallest_world_size(config) == 64
    assert smallest_world_size(load_config("llama3_70b", ["--distributed.tp=8", "--distributed.cp=3"])) == 24


def test_show_alone_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in preset_names():
        (line,) = (line for line in lines if f" {name} " in line)
        assert "#" not in line
    assert any("llama3_70b" in line and "70,553,706,496" in line for line in lines)


def test_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "model" in schema["properties"]
    assert "micro-batch of\none data-parallel rank" in schema["$defs"]["ModelConfig"]["description"]
    fields = schema["$defs"]["ModelConfig"]["properties"]
    for name in ("moe_aux_loss_weight", "moe_capacity_factor", "moe_gradient_scale"):
        assert "one micro-batch of one data-parallel rank" in fields[name]["description"]
    assert "does not depend on how a batch is cut" in fields["moe_sequence_aux_loss_weight"]["description"]


def test_show_needs_neither_framework_and_is_quick() -> None:
    result = run_python("-m", "shared_config.cli", "show", "llama3_70b", blocked=("torch", "jax"))
    assert result.returncode == 0, result.stderr
    assert "llama3_70b" in result.stdout
    assert result.seconds < 3


def test_bare_import_loads_no_framework() -> None:
    code = (
        "import shared_config, shared_config.cli, sys; print([m for m in ('torch', 'jax', 'flax') if m in sys.modules])"
    )
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("layout", "devices", "said"),
    [
        (["--distributed.pp=2"], 2, "train.grad_accum_steps = 1: must be at least distributed.pp = 2"),
        (["--distributed.tp=2", "--model.ffn_hidden_dim=131"], 2, "must divide model.ffn_hidden_dim = 131"),
    ],
)
def test_layouts_that_can_not_be_are_refused(
    layout: list[str], devices: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "debug", *layout, "--world-size", str(devices)]) != 0
    assert said in capsys.readouterr().err
