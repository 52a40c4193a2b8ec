"""`validate --full` in real processes, and bugs planted behind each of its rows, in either backend."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from shared_config.cli import main
from shared_config.commands import validate
from shared_config.loader import load_config
from shared_config.parity.plan import BACKENDS, CHECKS, Plan
from shared_config.parity.scenarios import applicable
from shared_config.schema.distributed import DistributedConfig
from tests.cli.processes import run_python
from tests.mutants import in_a_process, of_this_run, planted
from tests.mutants_distributed import DISTRIBUTED_MUTANTS, JAX_MUTANTS
from tests.mutants_full import REACHING, Reaching

TINY = ["--model.dim=16", "--model.n_layers=1", "--model.ffn_hidden_dim=24", "--train.seq_len=16"]
LAYOUT, ASKED = DistributedConfig(dp_shard=2, tp=2), ("--distributed.dp_shard=2", "--distributed.tp", "2")
NIGHTLY = settings.get_current_profile_name() == "nightly"
PARTS = {"torch": "torch, jax, torch", "jax": "jax, torch, jax"}


PLANTED = {
    "torch": {
        "gradients of what ranks share not summed": {"torch = 1 device: gradients", "torch = 1 device: weights"},
        "gradient divided twice": {"torch = 1 device: losses", "torch = 1 device: gradients"},
        "a rank's own clip": {"torch = 1 device: losses", "torch: replicas"},
        "rows of the vocabulary in reverse": {"torch = 1 device: losses"},
    },
    "jax": {
        "gradient divided by the ranks, jax": {"jax = 1 device: losses", "jax = 1 device: gradients"},
        "terms of one rank, jax": {"jax = 1 device: losses"},
    },
}
"""Backend -> bug -> subjects that name it, among others."""
BY_DAY = {"torch": ("gradients of what ranks share not summed",), "jax": ("gradient divided by the ranks, jax",)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a validation that found no difference leaves behind."""
    folder = tmp_path_factory.mktemp("full")
    report = folder.parent / "report.html"
    options = ["--full", *ASKED, "--dtypes=float64", "--steps=2", f"--keep={folder}", f"--report={report}", *TINY]
    result = run_python("-m", "shared_config.cli", "validate", "debug", *options, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the backends agree" in result.stdout
    assert report.exists()
    for name in (*applicable(plan(folder).config), "mixed precision", "601 positions"):
        assert f"│ {name.partition('-')[0]}" in result.stdout
    for pair in ("torch = 1 device", "jax = 1 device", "jax = torch"):
        for subject in ("initial weights", "losses", "counts", "gradients", "weights"):
            assert f"<td>dp_shard 2, tp 2</td><td>{pair}: {subject}</td>" in report.read_text(encoding="utf-8")
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_names_the_bugs_that_reach_it(kept: Path, tmp_path: Path, backend: str) -> None:
    """Every fifth bug, in JAX every eighth; all of them under HYPOTHESIS_PROFILE=nightly."""
    assert not in_a_process(
        survey,
        kept,
        tmp_path,
        backend,
        of_this_run([bug for bug in REACHING if getattr(bug.mutant, backend)], backend, every=8),
    )


def survey(kept: Path, scratch: Path, backend: str, bugs: Sequence[Reaching]) -> dict[str, list[str]]:
    """The bugs that the row they reach does not name, with the rows that do."""
    unnamed = {}
    for place, bug in enumerate(bugs):
        folder = scratch / str(place)
        shutil.copytree(kept, folder)
        with planted(bug.mutant, backend):
            repeat(bug, plan(folder), backend)
        named = [f"{found.check}: {found.subject}" for found in validate.judge(plan(folder)) if not found.ok]
        subject = bug.subject.format(backend=backend, way=PARTS[backend])
        if f"{bug.check}: {subject}" not in named:
            unnamed[str(bug.mutant)] = named
        shutil.rmtree(folder)
    return unnamed


def repeat(bug: Reaching, plan: Plan, backend: str) -> None:
    """Do the scenarios of a bug again, with the command lines that `validate` has for them."""
    for name in bug.scenarios:
        output = str(plan.scenario_file(backend, name, bug.dtype))
        (job,) = (job for check in plan.checks for job in check.jobs(plan, backend) if output in job)
        assert main(job) == 0, job


@pytest.mark.parametrize("backend", BACKENDS)
def test_bugs_of_a_layout_are_named(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """One of each backend, all of them under HYPOTHESIS_PROFILE=nightly."""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={LAYOUT.fewest_devices}")
    kept = shutil.copytree(kept, tmp_path / "kept")
    plan = Plan(load_config("debug", TINY), kept, layouts=(LAYOUT,))
    job = CHECKS["layouts"].jobs(plan, backend)[1]
    for bug, subjects in PLANTED[backend].items():
        if NIGHTLY or bug in BY_DAY[backend]:
            result = run_python("-m", "shared_config.cli", *job, changes=change(backend, bug), timeout=600)
            assert result.returncode == 0, result.stderr
            findings = list(CHECKS["layouts"].judge(plan))
            assert subjects <= {finding.subject for finding in findings if not finding.ok}, bug
            assert not {finding.subject for finding in findings if not finding.ok and other(backend) in finding.backend}


def change(backend: str, name: str) -> dict[str, list[tuple[str, str]]]:
    """A bug of tests.mutants_distributed, for the processes of a command."""
    (mutant,) = (bug.mutant for bug in (*DISTRIBUTED_MUTANTS, *JAX_MUTANTS) if bug.mutant.name == name)
    return {f"kempnerforge_{backend}.{mutant.component}": [getattr(mutant, backend)]}


def other(backend: str) -> str:
    return next(name for name in BACKENDS if name != backend)


def plan(folder: Path) -> Plan:
    return Plan(load_config("debug", TINY), folder, dtypes=("float64",), steps=0, full=True)


def test_scenarios_refuse_what_they_have_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["trace", "debug", *TINY, "--backend=torch", "--device=cpu", f"--output={tmp_path / 't.safetensors'}"]
    assert main([*line, "--scenario=padding", "--tokens=1,2"]) == 2
    assert "--tokens: a scenario has its own inputs" in capsys.readouterr().err
    assert main([*line, "--scenario=resume-1"]) == 2
    assert "needs --runs DIR" in capsys.readouterr().err
    assert main([*line, "--scenario=generate", "--model.sliding_window=4"]) == 2
    assert "scenario = 'generate': must be one of documents, padding" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
