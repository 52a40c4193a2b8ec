"""`kempnerforge validate`: real processes once, and the verdict on what they could have left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shared_config import checks
from shared_config.checks import CHECKS, Check, Finding, Plan, register
from shared_config.cli import main
from shared_config.commands import validate
from shared_config.interchange.traces import Trace, TraceMeta, write_trace
from shared_config.loader import config_to_toml, load_config
from tests.cli.processes import run_python

CONFIG = load_config("debug")


def test_validate_in_real_processes(tmp_path: Path) -> None:
    options = ["--shrink", "--dtypes", "float64", "--steps", "2", "--keep", str(tmp_path)]
    options += ["--report", str(tmp_path / "report.html")]
    result = run_python("-m", "shared_config.cli", "validate", "debug", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the backends agree" in result.stdout
    assert {"torch-float64.safetensors", "jax-float64.safetensors", "report.html"} < {
        file.name for file in tmp_path.iterdir()
    }


def test_processes_run_the_code_of_this_one(tmp_path: Path) -> None:
    """Whatever the working directory holds."""
    (tmp_path / "shared_config").mkdir()
    (tmp_path / "shared_config" / "__init__.py").write_text("raise RuntimeError('not this one')", encoding="utf-8")
    code = (
        "import sys; from shared_config.checks import Plan; from shared_config.commands import validate;"
        "from shared_config.loader import load_config; from pathlib import Path;"
        "validate.CHECKS.clear(); print(validate.run_processes(Plan(load_config('debug'), Path(sys.argv[1]))))"
    )
    result = run_python("-P", "-c", code, str(tmp_path), cwd=tmp_path)
    assert result.stdout == "None\n", result.stderr


def test_differences_in_training_are_found(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path, steps=3)
    _train(plan, "torch", [3.0, 2.0, 1.0])
    _train(plan, "jax", [3.0, 2.0, 1.00001])
    (finding,) = CHECKS["training"].judge(plan)
    assert finding.ok
    _train(plan, "jax", [3.0, 2.0, 1.0001])
    (finding,) = CHECKS["training"].judge(plan)
    assert not finding.ok
    assert "(2,)" in finding.detail


def test_a_training_run_that_stopped_early_is_a_difference(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path, steps=3)
    _train(plan, "torch", [3.0, 2.0, 1.0])
    _train(plan, "jax", [3.0, 2.0])
    (finding,) = CHECKS["training"].judge(plan)
    assert not finding.ok


def test_decoding_unlike_the_forward_is_found(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path)
    logits = np.linspace(1.0, 2.0, 12).reshape(1, 3, 4)
    for backend, factor in (("torch", 1.0), ("jax", 1 + 1e-11)):
        tensors = {"forward/output_head": logits, "decode/single": logits * factor, "decode/drawn": logits}
        write_trace(plan.trace_file(backend, "float64"), Trace(tensors, _meta(backend, "float64")))
    torch_finding, jax_finding = CHECKS["cached decoding"].judge(plan)
    assert torch_finding.ok
    assert not jax_finding.ok
    assert "decode/single" in jax_finding.detail


def test_a_backend_that_disagrees_with_itself_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(CONFIG, tmp_path)
    logits = np.linspace(1.0, 2.0, 12).reshape(1, 3, 4)
    for backend, factor in (("torch", 1.0), ("jax", 2.0)):
        tensors = {"forward/output_head": logits, "decode/single": logits * factor}
        write_trace(plan.trace_file(backend, "float64"), Trace(tensors, _meta(backend, "float64")))
    findings = list(CHECKS["cached decoding"].judge(plan))
    assert [finding.verdict for finding in findings] == ["same", "jax INCONSISTENT"]
    assert not validate.show(Console(width=200), plan, findings, 1.0)
    printed = capsys.readouterr().out
    assert "jax disagrees with itself: decode/single" in printed
    assert "the backends agree; jax DISAGREES WITH ITSELF in 1 of 2 comparisons" in printed
    assert "DIFFER" not in printed
    between = Finding("one step", "loss", ok=False)
    said = checks.outcome([*findings, between])
    assert said == ("the backends DIFFER in 1 of 3 comparisons; jax DISAGREES WITH ITSELF in 1 of 3 comparisons")


def test_decoding_is_held_to_a_forward_without_capacity_limits(tmp_path: Path) -> None:
    overrides = ["--model.num_experts", "4", "--model.moe_capacity_factor", "0.5"]
    plan = Plan(load_config("debug", overrides), tmp_path)
    free = np.linspace(1.0, 2.0, 12).reshape(1, 3, 4)
    for backend, decoded in (("torch", free), ("jax", free / 2)):
        tensors = {"forward/output_head": free / 2, "decode/whole": free, "decode/single": decoded}
        write_trace(plan.trace_file(backend, "float64"), Trace(tensors, _meta(backend, "float64")))
    torch_finding, jax_finding = CHECKS["cached decoding"].judge(plan)
    assert torch_finding.ok
    assert torch_finding.count == 1
    assert not jax_finding.ok


def test_other_initial_weights_are_a_difference(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path, dtypes=("float64",))
    for backend in checks.BACKENDS:
        trace = Trace({"loss": np.array(1.0)}, _meta(backend, "float64", initial_hash=f"hash of {backend}"))
        write_trace(plan.trace_file(backend, "float64"), trace)
    found = {finding.subject: finding.ok for finding in CHECKS["one step"].judge(plan)}
    assert found == {"initial weights": False, "loss": True}


KILLED = "#!/bin/sh\necho the last line >&2\nkill -9 $$\n"
FAILED = "#!/bin/sh\necho Traceback >&2\necho 'ImportError: the last line' >&2\nexit 1\n"


@pytest.mark.parametrize(("script", "how"), [(KILLED, "was killed by signal 9"), (FAILED, "ended with status 1")])
def test_a_process_that_breaks_down_is_no_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, script: str, how: str
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(script, encoding="utf-8")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    assert main(["validate", "debug"]) == 2
    out, err = capsys.readouterr()
    assert "DIFFER" not in out + err
    for backend in checks.BACKENDS:
        (line,) = (line for line in err.splitlines() if f"{backend}: the process {how}" in line)
        assert line.endswith("the last line")
    assert "Traceback" not in err


@pytest.mark.parametrize("device", ["cuda:99", "fpga"])
def test_a_device_that_is_not_there_is_no_difference(capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert main(["validate", "debug", "--shrink", "--dtypes=float64", "--steps=0", "--device", device]) == 2
    out, err = capsys.readouterr()
    assert "DIFFER" not in out + err
    assert f"torch: device = {device!r}" in err
    assert f"jax: device = {device!r}" in err


def test_what_a_process_refuses_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = Check("refusing", lambda plan, backend: [["show", "no_such_preset"]], lambda _: [])
    monkeypatch.setattr(validate, "CHECKS", {"refusing": refusing})
    assert main(["validate", "debug"]) == 2
    out, err = capsys.readouterr()
    assert "torch: config = 'no_such_preset'" in err
    assert "Traceback" not in out + err


def test_parts_add_checks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", dict(CHECKS))
    check = register(Check("sums", lambda plan, backend: [], lambda plan: [Finding("sums", "1 + 1", ok=True)]))
    assert checks.CHECKS["sums"] is check
    with pytest.raises(ValueError, match="'sums' is registered already"):
        register(check)


def test_dtypes_always_include_the_truth() -> None:
    assert validate.read_dtypes("bfloat16") == ("float64", "bfloat16")
    assert validate.read_dtypes("float32, float64") == ("float64", "float32")


def test_free_memory_is_read() -> None:
    assert 2**26 < validate.available_memory() < 2**50


def _train(plan: Plan, backend: str, losses: list[float]) -> None:
    folder = plan.run_folder(backend)
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _meta(backend: str, dtype: str, initial_hash: str = "") -> TraceMeta:
    return TraceMeta(backend, "cpu", dtype, 0, config_to_toml(CONFIG), initial_hash=initial_hash)
