"""`kempnerforge bench`: what it asks processes for, what it prints and writes, and what it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from shared_config.bench.measure import Request, measured
from shared_config.bench.result import FOREIGN, OURS, Result
from shared_config.bench.works import batches_of
from shared_config.cli import main
from shared_config.commands import backends, bench
from shared_config.errors import UserError
from shared_config.interchange.toml import config_to_toml
from shared_config.loader import load_config
from tests.jobs import EXPERTS, tiny_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
SMALL = {"train": {"batch_size": 2, "seq_len": 8}}
BOTH = pytest.mark.parametrize("backend", ["torch", "jax"])


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "job.toml"
    file.write_text(config_to_toml(tiny_job(EXPERTS, **SMALL)))
    return str(file)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Request]]:
    """What processes are asked for; this one does it, with small limits."""
    found: list[tuple[str, Request]] = []

    def result_of(backend: str, request: Request, folder: Path) -> Result:
        found.append((backend, request))
        module = importlib.import_module(f"kempnerforge_{backend}.bench")
        machine = (module.Foreign if request.of == FOREIGN else module.Machine)(request.device)
        return measured(machine, Request.from_json(json.loads(json.dumps(request.to_json()))))

    monkeypatch.setattr(bench, "result_of", result_of)
    monkeypatch.setattr("shared_config.bench.measure.SIZES", {False: (16, 2**10)})
    monkeypatch.setattr("shared_config.bench.measure.SHORTEST", 1e-9)
    return found


@BOTH
def test_all_works_are_measured(
    backend: str, config: str, asked: list[tuple[str, Request]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By day without those that would only take, and in JAX compile, further steps."""
    works = ["train", "moe", "decode", "memory"] if backend == "torch" else ["moe", "memory"]
    works = ["train", "packed", "window", "moe", "decode", "memory"] if NIGHTLY else works
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.html"
    files = ["--json", str(numbers), "--report", str(page)]
    options = ["--what", ",".join(works), "--repeats", "2", "--device", "cpu", "--profile", *files]
    assert main(["bench", config, "--backend", backend, *options]) == 0
    assert [(by, request.work) for by, request in asked] == [(backend, work) for work in ("limits", *works)]
    found = Result.from_json(json.loads(numbers.read_text()))
    assert [line.work for line in found.lines] == works[:-1]
    assert found.limits is not None
    for line in found.lines:
        assert line.of == OURS
        assert line.timing.median > 0
        assert (line.share(found.limits) or 0) > 0
        assert (line.bytes is None) == (line.work != "decode")
    assert {"weights and buffers", "moments", "gradients"} <= set(found.memory)
    assert found.memory["moments"] >= 2 * found.memory["gradients"] > 0
    printed, written = capsys.readouterr().out, page.read_text()
    assert all(line.work in printed and line.work in written for line in found.lines)
    if backend == "torch":
        assert set(found.profiles) == set(works) - {"memory"}
        for shares in found.profiles.values():
            assert sum(shares.values()) == pytest.approx(1)
            assert shares["matmul"] > 0
    else:
        assert not found.profiles
        assert "note: JAX names fusions on a CPU" in printed


@pytest.mark.skipif(not NIGHTLY, reason="imports transformers")
def test_models_of_transformers_stand_beside_ours(config: str, asked: list[tuple[str, Request]]) -> None:
    pytest.importorskip("transformers")
    dense = [
        "--model.family=llama",
        "--model.qk_norm=false",
        "--model.num_experts=0",
        "--model.moe_router=softmax_topk",
        "--model.moe_sequence_aux_loss_weight=0",
    ]
    options = ["--what", "train,decode", "--against", "hf", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", config, "--backend", "torch", *options, *dense]) == 0
    expected = [("limits", OURS), ("train", OURS), ("train", FOREIGN), ("decode", OURS), ("decode", FOREIGN)]
    assert [(request.work, request.of) for _, request in asked] == expected
    assert {by for by, _ in asked} == {"torch"}


def test_works_are_left_out_of_which_transformers_has_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    able, (note,) = bench.foreign_works(
        tiny_job({"qk_norm": False, "family": "llama"}), ["train", "window", "moe", "decode"]
    )
    assert able == ["train", "decode"]
    assert note.startswith("transformers has no such model, window: model.sliding_window = 2: ")
    for works, message in (
        (["window"], "transformers has no such model, window: model.sliding_window"),
        (["memory"], "--what must have one of train, window, decode"),
    ):
        with pytest.raises(UserError, match=rf"^--against hf: {message}"):
            bench.foreign_works(tiny_job({"qk_norm": False, "family": "llama"}), works)


def test_what_can_not_be_measured_is_said_in_a_line(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["debug", "--what", "moe"], "--what = 'moe': moe needs a model with experts that a router chooses"),
        (
            ["debug", "--what", "fast"],
            "--what = 'fast': 'fast' must be one of train, packed, window, moe, decode, memory",
        ),
        (
            ["debug_vlm_mot", "--what", "decode"],
            "--what = 'decode': decode needs a text model (a config without [vlm])",
        ),
        (["debug_vlm_mot", "--against", "hf"], "--against hf: must be a text model (a config without [vlm])"),
        (["debug", "--repeats", "0"], "argument --repeats: '0': must be an integer of at least 1"),
        (["debug", "--against", "them"], "argument --against: invalid choice: 'them' (choose from"),
    ):
        assert main(["bench", *arguments, "--backend", "torch"]) == 2
        assert capsys.readouterr().err.startswith(f"kempnerforge: {message}")
    monkeypatch.setattr(backends, "_is_installed", lambda package: package != "transformers")
    assert main(["bench", "debug", "--backend", "torch", "--against", "hf"]) == 2
    assert "--against hf: the package transformers is not installed; pip install" in capsys.readouterr().err
    same = ["--json", config, "--backend", "torch"]
    assert main(["bench", config, *same]) == 2
    assert config in capsys.readouterr().err


def test_what_a_process_says_is_passed_on(tmp_path: Path) -> None:
    request = Request(tiny_job(**SMALL), "train", device="nowhere")
    with pytest.raises(UserError, match=r"^train, none: the process ended with status 1: KeyError: 'none'$"):
        bench.result_of("none", request, tmp_path)
    if NIGHTLY:
        with pytest.raises(UserError, match=r"^train, torch: device = 'nowhere': "):
            bench.result_of("torch", request, tmp_path)


@pytest.mark.skipif(not NIGHTLY, reason="starts twelve processes")
@BOTH
def test_a_preset_in_processes_of_its_own(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "debug", "--backend", backend, "--device", "cpu", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("TFLOP/s", "GB/s", "train", "packed", "window", "decode", "peak of a step"))


def as_trace(*events: tuple[str, int, int, float]) -> list[dict[str, Any]]:
    names = [("process_name", 1, 0, "/device:GPU:0"), ("process_name", 2, 0, "/host:CPU")]
    names += [("thread_name", 1, 7, "Stream #7(compute)"), ("thread_name", 1, 8, "XLA Ops")]
    named = [
        {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}} for kind, pid, tid, name in names
    ]
    timed = [{"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": dur} for name, pid, tid, dur in events]
    return [*named, *timed]


def test_kernels_of_a_trace_are_counted_once() -> None:
    """What a stream ran, and neither what is told of it a second time nor what the host did."""
    kernels = importlib.import_module("kempnerforge_jax.bench").kernels_of
    found = kernels(
        as_trace(("gemm", 1, 7, 3.0), ("dot.1", 1, 8, 3.0), ("PjitFunction", 2, 7, 9.0), ("add", 1, 7, 1.0))
    )
    assert [(kernel.name, pytest.approx(kernel.seconds)) for kernel in found] == [("gemm", 3e-6), ("add", 1e-6)]


def test_a_peak_counts_what_recorded_steps_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tensors are free in the eyes of the allocator, which counts what others hold."""
    bench = importlib.import_module("kempnerforge_torch.bench")
    called: list[str] = []
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 64, "allocated_size": 8},
        {"segment_pool_id": (0, 1), "total_size": 32, "allocated_size": 4},
        {"segment_pool_id": (0, 2), "total_size": 16, "allocated_size": 16},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: called.append("reset"))
    monkeypatch.setattr(bench, "peak_memory", lambda _: called.append("read") or 100)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: called.append("wait"))
    machine = bench.Machine("cpu")
    machine.device, machine.is_accelerator = torch.device("cuda"), True
    assert machine.peak(lambda: called.append("call")) == 100 + 28
    assert called == ["reset", "call", "wait", "read"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_recorded_step_grows_with_its_tokens() -> None:
    bench, peaks = importlib.import_module("kempnerforge_torch.bench"), []
    for batch_size in ("2", "8"):
        overrides = [f"--train.batch_size={batch_size}", "--train.seq_len=512", "--train.mixed_precision=bf16"]
        job = load_config("debug", [*overrides, "--model.max_seq_len=512"])
        machine = bench.Machine("cuda")
        step = machine.step(job, batches_of(job))
        for _ in range(5):
            step()
        peaks.append(machine.peak(step))
    assert peaks[1] > 1.5 * peaks[0]
