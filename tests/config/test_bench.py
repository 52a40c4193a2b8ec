"""The arithmetic of `kempnerforge bench`: medians and shares, FLOPs and bytes of its works, kernels by kind, and what
comes back from JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
from html import escape
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.bench import measure
from shared_config.bench.kernels import KINDS, OTHER, Kernel, kind_of, shares_by_kind
from shared_config.bench.measure import FEWEST, MOST_TOGETHER, REPEATS, Request, timed
from shared_config.bench.page import write_page
from shared_config.bench.result import FOREIGN, OURS, Limits, Line, Result, Timing, joined
from shared_config.bench.works import (
    WORKS,
    batches_of,
    chosen_works,
    decode_bytes,
    decode_lengths,
    experts_flops,
    job_of,
    routed_layers,
    step_flops,
    tokens_of,
)
from shared_config.contract.counts import count_parameters, flops_per_token, visible_pairs
from shared_config.contract.flops import micro_batch_flops
from shared_config.contract.parameters import parameter_table
from shared_config.errors import UserError
from shared_config.loader import load_config
from tests.jobs import EXPERTS, tiny_job

seconds = st.floats(1e-6, 1e3)
timings = st.builds(Timing, seconds, st.lists(seconds, min_size=1, max_size=9).map(tuple))
counts = st.integers(1, 10**15)
limits = st.builds(
    Limits.of, timings, timings, st.sampled_from(["float32", "bfloat16"]), st.integers(1, 8192), st.integers(1, 2**30)
)
lines = st.builds(
    Line, st.sampled_from(list(WORKS)), st.sampled_from([OURS, FOREIGN]), timings, st.integers(1, 10**9),
    st.none() | st.floats(1, 1e18), st.none() | st.floats(1, 1e12), st.none() | st.integers(0, 2**40),
)  # fmt: skip
texts = st.sampled_from(["H100", "a & <b>", "\N{MULTIPLICATION SIGN}"])
results = st.builds(
    Result, texts, st.dictionaries(texts, texts), st.none() | limits, st.lists(lines, max_size=2).map(tuple),
    st.dictionaries(texts, st.integers(0, 2**40)),
    st.dictionaries(st.sampled_from(list(WORKS)), st.dictionaries(st.sampled_from(list(KINDS)), st.floats(0, 1))),
    st.lists(texts, unique=True).map(tuple),
)  # fmt: skip
few = settings(max_examples=15)


@given(timings)
def test_a_timing_tells_the_median_and_how_far_the_others_are(timing: Timing) -> None:
    ordered = sorted(timing.each)
    below, above = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    assert timing.median == pytest.approx((below + above) / 2)
    assert timing.spread == pytest.approx((ordered[-1] - ordered[0]) / timing.median)
    assert timing.compilation == max(0.0, timing.first - timing.median)


@given(limits, lines, st.floats(0.1, 10))
def test_a_share_is_work_over_time_over_its_limit(limit: Limits, line: Line, factor: float) -> None:
    share = line.share(limit)
    if line.flops is not None:
        assert share == pytest.approx(line.flops / (limit.product * line.timing.median))
    elif line.bytes is not None:
        assert share == pytest.approx(line.bytes / (limit.copy * line.timing.median))
    if share is None:
        assert (line.flops, line.bytes) == (None, None)
        return
    slower = Line(
        line.work, line.of, Timing(line.timing.first, tuple(factor * each for each in line.timing.each)), line.tokens,
        line.flops, line.bytes,
    )  # fmt: skip
    assert slower.share(limit) == pytest.approx(share / factor)
    assert slower.tokens_per_second == pytest.approx(line.tokens_per_second / factor)


@given(timings, st.integers(1, 8192), st.integers(1, 2**30))
def test_the_machine_at_its_limits_has_a_share_of_one(timing: Timing, size: int, copied: int) -> None:
    """A product is n^3 multiplications and additions; a copy reads and writes."""
    limit = Limits.of(timing, timing, "float32", size, copied)
    assert Line("train", OURS, timing, 1, flops=2.0 * size**3).share(limit) == pytest.approx(1)
    assert Line("decode", OURS, timing, 1, bytes=2.0 * copied).share(limit) == pytest.approx(1)


@few
@given(results)
def test_json_loses_nothing(result: Result) -> None:
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


@few
@given(st.lists(results, min_size=1, max_size=3))
def test_results_of_several_processes_are_one(several: list[Result]) -> None:
    whole = joined(several)
    assert whole.device == several[0].device
    assert whole.lines == tuple(itertools.chain.from_iterable(result.lines for result in several))
    assert whole.limits == next((result.limits for result in several if result.limits), None)
    assert set(whole.notes) == set(itertools.chain.from_iterable(result.notes for result in several))
    for name in ("versions", "memory", "profiles"):
        assert set(getattr(whole, name)) == set().union(*(getattr(result, name) for result in several))


@given(st.lists(st.tuples(st.sampled_from(["aten::mm", "nvjet_x", "ncclKernel", "tanh", "x"]), st.floats(0, 10))))
def test_shares_of_kinds_sum_to_one(kernels: list[tuple[str, float]]) -> None:
    found = shares_by_kind(itertools.starmap(Kernel, kernels))
    assert not found or sum(found.values()) == pytest.approx(1)
    assert bool(found) == (sum(taken for _, taken in kernels) > 0)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert set(found) <= {*KINDS, OTHER}


NAMED = {
    "aten::mm": "matmul",
    "aten::addmm": "matmul",
    "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNN": "matmul",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
    "gemm_fusion_dot_12": "matmul",
    "pytorch_flash::flash_fwd_kernel": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "elementwise",
    "triton_red_fused__to_copy_mul_3": "copies and casts",
    "loop_multiply_fusion_2": "elementwise",
    "input_reduce_fusion": "elementwise",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor>": "optimiser",
    "aten::_fused_adamw_": "optimiser",
    "Memcpy DtoD (Device -> Device)": "copies and casts",
    "aten::copy_": "copies and casts",
    "ncclDevKernel_AllGather_RING_LL": "collectives",
    "all-reduce.3": "collectives",
    "collective-permute.1": "collectives",
    "void cutlass::device_kernel<cutlass::gemm::collective::CollectiveMma<GroupProblemShape>>": "matmul",
    "something": OTHER,
}


def test_kernels_are_known_by_their_names() -> None:
    assert {name: kind_of(name) for name in NAMED} == NAMED


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9).map(sorted), min_size=1, max_size=3), st.data())
def test_visible_pairs_are_those_of_a_mask(rows: list[list[int]], data: st.DataObject) -> None:
    length = min(map(len, rows))
    doc_ids = np.array([row[:length] for row in rows])
    window = data.draw(st.none() | st.integers(1, 10))
    places = np.arange(length)
    seen = (places[:, None] >= places) & (places[:, None] - places < (window or length))
    apart = doc_ids[:, :, None] == doc_ids[:, None, :]
    assert visible_pairs(doc_ids, doc_ids.shape, window) == (seen & apart).sum()
    assert visible_pairs(None, doc_ids.shape, window) == seen.sum() * len(rows)


def test_flops_of_steps_follow_from_what_is_seen() -> None:
    job = tiny_job(train={"grad_accum_steps": 2})
    batches = batches_of(job)
    assert len(batches) == 2
    tokens = tokens_of(batches)
    assert step_flops(job, batches) == pytest.approx(flops_per_token(job.model, 10).training * tokens, rel=1e-3)
    flops = {
        work: step_flops(job_of(work, job), batches_of(job_of(work, job))) for work in ("train", "packed", "window")
    }
    assert all((flops[work] or 0) < (flops["train"] or 0) for work in ("packed", "window"))
    assert job_of("window", job).model.sliding_window == 2
    assert any(len(np.unique(row)) > 1 for row in batches_of(job_of("packed", job))[0]["doc_ids"])


def test_flops_of_steps_with_images_are_those_of_their_parts() -> None:
    job = load_config("debug_vlm_joint_decoder", ["--train.batch_size=2", "--train.grad_accum_steps=3"])
    found = micro_batch_flops(job)
    assert found is not None
    assert step_flops(job, batches_of(job)) == 3 * found.training
    clips = load_config("debug_vlm_mot", ["--video.max_frames=3", "--video.min_frames=1", "--video.frame_size=32"])
    found = micro_batch_flops(clips, frames=3)
    assert found is not None
    assert step_flops(clips, batches_of(clips)) == found.training
    prefix = load_config("debug_vlm_joint_decoder", ["--vlm.prefix_lm=true", "--train.batch_size=2"])
    (batch,) = batches_of(prefix)
    found = micro_batch_flops(prefix, prompts=[5, 9])
    assert found is not None
    assert step_flops(prefix, [{**batch, "prompt_lengths": np.array([5, 9])}]) == found.training


def test_flops_of_experts_are_those_of_their_matrices() -> None:
    job = tiny_job({**EXPERTS, "moe_shared_experts": 1})
    model, tokens = job.model, job.train.batch_size * job.train.seq_len
    hidden = model.computed_expert_ffn_hidden_dim
    expected = model.dim * model.num_experts + (model.moe_top_k + 1) * 3 * model.dim * hidden
    assert experts_flops(job) == 3 * 2 * expected * tokens
    assert routed_layers(job) == [1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_token_reads_all_weights_but_a_table(tied: bool) -> None:
    job = tiny_job({"tie_embeddings": tied}, train={"mixed_precision": "bf16"})
    model, (prompt, new) = job.model, decode_lengths(job)
    assert (prompt, new) == (16, 16)
    table = parameter_table(model)["token_embedding.embedding.weight"].shape
    weights = count_parameters(model) - (0 if tied else math.prod(table) - model.dim)
    cached = 2 * model.n_layers * model.kv_heads * model.head_size * (prompt + 8)
    assert decode_bytes(job, prompt, new) == 2 * (weights + cached)


def test_works_are_those_that_a_config_has() -> None:
    dense, experts = tiny_job(), tiny_job(EXPERTS)
    images = load_config("debug_vlm_mot")
    assert chosen_works(None, dense) == ("train", "packed", "window", "decode", "memory")
    assert chosen_works(None, experts) == tuple(WORKS)
    assert chosen_works(None, images) == ("train", "memory")
    assert chosen_works("memory, train,memory", dense) == ("memory", "train")
    for text, config, message in (
        ("moe", dense, "moe needs a model with experts"),
        ("packed", images, "packed needs a text model"),
        ("train,speed", dense, "'speed' must be one of train, packed, window, moe, decode, memory"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_works(text, config)
    with pytest.raises(UserError, match=r"model.max_seq_len = 2: must be at least 3"):
        decode_lengths(tiny_job({"max_seq_len": 2}, train={"seq_len": 2}))


def test_requests_come_back_from_json() -> None:
    request = Request(tiny_job(EXPERTS), "moe", FOREIGN, "cpu", 3, True)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, first: float, later: float):
        self.now, self.calls, self.durations = 0.0, 0, itertools.chain([first], itertools.repeat(later))

    def perf_counter(self) -> float:
        return self.now

    def call(self) -> None:
        self.calls += 1
        self.now += next(self.durations)


@given(st.floats(1e-3, 50), st.floats(1e-3, 5), st.none() | st.integers(1, 20))
def test_calls_are_timed_after_the_first_two(first: float, later: float, repeats: int | None) -> None:
    clock = Clock(first, later)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", clock)
        timing = timed(clock.call, lambda: None, repeats)
    assert timing.first == first
    assert timing.median == pytest.approx(later)
    together = min(MOST_TOGETHER, math.ceil(measure.SHORTEST / later))
    assert clock.calls - 2 == pytest.approx(len(timing.each) * together, abs=len(timing.each))
    if repeats is not None:
        assert len(timing.each) == repeats
    else:
        assert FEWEST <= len(timing.each) <= REPEATS
    assert statistics.median(timing.each) == timing.median


@few
@given(results)
def test_a_page_shows_all(result: Result) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_page(Path(folder) / "page.html", result, title="a & b")
        page = (Path(folder) / "page.html").read_text(encoding="utf-8")
    assert page.count("<tr>") >= len(result.lines) + len(result.memory)
    assert "<h1>a &amp; b</h1>" in page
    assert all(escape(text) in page for text in (*result.notes, *result.memory, *result.versions.values()))
