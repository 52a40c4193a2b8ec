"""Folders of runs, models and outputs: what is in them, what is made room for, and every refusal word by word."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from shared_config.contract.parameters import parameter_table
from shared_config.errors import ConfigError, UserError
from shared_config.interchange import checkpoint, outputs, run_layout, saving, source
from shared_config.interchange.checkpoint import TrainingState, first_nonfinite, installed_versions, is_checkpoint, save
from shared_config.interchange.huggingface import save_huggingface
from shared_config.interchange.outputs import (
    claim_folder,
    claim_record_folder,
    claim_run_folder,
    forget_run,
    refuse_overlap,
    refuse_overwriting,
    writable_folder,
)
from shared_config.interchange.run_layout import clean, hidden, latest, prune, published_steps, read_state, with_room
from shared_config.interchange.source import check_same_function, find_config, kind_of, read_config, read_model
from shared_config.interchange.tensors import TRACE, write_tensors
from shared_config.interchange.text_weights import load_text_weights
from shared_config.interchange.toml import config_to_dict, config_to_toml
from shared_config.interchange.weights import WeightsError, save_weights
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig
from shared_config.schema.training import TrainConfig
from tests.oracle.weights import draw

TINY = ("--model.dim=16", "--model.n_layers=1", "--model.ffn_hidden_dim=24", "--model.vocab_size=19")
CONFIG = load_config("debug", TINY)
ONE = np.ones(2, np.float32)


def state_of(config: JobConfig = CONFIG) -> dict[str, np.ndarray]:
    table = parameter_table(config.model)
    return {name: value.astype(np.float32) for name, value in draw({n: s.shape for n, s in table.items()}, 3).items()}


def state(step: int) -> TrainingState:
    return TrainingState(step, {"w": ONE * step}, {"m.w": ONE})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Runs


def test_steps_are_told_by_their_names(tmp_path: Path) -> None:
    for name in ("step_00000012", "step_123456789", "step_0000001", "step_00000013x", ".step_00000014.old",
                 ".step_00000015.new", "step_00000012.old", ".step_00000012.old"):  # fmt: skip
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000099").touch()
    steps = {12: "step_00000012", 14: ".step_00000014.old", 123456789: "step_123456789"}
    assert published_steps(tmp_path) == {step: tmp_path / name for step, name in steps.items()}
    assert latest(tmp_path) == tmp_path / "step_123456789"
    assert hidden(tmp_path / "step_00000012", "new") == tmp_path / ".step_00000012.new"


def test_leftovers_go_and_others_stay(tmp_path: Path) -> None:
    for name in (".step_00000001.new", ".step_00000002.gone", ".step_00000003.old", "step_00000003", ".step_4.other",
                 ".step_00000005.old", ".lock.new"):  # fmt: skip
        (tmp_path / name).mkdir()
    (tmp_path / ".step_00000006.new").symlink_to("step_00000003")
    (tmp_path / ".step_00000007.new").touch()
    clean(tmp_path)
    assert names(tmp_path) == [".lock.new", ".step_4.other", "step_00000003", "step_00000005"]


def test_what_is_pruned_is_the_oldest(tmp_path: Path) -> None:
    def after(keep: int, spare: int | None = None) -> list[int]:
        shutil.rmtree(tmp_path, ignore_errors=True)
        for step in (3, 1, 20, 100):
            (tmp_path / f"step_{step:08d}").mkdir(parents=True)
        prune(tmp_path, keep, None if spare is None else tmp_path / f"step_{spare:08d}")
        assert not list(tmp_path.glob(".*"))
        return sorted(published_steps(tmp_path))

    assert [after(keep) for keep in (5, 4, 3, 1, 0)] == [[1, 3, 20, 100]] * 2 + [[3, 20, 100], [100], []]
    assert after(1, spare=3) == [3, 100]
    assert after(0, spare=100) == [100]


class Disk:
    """A disk on which as many writes fail as it is told."""

    def __init__(self, failures: int, error: BaseException) -> None:
        self.failures, self.error, self.tries = failures, error, 0

    def write(self) -> str:
        self.tries += 1
        if self.tries <= self.failures:
            raise self.error
        return "written"


def run_of(folder: Path, *steps: int) -> Path:
    for step in steps:
        save(folder, state(step))
    return folder


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = [
    OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), SafetensorError("x (os error 28)"),
    SafetensorError("x (os error 122)"), caused(UserError("x"), OSError(errno.ENOSPC, "x")),
]  # fmt: skip
OTHER = [
    OSError(errno.EIO, "os error 28"), UserError("os error 28"), SafetensorError("os error 5"), ValueError("x"),
    caused(UserError("x"), OSError(errno.EIO, "x")),
]  # fmt: skip


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_full_disk_is_told_by_its_error(error: Exception, tmp_path: Path) -> None:
    error = error if isinstance(error, (OSError, UserError)) else caused(UserError("x"), error)
    disk = Disk(1, error)
    assert with_room(tmp_path, None, disk.write) == "written"
    assert disk.tries == 2


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_other_errors_are_raised_at_once(error: Exception, tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2)
    for failures in (1, 2):
        disk = Disk(failures, error)
        with pytest.raises(type(error)):
            with_room(tmp_path, 1, disk.write)
        assert disk.tries == 1
    mixed = iter([OSError(errno.ENOSPC, "x"), error])

    def write() -> None:
        raise next(mixed)

    with pytest.raises(type(error)) as caught:
        with_room(tmp_path, None, write)
    assert caught.value is error


@pytest.mark.parametrize(
    ("keep", "left"),
    [(None, [1, 2, 3, 4]), (5, [1, 2, 3, 4]), (4, [2, 3, 4]), (3, [3, 4]), (2, [4]), (1, [4]), (0, [4])],
)
def test_room_is_made_by_what_is_given_up(keep: int | None, left: list[int], tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2, 3, 4)
    (tmp_path / ".step_00000009.new").mkdir()
    assert with_room(tmp_path, keep, Disk(1, OSError(errno.ENOSPC, "x")).write) == "written"
    assert sorted(published_steps(tmp_path)) == left
    assert not (tmp_path / ".step_00000009.new").exists()


@pytest.mark.parametrize("damage", ["no state", "short", "no file", "not JSON"])
def test_the_newest_whole_checkpoint_is_spared(damage: str, tmp_path: Path) -> None:
    run_of(tmp_path, 2, 1, 3)
    newest = tmp_path / "step_00000003"
    if damage == "short":
        (newest / "weights.safetensors").write_bytes(b"x")
    elif damage == "not JSON":
        (newest / "state.json").write_text("{")
    else:
        (newest / {"no state": "state.json", "no file": "optimizer.safetensors"}[damage]).unlink()
    with pytest.raises(UserError) as caught:
        with_room(tmp_path, 1, Disk(2, OSError(errno.ENOSPC, "x")).write)
    assert str(caught.value) == (
        f"{tmp_path}: No space left on device, also without what checkpoint.keep_last_n = 1 gives up; "
        "kept: step_00000002, step_00000003; free some space and start the run again"
    )


def test_what_a_failed_write_leaves_goes_with_it(tmp_path: Path) -> None:
    run_of(tmp_path, 1)

    def write() -> None:
        (tmp_path / ".step_00000002.new").mkdir()
        raise OSError(errno.ENOSPC, "x")

    with pytest.raises(UserError, match="kept: step_00000001;"):
        with_room(tmp_path, None, write)
    assert names(tmp_path) == ["step_00000001"]


def test_a_checkpoint_is_hidden_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a process that is killed meanwhile leaves no part under the name of a whole one."""
    run_of(tmp_path, 1, 2)
    removed: list[Path] = []
    monkeypatch.setattr(run_layout, "remove", removed.append)
    prune(tmp_path, 1)
    assert removed == [tmp_path / ".step_00000001.gone"]
    assert names(tmp_path) == [".step_00000001.gone", "step_00000002"]


def test_what_was_wrong_first_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path, *_: object) -> None:
        shutil.rmtree(path.parent)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "write_tensors", gone)
    with pytest.raises(UserError) as caught:
        save(tmp_path, state(1))
    assert str(caught.value) == f"{tmp_path}/step_00000001: the checkpoint can't be written: Input/output error"


def test_the_state_of_a_checkpoint_is_plain_json(tmp_path: Path) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    path = save(tmp_path, state(1), config=MappingProxyType({"model": {"dim": 8}}))
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert (checkpoint.load(path).rows, checkpoint.load(path).fingerprint, checkpoint.load(path).backend) == (0, "", "")
    assert checkpoint.read_config(path) == {"model": {"dim": 8}}
    text = (path / "state.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1) + "\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, TrainingState(2, {}, {}, {"x": float("nan")}))
    assert names(tmp_path) == ["step_00000001"]


def test_without_a_whole_checkpoint_nothing_goes(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}").mkdir()
    assert with_room(tmp_path, 1, Disk(1, OSError(errno.ENOSPC, "x")).write) == "written"
    assert sorted(published_steps(tmp_path)) == [1, 2]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(UserError, match="kept: no checkpoint; free some space"):
        with_room(tmp_path, 1, Disk(2, OSError(errno.ENOSPC, "x")).write)


def test_state_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = run_of(tmp_path, 3) / "step_00000003"
    file = path / "state.json"
    whole = json.loads(file.read_text())
    advice = f"; remove {path} to go on from the checkpoint before it"

    def said(content: str) -> str:
        file.write_text(content)
        with pytest.raises(UserError) as caught:
            read_state(file)
        return str(caught.value)

    assert said("{").startswith(f"{file}: can't be read (Expecting")
    assert said("{").endswith(advice)
    for content in ("[]", "{}", '{"format": "2"}'):
        assert said(content) == f"{file}: not the state of a training checkpoint{advice}"
    assert said('{"format": 4}') == f"{file}: format 4 is newer than this version reads (3)"
    for changes in ({"step": 4}, {"checksum": "x"}):
        assert said(json.dumps({**whole, **changes})) == f"{file}: corrupt: its checksum does not match{advice}"
    del whole["checksum"]
    assert said(json.dumps(whole)) == f"{file}: corrupt: its checksum does not match{advice}"
    told = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**dict(reversed(whole.items())), "checksum": told}))
    assert read_state(file) == whole


def test_files_of_a_checkpoint_that_cannot_be_read(tmp_path: Path) -> None:
    path = run_of(tmp_path, 3) / "step_00000003"
    advice = f"; remove {path} to go on from the checkpoint before it"
    file = path / "optimizer.safetensors"
    whole = file.read_bytes()

    def said() -> str:
        with pytest.raises(UserError) as caught:
            checkpoint.load(path)
        return str(caught.value)

    file.write_bytes(whole[:-1])
    assert said() == f"{file}: truncated: {len(whole) - 1} bytes instead of {len(whole)}{advice}"
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert said() == f"{file}: corrupt: its checksum does not match state.json{advice}"
    assert checkpoint.load(path, with_optimizer=False).state.optimizer == {}
    file.unlink()
    assert said() == f"{file}: can't be read (No such file or directory){advice}"
    os.mkfifo(file)
    assert said().startswith(f"{file}: is a named pipe; must be a regular file")
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path / "absent")
    assert str(caught.value) == (
        f"{tmp_path}/absent: no checkpoint, nor a folder with checkpoints (step_00000050, ...)"
    )
    with pytest.raises(UserError, match=r"step_00000009/state\.json: can't be read"):
        checkpoint.load(tmp_path / "step_00000009")


def test_the_first_that_is_not_finite_is_named_in_the_order_of_the_weights() -> None:
    def found(*bad: str) -> str | None:
        arrays = {name: np.array([0.0, np.nan if name in bad else 1.0]) for name in
                  ("a", "b", "v.b", "m.b", "v.a", "m.a", "m.c", "t.a")}  # fmt: skip
        weights = {name: arrays.pop(name) for name in ("a", "b")}
        return first_nonfinite(TrainingState(1, weights, arrays))

    assert found() is None
    order = ["a", "v.a", "m.a", "b", "v.b", "m.b", "m.c", "t.a"]
    for place, name in enumerate(order):
        assert found(*order[place:]) == name
    infinite = TrainingState(1, {"a": np.array([-np.inf])}, {})
    assert first_nonfinite(infinite) == "a"


def test_what_is_a_checkpoint(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path)
    path = run_of(tmp_path / "run", 3) / "step_00000003"
    assert is_checkpoint(path)
    assert is_checkpoint(tmp_path / "run")
    path.rename(tmp_path / "moved")
    assert is_checkpoint(tmp_path / "moved")
    assert not is_checkpoint(tmp_path / "run")
    assert checkpoint.load(tmp_path / "moved").state.step == 3


def test_a_checkpoint_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    save(tmp_path, state(3))
    aside = tmp_path / ".step_00000003.new"
    assert synced[-3:] == [str(aside / "state.json"), str(aside), str(tmp_path)]


def test_kept_checkpoints_are_the_newest_and_the_one_just_written(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2, 3)
    save(tmp_path, state(2), keep=1)
    assert sorted(published_steps(tmp_path)) == [2, 3]
    assert (tmp_path / "step_00000002" / "state.json").read_text().endswith("}\n")
    versions = installed_versions()
    assert list(versions)[:2] == ["python", "numpy"]
    assert versions["numpy"] == np.__version__
    assert versions["python"].count(".") == 2


# Outputs


def test_an_output_is_not_where_its_source_is(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "w.safetensors").touch()
    (tmp_path / "ab").mkdir()
    folder = tmp_path / "a"
    for target, read in ((folder, folder), (folder / "b", folder), (folder, folder / "b"), (folder / "c", folder),
                         (folder, folder / "w.safetensors"), (tmp_path, folder / "w.safetensors"),
                         (folder / "w.safetensors", folder / "w.safetensors"),
                         (folder / "b" / "..", folder)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            refuse_overlap(target, read)
        said = f"{target}: is, is within, or holds the folder that is read, {read}; give another folder"
        assert str(caught.value) == said
    for target, read in ((tmp_path / "ab", folder), (folder, tmp_path / "ab"), (folder / "c", folder / "b"),
                         (folder / "b", folder / "w.safetensors"),
                         (folder / "new", folder / "w.safetensors")):  # fmt: skip
        refuse_overlap(target, read)


def test_an_output_file_is_none_of_those_that_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "deep").mkdir(parents=True)
    for name in ("w.safetensors", "deep/x", "model.safetensors.index.json"):
        (folder / name).touch()
    (tmp_path / "other").touch()
    (tmp_path / "linked").hardlink_to(folder / "deep" / "x")
    write_tensors(folder / "trace.safetensors", {"a": ONE}, {TRACE: "1"})
    index = folder / "model.safetensors.index.json"
    for target, read in ((folder / "w.safetensors", folder / "w.safetensors"), (folder / "w.safetensors", folder),
                         (folder / "deep" / "x", folder), (tmp_path / "linked", folder),
                         (folder / "w.safetensors", index), (index, index),
                         (folder / "trace.safetensors", folder / "trace.safetensors")):  # fmt: skip
        for sources in ((read,), (None, tmp_path / "other", read)):
            with pytest.raises(UserError) as caught:
                refuse_overwriting(target, *sources)
            assert str(caught.value) == f"{target}: is read from {read}; give another file to write to"
    for target, read in ((folder / "new", folder), (tmp_path / "other", folder), (folder / "trace.safetensors", folder),
                         (folder / "trace.safetensors", index), (folder / "deep" / "x", folder / "w.safetensors"),
                         (folder / "w.safetensors", folder / "deep" / "x")):  # fmt: skip
        refuse_overwriting(target, read, None)
    refuse_overwriting(tmp_path / "other")
    refuse_overwriting(tmp_path / "other", tmp_path / "absent", tmp_path / "none" / "a.json")


@pytest.mark.parametrize(
    ("count", "listed"),
    [(1, "a0"), (3, "a0, a1, a2"), (4, "a0, a1, a2 and 1 more"), (6, "a0, a1, a2 and 3 more")],
)
def test_a_folder_in_use_is_refused_with_what_it_holds(count: int, listed: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for place in [1, 0, *range(2, count)] if count > 1 else [0]:
        (folder / f"a{place}").touch()
    with pytest.raises(UserError) as caught:
        claim_folder(folder, "native", CONFIG, source=tmp_path / "source")
    assert str(caught.value) == (
        f"{folder}: holds {listed}, which this command did not write for this model and config as native weights; "
        "give a new or an empty folder"
    )
    with pytest.raises(UserError) as caught:
        claim_run_folder(folder)
    assert str(caught.value) == (
        f"checkpoint.dir = {str(folder)!r}: holds {listed}, and is no training run; give a new or an empty folder"
    )
    with pytest.raises(UserError) as caught:
        claim_record_folder(folder, frozenset({"b"}))
    assert str(caught.value) == f"{folder}: holds {listed}, which validate did not write; give a new folder"


def test_a_run_may_have_its_folder_again_unless_there_are_weights_of_others(tmp_path: Path) -> None:
    for name in ("absent", "empty", "locked", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "absent").rmdir()
    (tmp_path / "locked" / ".lock").touch()
    (tmp_path / "locked" / "anything").touch()
    run_of(tmp_path / "run", 1)
    for name in ("absent", "empty", "locked", "run"):
        claim_run_folder(tmp_path / name)
    for own in ("locked", "run"):
        for other in ("model.safetensors", "model.safetensors.index.json", "config.json"):
            (tmp_path / own / other).touch()
            with pytest.raises(UserError, match="and is no training run; give a new or an empty folder"):
                claim_run_folder(tmp_path / own)
            (tmp_path / own / other).unlink()


def test_a_run_is_forgotten_and_what_else_is_there_stays(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2)
    for name in ("metrics.jsonl", "config.toml", ".lock", "step_1"):
        (tmp_path / name).touch()
    forget_run(tmp_path)
    assert names(tmp_path) == [".lock", "config.toml", "step_1"]
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="is no training run"):
        forget_run(tmp_path)


def written(folder: Path, kind: str, config: JobConfig = CONFIG, writer: str | None = None) -> Path:
    metadata = {} if writer == "" else {outputs.WRITER: writer or kind}
    if kind == "native":
        save_weights(folder, state_of(config), metadata=metadata)
        (folder / "config.toml").write_text(config_to_toml(config))
    else:
        save_huggingface(folder, state_of(config), config.model, metadata=metadata)
    return folder


def may_claim(folder: Path, kind: str, config: JobConfig = CONFIG) -> bool:
    refused = ""
    try:
        claimed = claim_folder(folder, kind, config, source=folder.parent / "source")
    except UserError as error:
        refused = str(error)
    else:
        assert claimed == folder
    assert not refused or refused.endswith(f"and config as {kind} weights; give a new or an empty folder")
    return not refused


@pytest.mark.parametrize("kind", ["native", "huggingface"])
def test_what_a_command_wrote_is_known_again(kind: str, tmp_path: Path) -> None:
    other = {"native": "huggingface", "huggingface": "native"}[kind]
    own, foreign = {"native": ("config.toml", "config.json"), "huggingface": ("config.json", "config.toml")}[kind]
    folder = written(tmp_path / "out", kind)
    assert may_claim(folder, kind)
    assert not may_claim(folder, other)
    assert not may_claim(folder, kind, CONFIG.replace(model=CONFIG.model.replace(norm_eps=0.5)))
    tokenizer = CONFIG.replace(data=CONFIG.data.replace(tokenizer=str(tmp_path)))
    assert may_claim(folder, kind, tokenizer)
    assert may_claim(folder, kind, CONFIG.replace(train=CONFIG.train.replace(seed=5))) == (kind == "huggingface")
    text = (folder / own).read_text()
    (folder / own).unlink()
    assert may_claim(folder, kind)
    for broken in ("{", "[]", "3", '{"model_type": "gpt2"}'):
        (folder / own).write_text(broken)
        assert not may_claim(folder, kind), broken
    (folder / own).write_bytes(b"\xff")
    assert not may_claim(folder, kind)
    (folder / own).write_text(text)
    (folder / foreign).touch()
    assert not may_claim(folder, kind)
    assert not may_claim(written(tmp_path / "unsigned", kind, writer=""), kind)
    (tmp_path / "out" / foreign).unlink()
    (folder / "model.safetensors").unlink()
    for index in ("", "[]", '{"metadata": 3}', "{}", '{"metadata": {}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        assert not may_claim(folder, kind)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"kempnerforge": kind}}))
    assert may_claim(folder, kind)


def test_folders_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    asked: list[int] = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(mode))
    with pytest.raises(UserError) as caught:
        writable_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path}: the output folder is not writable"
    assert asked == [os.W_OK | os.X_OK]

    def refused(*_: object) -> Any:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(outputs, "make_folder", refused)
    with pytest.raises(UserError) as caught:
        writable_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path}: can't be created as an output folder: Permission denied"
    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(UserError) as caught:
        claim_run_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path}: can't be an output folder: Permission denied"


# Sources


def test_the_kind_of_a_model_is_told_by_what_is_there(tmp_path: Path) -> None:
    native = written(tmp_path / "native", "native")
    foreign = written(tmp_path / "foreign", "huggingface")
    run = run_of(tmp_path / "run", 3)
    (tmp_path / "step_00000008").mkdir()
    (foreign / "other.safetensors").touch()
    kinds = {native: "native", native / "model.safetensors": "native", native / "config.toml": "native",
             foreign: "huggingface", foreign / "model.safetensors": "huggingface",
             foreign / "other.safetensors": "native", run: "checkpoint", run / "step_00000003": "checkpoint",
             run / "step_00000003" / "weights.safetensors": "native",
             tmp_path / "step_00000008": "checkpoint"}  # fmt: skip
    assert {path: kind_of(path) for path in kinds} == kinds
    (foreign / "model.safetensors.index.json").touch()
    assert kind_of(foreign / "model.safetensors.index.json") == "huggingface"
    with pytest.raises(UserError) as caught:
        kind_of(tmp_path / "absent")
    assert str(caught.value) == f"{tmp_path}/absent: no such file or folder"
    (foreign / "config.toml").touch()
    for path in (foreign, foreign / "model.safetensors"):
        with pytest.raises(UserError) as caught:
            kind_of(path)
        said = "holds both config.json and config.toml: remove the one that isn't its own"
        assert str(caught.value) == f"{foreign}: {said}"
    assert kind_of(foreign / "other.safetensors") == "native"


def test_the_config_of_a_model_is_found(tmp_path: Path) -> None:
    native = written(tmp_path / "native", "native")
    assert find_config(native) == find_config(native / "model.safetensors") == config_to_dict(CONFIG)
    foreign = written(tmp_path / "foreign", "huggingface")
    fields = find_config(foreign)
    assert fields is not None
    assert fields.keys() == {"model", "train", "optimizer", "scheduler"}
    seq_len = min(type(CONFIG.train)().seq_len, CONFIG.model.max_seq_len)
    assert fields["train"] == {"max_steps": 1000, "seq_len": seq_len}, (
        "what is trained already is tuned, not pretrained"
    )
    assert (fields["optimizer"], fields["scheduler"]) == ({"lr": 2e-5}, {"warmup_steps": 30})
    (foreign / "tokenizer.json").write_text("{}")
    assert read_config(foreign)["data"] == {"tokenizer": str(foreign)}
    save(tmp_path / "run", state(3), config={"model": {"dim": 16}, "data": {"path": "p"}})
    step = tmp_path / "run" / "step_00000003"
    for path in (tmp_path / "run", step, step / "weights.safetensors"):
        assert find_config(path) == {"model": {"dim": 16}, "data": {"path": "p"}}
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "generation_config.json").write_text("{}")
    assert read_config(step)["data"] == {"path": "p"}
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "run", step, step / "weights.safetensors"):
        tokenizer = str(tmp_path / "run" / "tokenizer")
        assert read_config(path)["data"] == {"path": "p", "tokenizer": tokenizer}
    bare = run_of(tmp_path / "bare", 1)
    assert find_config(bare) is None
    for length in (16, 100_000):
        short = CONFIG.replace(model=CONFIG.model.replace(max_seq_len=length), train=CONFIG.train.replace(seq_len=16))
        fields = find_config(written(tmp_path / f"of {length}", "huggingface", short))
        assert fields is not None
        assert fields["train"] == {"max_steps": 1000, "seq_len": min(length, TrainConfig().seq_len)}
        assert load_text_weights(tmp_path / f"of {length}", short.model).keys() == state_of().keys()
    (tmp_path / "config alone").mkdir()
    text = '[model]\ndim = 24\nn_heads = 6\nn_kv_heads = 3\n[vlm]\narch = "cross_attention"\n'
    (tmp_path / "config alone" / "config.toml").write_text(text)
    assert find_config(tmp_path / "config alone") == tomllib.loads(text), "no weights, of no former version"
    save_weights(tmp_path / "alone.safetensors", {"a": ONE})
    assert find_config(tmp_path / "alone.safetensors") is None
    with pytest.raises(UserError) as caught:
        read_config(bare)
    assert str(caught.value) == (
        f"{bare}: has no config: needs a config.toml, a Hugging Face folder's config.json, or a training checkpoint"
    )


def test_a_model_is_read_with_its_config_or_the_one_that_is_given(tmp_path: Path) -> None:
    said: list[str] = []
    native = written(tmp_path / "native", "native")
    found = read_model(native, say=said.append)
    assert (found.path, found.kind, found.config, found.found) == (native, "native", CONFIG, CONFIG)
    assert found.weights.keys() == state_of().keys()
    assert all(np.array_equal(found.weights[name], value) for name, value in state_of().items())
    assert said == []
    other = CONFIG.replace(model=CONFIG.model.replace(norm_eps=0.5))
    with pytest.raises(UserError) as caught:
        read_model(native, other, say=said.append)
    here, there = f"model.norm_eps = 0.5: is {CONFIG.model.norm_eps!r} beside the weights", str(native)
    assert str(caught.value) == "\n".join([
        f"{there}: the weights were written with another config:", here,
        "leave the fields as they are there, or set them on the command line to go on all the same",
    ])  # fmt: skip
    assert said == []
    changed = read_model(native, other, overridden={"model.norm_eps"}, say=said.append)
    assert (changed.config, changed.found) == (other, CONFIG)
    assert len(said) == 1
    assert said[0].startswith("note: ")
    with pytest.raises(UserError, match=r"model\.norm_eps = 0\.5"):
        check_same_function(other, CONFIG, "x", overridden={"model.rope_theta"}, say=said.append)
    (native / "config.toml").unlink()
    with pytest.raises(UserError) as caught:
        read_model(native)
    assert str(caught.value) == f"{native}: has no config.toml beside it"
    said.clear()
    alone = read_model(native, CONFIG, say=said.append)
    assert (alone.found, alone.config) == (None, CONFIG)
    assert said == [
        f"note: {native} has no config beside it; its weights are taken to be those of the config that is given"
    ]
    (native / "config.toml").write_text("[model]\ndim = -1\n")
    with pytest.raises(ConfigError) as caught_config:
        read_model(native, CONFIG)
    assert caught_config.value.problems
    assert all(problem.startswith(f"{native}: model.dim") for problem in caught_config.value.problems)


def test_notes_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    source.to_stderr("said")
    assert capsys.readouterr() == ("", "said\n")


def test_a_tied_tensor_comes_under_its_own_name(tmp_path: Path) -> None:
    tied = CONFIG.replace(model=CONFIG.model.replace(tie_embeddings=True))
    head, embedding = "output_head.proj.weight", "token_embedding.embedding.weight"
    tensors = state_of(tied)
    for stored in ({}, {head: tensors[embedding]}):
        save_weights(tmp_path / "a.safetensors", {**tensors, **stored})
        found = read_model(tmp_path / "a.safetensors", tied, say=lambda line: None).weights
        assert found.keys() == tensors.keys()
    only = {head if name == embedding else name: value for name, value in tensors.items()}
    save_weights(tmp_path / "a.safetensors", only)
    found = read_model(tmp_path / "a.safetensors", tied, say=lambda line: None).weights
    assert found.keys() == tensors.keys()
    assert np.array_equal(found[embedding], tensors[embedding])
    save_weights(tmp_path / "a.safetensors", {**tensors, head: tensors[embedding] + 1})
    with pytest.raises(WeightsError) as caught:
        read_model(tmp_path / "a.safetensors", tied, say=lambda line: None)
    assert str(caught.value) == (
        f"{tmp_path}/a.safetensors: 1 tensors do not fit:\n  {head}: differs from {embedding}, though "
        "model.tie_embeddings is true"
    )


@pytest.mark.parametrize("kind", ["native", "huggingface", "run"])
def test_a_text_model_is_read_from_every_kind_of_place(kind: str, tmp_path: Path) -> None:
    expected = state_of()
    if kind == "run":
        save(tmp_path / "a", TrainingState(1, expected, {}), config=config_to_dict(CONFIG))
    else:
        written(tmp_path / "a", kind)
    found = load_text_weights(tmp_path / "a", CONFIG.model)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match=r"model\.rope_theta = 5\.0: is"):
        load_text_weights(tmp_path / "a", CONFIG.model.replace(rope_theta=5.0))
