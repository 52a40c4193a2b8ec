"""Training checkpoints: exact round trips, a clear word on damaged files, and what a crash at any instant leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState, load, save
from shared_config.interchange.run_layout import INDEX, OPTIMIZER, STATE, WEIGHTS, clean, latest, prune

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int32, np.int64, np.uint8, np.bool_)


def state_of(step: int, size: int = 3) -> TrainingState:
    values = np.arange(size, dtype=np.float32) + step
    return TrainingState(
        step, {"w": values, "bias": -values}, {"m.w": values / 3, "v.w": values**2}, {"rng": [step, 2**60]}
    )


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


# Round trips


def test_everything_comes_back(tmp_path: Path) -> None:
    config = {"model": {"dim": 8, "norm_eps": 1e-5}, "data": {"path": "ä"}}
    state = state_of(50)
    path = save(tmp_path, state, rows=4000, fingerprint="f0", config=config, backend="torch")
    assert path == tmp_path / "step_00000050"
    for source in (path, tmp_path):
        loaded = load(source)
        assert_same(loaded.state.weights, state.weights)
        assert_same(loaded.state.optimizer, state.optimizer)
        assert (loaded.state.step, loaded.state.extra) == (50, {"rng": [50, 2**60]})
        assert (loaded.rows, loaded.fingerprint, loaded.config, loaded.backend) == (4000, "f0", config, "torch")
        assert loaded.versions["numpy"] == np.__version__
        assert loaded.path == path
    assert load(path, with_optimizer=False).state.optimizer == {}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000050"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_arrays_of_any_type_shape_and_layout_come_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arrays = {}
    for name in data.draw(st.lists(st.sampled_from("abcdef"), unique=True)):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        raw = np.random.default_rng(len(arrays)).integers(0, 255, size=(*shape, 8), dtype=np.uint8)
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        array = (
            (raw[..., 0] % 2).astype(dtype)
            if dtype == np.bool_
            else raw[..., : dtype.itemsize].copy().view(dtype)[..., 0]
        )
        array = np.where(np.isfinite(array), array, np.ones((), dtype))  # what is not is refused
        layout = data.draw(st.sampled_from(["plain", "transposed", "reversed", "strided"]))
        if array.ndim:
            array = {"plain": array, "transposed": array.T, "reversed": array[::-1], "strided": array[..., ::2]}[layout]
        arrays[f"layer.{name}"] = array
    folder = tmp_path_factory.mktemp("any")
    save(folder, TrainingState(1, arrays, {f"m.{name}": array for name, array in arrays.items()}))
    loaded = load(folder).state
    assert_same(loaded.weights, arrays)
    assert_same({name[2:]: array for name, array in loaded.optimizer.items()}, arrays)


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    one, other = (save(tmp_path / name, state_of(5), config={"a": 1}, backend="jax") for name in ("one", "other"))
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_all_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = save(tmp_path / "run", state_of(1))
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


# Latest, pruning, leftovers


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    for step in (9, 100_000_000, 10):
        save(tmp_path, state_of(step))
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_99999999999").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step_100000000"
    with pytest.raises(UserError, match="no checkpoint, nor a folder with checkpoints"):
        load(tmp_path / "absent")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, state_of(step), keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    save(tmp_path, state_of(1), keep=2)
    assert load(tmp_path / "step_00000001").state.step == 1
    prune(tmp_path, 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000004"]


def test_the_checkpoint_of_a_step_can_be_replaced(tmp_path: Path) -> None:
    save(tmp_path, state_of(3, size=3))
    save(tmp_path, state_of(3, size=5))
    assert load(tmp_path).state.weights["w"].shape == (5,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000003"]


def test_leftovers_are_removed_and_a_replaced_checkpoint_is_put_back(tmp_path: Path) -> None:
    save(tmp_path, state_of(3)).rename(tmp_path / ".step_00000003.old")
    for name in (".step_00000004.new", ".step_00000002.gone", ".step_00000001.old", "step_00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    assert load(tmp_path).state.step == 3
    clean(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    assert load(tmp_path).state.step == 3


# Damage


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, INDEX, STATE])
def test_any_damage_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, state_of(3), config={"a": 1})
    file = path / name
    whole = file.read_bytes()

    def refused(content: bytes | None) -> str:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load(tmp_path)
        assert str(caught.value).startswith(f"{file}: ")
        assert f"remove {path} to go on from the checkpoint before it" in str(caught.value)
        return str(caught.value)

    assert "can't be read" in refused(None)
    for length in (0, 1, len(whole) // 2, len(whole) - 2):
        refused(whole[:length])
    for place in range(0, len(whole) - 1, 7):
        refused(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    file.write_bytes(whole)
    assert load(tmp_path).state.step == 3


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(3))
    fields = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps({**fields, "format": 4}))
    with pytest.raises(UserError, match="format 4 is newer than this version reads"):
        load(path)
    (path / STATE).write_text("[]")
    with pytest.raises(UserError, match="not the state of a training checkpoint"):
        load(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"step_00000001: the checkpoint can't be written"):
        save(tmp_path / "file" / "run", state_of(1))


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, state_of(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, state_of(2), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]


# Crashes


CRASHES = """
import os, shutil, sys
from pathlib import Path
from shared_config.interchange.checkpoint import load, save
from shared_config.interchange.run_layout import latest
from tests.interchange.test_checkpoint import state_of

def counted(function, limit):
    def call(*args, **kwargs):
        calls.append(function)
        if len(calls) > limit:
            os._exit(9)
        return function(*args, **kwargs)
    return call

os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
folder, new_step, seen = Path(sys.argv[1]), int(sys.argv[2]), []
for limit in range(1000):
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2):
        save(folder, state_of(step))
    child = os.fork()
    if child == 0:
        calls = []
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name), limit))
        save(folder, state_of(new_step, size=7), keep=2)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = load(folder).state
    seen.append((found.step, found.weights["w"].size))
    save(folder, state_of(9), keep=2)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 and not any(name.startswith(".") for name in names), (limit, names)
    assert load(folder).state.step == 9
    if ended:
        break
assert seen == sorted(seen) and set(seen) == {(2, 3), (new_step, 7)}, seen
print(limit)
"""


@pytest.mark.parametrize("new_step", [3, 2])
def test_a_crash_at_any_instant_leaves_the_old_or_the_new(tmp_path: Path, new_step: int) -> None:
    """The writer dies before its n-th system call, for each n; once with a new step, once replacing the last one."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path / "run"), str(new_step)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
