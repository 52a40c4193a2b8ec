"""Steps that are compiled ahead of time: what is counted in their programs, and that they are those of a trainer; for
slices of TPUs under HYPOTHESIS_PROFILE=nightly, where libtpu is installed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from jax import lax

from kempnerforge_jax.distributed.ahead_of_time import traced_step
from kempnerforge_jax.distributed.flops import product_flops
from kempnerforge_jax.distributed.hlo import collectives_of
from kempnerforge_jax.model.grouped import grouped_matmul, grouped_outer
from shared_config.contract.counts import count_parameters, flops_per_token
from shared_config.contract.parameters import parameter_table
from shared_config.contract.programs import Collective
from shared_config.contract.sharding import layout_of
from shared_config.contract.traffic import step_traffic
from shared_config.errors import ConfigError
from shared_config.loader import load_config
from tests.distributed.compiled import DEVICES, job_of, run_devices
from tests.jobs import tiny_job

ROOT = Path(__file__).parents[2]
NIGHTLY = settings.get_current_profile_name() == "nightly"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HLO = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%begin (p: bf16[4,2]) -> (bf16[4,2], bf16[4,8], u32[]) {
  %p = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(0)
  %gathered = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={1}
  ROOT %started = (bf16[4,2]{1,0}, bf16[4,8]{1,0}, /*index=2*/u32[]) custom-call(%gathered), \
custom_call_target="AsyncCollectiveStart"
}

%go_on (p: bf16[4,2]) -> bf16[4,8] {
  %p = bf16[4,2]{1,0} parameter(0)
  ROOT %again = bf16[4,8]{1,0} all-gather(%p), channel_id=3, dimensions={1}
}

%body (carry: (s32[], f32[16])) -> (s32[], f32[16]) {
  %carry = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %part = bf16[4,2]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %start = (bf16[4,2]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}) fusion(%part), kind=kCustom, calls=%begin
  %end = bf16[4,8]{1,0} fusion(%part), kind=kCustom, calls=%go_on
  %whole = f32[16]{0:T(128)} get-tuple-element(%carry), index=1
  %scattered = f32[4]{0:T(128)S(1)} reduce-scatter(%whole), channel_id=1, dimensions={0}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%carry)
}

%test (carry: (s32[], f32[16])) -> pred[] {
  %carry = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5), metadata={op_name="jit(step)"}
  %at = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%once (x: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %mean = f32[]{:T(128)} all-reduce(%x), to_apply=%add
}

%twice (x: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %first = f32[]{:T(128)} call(%x), to_apply=%once
  ROOT %second = f32[]{:T(128)} call(%first), to_apply=%once
}

ENTRY %main (x: f32[], rows: s8[10]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %rows = s8[10]{0} parameter(1)
  %inputs = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%x)
  %loop = (s32[]{:T(128)}, f32[16]{0:T(128)}) while(%inputs), condition=%test, body=%body
  %told = (s32[]{:T(128)}, f32[16]{0:T(128)}) while(%inputs), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
  %moving = (s8[10]{0}, s8[10]{0}, u32[]) collective-permute-start(%rows), channel_id=7
  %moved = s8[10]{0} collective-permute-done(%moving)
  %pair = (f32[]{:T(128)}, s8[10]{0}) all-reduce(%x, %moved), replica_groups={{0,1},{2,3}}, to_apply=%add
  %alone = f32[]{:T(128)} all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %single = s8[10]{0} all-to-all(%moved), replica_groups=[4,1]<=[4]
  ROOT %way = f32[]{:T(128)} conditional(%x, %x, %x), branch_computations={%once, %twice}
}
"""
"""A loop of five rounds and one of two; in each a gathering that goes on beside something, and a scattered sum."""
LIMIT = "%limit = s32[]{:T(128)} "
SMALL = (
    "debug_moe", "debug_vlm_joint_decoder", "debug_vlm_mot", "debug_vlm_cross_attention", "debug_vlm_moma",
)  # fmt: skip
PRESETS = (
    *((name, "v5e:2x2", ()) for name in SMALL),
    ("llama_125m", "v5e:2x2", ("--train.batch_size=1",)),
    ("moe_small", "v5e:4x4", ("--distributed.ep=4", "--train.batch_size=1")),
    ("moe_small", "v6e:4x4", ("--train.batch_size=2",)),
    ("llama3_8b", "v5p:2x2x4", ()),
    ("llama3_8b", "v6e:4x4", ("--distributed.tp=4",)),
)


def test_collectives_are_counted_in_the_text_of_a_program() -> None:
    found, unknown_loops = collectives_of(HLO)
    assert found == (
        Collective("all-gather", 7, 7 * 64),
        Collective("reduce-scatter", 7, 7 * 64),
        Collective("all-reduce", 3, 14 + 2 * 4),
        Collective("collective-permute", 1, 14),
    )
    assert unknown_loops == 0
    assert collectives_of("") == ((), 0)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [("direction=LT", "direction=NE"), (f"{LIMIT}constant(5)", f"{LIMIT}parameter(1)")],
)
def test_a_loop_whose_length_is_not_told_is_one_round(text: str, replacement: str) -> None:
    found, unknown_loops = collectives_of(HLO.replace(text, replacement))
    assert next(each for each in found if each.kind == "reduce-scatter") == Collective("reduce-scatter", 3, 3 * 64)
    assert unknown_loops == 1


def flops_of(function: Any, *shapes: tuple[int, ...], dtype: Any = jnp.float32, platform: str = "tpu") -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else dtype) for shape in shapes]
    return product_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr, platform)


def test_products_are_counted_where_they_stand() -> None:
    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(jax.checkpoint(jnp.matmul)(x, w)), None), x, w)[0]

    def chosen(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ (w @ w))

    def by_platform(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.platform_dependent(x, w, cuda=lambda x, w: x @ w @ w, default=jnp.matmul)

    assert flops_of(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (5, 3, 4), (5, 4, 7)) == 2 * 5 * 3 * 4 * 7
    assert flops_of(scanned, (3, 4), (6, 4, 4)) == 6 * 2 * 3 * 4 * 4
    assert flops_of(chosen, (3, 4), (4, 4)) == 2 * 4**3 + 2 * 3 * 4 * 4
    assert flops_of(by_platform, (3, 4), (4, 4)) == 2 * 3 * 4 * 4
    assert flops_of(by_platform, (3, 4), (4, 4), platform="cuda") == 2 * 2 * 3 * 4 * 4
    for dtype in (jnp.float32, jnp.bfloat16):
        assert flops_of(grouped_matmul, (9, 8), (3, 8, 16), (3,), dtype=dtype) == 2 * 9 * 8 * 16
        assert flops_of(grouped_outer, (9, 8), (9, 16), (3,), dtype=dtype) == 2 * 9 * 8 * 16


def test_layouts_are_refused_as_in_training() -> None:
    chips: list[Any] = [SimpleNamespace(platform="tpu")] * DEVICES
    with pytest.raises(ConfigError, match=r"distributed\.pp = 2: must be 1 for backend jax"):
        traced_step(tiny_job(distributed={"pp": 2}, train={"grad_accum_steps": 2}), chips)
    with pytest.raises(ConfigError, match="must equal the world size 4"):
        traced_step(tiny_job(distributed={"dp_shard": 3}), chips)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_devices(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("case", ["dense", "experts"])
def test_a_step_without_arrays_is_that_of_a_trainer(case: str, found: dict[str, Any]) -> None:
    assert found[case]["same"]


def test_a_program_for_four_devices_costs_what_it_has_to(found: dict[str, Any], tmp_path: Path) -> None:
    """Attention is computed for masked keys too, scores once more in the backward pass of a scan, and every part of a
    gradient is summed once. Of what is gathered, XLA keeps some norms and biases for the backward pass. It leaves out a
    number that a dense model does not use.
    """
    dense, job = found["dense"], job_of("dense", tmp_path)
    length = job.train.seq_len
    flops = flops_per_token(job.model, length)
    scores = flops.attention * length // (length + 1)
    forward = flops.matmul + 2 * scores
    specs = parameter_table(job.model).values()
    collectives = {each["kind"]: each for each in dense["collectives"]}
    gathered, scattered = collectives["all-gather"], collectives["reduce-scatter"]
    assert dense["flops"] == (3 * forward + scores) * job.train.batch_size * length
    assert dense["arguments"] == dense["held"] + 3 * np.dtype(np.float32).itemsize
    assert dense["outputs"] < 1000 < dense["temporaries"]
    assert (scattered["count"], scattered["bytes"]) == (len(specs), 4 * count_parameters(job.model))
    assert gathered["count"] >= len(specs)
    on_paper = {each.kind: each.bytes for each in step_traffic(job, layout_of(job.distributed, DEVICES))}
    assert scattered["bytes"] == on_paper["reduce-scatter"]
    assert 0.98 * on_paper["all-gather"] <= gathered["bytes"] <= on_paper["all-gather"]
    assert collectives["all-reduce"]["bytes"] < 100
    assert dense["unknown_loops"] == 0


@pytest.mark.skipif(not NIGHTLY or not HAS_LIBTPU, reason="by night, where the extra tpu is installed")
@pytest.mark.parametrize(("preset", "topology", "options"), PRESETS)
def test_presets_compile_for_tpus(preset: str, topology: str, options: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shared_config.cli", "compile", preset, f"--topology={topology}", *options]
    subprocess.run([*command, f"--json={tmp_path / 'costs.json'}"], cwd=ROOT, check=True)
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert 0 < costs["arguments"] < costs["memory"] < costs["memory_of_a_chip"]
    assert costs["unknown_loops"] == 0
    bytes_of = {each["kind"]: each["bytes"] for each in costs["collectives"]}
    job = load_config(preset)
    moved = 2 * count_parameters(job.model) / (4 if "--distributed.ep=4" in options else 1)
    assert bytes_of["all-gather"] > moved, "bfloat16 parameters, but for experts elsewhere"
    assert bytes_of.get("reduce-scatter", 0) + bytes_of["all-reduce"] > moved
