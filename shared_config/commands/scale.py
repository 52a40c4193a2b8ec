"""``kempnerforge show --scale``: what layouts of a model cost on many devices, on paper; and a table of one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from shared_config.contract.counts import count_active_parameters, count_parameters, stage_groups
from shared_config.contract.scale import HIDDEN, Cost, Hardware, candidates, cost_of, transfer_seconds
from shared_config.contract.sharding import MESH_AXES, Layout, refusals
from shared_config.errors import ConfigError
from shared_config.schema.job import JobConfig

WORLD_SIZES = (1024, 2048, 4096, 8192, 16384)
SHOWN = 3
"""Layouts of each number of devices."""


def scale_page(job: JobConfig, sizes: Sequence[int], hardware: Hardware, step_tokens: int) -> Iterator[RenderableType]:
    """What is assumed, and for each number of devices the layouts that are fastest where nothing is hidden, of those
    that fit; before them FSDP alone, and the fastest one whatever it holds.

    Raises:
        ConfigError: a model whose costs are not known.
    """
    check_known(job)
    yield assumptions(job, hardware, step_tokens)
    table = Table(
        "devices", *MESH_AXES, "N", "memory", "sent", "products", "waits", "beside", "bubble", "MFU",
        "most, of products",
        title="N micro-batches of a data rank; GB that a device holds, and sends in a step; seconds of a step",
        title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in table.columns[:-1]:
        column.justify = "right"
    for size in sizes:
        costs = costs_on(job, size, hardware, step_tokens)
        for place, cost in enumerate(chosen(costs, hardware)):
            table.add_row(f"{size:,}" if place == 0 else "", *cells(cost, hardware))
    yield table


def check_known(job: JobConfig) -> None:
    """
    Raises:
        ConfigError: a model with images.
    """
    if job.vlm is not None:
        raise ConfigError([f"vlm.arch = {job.vlm.arch!r}: must be none for costs of a layout, known of text models"])


def costs_on(job: JobConfig, devices: int, hardware: Hardware, step_tokens: int) -> list[Cost]:
    """Of all layouts that the model allows on so many devices, the fastest first, whether they fit or not.

    Raises:
        ConfigError: there is none.
    """
    stages, costs = {}, []
    for each in candidates(job, devices, step_tokens):
        if not refusals(each):
            pp = each.distributed.pp
            stages.setdefault(pp, stage_groups(each))
            costs.append(cost_of(each, devices, hardware, stages[pp]))
    if not costs:
        rows = step_tokens // (job.train.seq_len * job.train.batch_size)
        raise ConfigError([f"--world-size = {devices}: no layout of powers of two shares out {rows} micro-batches"])
    return sorted(costs, key=lambda cost: cost.slowest)


def chosen(costs: Sequence[Cost], hardware: Hardware) -> list[Cost]:
    """FSDP alone, the fastest, and the fastest that fit; each once."""
    alone = [cost for cost in costs if cost.layout == Layout(dp_shard=cost.devices)]
    fitting = [cost for cost in costs if cost.memory.total <= hardware.memory]
    return list(dict.fromkeys([*alone, costs[0], *fitting[:SHOWN]]))


def assumptions(job: JobConfig, hardware: Hardware, step_tokens: int) -> Table:
    """What the page rests on."""
    table = Table(title="Assumed", title_justify="left", show_header=False)
    model = job.model
    table.add_row("parameters", f"{count_parameters(model):,}")
    table.add_row("  used by a token", f"{count_active_parameters(model):,}")
    table.add_row("tokens of a step, sequence, micro-batch of a data rank", f"{step_tokens:,}, {job.train.seq_len:,}, "
                  f"{job.train.batch_size * job.train.seq_len:,}")  # fmt: skip
    table.add_row("recomputation, precision", f"{job.train.activation_checkpointing}, {job.train.mixed_precision}")
    for field in dataclasses.fields(hardware):
        table.add_row(f"hardware: {field.name}", f"{getattr(hardware, field.name):g}")
    return table


def cells(cost: Cost, hardware: Hardware) -> list[str]:
    """Of a row, but for its first."""
    slow, fast = (cost.utilization(seconds, hardware) for seconds in (cost.slowest, cost.fastest))
    return [
        *(str(getattr(cost.layout, axis)) for axis in MESH_AXES),
        str(cost.micro_batches),
        f"{cost.memory.total / 1e9:.0f}",
        f"{sum(each.sent for each in cost.traffic) / 1e9:.0f}",
        *(f"{seconds:.2f}" for seconds in (cost.compute, cost.exposed, cost.hidden)),
        f"{cost.bubble:.0%}",
        f"{slow:.0%}-{fast:.0%}",
        limit(cost, hardware),
    ]


def limit(cost: Cost, hardware: Hardware) -> str:
    """What breaks first, or what costs most besides products, as a share of their time."""
    if cost.memory.total > hardware.memory:
        names = [field.name for field in dataclasses.fields(cost.memory)]
        largest = max(names, key=lambda name: getattr(cost.memory, name))
        return f"too much: {largest}"
    seconds = {"bubble": (cost.compute + cost.exposed) * cost.bubble}
    for each in cost.traffic:
        seconds[each.purpose] = seconds.get(each.purpose, 0.0) + transfer_seconds(each, cost.layout, hardware)
    name = max(seconds, key=lambda key: seconds[key])
    return f"{name}: {seconds[name] / cost.compute:.0%}"


def traffic_of(cost: Cost, hardware: Hardware) -> Table:
    """The collectives of one device in a step, with the time that each takes."""
    table = Table(
        "for", "kind", "along", "count", "GB", "GB sent", "seconds", "beside products",
        title=f"Collectives of a step, for each of {cost.devices} devices", title_justify="left",
    )  # fmt: skip
    for column in range(3, 7):
        table.columns[column].justify = "right"
    for each in cost.traffic:
        seconds = transfer_seconds(each, cost.layout, hardware)
        numbers = (f"{each.count:,}", f"{each.bytes / 1e9:.4g}", f"{each.sent / 1e9:.4g}", f"{seconds:.4g}")
        hides = "yes" if each.purpose in HIDDEN else "no"
        table.add_row(each.purpose, each.kind, f"{', '.join(each.axes)}: {each.ranks}", *numbers, hides)
    return table


def costs_of(cost: Cost, hardware: Hardware) -> Table:
    """Memory and time of one layout."""
    table = Table(title="A step on paper, on the device with most to do", title_justify="left", show_header=False)
    memory = cost.memory
    for name in ("states", "gathered", "activations", "logits", "buffers", "total"):
        table.add_row(f"memory: {name}", f"{getattr(memory, name) / 1e9:.4g} GB")
    table.add_row("tokens, micro-batches of a data rank", f"{cost.tokens:,}, {cost.micro_batches}")
    for name in ("compute", "exposed", "hidden", "fastest", "slowest"):
        table.add_row(f"seconds: {name}", f"{getattr(cost, name):.4g}")
    table.add_row("bubble of the pipeline", f"{cost.bubble:.1%}")
    slow, fast = (cost.utilization(seconds, hardware) for seconds in (cost.slowest, cost.fastest))
    table.add_row("share of peak FLOPs that the model's are", f"{slow:.1%} to {fast:.1%}")
    table.add_row("most, as a share of products", limit(cost, hardware))
    return table
