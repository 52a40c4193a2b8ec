"""`kempnerforge validate`: real processes once, and the verdict on what they could have left behind."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared_config.cli import main
from shared_config.commands import validate
from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.toml import config_to_dict, config_to_toml
from shared_config.loader import load_config
from shared_config.parity import checks, plan
from shared_config.parity.plan import CHECKS, Check, Finding, Plan, register
from shared_config.parity.provenance import expected_meta, expected_names, initial_hash
from shared_config.parity.traces import Trace, write_trace
from tests.cli.processes import run_python

CONFIG = load_config(
    "debug", ["--model.dim=8", "--model.n_layers=1", "--model.ffn_hidden_dim=8", "--model.vocab_size=9"]
)


def test_processes_run_the_code_of_this_one(tmp_path: Path) -> None:
    """Whatever the working directory holds."""
    (tmp_path / "shared_config").mkdir()
    (tmp_path / "shared_config" / "__init__.py").write_text("raise RuntimeError('not this one')", encoding="utf-8")
    code = (
        "import sys; from shared_config.parity.plan import CHECKS, Plan; from shared_config.commands import validate;"
        "from shared_config.loader import load_config; from pathlib import Path;"
        "CHECKS.clear(); print(validate.run_processes(Plan(load_config('debug'), Path(sys.argv[1]))))"
    )
    result = run_python("-P", "-c", code, str(tmp_path), cwd=tmp_path)
    assert result.stdout == "None\n", result.stderr


def test_differences_in_training_are_found(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path, steps=3)
    _train(plan, "torch", [3.0, 2.0, 1.0])
    _train(plan, "jax", [3.0, 2.0, 1.00001])
    finding, *_ = CHECKS["training"].judge(plan)
    assert finding.ok
    _train(plan, "jax", [3.0, 2.0, 1.0001])
    finding, *_ = CHECKS["training"].judge(plan)
    assert not finding.ok
    assert "(2,)" in finding.detail


def test_a_training_run_that_stopped_early_is_a_difference(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path, steps=3)
    _train(plan, "torch", [3.0, 2.0, 1.0])
    _train(plan, "jax", [3.0, 2.0])
    finding, *_ = CHECKS["training"].judge(plan)
    assert not finding.ok


@pytest.mark.parametrize("changed", ["backend", "train.seed=5", "model.norm_eps=0.5", "train.mixed_precision=bf16"])
def test_a_training_run_that_was_not_asked_for_is_refused(tmp_path: Path, changed: str) -> None:
    plan = Plan(CONFIG, tmp_path, steps=2)
    _train(plan, "torch", [3.0, 2.0])
    if changed == "backend":
        _train(plan, "jax", [3.0, 2.0], by="torch")
    else:
        _train(plan, "jax", [3.0, 2.0], f"--{changed}")
    field = changed.partition("=")[0]
    with pytest.raises(UserError, match=rf"train-jax.*not of the run that was asked for:\n  {field} = "):
        list(CHECKS["training"].judge(plan))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float32"}, "dtype = 'float32': was to be 'float64'"),
    "seed": ({"seed": 1}, "seed = 1: was to be 0"),
    "kind of weights": ({"weights": "init"}, "weights = 'init': was to be 'validation'"),
    "weights": ({"weights_hash": "0"}, "weights: other values"),
    "tokens": ({"tokens_hash": "0"}, "tokens: other values"),
    "no initial weights": ({"initial_hash": ""}, "initial weights: none are recorded"),
    "some tensors": ({"selection": {"only": ["loss"]}}, "selection: not all tensors"),
    "given inputs": ({"refed": {"hash": "0", "modules": []}}, "refed: its layers were given recorded inputs"),
    "device": ({"device": "NVIDIA H100"}, "device = 'NVIDIA H100': was to be 'cpu'"),
    "config": (
        {"config": config_to_toml(CONFIG.replace(model=CONFIG.model.replace(rope_theta=5e5)))},
        "model.rope_theta = 500000.0: was to be 10000.0",
    ),
    "how it is computed": (
        {"config": config_to_toml(CONFIG.replace(train=CONFIG.train.replace(scan_layers=True)))},
        "train.scan_layers = True: was to be False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("sides", [("torch", "jax"), ("jax",)])
def test_a_trace_that_was_not_asked_for_is_refused(tmp_path: Path, sides: tuple[str, ...], name: str) -> None:
    """Of the same wrong kind on both sides, which would agree, or on one."""
    changes, said = REFUSED[name]
    plan = Plan(CONFIG, tmp_path, dtypes=("float64",))
    for backend in checks.BACKENDS:
        _trace(plan, backend, **(changes if backend in sides else {}))
    with pytest.raises(UserError, match=rf"{sides[0]}-float64\.safetensors: is not the trace") as refusal:
        list(CHECKS["one step"].judge(plan))
    assert said in str(refusal.value)


@pytest.mark.parametrize(("backend", "other"), [("torch", "jax"), ("jax", "torch")])
def test_a_backend_in_the_place_of_the_other_is_refused(tmp_path: Path, backend: str, other: str) -> None:
    plan = Plan(CONFIG, tmp_path, dtypes=("float64",))
    for side in checks.BACKENDS:
        _trace(plan, side, by=other)
    with pytest.raises(UserError, match=rf"{backend}-float64.*\n  backend = '{other}': was to be '{backend}'"):
        list(CHECKS["one step"].judge(plan))


@pytest.mark.parametrize("group", ["forward/output_head", "loss", "gradient/norm.weight", "updated", "decode"])
def test_what_neither_recorded_is_not_the_same(tmp_path: Path, group: str) -> None:
    plan = Plan(CONFIG, tmp_path, dtypes=("float64",))
    for backend in checks.BACKENDS:
        _trace(plan, backend, without=group)
    failed = [finding for finding in CHECKS["one step"].judge(plan) if not finding.ok]
    assert [finding.subject for finding in failed] == [group.partition("/")[0]]
    assert "neither backend recorded" in failed[0].detail


def test_logits_of_another_dtype_are_not_what_was_asked_for(tmp_path: Path) -> None:
    """A float32 run under the name of a bfloat16 one would pass every limit of the latter."""
    plan = Plan(CONFIG, tmp_path, dtypes=("float64",))
    for backend in checks.BACKENDS:
        _trace(plan, backend, tensors={"forward/output_head": np.ones((2, 24, 9), np.float32)})
    failed = [finding for finding in CHECKS["one step"].judge(plan) if not finding.ok]
    assert [finding.detail for finding in failed] == [
        f"{backend}: forward/output_head is float32; it was to be float64" for backend in checks.BACKENDS
    ]


def test_a_validation_begins_anew_in_a_folder_that_it_kept(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path, steps=2)
    for backend in checks.BACKENDS:
        _trace(plan, backend)
        _train(plan, backend, [3.0, 2.0])
    validate.forget(plan)
    left = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")}
    assert left == {"config.toml", "train-torch", "train-torch/.lock", "train-jax", "train-jax/.lock"}
    (tmp_path / "train-jax" / ".lock").unlink()
    (tmp_path / "train-jax" / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match="is no training run"):
        validate.forget(plan)
    assert (tmp_path / "train-jax" / "metrics.jsonl").read_text() == "mine"


def test_decoding_unlike_the_forward_is_found(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path)
    logits = np.linspace(1.0, 2.0, 12).reshape(1, 3, 4)
    for backend, factor in (("torch", 1.0), ("jax", 1 + 1e-11)):
        tensors = {"forward/output_head": logits, "decode/drawn": logits, "decode/single": logits * factor}
        _trace(plan, backend, tensors=tensors, without="decode/prefill")
    torch_finding, jax_finding = CHECKS["cached decoding"].judge(plan)
    assert torch_finding.ok
    assert not jax_finding.ok
    assert "decode/single" in jax_finding.detail


def test_a_backend_that_disagrees_with_itself_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(CONFIG, tmp_path)
    logits = np.linspace(1.0, 2.0, 12).reshape(1, 3, 4)
    for backend, factor in (("torch", 1.0), ("jax", 2.0)):
        tensors = {"forward/output_head": logits, "decode/single": logits * factor}
        _trace(plan, backend, tensors=tensors, without="decode")
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
    experts = CONFIG.model.replace(num_experts=4, moe_capacity_factor=0.5)
    plan = Plan(CONFIG.replace(model=experts), tmp_path)
    free = np.linspace(1.0, 2.0, 12).reshape(1, 3, 4)
    for backend, decoded in (("torch", free), ("jax", free / 2)):
        tensors = {"forward/output_head": free / 2, "decode/whole": free, "decode/single": decoded}
        _trace(plan, backend, tensors=tensors, without="decode")
    torch_finding, jax_finding = CHECKS["cached decoding"].judge(plan)
    assert torch_finding.ok
    assert torch_finding.count == 1
    assert not jax_finding.ok


def test_other_initial_weights_are_a_difference(tmp_path: Path) -> None:
    """Than the other's, and than those of the seed."""
    plan = Plan(CONFIG, tmp_path, dtypes=("float64",))
    for backend in checks.BACKENDS:
        _trace(plan, backend, initial_hash=f"hash of {backend}")
    failed = [finding for finding in CHECKS["one step"].judge(plan) if not finding.ok]
    assert [finding.subject for finding in failed] == ["initial weights"] * 3
    for backend in checks.BACKENDS:
        _trace(plan, backend, initial_hash="the same wrong ones")
    failed = [finding for finding in CHECKS["one step"].judge(dataclasses.replace(plan)) if not finding.ok]
    assert [finding.detail for finding in failed] == [
        f"{backend}: they are not those that seed 0 draws" for backend in checks.BACKENDS
    ]


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
    monkeypatch.setattr(plan, "CHECKS", {"refusing": refusing})
    assert main(["validate", "debug"]) == 2
    out, err = capsys.readouterr()
    assert "torch: config = 'no_such_preset'" in err
    assert "Traceback" not in out + err


def test_parts_add_checks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHECKS", dict(CHECKS))
    check = register(Check("sums", lambda plan, backend: [], lambda plan: [Finding("sums", "1 + 1", ok=True)]))
    assert plan.CHECKS["sums"] is check
    with pytest.raises(ValueError, match="'sums' is registered already"):
        register(check)


def test_dtypes_always_include_the_truth() -> None:
    assert validate.read_dtypes("bfloat16", CONFIG) == ("float64", "bfloat16")
    assert validate.read_dtypes("float32, float64", CONFIG) == ("float64", "float32")
    assert validate.read_dtypes(None, CONFIG) == ("float64", "float32", "bfloat16")
    in_fp8 = load_config("debug", ["--train.mixed_precision=fp8"])
    assert validate.read_dtypes("fp8", in_fp8) == ("float64", "fp8")
    assert validate.read_dtypes(None, in_fp8) == ("float64", "float32", "bfloat16", "fp8")
    with pytest.raises(UserError, match=r"--dtypes = 'fp8': 'fp8' needs --train\.mixed_precision fp8"):
        validate.read_dtypes("fp8", CONFIG)


def test_small_models_are_compiled_quickly_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a variable says otherwise; large ones, and those of other devices, as JAX does by itself."""
    small, large = (Plan(load_config(name), tmp_path) for name in ("debug", "llama_125m"))
    ways = [small, large, dataclasses.replace(small, device="cuda")]
    stages = (0, plan.LAYOUTS_STAGE)

    def flags() -> list[list[str]]:
        return [[validate._environment(way, stage).get("XLA_FLAGS", "") for stage in stages] for way in ways]

    devices = f"--xla_force_host_platform_device_count={small.devices}"
    quick = validate.COMPILED_QUICKLY
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert flags() == [[quick, f"{quick} {devices}"], ["", f" {devices}"], ["", f" {devices}"]]
    monkeypatch.setenv("XLA_FLAGS", "--own")
    assert flags() == [["--own", f"--own {devices}"]] * 3


def test_free_memory_is_read() -> None:
    assert 2**26 < validate.available_memory() < 2**50


def _train(plan: Plan, backend: str, losses: list[float], *overrides: str, by: str | None = None) -> None:
    """What a process leaves behind of a run: of the backend and the config of the plan, but for changes."""
    folder = plan.run_folder(backend)
    plan.config_file.write_text(config_to_toml(plan.config), encoding="utf-8")
    (job,) = CHECKS["training"].jobs(plan, backend)
    asked = [word for word in job if word.startswith("--") and "=" in word]
    config = load_config(str(plan.config_file), [*asked, f"--checkpoint.dir={folder}", *overrides])
    state = TrainingState(len(losses), {}, {})
    checkpoint.save(folder, state, config=config_to_dict(config), backend=by or backend)
    (folder / ".lock").touch()
    numbers = {"grad_norm": 1.0, "lr": 1.0, "tokens": 1.0}
    lines = [json.dumps({"step": step, "loss": loss, **numbers}) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _trace(
    plan: Plan, backend: str, *, by: str | None = None, tensors: Any = None, without: str | None = None, **changes: Any
) -> None:
    """What a process leaves behind of a step in float64: all that was asked for, but for changes."""
    plan.config_file.write_text(config_to_toml(plan.config), encoding="utf-8")
    names = expected_names(plan.config)
    held = {name: np.ones(3) for name in names if without is None or not f"{name}/".startswith(f"{without}/")}
    meta = dataclasses.replace(
        expected_meta(plan.config, plan.seed),
        **{
            "backend": by or backend,
            "device": "cpu",
            "dtype": "float64",
            "initial_hash": initial_hash(plan.config, plan.seed),
            **changes,
        },
    )
    write_trace(plan.trace_file(backend, "float64"), Trace({**held, **(tensors or {})}, meta))


REGISTERED = """
import importlib, pkgutil
import shared_config.commands.validate
from shared_config import parity
from shared_config.parity.plan import CHECKS
of_the_command = set(CHECKS)
for module in pkgutil.iter_modules(parity.__path__):
    importlib.import_module(f"{parity.__name__}.{module.name}")
print(sorted(of_the_command) == sorted(CHECKS), "layouts" in of_the_command, set(CHECKS) - of_the_command)
"""


def test_the_command_alone_has_every_check() -> None:
    """Checks are registered as their modules are imported: here by a process that imports nothing but the command."""
    assert run_python("-c", REGISTERED).stdout == "True True set()\n"
