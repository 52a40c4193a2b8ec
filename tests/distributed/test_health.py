"""The check of devices before a run: what is wrong with one is told, and which it is, by each backend."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import kempnerforge_jax.distributed.health as jax_health
import kempnerforge_jax.training.train as jax_training
import kempnerforge_torch.distributed.health as torch_health
import kempnerforge_torch.training.train as torch_training
from kempnerforge_torch.distributed.spawn import together
from shared_config.errors import UserError
from shared_config.training.health import (
    DONE,
    INNER,
    NAMED,
    PRODUCT,
    SUM,
    Report,
    from_text,
    known_matrices,
    to_text,
    verdict,
)
from tests.distributed.health import BY_DAY, BY_NIGHT, OTHERS, said, says
from tests.distributed.jax_processes import environments
from tests.jobs import text_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
CASES = BY_NIGHT if NIGHTLY else BY_DAY
STUCK = """
import importlib, os, sys, threading
from shared_config.cli import main
health = importlib.import_module(f"kempnerforge_{sys.argv.pop(1)}.distributed.health")
products = health.Bench.products
def stuck(bench, *arguments):
    if bench.rank == 1:
        threading.Event().wait()
    return products(bench, *arguments)
health.Bench.products = stuck
sys.exit(main())
"""
PHRASES = {
    "product": "a product of matrices is wrong",
    "given": "what it gives to a sum over all devices is wrong",
    "gotten": "the sum over all devices that it gets is wrong",
    "silent": "has not answered within 10 s",
    "stuck": "no product of matrices within 5 s",
    "late": "no sum over all devices within 5 s",
}
MODULES = {"torch": (torch_training, torch_health), "jax": (jax_training, jax_health)}


def rounds(folder: Path, cases: Mapping[str, tuple[float, str]]) -> None:
    """Write what each process says in every case; a silent one has lost the others."""
    found: dict[str, str] = {}
    for what, (seconds, _) in cases.items():
        dist.barrier()
        found[what] = says(torch_health.Bench(torch.device("cpu"), seconds), what, seconds)
    (folder / str(dist.get_rank())).write_text(json.dumps(found))


def test_processes_of_torch_name_the_device_that_fails(tmp_path: Path) -> None:
    """Those of JAX are in test_jax_processes."""
    together(rounds, 2, tmp_path, CASES)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == {what: said(text, {1: "cpu"}) for what, (_, text) in CASES.items()}
    unheard = "health check: rank 0 has not answered within 12 s"
    assert second == {
        what: unheard if what == "silent" else OTHERS if text else "" for what, (_, text) in CASES.items()
    }


@pytest.mark.skipif(not NIGHTLY, reason="by night: starts four processes that wait")
@pytest.mark.parametrize("backend", MODULES)
def test_a_command_ends_where_a_device_is_stuck(backend: str, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    run = ["train", "debug", f"--backend={backend}", "--device=cpu", f"--output={tmp_path / 'run'}"]
    started = [
        subprocess.Popen(
            [sys.executable, "stuck.py", backend, *run, "--train.health_check_seconds=5"],
            cwd=tmp_path,
            env=each,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in (environments(1) if backend == "jax" else as_torchrun(environments(1)))
    ]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    device = "cpu" if backend == "torch" else "cpu:0"
    text = f"health check: rank 1 on {socket.gethostname()}, {device}: no product of matrices within 5 s"
    assert [status for _, status in ends] == [2, 2]
    assert f"kempnerforge: {text}\n" in ends[0][0]
    assert "kempnerforge: " not in ends[1][0]
    assert not (tmp_path / "run").exists()


def as_torchrun(processes: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """What torchrun says to processes that would meet as JAX's do."""
    address, _, port = processes[0]["JAX_COORDINATOR_ADDRESS"].rpartition(":")
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(len(processes))}
    return [
        {
            **{name: value for name, value in each.items() if not name.startswith("JAX_")},
            **meeting,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        for rank, each in enumerate(processes)
    ]


@pytest.mark.parametrize("backend", MODULES)
def test_products_are_computed_in_both_dtypes(backend: str) -> None:
    """The second rounds what the first holds."""
    bench = torch_health.Bench(torch.device("cpu"), 1.0) if backend == "torch" else jax_health.Bench(jax.devices()[:1])
    a, one = np.full((1, 1), 1 + 2**-12, np.float32), np.ones((1, 1), np.float32)
    assert [product.item() for product in bench.products(0, a, one)] == [1 + 2**-12, 1]


@pytest.mark.parametrize("backend", MODULES)
def test_a_run_begins_with_the_check(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where it is not asked for."""
    training, health = MODULES[backend]
    products, asked = health.Bench.products, []

    def wrong(bench: Any, number: int, a: np.ndarray, b: np.ndarray) -> Any:
        asked.append(number)
        return [-product for product in products(bench, number, a, b)]

    monkeypatch.setattr(health.Bench, "products", wrong)
    monkeypatch.setattr(training, "Trainer", lambda *_: pytest.fail("a trainer was built"))
    job = text_job(tmp_path, train={"health_check_seconds": 60})
    with pytest.raises(UserError) as caught:
        training.train(job)
    device = "cpu" if backend == "torch" else "cpu:0"
    assert f"health check: rank 0 on {socket.gethostname()}, {device}: a product of matrices is wrong" in str(
        caught.value
    )
    asked.clear()
    health.check_health(text_job(tmp_path), None)
    assert not asked


def test_the_product_is_exact_in_every_dtype() -> None:
    """And no row of it is that of another, nor any column."""
    a, b = known_matrices()
    product = (a.astype(np.float64) @ b).astype(int)
    assert {-1, 0, 1} == set(np.unique(a)) == set(np.unique(b))
    assert np.abs(product).max() <= INNER <= 2**8
    lines = {line.tobytes() for matrix in (product, product.T) for line in matrix}
    assert len(lines) == 2 * len(product)


@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.sampled_from(sorted(PHRASES)))
def test_those_and_only_those_that_fail_are_named(data: st.DataObject, processes: int, each: int, kind: str) -> None:
    """Sums may be late, or wrong in other places, where products are wrong: they have to be."""
    count, first = processes * each, kind in ("silent", "late", "stuck")
    faulty = data.draw(st.sets(st.integers(int(kind == "silent"), max(1, (processes if first else count) - 1))))
    faulty &= set(range(kind == "gotten", processes if first else count))
    sums_fail = kind in ("product", "stuck", "silent") and bool(faulty)

    def report(rank: int) -> Report | None:
        own = {number: f"card {number}" for number in range(rank * each, (rank + 1) * each)}
        places = {number: sorted(faulty) if kind == "given" else [(number + 1) % count] * (number in faulty)
                  for number in own}  # fmt: skip
        sums = places if kind in ("given", "gotten") else {}
        products = sorted(faulty & own.keys()) if kind == "product" else []
        reached = PRODUCT if kind == "stuck" and rank in faulty else SUM if kind == "late" and rank in faulty else DONE
        reached = SUM if sums_fail and reached == DONE else reached
        return None if kind == "silent" and rank in faulty else Report(f"host{rank}", own, reached, "", products, sums)

    reports = [report(rank) for rank in range(processes)]
    lines = verdict([each and from_text(to_text(each)) for each in reports], 5).splitlines()
    if kind == "given" and len(faulty) == count > 1:
        assert lines == ["health check: every part of the sum over all devices is wrong, on each of them"]
        return
    ranks = [f"rank {one if first else one // each} " for one in sorted(faulty)]
    cards = [f"card {one}:" for one in sorted(faulty)]
    assert len(lines) == min(len(faulty), NAMED + 1)
    for line, rank, card in zip(lines[:NAMED], ranks, cards, strict=False):
        assert line.endswith(PHRASES[kind])
        assert line.startswith(f"health check: {rank}")
        assert first or card in line
    assert len(faulty) <= NAMED or lines[-1] == f"and {len(faulty) - NAMED} more"
