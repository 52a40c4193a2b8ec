"""`kempnerforge show`: what it prints, and that it needs no framework."""

from __future__ import annotations

import json

import pytest

from shared_config.cli import main
from shared_config.commands.show import compact, folded, readable_bytes, resolved_toml, smallest_world_size
from shared_config.contract.counts import count_parameters
from shared_config.contract.parameters import parameter_table
from shared_config.loader import config_from_toml, load_config, preset_names
from tests.cli.processes import run_python


@pytest.mark.parametrize("preset", preset_names())
def test_printed_toml_loads_as_the_same_config(preset: str) -> None:
    config = load_config(preset)
    assert config_from_toml(resolved_toml(config)) == config


def test_derived_values_stand_in_comments() -> None:
    text = resolved_toml(load_config("debug", ["--model.n_kv_heads", "none"]))
    assert "# n_kv_heads = 4, derived\n# head_dim = 32, derived\n" in text


@pytest.mark.parametrize("preset", preset_names())
def test_folded_table_counts_every_parameter(preset: str) -> None:
    config = load_config(preset)
    rows = folded(parameter_table(config.model, config.vlm))
    assert sum(spec.size * copies for _, spec, copies in rows if not spec.is_buffer) == count_parameters(
        config.model, config.vlm
    )


def test_folding_joins_layers_and_experts_of_one_shape_only() -> None:
    config = load_config("debug_moe", ["--model.moe_packed_experts", "false"])
    names = [name for name, _, _ in folded(parameter_table(config.model))]
    assert "layers.{0..3}.attention.q_proj.weight" in names
    assert "layers.{0,2}.mlp.up_proj.weight" in names
    assert "layers.{1,3}.mlp.experts.{0..7}.up_proj.weight" in names


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "3"), ([0, 1], "{0,1}"), ([0, 1, 2], "{0..2}"), ([1, 3, 5], "{1,3..5}"), ([0, 1, 4], "{0,1,4}")],
)
def test_compact_numbers(numbers: list[int], text: str) -> None:
    assert compact(numbers) == text


def test_readable_bytes() -> None:
    assert [readable_bytes(n) for n in (0, 1023, 1024, 3 * 2**29)] == ["0 B", "1023 B", "1 KiB", "1.5 GiB"]


def test_show_prints_counts_and_memory_of_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "llama3_70b", "--world-size", "64", "--distributed.tp", "8"]) == 0
    printed = capsys.readouterr().out
    assert "70,553,706,496" in printed
    assert "dp_replicate 1, dp_shard 8, tp 8, pp 1, ep 1" in printed
    assert "4.107 GiB" in printed  # 70.55e9 / 64 in float32


def test_layout_without_world_size_takes_the_devices_it_needs() -> None:
    config = load_config("llama3_70b", ["--distributed.tp=8", "--distributed.pp=4", "--distributed.dp_replicate=2"])
    assert smallest_world_size(config) == 64


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
