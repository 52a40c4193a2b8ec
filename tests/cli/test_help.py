"""What the command says of itself: help, versions, completion, and hints at what was meant."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

import pytest

from shared_config.cli import main
from shared_config.commands import NAMES, command, helps
from shared_config.commands.line import build_parser, split_overrides
from shared_config.interchange.toml import descriptions
from shared_config.loader import config_fields, load_config
from tests.cli.processes import ROOT

HEAVY = ("torch", "jax", "pydantic", "numpy", "rich", "safetensors")
QUICK = """
import sys
from shared_config.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = QUICK.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_gives_examples_that_it_understands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    examples = command(name).EXAMPLES
    assert examples
    assert helps()[name] == command(name).HELP
    for example in examples:
        assert example in said
        words = shlex.split(example.partition(" > ")[0].removeprefix("source <(").removesuffix(")"))
        words = words[words.index(name) :]
        own, overrides = split_overrides(words)
        options = build_parser(helps(), {name: command(name)}).parse_args(own)
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
    sections = json.loads(capsys.readouterr().out)["$defs"]
    assert sections["TrainConfig"]["properties"]["grad_clip_norm"]["description"] == "0 does not clip."
    scheduler = sections["SchedulerConfig"]["properties"]
    assert scheduler["name"]["enum"] == ["cosine", "linear", "wsd", "rex", "constant", "none"]
    assert "what the paper has" in scheduler["rex_alpha"]["description"]
    assert descriptions("All.\n\na, b: one\ntwo\n\nthree\nc: four") == {"a": "one two", "b": "one two", "c": "four"}
    assert "optimizer.lr" in config_fields()
