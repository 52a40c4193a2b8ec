"""What layouts cost on paper: laws that hold for all layouts, and sizes that papers and sums by hand give."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.contract.activations import WIDENED, buffer_bytes, expert_rows, gathers_tokens, kept_bytes
from shared_config.contract.counts import count_parameters, flops_per_token, training_memory
from shared_config.contract.labels import rows_of_logits
from shared_config.contract.scale import (
    HARDWARE,
    Cost,
    Hardware,
    candidates,
    cost_of,
    memory_of,
    parse_hardware,
    transfer_seconds,
)
from shared_config.contract.sharding import Layout, layout_of
from shared_config.contract.traffic import Traffic, step_traffic
from shared_config.errors import UserError
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig

H100 = HARDWARE["h100"]
MODELS = ("llama3_8b", "moe_small")
MIXTURE = (
    "--model.dim=7168", "--model.n_layers=60", "--model.n_heads=64", "--model.head_dim=128",
    "--model.vocab_size=163840", "--model.ffn_hidden_dim=2048", "--model.num_experts=384", "--model.moe_top_k=8",
    "--model.moe_shared_experts=1", "--train.batch_size=1", "--train.seq_len=4096",
    "--train.activation_checkpointing=full",
)  # fmt: skip
powers = st.sampled_from((1, 2, 4))
layouts = st.builds(
    Layout, dp_replicate=powers, dp_shard=powers, cp=st.sampled_from((1, 2)), tp=powers, pp=st.sampled_from((1, 2))
)


@cache
def base(model: str) -> JobConfig:
    return load_config(model)


def job_in(model: str, layout: Layout, micro_batches: int = 8, **train: Any) -> JobConfig:
    job = base(model)
    sizes = dataclasses.asdict(layout)
    sizes["dp_shard"] *= sizes["ep"]
    return job.replace(
        distributed=job.distributed.replace(**sizes), train=job.train.replace(grad_accum_steps=micro_batches, **train)
    )


def cost(model: str, layout: Layout, hardware: Hardware = H100, **options: Any) -> Cost:
    return cost_of(job_in(model, layout, **options), layout.devices, hardware)


def moved(cost: Cost, purpose: str) -> int:
    return sum(each.bytes for each in cost.traffic if each.purpose == purpose)


@given(st.sampled_from(MODELS), layouts)
def test_twice_the_shards_hold_half_and_send_as_much(model: str, layout: Layout) -> None:
    """But for the gates of routers, which all hold."""
    whole, half = cost(model, layout), cost(model, dataclasses.replace(layout, dp_shard=2 * layout.dp_shard))
    assert half.memory.states <= 0.51 * whole.memory.states
    assert half.memory.activations == whole.memory.activations
    assert half.compute == whole.compute
    if layout.size("dp_shard", "cp") > 1:
        assert moved(half, "weights") == moved(whole, "weights")
        assert moved(half, "gradients") == moved(whole, "gradients")
        assert 2 * moved(half, "gradients of copies") == moved(whole, "gradients of copies")


@given(st.sampled_from(MODELS), layouts)
def test_twice_the_copies_hold_and_do_the_same(model: str, layout: Layout) -> None:
    one, two = cost(model, layout), cost(model, dataclasses.replace(layout, dp_replicate=2 * layout.dp_replicate))
    states = one.memory.states if layout.devices > 1 else two.memory.states  # one device holds narrow gradients
    assert two.memory == dataclasses.replace(one.memory, states=states)
    assert (two.compute, two.exposed > 0) == (one.compute, one.exposed > 0 or "moe" in model)
    assert two.tokens == 2 * one.tokens
    assert moved(two, "gradients of copies") == moved(cost(model, dataclasses.replace(layout, dp_replicate=2)),
                                                      "gradients of copies") > 0  # fmt: skip


@given(st.sampled_from(MODELS), layouts)
def test_twice_the_parts_of_tensors_do_half(model: str, layout: Layout) -> None:
    whole = cost(model, layout)
    half = cost(model, dataclasses.replace(layout, tp=2 * layout.tp))
    assert 2 * half.compute == pytest.approx(whole.compute)
    assert half.memory.activations < whole.memory.activations
    for purpose in ("positions", "sums of positions", "sums of blocks", "sums of experts", "cross entropy"):
        assert moved(half, purpose) == moved(whole, purpose) or layout.tp == 1
    if layout.size("dp_shard", "cp") > 1:
        assert 0.5 <= moved(half, "weights") / moved(whole, "weights") <= 0.51


@given(st.sampled_from(MODELS), layouts, st.integers(2, 16))
def test_more_micro_batches_move_more_and_leave_smaller_bubbles(model: str, layout: Layout, number: int) -> None:
    few, many = cost(model, layout, micro_batches=number), cost(model, layout, micro_batches=2 * number)
    once = ("gradients of whole tensors", "gradients of norms")
    for each, twice in zip(few.traffic, many.traffic, strict=True):
        factor = 1 if each.purpose in once else 2
        assert (twice.purpose, twice.bytes, twice.count) == (each.purpose, factor * each.bytes, factor * each.count)
    assert few.bubble == 2 * many.bubble == (layout.pp - 1) / number
    assert 2 * few.compute == pytest.approx(many.compute)
    assert dataclasses.replace(few.memory, buffers=0) == dataclasses.replace(many.memory, buffers=0)
    job = base(model)
    stream = job.train.batch_size * job.train.seq_len // layout.cp * job.model.dim * 2
    assert many.memory.buffers - few.memory.buffers == (layout.pp - 1) * number * stream, "of two stages at most"


def test_what_stages_hold_beside_their_work() -> None:
    """Sums by hand; tests/distributed/test_traffic.py finds them in memory."""
    stream = 512 * 4096 * 2

    def held(stages: int, micro_batches: int, evaluated: int, rows: int | None = None) -> int:
        each = job_in("llama3_8b", Layout(pp=stages), micro_batches, batch_size=3, seq_len=512)
        return buffer_bytes(each.replace(eval=each.eval.replace(steps=evaluated, batch_size=rows)), Layout(pp=stages))

    assert held(1, 8, 8) == 0
    assert held(2, 8, 0) == 8 * 3 * stream
    assert held(2, 8, 5) == (8 + 2 + 1) * 3 * stream
    assert held(4, 8, 0) == 2 * 8 * 3 * stream
    assert held(4, 8, 3) == 2 * (8 + 3) * 3 * stream
    assert held(4, 8, 11, 7) == 2 * (8 * 3 + (4 + 3) * 7) * stream


@given(st.sampled_from(MODELS), layouts, st.floats(1, 8), st.sampled_from(("far", "near", "flops", "share")))
def test_better_hardware_is_never_slower(model: str, layout: Layout, factor: float, field: str) -> None:
    slower = dataclasses.replace(H100, share=0.1)
    better = dataclasses.replace(slower, **{field: getattr(slower, field) * factor})
    before, after = (cost(model, layout, hardware) for hardware in (slower, better))
    assert before.fastest <= before.slowest
    assert after.fastest <= before.fastest
    assert after.slowest <= before.slowest
    assert after.compute * max(factor, 1) >= before.compute * 0.999


@pytest.mark.parametrize("model", MODELS)
def test_what_recomputation_saves_and_costs(model: str) -> None:
    none, selective, narrow, full = (
        cost(model, Layout(dp_shard=8), activation_checkpointing=mode)
        for mode in ("none", "selective", "narrow", "full")
    )
    kept = [each.memory.activations for each in (none, selective, narrow, full)]
    assert kept == sorted(kept, reverse=True)
    assert len({kept[0], kept[1], kept[3]}) == 3
    assert none.compute == selective.compute <= narrow.compute < full.compute < none.compute * 4 / 3
    assert (narrow.compute > selective.compute) == (kept[2] < kept[1])


@pytest.mark.parametrize("mode", ["full", "none"])
@pytest.mark.parametrize("width", [0.125, 2.0])
def test_where_some_layers_are_mixtures_the_kind_that_keeps_most_counts(width: float, mode: str) -> None:
    """Experts that are narrow or wide, beside dense layers."""
    job = job_in("moe_small", Layout(), activation_checkpointing=mode)
    model = job.model.replace(moe_expert_ffn_multiplier=width)
    mixed, mixtures, dense = (
        memory_of(job.replace(model=model.replace(**changes)), 1).activations
        for changes in ({"moe_frequency": 2}, {}, {"num_experts": 0})
    )
    assert mixed == max(mixtures, dense)
    assert (mixtures > dense) == (width == 2)


def test_fsdp_moves_three_times_the_parameters() -> None:
    """Rajbhandari et al. 2020, section 7.2.2, all in one dtype; what stands outside blocks is gathered once only."""
    job = job_in("llama3_8b", Layout(dp_shard=64), micro_batches=1, mixed_precision="fp32")
    weights, gradients = step_traffic(job, Layout(dp_shard=64))
    size, outside = 4 * count_parameters(job.model), 4 * (2 * job.model.vocab_size * job.model.dim + job.model.dim)
    assert weights.bytes + gradients.bytes == 3 * size - outside
    assert weights.sent == pytest.approx((2 * size - outside) * 63 / 64)
    assert (weights.count, gradients.count) == (65, 33)


def test_the_bytes_of_tensor_parallelism_by_hand() -> None:
    """In a block outputs of two products forward (Shoeybi et al. 2019, figure 4), inputs of five backward: each of q,
    k, v, gate and up adds up its own. So it is where tp does not divide the positions.
    """
    job = job_in("llama3_8b", Layout(tp=8), micro_batches=3, activation_checkpointing="none", seq_len=8191)
    blocks, ends, loss = step_traffic(job, Layout(tp=8))
    stream = 8191 * 4096 * 2
    assert (blocks.count, blocks.bytes) == (3 * 32 * 7, 3 * 32 * 7 * stream)
    assert (ends.count, ends.bytes) == (6, 6 * stream)
    assert (loss.count, loss.bytes) == (9, 9 * 8191 * 4)
    assert blocks.sent == 2 * blocks.bytes * 7 / 8


def test_the_bytes_of_sequence_parallelism_by_hand() -> None:
    """In a block, forward and backward, two gathered streams and two scattered sums (Korthikanti et al. 2022, figure
    5): what two sums send. The stream is cut before the first block, and gathered after the last.
    """
    job = job_in("llama3_8b", Layout(tp=8), micro_batches=3, activation_checkpointing="none")
    norms, gathered, scattered, ends, _ = step_traffic(job, Layout(tp=8))
    stream = 8192 * 4096 * 2
    assert (norms.count, norms.bytes) == (1, 32 * 2 * 4096 * 4)
    assert (gathered.count, gathered.bytes) == (3 * (32 * 4 + 2), 3 * (32 * 4 + 2) * stream)
    assert (scattered.count, scattered.bytes) == (3 * 32 * 4, 3 * 32 * 4 * stream)
    assert (ends.count, ends.bytes) == (6, 6 * stream)
    assert gathered.sent + scattered.sent == 3 * (32 * 8 + 2) * stream * 7 / 8
    again = job_in("llama3_8b", Layout(tp=8), micro_batches=3, activation_checkpointing="full")
    _, gathered, scattered, *_ = step_traffic(again, Layout(tp=8))
    assert (gathered.count, scattered.count) == (3 * (32 * 6 + 2), 3 * 32 * 5), (
        "a block's last sum is not computed again"
    )


def test_the_tokens_of_experts_by_hand() -> None:
    """Rows and routes there, sums back, and the other way round; rows of 8 GiB of tokens are exchanged."""
    job = job_in("moe_small", Layout(ep=4), micro_batches=1)
    found = {each.purpose: each for each in step_traffic(job, Layout(ep=4))}
    gathered, summed = found["tokens of experts"], found["sums of tokens"]
    every = 4 * 4 * 2048
    assert (gathered.kind, gathered.axes, gathered.count) == ("all-gather", ("ep",), 8 * (3 + 1))
    assert gathered.bytes == 8 * every * (2 * 1024 * 2 + 2 * (8 + 4))
    assert (summed.kind, summed.axes, summed.count) == ("reduce-scatter", ("ep",), 8 * 2)
    assert summed.bytes == 8 * every * 4 * (1024 + 2)
    gradients = found["gradients of tokens"]
    assert (gradients.kind, gradients.axes, gradients.count) == ("all-to-all", ("ep",), 8)
    assert gradients.bytes == 8 * every * 1024 * 2
    large = job.replace(model=job.model.replace(dim=16384, n_heads=128, head_dim=128, n_kv_heads=8))
    rows = next(each for each in step_traffic(large, Layout(ep=4)) if each.purpose == "rows of experts")
    assert (rows.kind, rows.axes, rows.ranks, rows.count) == ("all-to-all", ("ep",), 4, 8 * 4)
    assert rows.bytes == 8 * 4 * (4 * 2048 * 2) * 16384 * 2


@pytest.mark.parametrize(
    ("ranks", "dim", "top_k", "gathers"),
    [
        (4, 1024, 2, True),
        (8, 1024, 2, True),
        (16, 1024, 2, False),
        (8, 4096, 2, False),
        (8, 4096, 8, True),
        (2, 8192, 1, True),
    ],
)
def test_tokens_are_gathered_where_few_bytes_more_are_sent(ranks: int, dim: int, top_k: int, gathers: bool) -> None:
    """8192 tokens of each rank in bfloat16; at most 1 GiB more."""
    job = load_config("moe_small")
    job = job.replace(model=job.model.replace(dim=dim, moe_top_k=top_k))
    more = (ranks - 1) * 8192 * dim * 10 - 4 * top_k * 8192 * dim * 2 * (ranks - 1) // ranks
    assert (more <= 2**30) is gathers
    assert gathers_tokens(job, Layout(ep=ranks)) is gathers


def test_experts_that_no_other_device_holds_are_copied() -> None:
    own = 8 * (16 // 4) * 3 * 1024 * 2816 * 2
    held = [cost("moe_small", layout, activation_checkpointing=mode, mixed_precision=precision).memory.gathered
            for layout in (Layout(ep=4), Layout(dp_shard=2, ep=4))
            for mode, precision in (("none", "bf16"), ("full", "bf16"), ("none", "fp32"))]  # fmt: skip
    assert held[0] - held[1] == own
    assert held[3] == held[4] == held[1]
    assert held[2] == held[5]


@pytest.mark.parametrize(("factor", "numbers"), [(0.0, 5), (1.25, 7)])
def test_what_ranks_that_share_experts_keep_more_of_a_token_by_hand(factor: float, numbers: int) -> None:
    """The sums of the other's experts, and of each rank's choices their places: two of 16 experts, in bfloat16."""
    alone, shared = (job_in("moe_small", Layout(dp_shard=count, ep=ep)) for count, ep in ((2, 1), (1, 2)))
    kept, rows = [], []
    for job in (alone, shared):
        job = job.replace(model=job.model.replace(moe_capacity_factor=factor))
        layout = layout_of(job.distributed, 2)
        kept.append(kept_bytes(job, layout, is_moe=True, mode="none"))
        rows.append(expert_rows(job, layout))
    assert gathers_tokens(shared, layout_of(shared.distributed, 2))
    of_a_row = 2 * (1024 + 2 * 2 * 2816)
    of_a_token = 4 * (2 * 1024 + numbers * 2 * 2)
    assert kept[1] - kept[0] - of_a_row * (rows[1] - rows[0]) == of_a_token * 4 * 2048


def test_room_for_rows_of_experts_by_hand() -> None:
    job = load_config("moe_small")
    own = 8192 * 2
    assert expert_rows(job, Layout()) == expert_rows(job, Layout(ep=16)) == own
    assert expert_rows(job, Layout(ep=4)) == 4 * own
    limited = job.replace(model=job.model.replace(moe_capacity_factor=1.25))
    assert expert_rows(limited, Layout(ep=4)) == own * 5 // 4
    assert expert_rows(limited, Layout()) == own


def test_a_pipeline_idles_as_its_paper_says() -> None:
    """Narayanan et al. 2021, section 2.2.1; sends are of one residual stream each way."""
    found = cost("llama3_8b", Layout(pp=4), micro_batches=12)
    assert found.bubble == 3 / 12
    (sent,) = (each for each in found.traffic if each.kind == "send")
    assert (sent.count, sent.bytes) == (24, 24 * 8192 * 4096 * 2)
    in_flight = [cost("llama3_8b", Layout(pp=4), micro_batches=number).memory.activations for number in (4, 12)]
    assert in_flight[0] == in_flight[1], "as many micro-batches as stages are on their way"


def test_a_share_of_the_peak_is_that_of_the_model_s_flops() -> None:
    found = cost("llama3_8b", Layout(), micro_batches=1, activation_checkpointing="none")
    flops = flops_per_token(base("llama3_8b").model, 8192).training * 8192
    assert (found.traffic, found.exposed, found.hidden, found.bubble) == ((), 0, 0, 0)
    assert found.fastest == found.slowest == pytest.approx(flops / (989e12 * 0.6))
    assert found.utilization(found.slowest, H100) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("layout", "axes", "kind", "seconds"),
    [
        (Layout(tp=8), ("tp",), "all-gather", 7e9 / 450e9 + 7 * 2e-6),
        (Layout(tp=16), ("tp",), "all-gather", 15e9 / 50e9 + 5e-6 + 14 * 2e-6),
        (Layout(dp_shard=4, tp=2), ("dp_shard",), "all-reduce", 6e9 / 450e9 + 2 * 3 * 2e-6),
        (Layout(dp_shard=16, tp=8), ("dp_shard",), "reduce-scatter", 15e9 / 50e9 + 15 * 5e-6),
        (Layout(dp_shard=16), ("dp_shard",), "reduce-scatter", 15e9 / 50e9 + 5e-6 + 14 * 2e-6),
        (Layout(pp=2, tp=8), ("pp",), "send", 2e9 / 50e9 + 5e-6),
        (Layout(ep=8, tp=2), ("ep",), "all-to-all", 7e9 / 50e9 + 5e-6),
        (Layout(ep=8, cp=2), ("ep",), "all-gather", 7e9 / 50e9 + 5e-6 + 6 * 2e-6),
    ],
)
def test_the_link_that_a_collective_needs(layout: Layout, axes: tuple[str, ...], kind: str, seconds: float) -> None:
    ranks = layout.size(*axes)
    traffic = Traffic("", kind, axes, ranks, 1, ranks * 10**9)
    assert transfer_seconds(traffic, layout, H100) == pytest.approx(seconds, rel=1e-9)


def test_hardware_is_named_or_set() -> None:
    assert parse_hardware("h100") == H100
    assert parse_hardware("h200,far=25e9,node=4") == dataclasses.replace(HARDWARE["h200"], far=25e9, node=4)
    assert parse_hardware("flops=1e15") == dataclasses.replace(H100, flops=1e15)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' must be h100, h200, b200, or settings of flops, "),
        ("a100", "'a100' must be h100, h200"),
        ("h100,a100", "'a100' must be h100, h200"),
        ("h100,speed=1", "'speed=1' must be"),
        ("memory=-1", "memory must be a positive number"),
        ("memory=nan", "memory must be a positive number"),
        ("memory=inf", "memory must be a positive number"),
        ("memory=lots", "memory must be a positive number"),
        ("share=1.5", "share must be above 0 and at most 1"),
        ("node=2.5", "node must be a positive whole number"),
    ],
)
def test_hardware_that_can_not_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_hardware(text)
    assert str(caught.value).startswith(f"--hardware = {text!r}: ")
    assert said in str(caught.value)


def test_the_page_of_scale(capsys: pytest.CaptureFixture[str]) -> None:
    """FSDP alone stands first; what fits no layout is said; models with images are refused."""
    arguments = ["show", "debug", "--scale", "--world-size=8", "--step-tokens=65536"]
    assert main([*arguments, "--hardware=h100,node=4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["│", "hardware:", "node", "│", "4", "│"] in lines
    header = lines.index(next(line for line in lines if line[:3] == ["devices", "pp", "dp_replicate"]))
    table = [line for line in lines[header + 2 :] if line]
    assert table[0][:9] == ["8", "1", "1", "8", "1", "1", "1", "4", "0"]
    assert len(table) >= 4
    assert main(["show", "debug", "--scale", "--world-size=64", "--step-tokens=2048"]) == 2
    assert "--world-size = 64: no layout of powers of two shares out 1 micro-batches" in capsys.readouterr().err
    assert main(["show", "debug_vlm_mot", "--scale"]) == 2
    assert "vlm.arch = 'mot': must be none for costs of a layout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("compute", "exposed", "hidden", "bubble", "fastest"),
    [(2.0, 0.0, 1.0, 0.25, 2.5), (2.0, 1.0, 0.0, 0.5, 4.5), (2.0, 0.0, 9.0, 0.25, 9.0), (2.0, 1.0, 3.5, 0.0, 3.5)],
)
def test_the_bound_of_a_step_s_time(
    compute: float, exposed: float, hidden: float, bubble: float, fastest: float
) -> None:
    found = dataclasses.replace(cost("debug", Layout()), compute=compute, exposed=exposed, hidden=hidden, bubble=bubble)
    assert found.fastest == fastest


def test_the_memory_of_gathered_weights_and_logits_by_hand() -> None:
    """llama3_8b over 8 devices in bfloat16: two blocks and what stands outside of blocks, and of the larger of a block
    and that its gradient, narrow and wide; logits of some of 8192 tokens and their gradient, of which the loss widens
    some.
    """
    memory = cost("llama3_8b", Layout(dp_shard=8), mixed_precision="bf16").memory
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    outside = 2 * 128256 * 4096 + 4096
    assert memory.gathered == 2 * (2 * block + outside) + (2 + 4) * outside
    rows = rows_of_logits(8192, 4096, 128256, 2)
    assert memory.logits == 2 * 2 * rows * 128256 + 4 * 2 * min(rows * 128256, WIDENED)
    alone = cost("llama3_8b", Layout(), mixed_precision="bf16").memory
    assert alone.gathered == (2 + 4) * outside
    rows = rows_of_logits(8192, 4096, 64128, 2)
    assert cost("llama3_8b", Layout(dp_shard=8, tp=2)).memory.logits == (2 * 2 + 4 * 3) * rows * 64128


def test_a_mixture_of_a_trillion_parameters() -> None:
    """On 1,024 devices FSDP alone moves its experts hundreds of times faster than a network does."""
    job = load_config("moe_small", MIXTURE)
    assert count_parameters(job.model) == 1_027_770_498_048
    sizes, train = job.distributed.replace(dp_shard=1024, ep=128), job.train.replace(grad_accum_steps=4)
    spread = cost_of(job.replace(distributed=sizes, train=train), 1024, H100)
    alone = cost_of(job.replace(distributed=sizes.replace(ep=1), train=train), 1024, H100)
    assert spread.memory.total < H100.memory < alone.memory.total
    assert alone.hidden > 20 * spread.hidden > 20 * spread.compute


@pytest.mark.parametrize("name", ["llama3_8b", "debug", "moe_small"])
@pytest.mark.parametrize("layout", [Layout(dp_shard=8), Layout(dp_shard=2, tp=4), Layout(pp=2, dp_shard=2)])
def test_what_is_held_is_what_the_table_of_memory_says(name: str, layout: Layout) -> None:
    job = load_config(name)
    job = job.replace(
        distributed=job.distributed.replace(**dataclasses.asdict(layout)), train=job.train.replace(grad_accum_steps=2)
    )
    memory = training_memory(job, layout.devices)
    assert cost_of(job, layout.devices, H100).memory.states == memory.parameters + memory.gradients + memory.optimizer


@given(st.sampled_from(MODELS), layouts)
def test_the_total_is_the_sum_of_the_parts(model: str, layout: Layout) -> None:
    memory = cost(model, layout, micro_batches=4).memory
    assert memory.total == sum(dataclasses.asdict(memory).values())


@pytest.mark.parametrize("model", ["llama3_8b", "moe_small"])
def test_layouts_that_are_tried_are_all_there_is_and_differ(model: str) -> None:
    """By a loop over the sizes of every axis."""
    job, devices, rows = load_config(model), 64, 128
    tokens = rows * job.train.seq_len * job.train.batch_size
    found = [layout_of(each.distributed, devices) for each in candidates(job, devices, tokens)]
    powers = [1, 2, 4, 8, 16, 32, 64]
    experts = [1] if model == "llama3_8b" else [ep for ep in (1, 8, 64, 128) if job.model.num_experts % ep == 0]
    sizes = itertools.product([1, 8, 64], powers, [1, 2, 4, 8], [1, 2, 4, 8, 16], [1, 2], experts)
    expected = {
        Layout(dp_replicate=copies, dp_shard=shards, tp=tp, pp=pp, cp=cp, ep=ep)
        for copies, shards, tp, pp, cp, ep in sizes
        if copies * shards * ep * tp * pp * cp == devices
    }
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_a_layout_s_costs_stand_beside_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "llama3_8b", "--world-size=64", "--distributed.tp=2", "--train.grad_accum_steps=2"]) == 0
    said = capsys.readouterr().out
    job = job_in("llama3_8b", Layout(dp_shard=32, tp=2), micro_batches=2)
    for each in step_traffic(job, layout_of(job.distributed, 64)):
        row = next(line for line in said.splitlines() if each.purpose in line and each.kind in line)
        assert f" {each.count:,} " in row
        assert f" {each.bytes / 1e9:.4g} " in row
    assert f"{cost_of(job, 64, H100).memory.total / 1e9:.4g} GB" in said
