"""The benchmark of several GPUs, as far as it can be tested without them."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from shared_config.contract.parameters import parameter_table
from shared_config.contract.sharding import refusals, unsupported
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config
from tests.benchmarks import bench_scaling
from tests.benchmarks.bench_scaling import WHAT, Run, curves, data_ranks, measure, runs_of, spread, table
from tests.benchmarks.pool import perturbed, repeated

DEVICES = (1, 2, 4, 8)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("recomputation", ["full", "selective"])
def test_every_run_is_a_layout_that_its_backends_train_in_on_gpus(what: str, recomputation: str) -> None:
    runs = list(runs_of(what, DEVICES, (recomputation,)))
    assert {run.devices for run in runs} == set(DEVICES)
    for run in runs:
        config = load_config(run.config, run.arguments)
        assert [*config.distributed.problems_on(run.devices), *refusals(config)] == []
        for backend in run.backends:
            assert unsupported(config, backend, tower_of(config), "gpu") == []
        accumulated = config.train.grad_accum_steps
        assert accumulated * data_ranks(run.devices, run.layout) == run.micro_batches
        assert accumulated >= config.distributed.pp
        assert config.train.activation_checkpointing == recomputation or what not in ("depth", "dense")


@pytest.mark.parametrize("what", ["agree", "curves"])
def test_losses_are_compared_in_every_layout_of_one_step(what: str) -> None:
    runs = list(runs_of(what, DEVICES))
    assert {run.micro_batches for run in runs} == {8}
    used = {axis for run in runs for axis, size in run.layout.items() if size > 1}
    assert used == {"dp_shard", "dp_replicate", "cp", "tp", "pp", "ep"}
    alone = [(run.name, run.perturbed) for run in runs if run.devices == 1]
    assert alone == [(name, off) for name in dict.fromkeys(run.name for run in runs) for off in (True, False)]


@settings(max_examples=20)
@given(
    devices=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=8), gpus=st.sampled_from([4, 5, 8]),
    fails=st.booleans(),
)  # fmt: skip
def test_runs_beside_each_other_have_gpus_of_their_own(devices: list[int], gpus: int, fails: bool) -> None:
    lock, busy, most = threading.Lock(), set(), [0]

    def measured(backend: str, run: Run, steps: int, own: Sequence[int]) -> dict[str, Any]:
        with lock:
            assert len(set(own)) == run.devices
            assert not busy & set(own)
            busy.update(own)
            most[0] = max(most[0], len(busy))
        time.sleep(0.002)
        with lock:
            busy.difference_update(own)
        if fails and run.name == "0":
            raise OSError("no memory")
        return {"run": run.name, "gpus": list(own)}

    runs = [("torch", Run(str(place), "debug", count, {})) for place, count in enumerate(devices)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_scaling, "measure", measured)
        if fails:
            with pytest.raises(OSError, match="no memory"):
                list(spread(runs, 1, gpus))
        else:
            lines = list(spread(runs, 1, gpus))
            assert [line["run"] for line in lines] == [run.name for _, run in runs]
            assert {gpu for line in lines for gpu in line["gpus"]} <= set(range(gpus))
    assert most[0] <= gpus
    assert busy == set()


def test_lines_are_known_before_the_last_run_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that not all is lost where time runs out."""
    begun: list[str] = []

    def measured(backend: str, run: Run, steps: int, own: Sequence[int]) -> dict[str, Any]:
        begun.append(run.name)
        time.sleep(0.02)
        return {"run": run.name}

    monkeypatch.setattr(bench_scaling, "measure", measured)
    lines = spread([("torch", Run(str(place), "debug", 1, {})) for place in range(8)], 1, 1)
    assert next(lines) == {"run": "0"}
    assert len(begun) < 5
    assert [line["run"] for line in lines] == begun[1:] == [str(place) for place in range(1, 8)]


def test_one_at_a_time_sees_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scaling, "measure", lambda *arguments: {"of": arguments})
    run = Run("a", "debug", 2, {})
    assert list(spread([("jax", run)], 3, 0)) == [{"of": ("jax", run, 3)}]


@pytest.mark.parametrize(("gpus", "seen"), [((2, 5), "2,5"), ((), None)])
def test_a_run_sees_its_own_gpus(gpus: Sequence[int], seen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environments = []

    def ran(command: Sequence[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        environments.append(env)
        return subprocess.CompletedProcess(command, 1, "", "no such GPU")

    monkeypatch.setattr(subprocess, "run", ran)
    assert measure("torch", Run("a", "debug", 2, {}), 1, gpus)["failed"] == "no such GPU"
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in environments] == [seen]


def test_perturbed_values_are_off_by_roundings() -> None:
    for spec in parameter_table(load_config("debug").model).values():
        values, off = repeated("", spec, 0), perturbed("", spec, 0)
        assert off.dtype == np.float32
        assert (off != values).any() or not values.any()
        np.testing.assert_allclose(off, values, rtol=2 * float(np.finfo(np.float32).eps))


def line(backend: str, devices: int, losses: Sequence[float], **others: Any) -> dict[str, Any]:
    about = {"backend": backend, "name": "a", "run": f"a x{devices}", "devices": devices, "micro_batches": 8}
    speed = {"tokens/s": 90.0 * devices if devices > 1 else 100.0, "flops": 400.0, "seconds": 2.0, "GiB": 3.0}
    return {**about, **speed, "perturbed": False, "losses": list(losses), **others}


def test_the_table_tells_scaling_share_and_how_far_losses_are_off() -> None:
    lines = [
        line("torch", 1, [4.0, 2.0 + 1e-4], perturbed=True),
        line("torch", 1, [4.0, 2.0]),
        line("torch", 2, [4.0, 2.0 + 5e-4]),
        line("jax", 1, [4.0 + 8e-5, 2.0]),
        line("jax", 1, [9.0, 9.0], micro_batches=1),
        {"backend": "jax", "name": "a", "run": "a x4", "failed": "out of memory"},
    ]
    rows = [row.split()[3:] for row in table(lines, {"product FLOP/s": 1000.0}).splitlines()[1:]]
    assert rows[1] == ["100", "1.000", "0.200", "3.0", "0.0e+00", "0.000"]
    assert rows[2] == ["180", "0.900", "0.100", "3.0", "2.5e-04", "0.500"]
    assert rows[3][-2:] == ["2.0e-05", "2.000"]
    assert rows[4][-2:] == ["0.0e+00", "nan"]
    assert rows[5] == ["failed"]


def test_losses_of_every_fifth_step() -> None:
    failed = {"backend": "jax", "name": "a", "run": "a x4", "failed": "out of memory"}
    assert curves([failed]).split() == ["losses", "of", "step"]
    rows = curves([failed, line("torch", 1, [float(step) for step in range(8)])]).splitlines()
    assert rows[0].split() == ["losses", "of", "step", "1", "6"]
    assert rows[1].split() == ["torch", "a", "x1", "0.000000", "5.000000"]
