"""Writers write regular files and folders, through links, and never over anything else."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared_config.cli import main
from shared_config.errors import UserError
from shared_config.interchange.activations import ActivationWriter
from shared_config.interchange.files import written_aside
from shared_config.interchange.tensors import write_tensors
from shared_config.interchange.weights import save_weights
from shared_config.metrics import JsonLinesLogger

TENSORS = {"x": np.ones(3, np.float32)}


def write_text(path: Path) -> None:
    with written_aside(path) as aside:
        aside.write_text("text", encoding="utf-8")


def write_activations(path: Path) -> None:
    with ActivationWriter(path) as writer:
        writer.append(TENSORS)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": write_text,
    "tensors": lambda path: write_tensors(path, TENSORS),
    "weights": lambda path: save_weights(path, TENSORS),
    "activations": write_activations,
    "metrics": lambda path: JsonLinesLogger(path, 0).close(),
}


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


SPECIAL: dict[str, Callable[[Path], object]] = {"pipe": os.mkfifo, "socket": make_socket, "folder": Path.mkdir}


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "link"])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_but_regular_files_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, special: str, linked: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    place, path = tmp_path / "place", tmp_path / "out.safetensors"
    SPECIAL[special](place)
    kind = stat.S_IFMT(place.stat().st_mode)
    path = path if linked else place
    if linked:
        path.symlink_to(place)
    if writer == "weights" and special == "folder":
        pytest.skip("weights may be written to a folder")
    with pytest.raises(UserError, match=rf"{path.name}.*(is a|File exists)"):
        WRITERS[writer](path)
    assert stat.S_IFMT(place.stat().st_mode) == kind
    assert path.is_symlink() == linked
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize("exists", [False, True], ids=["dangling", "existing"])
@pytest.mark.parametrize("writer", WRITERS)
def test_links_stay_and_what_they_lead_to_is_written(tmp_path: Path, writer: str, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, second = (tmp_path / name for name in ("elsewhere/t.safetensors", "a.safetensors", "b.safetensors"))
    if exists:
        target.write_text("", encoding="utf-8")
    second.symlink_to("elsewhere/t.safetensors")
    link.symlink_to(second)
    WRITERS[writer](link)
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.is_file()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert writer == "metrics" or target.stat().st_size > 0


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="can't be written"):
        write_text(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", ".lock"])
def test_a_run_does_not_wait_for_a_pipe_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    os.mkfifo(tmp_path / name)
    command = ("train", "debug", "--backend", "torch", "--quiet", "--train.max_steps=1", "--output", str(tmp_path))
    assert main(command) == 2
    assert f"{name}: is a named pipe" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--report", "--json"])
def test_compare_refuses_a_pipe_before_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    os.mkfifo(tmp_path / "page")
    assert main(["compare", "absent", "absent", option, str(tmp_path / "page")]) == 2
    assert "is a named pipe" in capsys.readouterr().err
