"""What the command says of itself: help, versions, completion, and hints at what was meant."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess

import pytest

from shared_config.bench.measure import REPEATS
from shared_config.bench.works import WORKS
from shared_config.cli import main
from shared_config.commands import NAMES, helps, line_of, sections
from shared_config.commands.line import build_parser, split_overrides
from shared_config.commands.lines import bench, trace
from shared_config.contract.decoding import DTYPES as HELD_DTYPES
from shared_config.contract.int8 import WEIGHTS_DTYPES
from shared_config.contract.scale import HARDWARE, Hardware
from shared_config.contract.slices import CHIPS
from shared_config.data.prepare import SHARD_BYTES
from shared_config.interchange.toml import descriptions
from shared_config.loader import config_fields, load_config
from shared_config.parity.dtypes import DTYPES
from shared_config.parity.full_checks import LONG_SEQUENCE
from shared_config.parity.layout_checks import AGREED
from shared_config.parity.layouts import LAYOUT
from shared_config.parity.plan import BACKENDS, TRANSFORMERS
from shared_config.parity.scenarios import SCENARIOS
from shared_config.schema.job import JobConfig
from tests.cli.processes import run_python

HELPED = """
import sys
before = set(sys.modules)
from shared_config.cli import main
for arguments in {lines!r}:
    try:
        main(arguments)
    except SystemExit:
        pass
print(*(name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names))
"""
LIGHT = {"errors", "cli", "commands", "training"}
LIGHT |= {f"commands.{name}" for name in ("line", "lines", "lines.arguments", "backends")}
LIGHT |= {f"training.{name}" for name in ("streams", "launch", "signals")}
SECONDS = 0.3


def test_help_and_version_import_next_to_nothing() -> None:
    """Of packages none, and of this one what reads the line, and says what may stand there."""
    lines = [["--help"], ["--version"], *([name, "--help"] for name in NAMES)]
    done = run_python("-c", HELPED.format(lines=lines))
    assert done.returncode == 0, done.stderr
    imported = {module.removeprefix("shared_config.") for module in done.stdout.splitlines()[-1].split()}
    assert imported - LIGHT == {"shared_config", *(f"commands.lines.{name}" for name in NAMES)}


def test_help_is_there_at_once_and_ends_well() -> None:
    """In seconds of the processor, the better of two."""
    done = [run_python("-m", "shared_config.cli", *line) for line in (["validate", "--help"], ["--version"])]
    assert [each.returncode for each in done] == [0, 0]
    assert min(each.seconds for each in done) < SECONDS


def test_lines_say_what_stands_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is written a second time, so that it need not be imported."""
    assert sections() == [field.name for field in dataclasses.fields(JobConfig)]  # type: ignore[arg-type]
    assert trace.DTYPES == DTYPES
    assert (*SCENARIOS, LAYOUT) == trace.SCENARIOS
    assert "; ".join(f"{name}: {meaning}" for name, meaning in WORKS.items()) == bench.WORKS
    for name, said in {
        "validate": (",".join(DTYPES), f"{LONG_SEQUENCE} positions", f"agree to {AGREED:g}"),
        "prepare": (f"(default: {SHARD_BYTES >> 20})",),
        "generate": (f"{{{','.join(WEIGHTS_DTYPES)}}}", f"{{{','.join(HELD_DTYPES)}}}"),
        "eval": (f"{{{','.join(HELD_DTYPES)}}}",),
        "trace": (f"{{{','.join((*BACKENDS, TRANSFORMERS))}}}",),
        "show": (", ".join(HARDWARE), ", ".join(field.name for field in dataclasses.fields(Hardware))),
        "compile": (", ".join(chip.example for chip in CHIPS.values()),),
        "bench": (f"(default: {REPEATS}, ",),
    }.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert not [text for text in said if text not in shown], name


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_gives_examples_that_it_understands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    examples = line_of(name).EXAMPLES
    assert examples
    assert helps()[name] == line_of(name).HELP
    for example in examples:
        assert example in said
        words = shlex.split(example.partition(" > ")[0].removeprefix("source <(").removesuffix(")"))
        words = words[words.index(name) :]
        own, overrides = split_overrides(words)
        options = build_parser(helps(), {name: line_of(name)}).parse_args(own)
        assert isinstance(options, argparse.Namespace)
        load_config("debug", overrides)
    if name in ("train", "show", "validate", "eval"):
        assert "model, train, optimizer, scheduler" in said
        assert "kempnerforge show --schema" in said


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "debug", "--backend", "torch", "--lr", "1"], "did you mean --optimizer.lr?"),
        (["show", "debug", "--model.lr", "1"], "--model.lr: unknown key; did you mean optimizer.lr?"),
        (["show", "debug", "--train.weight_decai", "1"], "did you mean optimizer.weight_decay"),
        (["show", "debug", "--train.vocab_size", "1"], "unknown key; did you mean model.vocab_size?"),
        (["show", "debug", "--optimzer.lr", "1"], "unknown key; did you mean optimizer.lr?"),
        (["show", "debug", "--model.rope_skaling.factor", "1"], "unknown key; did you mean rope_scaling.factor"),
        (["trian", "debug"], "did you mean train"),
        (["show", "debug", "--optimizer.wait_decay", "1"], "did you mean weight_decay"),
        (["show", "debug", "--train.batch_size_", "1"], "did you mean batch_size"),
    ],
)
def test_fields_of_other_sections_are_suggested(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_versions_are_those_installed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    import importlib.metadata

    assert f"torch {importlib.metadata.version('torch')}" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_know_commands_options_and_fields(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    for word in (*NAMES, "optimizer.lr", "model.dim", "max-new-tokens", "debug_moe"):
        assert word in said
    if shell == "bash":
        ask = 'COMP_WORDS=(kempnerforge train --optimizer.n); COMP_CWORD=2; _kempnerforge; echo "${COMPREPLY[*]}"'
        done = subprocess.run(["bash", "-c", f"{said}\n{ask}"], capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == "--optimizer.name"


def test_the_schema_says_what_fields_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--schema"]) == 0
    said = json.loads(capsys.readouterr().out)["$defs"]
    assert said["TrainConfig"]["properties"]["grad_clip_norm"]["description"] == "0 does not clip."
    scheduler = said["SchedulerConfig"]["properties"]
    assert scheduler["name"]["enum"] == ["cosine", "linear", "wsd", "rex", "constant", "none"]
    assert "what the paper has" in scheduler["rex_alpha"]["description"]
    assert descriptions("All.\n\na, b: one\ntwo\n\nthree\nc: four") == {"a": "one two", "b": "one two", "c": "four"}
    assert "optimizer.lr" in config_fields()
