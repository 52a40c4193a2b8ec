"""`kempnerforge compile`: what it is told, what it says, and what it needs."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared_config.cli import main
from shared_config.commands import backends
from shared_config.contract.programs import Collective, Program
from shared_config.contract.slices import CHIPS, GIB, parse_slice
from shared_config.errors import UserError

PROGRAM = Program(
    flops=3 * 10**12,
    arguments=5 * GIB,
    outputs=2**10,
    temporaries=2 * GIB,
    code=GIB,
    collectives=(Collective("all-gather", 170, 3 * GIB), Collective("all-reduce", 2, 2**20)),
    unknown_loops=1,
)


def test_slices_are_parsed() -> None:
    for name, chips in {"v5e:4x4": 16, "v5e:2x2": 4, "v6e:16x16": 256, "v5p:2x2x1": 4, "v5p:4x4x3": 48}.items():
        topology = parse_slice(name)
        assert (topology.name, topology.chips, topology.chip) == (name, chips, CHIPS[name[:3]])
    assert {kind: parse_slice(chip.example).chip for kind, chip in CHIPS.items()} == dict(CHIPS)


@pytest.mark.parametrize(
    "text", ["", "v5e", "v9:2x2", "v5e:", "v5e:4x", "v5e:0x4", "v5e:-2x2", "v5e:4X4", "4x4", "v5e:4x99999"]
)
def test_what_is_no_slice_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_slice(text)
    message = str(caught.value)
    assert message.startswith(f"--topology = {text!r}: must be a slice of v5e, v5p, v6e, as ")
    assert all(chip.example in message for chip in CHIPS.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v5e:4x3", "even x even chips of v5e, at most 256, as v5e:4x4"),
        ("v5e:3x4", "even x even chips of v5e, at most 256, as v5e:4x4"),
        ("v5e:2x2x2", "even x even chips of v5e, at most 256, as v5e:4x4"),
        ("v6e:16x18", "even x even chips of v6e, at most 256, as v6e:8x8"),
        ("v5p:4x4", "even x even x any chips of v5p, at most 8960, as v5p:2x2x4"),
    ],
)
def test_slices_that_no_hosts_make_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_slice(text)
    assert str(caught.value) == f"--topology = {text!r}: must be {expected}"


def test_the_extra_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert main(["compile", "debug", "--topology=v5e:2x2"]) == 2
    said = capsys.readouterr().err
    assert "the package libtpu is not installed; pip install 'kempnerforge-twin[tpu]'" in said


def test_layouts_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "debug", "--topology=v5e:2x2", "--distributed.dp_shard=3"]) == 2
    assert "distributed.dp_shard = 3: " in capsys.readouterr().err
    assert "= 3 must equal the world size 4"


def test_costs_are_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def compile_step(config: Any, topology: Any) -> Program:
        asked.append((config, topology, os.environ["JAX_PLATFORMS"], os.environ["TPU_SKIP_MDS_QUERY"]))
        return PROGRAM

    command = importlib.import_module("shared_config.commands.compile")
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    monkeypatch.setattr(command, "backend_module", lambda *_: SimpleNamespace(compile_step=compile_step))
    monkeypatch.setenv("JAX_PLATFORMS", "else")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    file = tmp_path / "costs.json"
    assert main(["compile", "debug", "--topology=v5e:2x4", "--distributed.tp=2", f"--json={file}"]) == 0
    ((config, topology, platforms, skipped),) = asked
    assert (config.distributed.tp, topology.chips, platforms, skipped) == (2, 8, "cpu", "1")
    assert (os.environ["JAX_PLATFORMS"], os.environ.get("TPU_WORKER_HOSTNAMES")) == ("else", None)
    said = capsys.readouterr().out
    assert re.search(r"loops of unknown trip count, counted as one iteration │ +1 │", said)
    for part in ("3e+12", "5 GiB", "8 GiB, 50% of 16 GiB", "dp_shard 4, ep 1", "tp 2", "all-gather", "170", "3 GiB"):
        assert part in said, part
    written = json.loads(file.read_text())
    assert written["memory"] == 8 * GIB + 2**10
    assert written["collectives"][1] == {"kind": "all-reduce", "count": 2, "bytes": 2**20}
    assert (written["chips"], written["layout"]["dp_shard"], written["memory_of_a_chip"]) == (8, 4, 16 * GIB)
