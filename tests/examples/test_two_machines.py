"""Two folders of recordings, and a port of Llama: as the command line compares them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shared_config.cli import main
from shared_config.parity import make_map, read_trace, write_trace
from shared_config.parity.traces import Trace
from tests.examples.record_folder import record_with_jax, record_with_torch


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("machines")
    record_with_torch(root / "there")
    record_with_jax(root / "here")
    return root / "there", root / "here"


def test_folders_of_two_machines_are_compared_file_by_file(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, here = map(str, folders)
    assert main(["compare", there, here, "--report", f"{tmp_path}/page.html", "--json", f"{tmp_path}/all.json"]) == 0
    assert "length-17" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "all.json").read_text())) == {"length-17", "length-9"}
    assert "length-17" in (tmp_path / "page.html").read_text()
    assert main(["compare", there, here, "--derive-tolerance", "2"]) == 0
    said = capsys.readouterr().out
    assert "float32 forward: 4 tensors, median" in said
    assert "allowed K = 10" in said
    assert main(["compare", there, here, "--derive-tolerance", "3"]) == 2
    assert "the two folders have 2 pairs" in capsys.readouterr().err


def test_files_without_a_counterpart_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, _ = folders
    for place, said in (
        (there / "length-9.safetensors", "must be two traces, or two folders"),
        (tmp_path, "length-17.safetensors"),
    ):
        assert main(["compare", str(there), str(place)]) == 2
        assert said in capsys.readouterr().err


def test_one_wrong_file_of_a_folder_is_found_with_its_place_and_cause_under_a_map(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, here = (folder / "length-9.safetensors" for folder in folders)
    trace = read_trace(here)
    wrong = {
        name.replace("gated", "product"): np.roll(tensor, 1, axis=1) if name == "forward/gated" else tensor
        for name, tensor in trace.tensors.items()
        if isinstance(tensor, np.ndarray)
    }
    write_trace(tmp_path / "wrong.safetensors", Trace(wrong, trace.meta))
    make_map(activations={"gated": "product"}).write(tmp_path / "map.toml")
    command = [
        "compare",
        str(there),
        str(tmp_path / "wrong.safetensors"),
        "--common",
        "--map",
        str(tmp_path / "map.toml"),
    ]
    assert main([*command, "--json", str(tmp_path / "found.json"), "--report", str(tmp_path / "page.html")]) == 1
    said = capsys.readouterr().out
    assert "first to diverge, forward: forward/product" in said
    for shown in (
        said,
        (tmp_path / "page.html").read_text(),
        " ".join(json.loads((tmp_path / "found.json").read_text())["notes"]),
    ):
        assert "forward: made in product" in shown
        assert "cause: off by 1 along axis 1: b is behind" in shown
    assert main(command[:-2]) == 0, "what has no counterpart is listed, and does not count"
    assert "only torch has forward/gated" in capsys.readouterr().out
    assert main(["compare", str(there), str(tmp_path / "wrong.safetensors")]) == 1
