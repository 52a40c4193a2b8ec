"""``kempnerforge show``: what a config builds and costs, from the config alone; no framework is imported."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from shared_config.commands.common import console
from shared_config.commands.scale import WORLD_SIZES, costs_of, scale_page, traffic_of
from shared_config.contract.counts import (
    BFLOAT16,
    FLOAT32,
    count_active_parameters,
    count_parameters,
    flops_per_token,
    gradient_bytes,
    kv_cache_bytes,
    training_memory,
)
from shared_config.contract.decoding import PREFILL_CHUNK
from shared_config.contract.flops import micro_batch_flops
from shared_config.contract.parameters import aliases, parameter_groups
from shared_config.contract.scale import Hardware, cost_of, parse_hardware
from shared_config.contract.sharding import layout_of, refusals
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.contract.vision import TowerConfig
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.toml import config_to_toml, json_schema
from shared_config.interchange.vision import MODEL_TYPES, resolve_tower
from shared_config.loader import PRESETS, load_config, preset_names
from shared_config.schema.base import Section
from shared_config.schema.job import JobConfig

PREFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    if options.schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    if options.config is None:
        console().print(presets())
        return 0
    config = load_config(options.config, overrides)
    screen, hardware = console(), parse_hardware(options.hardware)
    if options.scale:
        sizes = WORLD_SIZES if options.world_size is None else (options.world_size,)
        for table in scale_page(config, sizes, hardware, options.step_tokens):
            screen.print(table)
        return 0
    world_size = smallest_world_size(config) if options.world_size is None else options.world_size
    config.validate(world_size)
    if problems := refusals(config):
        raise ConfigError(problems)
    print(resolved_toml(config))
    for table in tables(config, world_size, hardware):
        screen.print(table)
    return 0


def presets() -> Table:
    """Every preset with its size and the line its file begins with."""
    table = Table("preset", "parameters", "what it is")
    table.columns[1].justify = "right"
    for name in preset_names():
        config = load_config(name)
        description, _, _ = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").partition("\n")
        table.add_row(name, f"{count_parameters(config.model, config.vlm):,}", description.removeprefix("# "))
    return table


def tables(config: JobConfig, world_size: int, hardware: Hardware) -> Iterator[RenderableType]:
    """Parameters, counts, and memory; of a text model on several devices also what a step costs on paper."""
    yield parameters_of(config)
    yield counts_of(config)
    yield memory_of(config, world_size)
    if config.vlm is None and world_size > 1:
        cost = cost_of(config, world_size, hardware)
        yield traffic_of(cost, hardware)
        yield costs_of(cost, hardware)


def resolved_toml(config: JobConfig) -> str:
    """The config as TOML that loads as the same config; derived values stand in comments."""
    lines = []
    for line in config_to_toml(config).splitlines():
        lines.append(line)
        header = re.fullmatch(r"\[(\w+)\]", line)
        section = getattr(config, header[1], None) if header else None
        if isinstance(section, Section):
            given = section.given()
            names = [name for name in section.derive() if name not in given]
            lines.extend(f"# {name} = {getattr(section, name)}, derived" for name in names)
    return "\n".join(lines) + "\n"


def smallest_world_size(config: JobConfig) -> int:
    """Devices that the layout names, with a ``dp_shard`` that is left open taken as ``ep``, or 1."""
    layout = config.distributed
    shard = layout.dp_shard if layout.dp_shard > 0 else layout.ep
    return layout.dp_replicate * shard * layout.cp * layout.tp * layout.pp


def parameters_of(config: JobConfig) -> Table:
    """The parameter table, repeated layers folded."""
    table = Table("name", "shape", "axes", "initial", "copies", "elements", title="Parameters", title_justify="left")
    for number in (4, 5):
        table.columns[number].justify = "right"
    for group in parameter_groups(config.model, config.vlm):
        spec = group.spec
        table.add_row(
            group.name + (" (buffer)" if spec.is_buffer else ""),
            " x ".join(map(str, spec.shape)),
            ", ".join(axis or "-" for axis in spec.axes),
            _initial(spec),
            str(group.copies),
            f"{group.size:,}",
        )
    for alias, name in aliases(config.model).items():
        table.add_row(alias, "", "", f"is {name}", "", "0")
    return table


def counts_of(config: JobConfig) -> Table:
    """Parameters, floating point operations per token, key/value cache."""
    model, length = config.model, config.train.seq_len
    flops = flops_per_token(model, length, config.vlm)
    table = pairs("Counts")
    name = "parameters" if config.vlm is None else "parameters of the language model"
    table.add_row(name, f"{count_parameters(model, config.vlm):,}")
    if model.is_moe:
        table.add_row("parameters used per token", f"{count_active_parameters(model, config.vlm):,}")
    table.add_row(f"FLOPs per text token, forward, {length} positions", f"{flops.forward:,}")
    table.add_row("  in matrix products", f"{flops.matmul:,}")
    table.add_row("  in attention", f"{flops.attention:,}")
    table.add_row("FLOPs per text token, training", f"{flops.training:,}")
    for label, each in image_flops_of(config):
        table.add_row(label, f"{each:,}")
    cache = kv_cache_bytes(model, 1, model.max_seq_len, BFLOAT16, config.vlm, spare=PREFILL_CHUNK - 1)
    table.add_row(f"key/value cache per row, bfloat16, {model.max_seq_len} positions", readable_bytes(cache))
    return table


def image_flops_of(config: JobConfig) -> Iterator[tuple[str, int]]:
    """What a micro-batch of rows with images takes in training, the first stage of freezing, by part."""
    found = micro_batch_flops(config, known_tower(config))
    if found is None:
        return
    rows, model = config.train.batch_size, found.model
    kind = "clips" if config.video is not None else f"{config.data.max_images} images each"
    yield f"FLOPs of {rows} rows with {'images' if config.frames_per_row == 1 else kind}, training", found.training
    for name, part in (("vision encoder", found.tower), ("adapter", found.adapter), ("language model", model)):
        yield f"  {name}", part.training


def memory_of(config: JobConfig, world_size: int) -> Table:
    """Bytes each device holds during training."""
    layout, tower = config.distributed, known_tower(config)
    memory = training_memory(config, world_size, tower)
    axes = {
        "dp_replicate": layout.dp_replicate,
        "dp_shard": layout.resolved_dp_shard(world_size),
        "cp": layout.cp,
        "tp": layout.tp,
        "pp": layout.pp,
        "ep": layout.ep,
    }
    sizes = ", ".join(f"{name} {size}" for name, size in axes.items())
    table = pairs("Training memory per device, activations not counted")
    table.add_row("devices", str(world_size))
    table.add_row("layout", sizes)
    if config.vision_encoder is not None and config.vision_encoder.type in MODEL_TYPES and tower is None:
        table.add_row("vision encoder", f"not counted: no model in {config.vision_encoder.path}")
    table.add_row("parameters, float32", readable_bytes(memory.parameters))
    table.add_row(f"gradients, {kinds_of_gradients(config, world_size)}", readable_bytes(memory.gradients))
    table.add_row("moments, float32", readable_bytes(memory.optimizer))
    table.add_row("bfloat16 copy at work", readable_bytes(memory.compute_copy))
    table.add_row("total", readable_bytes(memory.total))
    return table


def kinds_of_gradients(config: JobConfig, world_size: int) -> str:
    """The dtypes of what training holds of gradients."""
    held = gradient_bytes(ParameterSpec((), Constant(0.0), ()), config, layout_of(config.distributed, world_size))
    return {FLOAT32: "float32", BFLOAT16: "bfloat16"}.get(held, "bfloat16 and their float32 sums")


def known_tower(config: JobConfig) -> TowerConfig | None:
    """The tower of the encoder, if there is one and its folder is here."""
    try:
        return None if config.vision_encoder is None else resolve_tower(config.vision_encoder)
    except UserError:
        return None


def readable_bytes(number: float) -> str:
    """Three digits and a binary prefix."""
    power = 0
    while number >= 1024 and power < len(PREFIXES) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.4g} {PREFIXES[power]}B"


def pairs(title: str) -> Table:
    """A table of names and values, to be filled."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _initial(spec: ParameterSpec) -> str:
    if isinstance(spec.initializer, Constant):
        return f"{spec.initializer.value:g}"
    return f"normal, std {spec.initializer.std:.4g}"
