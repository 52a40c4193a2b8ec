"""What steps of models of each kind cost in layouts of each kind, part by part, as it was once looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from shared_config.contract.activations import expert_rows, gathers_tokens, kept_bytes, logits_rows, widening_flops
from shared_config.contract.scale import HARDWARE, cost_of
from shared_config.contract.sharding import Layout, refusals
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig
from tests.config.test_contract_golden import EVERY, written
from tests.config.test_scale import MIXTURE

LARGE = {
    "llama3_8b": load_config("llama3_8b"),
    "moe_small": load_config("moe_small"),
    "capacity": load_config("moe_small", ["--model.moe_capacity_factor=1.25", "--model.moe_frequency=2"]),
    "trillion": load_config("moe_small", [*MIXTURE, "--model.moe_shared_expert_gate=true"]),
}
MODELS = {name: job for name, job in {**EVERY, **LARGE}.items() if job.vlm is None}
LAYOUTS = (
    Layout(), Layout(dp_shard=2), Layout(dp_replicate=2), Layout(dp_replicate=2, dp_shard=4, cp=2), Layout(tp=2),
    Layout(dp_shard=2, tp=2), Layout(ep=2), Layout(dp_shard=4, ep=2, tp=2), Layout(dp_shard=2, ep=8), Layout(cp=2),
    Layout(pp=2), Layout(dp_shard=2, tp=2, pp=2), Layout(dp_shard=16, pp=4), Layout(dp_shard=64, ep=4, cp=2),
)  # fmt: skip
MODES = ("none", "narrow", "selective", "full")
OPTIMIZERS = ("adamw", "muon", "lion")


def jobs() -> Iterator[tuple[str, JobConfig, Layout]]:
    """Each model in each layout, with the modes, dtypes and optimisers in turn."""
    for place, (name, job) in enumerate(MODELS.items()):
        for number, layout in enumerate(LAYOUTS, place):
            mode, optimizer = MODES[number % 4], OPTIMIZERS[number % 3]
            precision = ("bf16", "fp32")[number // 4 % 2]
            sizes = dataclasses.asdict(layout) | {"dp_shard": layout.dp_shard * layout.ep}
            changed = job.replace(
                distributed=job.distributed.replace(**sizes),
                train=job.train.replace(grad_accum_steps=8, activation_checkpointing=mode, mixed_precision=precision),
                optimizer=job.optimizer.replace(name=optimizer),
            )
            yield f"{name} {layout} {mode} {precision} {optimizer}", changed, layout


def lines_of(job: JobConfig, layout: Layout) -> Iterator[str]:
    """Of a step, and of a layer of each kind."""
    cost = cost_of(job, layout.devices, HARDWARE["h100"])
    times = " ".join(f"{seconds:.10g}" for seconds in (cost.compute, cost.exposed, cost.hidden, cost.bubble))
    yield f"  {cost.tokens} {cost.model_flops:.10g} {times} {' '.join(map(str, dataclasses.astuple(cost.memory)))}"
    yield f"  {' '.join('/'.join(map(str, dataclasses.astuple(each))) for each in cost.traffic)}"
    kinds = [False, True] if job.model.is_moe else [False]
    kept = [kept_bytes(job, layout, is_moe=is_moe) for is_moe in kinds]
    widening = [widening_flops(job, layout, is_moe=is_moe) for is_moe in kinds]
    rows = (expert_rows(job, layout), gathers_tokens(job, layout)) if job.model.is_moe else ()
    yield f"  {' '.join(map(str, [*kept, *widening, logits_rows(job, layout), *rows]))}"


def test_costs() -> None:
    lines = []
    for said, job, layout in jobs():
        lines.append(said)
        refused = refusals(job)
        lines += [f"  {reason}" for reason in refused] or lines_of(job, layout)
    written("costs.txt", lines)
