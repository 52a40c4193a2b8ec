"""`kempnerforge launch --slurm`: the script that it prints, which runs; and what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.commands.launch import script, variable
from shared_config.commands.line import build_parser
from shared_config.interchange.run_layout import latest
from shared_config.interchange.toml import config_to_toml
from tests.jobs import text_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env bash
# Starts TASKS processes as srun does, on this machine.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=$TASKS SLURM_STEP_NODELIST=localhost SLURM_JOB_ID=$$
for ((task = 1; task < TASKS; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
wait
"""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", *arguments, "--slurm"]) == 0
    return capsys.readouterr().out


def is_shell(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True).returncode == 0


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))


def test_a_process_for_each_gpu_in_pytorch_and_for_each_machine_in_jax(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--nodes=4", "--gpus-per-node=8", "--cpus-per-gpu=12", "--time=2-00:00:00", "--partition=gpu,long",
               "--account=lab_1", "--job-name=big")  # fmt: skip
    in_torch = printed(capsys, "llama3_8b", "--backend=torch", *options, "--distributed.tp=8", "--output=runs/a")
    in_jax = printed(capsys, "llama3_8b", "--backend=jax", *options)
    assert is_shell(in_torch)
    assert is_shell(in_jax)
    expected = {"job-name": "big", "nodes": "4", "gpus-per-node": "8", "time": "2-00:00:00", "partition": "gpu,long",
                "account": "lab_1", "signal": "TERM@300", "open-mode": "append"}  # fmt: skip
    assert directives(in_torch) == expected | {"ntasks-per-node": "8", "cpus-per-task": "12"}
    assert directives(in_jax) == expected | {"ntasks-per-node": "1", "cpus-per-task": "96"}
    *_, last = in_torch.splitlines()
    assert shlex.split(last)[:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=12"]
    assert shlex.split(last)[3:] == [
        sys.executable, "-m", "shared_config.cli", "train", "llama3_8b", "--backend=torch", "--output=runs/a",
        "--distributed.tp=8",
    ]  # fmt: skip


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@given(config=texts, output=texts, python=texts, values=st.lists(texts, max_size=3), override=texts)
def test_whatever_names_hold_a_shell_reads_them_as_they_are(
    config: str, output: str, python: str, values: list[str], override: str
) -> None:
    """Quotes, line ends, and what a shell would run."""
    parser = build_parser(
        {"launch": ""}, {"launch": __import__("shared_config.commands.lines.launch", fromlist=["launch"])}
    )
    environment = [f"V{place}={value}" for place, value in enumerate(values)]
    given = [f"--env={setting}" for setting in environment]
    options = parser.parse_args(["launch", "debug", "--backend=torch", "--slurm", f"--output={output}", *given])
    options.config, options.python = config, python
    text = script(options, [f"--data.path={override}"])
    body = text[text.index("set -euo pipefail") :].split("\n", 1)[1]
    words = shlex.split(body)
    start = words.index("srun")
    assert words[start + 3 :] == [
        python, "-m", "shared_config.cli", "train", config, "--backend=torch", f"--output={output}",
        f"--data.path={override}",
    ]  # fmt: skip
    assert [word for word in words[:start] if word.startswith("V")] == environment


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--time=soon"], "--time = 'soon': must be MM, HH:MM"),
        (["--time=1:99"], "--time = '1:99': must be MM, HH:MM"),
        (["--time=1\n#SBATCH --nodes=9"], "--time = '1\\n#SBATCH --nodes=9': must be"),
        (["--partition=gpu --nodes=9"], "--partition = 'gpu --nodes=9': must be letters, digits and"),
        (["--account=-x"], "--account = '-x': must be letters"),
        (["--job-name=$(id)"], "--job-name = '$(id)': must be letters"),
        (["--env=A"], "--env = 'A': must be NAME=VALUE"),
        (["--env=A B=1"], "--env = 'A B=1': must be NAME=VALUE"),
        (["--env=1A=1"], "--env = '1A=1': must be NAME=VALUE"),
        (["--nodes=0"], "--nodes: '0': must be an integer of at least 1"),
        (["--gpus-per-node=x"], "--gpus-per-node: 'x': must be an integer"),
        (["--nodes=2", "--distributed.dp_shard=3"], "must equal the world size 16"),
        (["--gpus-per-node=3", "--distributed.tp=3"], "distributed.tp = 3: must divide model.n_heads"),
    ],
)
def test_values_that_can_not_be_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "debug", "--backend=torch", "--slurm", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_layouts_that_a_backend_has_not_on_gpus_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "debug", "--backend=jax", "--slurm", "--gpus-per-node=2", "--distributed.tp=2"]) == 2
    assert "distributed.tp = 2: must be 1 for backend jax on GPUs" in capsys.readouterr().err
    assert main(["launch", "debug", "--backend=torch"]) == 2
    assert "the following arguments are required: --slurm" in capsys.readouterr().err


def test_a_variable_may_be_empty_and_hold_equals_signs() -> None:
    assert (variable("A="), variable("_b2=c=d e")) == (("A", ""), ("_b2", "c=d e"))


@pytest.mark.parametrize("tasks", [1, 2] if NIGHTLY else [1])
def test_the_script_trains(tasks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an srun that starts its tasks here; two of them under HYPOTHESIS_PROFILE=nightly."""
    place = tmp_path / "a 'place'"
    place.mkdir()
    (place / "job.toml").write_text(config_to_toml(text_job(place, train={"max_steps": 1}, eval={"steps": 0})))
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    text = printed(
        capsys, str(place / "job.toml"), "--backend=torch", f"--gpus-per-node={tasks}", f"--env=PYTHONPATH={ROOT}",
        f"--output={place / 'out'}",
    )  # fmt: skip
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TASKS": str(tasks)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(["bash"], input=text, text=True, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert latest(place / "out") == place / "out" / "step_00000001"
