"""Writers write regular files and folders, through links, and never over anything else."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shared_config.cli import main
from shared_config.errors import UserError
from shared_config.interchange import checkpoint, run_layout
from shared_config.interchange.activations import ActivationWriter
from shared_config.interchange.files import written_aside
from shared_config.interchange.outputs import WRITER, claim_folder, claim_record_folder, writable_folder
from shared_config.interchange.tensors import write_tensors
from shared_config.interchange.weights import save_weights
from shared_config.loader import load_config
from shared_config.training.metrics import JsonLinesLogger, TensorBoardLogger, WandbLogger

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
    with pytest.raises(UserError, match=rf"{path.name}.*is a"):
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


def save_step(path: Path) -> object:
    return checkpoint.save(path.parent, checkpoint.TrainingState(int(path.name.removeprefix("step_")), TENSORS, {}))


def log_to_tensorboard(path: Path) -> None:
    TensorBoardLogger(path).close()


def log_to_wandb(path: Path) -> None:
    config = load_config("debug", ["--metrics.wandb_project=tests"])
    WandbLogger(config, path.parent).close()


FOLDER_WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda path: save_weights(path, TENSORS), "weights"),
    "checkpoint": (save_step, "step_00000003"),
    "tensorboard": (log_to_tensorboard, "tensorboard"),
    "wandb": (log_to_wandb, "wandb"),
    "output": (writable_folder, "out"),
}


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages of TensorBoard and Weights & Biases: they make their folder and no more."""

    def started(folder: str) -> SimpleNamespace:
        Path(folder).mkdir(exist_ok=True)
        return SimpleNamespace(close=lambda: None, finish=lambda: None)

    summary = SimpleNamespace(Writer=started)
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(summary=summary))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", summary)
    wandb = SimpleNamespace(init=lambda dir, **_: started(f"{dir}/wandb"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)


NO_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a named pipe"),
    "socket": (make_socket, "a socket"),
    "file": (Path.touch, "a file"),
}


@pytest.mark.usefixtures("recorders")
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "link"])
@pytest.mark.parametrize("special", NO_FOLDERS)
@pytest.mark.parametrize("writer", FOLDER_WRITERS)
def test_what_is_no_folder_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, special: str, linked: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (make, said), (write, name) = NO_FOLDERS[special], FOLDER_WRITERS[writer]
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    place = tmp_path / "place" if linked else path
    make(place)
    kind = stat.S_IFMT(place.stat().st_mode)
    if linked:
        path.symlink_to(place)
    with pytest.raises(UserError, match=rf"{path.name}: is {said}; the name of a folder is needed"):
        write(path)
    assert stat.S_IFMT(place.stat().st_mode) == kind
    assert path.is_symlink() == linked
    assert not list(tmp_path.rglob(".*.new"))


@pytest.mark.usefixtures("recorders")
@pytest.mark.parametrize("exists", [False, True], ids=["dangling", "existing"])
@pytest.mark.parametrize("writer", sorted(set(FOLDER_WRITERS) - {"wandb"}))  # which makes its folder itself
def test_folders_are_written_through_links(tmp_path: Path, writer: str, exists: bool) -> None:
    write, name = FOLDER_WRITERS[writer]
    elsewhere, path = tmp_path / "elsewhere" / "place", tmp_path / "run" / name
    path.parent.mkdir()
    if exists:
        elsewhere.mkdir(parents=True)
    path.symlink_to(elsewhere)
    for _ in range(2):
        write(path)
        assert path.is_symlink()
        assert elsewhere.is_dir()
        assert [file.name for file in elsewhere.parent.iterdir()] == ["place"]
    if writer == "checkpoint":
        assert checkpoint.load(path.parent).state.step == 3
        run_layout.prune(path.parent, keep=0)
        assert not list(path.parent.iterdir())
        assert elsewhere.is_dir(), "the link goes, and nothing that is not in the run's folder"


@pytest.mark.parametrize("how", ["itself", "symbolic link", "hard link", "of a folder", "shard of an index"])
def test_a_trace_is_not_written_over_the_weights_it_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    (tmp_path / "read").mkdir()
    weights = tmp_path / "read" / "model.safetensors"
    save_weights(weights, TENSORS)
    (tmp_path / "read" / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    given = {"of a folder": weights.parent, "shard of an index": weights.parent / "model.safetensors.index.json"}
    output = weights if how == "itself" or how in given else tmp_path / "other.safetensors"
    if how == "symbolic link":
        output.symlink_to(weights)
    elif how == "hard link":
        output.hardlink_to(weights)
    before = weights.read_bytes()
    command = [
        "trace",
        "debug",
        "--backend",
        "torch",
        "--weights",
        str(given.get(how, weights)),
        "--output",
        str(output),
    ]
    assert main(command) == 2
    assert f"{output}: is read from {given.get(how, weights)}" in capsys.readouterr().err
    assert weights.read_bytes() == before


@pytest.mark.parametrize("option", ["--report", "--json"])
def test_compare_does_not_write_over_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    traces = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in traces:
        path.write_text("a trace", encoding="utf-8")
    assert main(["compare", *map(str, traces), option, str(traces[1])]) == 2
    assert "b.safetensors: is read from" in capsys.readouterr().err
    assert traces[1].read_text(encoding="utf-8") == "a trace"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="can't be written"):
        write_text(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", ".lock"])
def test_a_run_does_not_wait_for_a_pipe_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / name).unlink(missing_ok=True)
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


def test_a_folder_for_records_may_hold_records_of_these_names_alone(tmp_path: Path) -> None:
    files = frozenset({"a.npz", "b.npz"})
    assert claim_record_folder(tmp_path / "deep" / "new", files).is_dir()
    shutil.rmtree(tmp_path / "deep")
    (tmp_path / "a.npz").touch()
    assert claim_record_folder(tmp_path, files) == tmp_path
    for name in ("c.npz", "d.npz"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"holds c\.npz(, d\.npz)?, which validate did not write"):
            claim_record_folder(tmp_path, files)


@pytest.mark.parametrize("shard_bytes", [2**30, 8], ids=["one file", "shards"])
def test_a_folder_of_weights_may_be_written_again_by_the_command_that_wrote_it(
    tmp_path: Path, shard_bytes: int
) -> None:
    config, folder = load_config("debug"), tmp_path / "out"
    tensors = {"x": np.ones(3, np.float32), "y": np.ones(3, np.float32)}
    save_weights(folder, tensors, max_shard_bytes=shard_bytes, metadata={WRITER: "native"})
    assert claim_folder(folder, "native", config, source=tmp_path / "source") == folder
    with pytest.raises(UserError, match="did not write for this model and config as huggingface"):
        claim_folder(folder, "huggingface", config, source=tmp_path / "source")
    save_weights(folder, tensors, max_shard_bytes=shard_bytes)
    with pytest.raises(UserError, match="did not write for this model and config as native"):
        claim_folder(folder, "native", config, source=tmp_path / "source")
