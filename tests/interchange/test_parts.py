"""Checkpoints that several processes write in parts: whatever holds what, the whole comes back, any slice of it is
read alone, and one that is not whole is never there.
"""

from __future__ import annotations

import errno
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.errors import UserError
from shared_config.interchange import checkpoint, saving
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.parts import Part, Parts, StateParts, covers, stacked, whole
from shared_config.interchange.run_layout import FileFields, latest
from shared_config.interchange.together import ALONE, Processes
from tests.ranks import together

RANKS = 3


def cut(array: np.ndarray, cuts: Sequence[Sequence[int]]) -> list[Part]:
    """The array as a grid, cut along each axis at these places."""
    bounds = [[0, *places, size] for places, size in zip(cuts, array.shape, strict=True)]
    boxes = itertools.product(*(itertools.pairwise(places) for places in bounds))
    return [
        Part(tuple(start for start, _ in box), array[tuple(slice(start, stop) for start, stop in box)]) for box in boxes
    ]


def grid_of(data: st.DataObject, array: np.ndarray) -> list[Part]:
    cuts = [
        sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=2)) if size > 1 else ()) for size in array.shape
    ]
    return cut(array, cuts)


def state_of(step: int) -> TrainingState:
    table = np.arange(24, dtype=np.float32).reshape(6, 4) + step
    return TrainingState(
        step,
        {"table": table, "bias": table[0].astype(ml_dtypes.bfloat16)},
        {"m.table": table / 7, "t.table": np.asarray(step, np.int32)},
        {"rng": step},
    )


def share_of(state: TrainingState, rank: int, count: int = RANKS) -> StateParts:
    """Rows of the table for each rank; of the rest, everything for the last."""

    def share(name: str, array: np.ndarray) -> Parts:
        if array.ndim < 2:
            return whole(name, array) if rank == count - 1 else Parts(array.shape, array.dtype)
        rows = cut(array, [[len(array) * place // count for place in range(1, count)], []])
        return Parts(array.shape, array.dtype, (rows[rank],))

    kinds = (
        {name: share(name, array) for name, array in arrays.items()} for arrays in (state.weights, state.optimizer)
    )
    return StateParts(state.step, *kinds, extra=state.extra)


def save_together(folder: Path, step: int, share: Callable[..., StateParts] = share_of, **options: Any) -> list[Any]:
    return together(
        RANKS,
        lambda own: checkpoint.save(folder, share(state_of(step), own.rank), processes=own, backend="x", **options),
    )


def assert_same(found: TrainingState, true: TrainingState) -> None:
    assert (found.step, found.extra) == (true.step, true.extra)
    for own, expected in ((found.weights, true.weights), (found.optimizer, true.optimizer)):
        assert own.keys() == expected.keys()
        for name, array in own.items():
            assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
            assert array.tobytes() == expected[name].tobytes(), name


# Parts


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_of_any_grid_is_that_of_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    parts = data.draw(st.permutations(grid_of(data, array)))
    tensor = Parts(array.shape, array.dtype, tuple(parts))
    box = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape)
    np.testing.assert_array_equal(tensor[box], array[box], strict=True)
    np.testing.assert_array_equal(np.asarray(tensor), array, strict=True)
    assert covers(shape, [(part.start, part.stop) for part in parts])
    if array.size:
        assert not covers(shape, [(part.start, part.stop) for part in parts[1:]])
        assert not covers(shape, [(part.start, part.stop) for part in (*parts, parts[0])])
        with pytest.raises(ValueError, match="not all of its parts are held"):
            np.asarray(Parts(array.shape, array.dtype, tuple(parts[1:])))
    layers = stacked([tensor, array + 1])
    np.testing.assert_array_equal(np.asarray(layers), np.stack([array, array + 1]), strict=True)
    np.testing.assert_array_equal(np.asarray(layers.layer(0)), array, strict=True)
    np.testing.assert_array_equal(np.asarray(layers.layer(1)), array + 1, strict=True)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4))],
        [((0, 0), (2, 4)), ((3, 0), (6, 4))],
        [((0, 0), (3, 4)), ((2, 0), (6, 4))],
        [((0, 0), (3, 4)), ((3, 0), (6, 2)), ((0, 2), (3, 4))],
        [((0, 0), (6, 5))],
        [((0,), (6,))],
        [],
    ],
)
def test_what_does_not_cover_a_tensor_once_is_seen(boxes: list[Any]) -> None:
    assert not covers((6, 4), boxes)


def test_a_part_in_one_place_is_not_copied() -> None:
    array = np.arange(12).reshape(3, 4)
    assert np.shares_memory(Parts(array.shape, array.dtype, tuple(cut(array, [[1], []])))[1:3, 1:2], array)


# Several processes


def test_what_ranks_hold_together_comes_back(tmp_path: Path) -> None:
    assert save_together(tmp_path, 3, rows=7) == [tmp_path / "step_00000003"] * RANKS
    found = checkpoint.load(tmp_path)
    assert (found.rows, found.backend) == (7, "x")
    assert_same(found.state, state_of(3))
    assert checkpoint.load(tmp_path, with_optimizer=False).state.optimizer == {}
    files = {path.name for path in found.path.iterdir()}
    shares = {f"{kind}-0000{rank}-of-00003.safetensors" for kind in ("weights", "optimizer") for rank in (1, 2, 3)}
    assert files == {*shares, "index.json", "state.json"}
    np.testing.assert_array_equal(
        found.parts.optimizer["m.table"][1:5, 2:3], state_of(3).optimizer["m.table"][1:5, 2:3]
    )


def test_a_rank_that_holds_nothing_writes_nothing(tmp_path: Path) -> None:
    def of_the_last(state: TrainingState, rank: int) -> StateParts:
        full, empty = state.parts(), StateParts(state.step, {}, {}, {})
        return full if rank == RANKS - 1 else empty

    save_together(tmp_path, 1, of_the_last)
    assert len(list((tmp_path / "step_00000001").iterdir())) == 4
    assert checkpoint.load(tmp_path).state.weights.keys() == state_of(1).weights.keys()


def test_ranks_share_the_checking_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_together(tmp_path, 1)
    described: list[str] = []
    describe = checkpoint.describe

    def noting(file: Path) -> FileFields:
        described.append(file.name)
        return describe(file)

    monkeypatch.setattr(checkpoint, "describe", noting)
    together(2, lambda own: checkpoint.load(tmp_path, processes=own))
    assert sorted(described) == sorted(
        [path.name for path in (tmp_path / "step_00000001").glob("*.safetensors")] + ["index.json"] * 2
    )


def test_damage_is_seen_by_the_rank_that_checks_the_file(tmp_path: Path) -> None:
    save_together(tmp_path, 1)
    file = tmp_path / "step_00000001" / "weights-00002-of-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    def load(own: Processes) -> None:
        with own.agreed():
            checkpoint.load(tmp_path, processes=own)

    holder = list(checkpoint.read_state(file.parent / "state.json")["files"]).index(file.name) % 2
    found = together(2, load)
    assert str(found[holder]).partition("; remove")[0] == f"{file}: corrupt: its checksum does not match state.json"
    assert_others_are_silent(found, holder)


def test_where_several_fail_the_first_of_the_worst_speaks() -> None:
    """And all know what that one gave."""
    given = {0: 1, 1: 2, 2: 0, 3: 2}
    assert together(4, lambda own: own.worst(given[own.rank])) == [(2, 1)] * 4
    assert together(4, lambda own: own.worst(0)) == [(0, 0)] * 4

    def fail(own: Processes) -> None:
        with own.agreed():
            if given[own.rank] == 2:
                raise OSError(f"of {own.rank}")

    found = together(4, fail)
    assert str(found[1]) == "of 1"
    assert_others_are_silent(found, 1)
    assert [str(getattr(found[rank], "__cause__", "")) for rank in (0, 2, 3)] == ["None", "None", "of 3"]


def assert_others_are_silent(found: Sequence[Any], failed: int) -> None:
    """All ranks end, and only the one that has failed says why."""
    assert not getattr(found[failed], "shown_elsewhere", False)
    others = [error for rank, error in enumerate(found) if rank != failed]
    assert [str(error) for error in others] == [f"process {failed} of the run has failed, and says why"] * len(others)
    assert all(isinstance(error, UserError) and error.shown_elsewhere for error in others)


@pytest.mark.parametrize("bug", ["missing", "twice", "moved"])
def test_parts_that_make_no_whole_are_not_published(bug: str, tmp_path: Path) -> None:
    save_together(tmp_path, 1)

    def wrong(state: TrainingState, rank: int) -> StateParts:
        own = share_of(state, 1 if bug == "twice" and rank == 2 else rank)
        table = own.weights["table"]
        held = {
            "missing": () if rank == 2 else table.held,
            "moved": tuple(Part((part.start[0] + (rank == 0), 0), part.values) for part in table.held),
        }
        weights = {**own.weights, "table": Parts(table.shape, table.dtype, held.get(bug, table.held))}
        return StateParts(own.step, weights, own.optimizer, own.extra)

    found = save_together(tmp_path, 2, wrong)
    assert "the parts of 'table' are no whole (6, 4)" in str(found[0])
    assert_others_are_silent(found, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_same(checkpoint.load(tmp_path).state, state_of(1))


def test_nothing_is_seen_before_the_last_part_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, seen = threading.Event(), []
    write = saving.write_share

    def late(folder: Path, state: StateParts, processes: Processes) -> None:
        if processes.rank == 1:
            held.wait(30)
        write(folder, state, processes)

    def save(own: Processes) -> Path:
        pending = checkpoint.begin(tmp_path, share_of(state_of(5), own.rank), processes=own)
        seen.append(pending.poll())
        seen.append(latest(tmp_path))
        if own.largest(0) == own.rank:
            held.set()
        return pending.finish()

    monkeypatch.setattr(saving, "write_share", late)
    assert together(RANKS, save) == [tmp_path / "step_00000005"] * RANKS
    assert seen == [None] * 2 * RANKS
    assert_same(checkpoint.load(tmp_path).state, state_of(5))


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("a bug")])
def test_a_rank_that_fails_leaves_the_checkpoint_before(
    rank: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_together(tmp_path, 1)
    fail_on(rank, error, monkeypatch, times=9)
    found = save_together(tmp_path, 2, keep=1)
    assert str(error).rpartition("] ")[2] in str(found[rank])
    assert_others_are_silent(found, rank)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(("times", "left"), [(1, [2, 3]), (2, [2])])
def test_a_full_disk_on_one_rank_gets_space_once(
    times: int, left: list[int], rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_together(tmp_path, step)
    fail_on(rank, OSError(errno.ENOSPC, "No space left on device"), monkeypatch, times)
    found = save_together(tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_0000000{step}" for step in left]
    if times == 2:
        assert "kept: step_00000002; free some space" in str(found[rank])
        assert_others_are_silent(found, rank)
    assert_same(checkpoint.load(tmp_path).state, state_of(left[-1]))


def fail_on(rank: int, error: Exception, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let a rank write a part of its part, so many times."""
    write, left = saving.write_share, [times]

    def failing(folder: Path, state: StateParts, processes: Processes) -> None:
        if processes.rank == rank and left[0]:
            left[0] -= 1
            (folder / "weights-00001-of-00003.safetensors.part").write_bytes(b"a part")
            raise error
        write(folder, state, processes)

    monkeypatch.setattr(saving, "write_share", failing)


def test_what_is_not_finite_on_one_rank_is_written_by_none(tmp_path: Path) -> None:
    def bad(state: TrainingState, rank: int) -> StateParts:
        if rank == 1:
            state.weights["table"][2:4] = np.nan
        return share_of(state, rank)

    found = save_together(tmp_path, 1, bad)
    names = [error.name for error in found if isinstance(error, checkpoint.NonFiniteError)]
    assert names == ["a tensor of another process", "table", "a tensor of another process"]
    assert [error.shown_elsewhere for error in found] == [True, False, True]
    assert list(tmp_path.iterdir()) == []


def test_all_must_see_one_folder(tmp_path: Path) -> None:
    found = together(
        2, lambda own: checkpoint.save(tmp_path / str(own.rank), share_of(state_of(1), own.rank, 2), processes=own)
    )
    assert "all processes of a run must see the same folder" in str(found[1])
    assert list(tmp_path.glob("*/step_*")) == []


# Files of before


def test_a_checkpoint_without_an_index_is_read(tmp_path: Path) -> None:
    """Format 2: each tensor whole, in the one file of its kind."""
    path = checkpoint.save(tmp_path, state_of(4), rows=3, backend="torch")
    fields = json.loads((path / "state.json").read_text())
    (path / "index.json").unlink()
    del fields["files"]["index.json"], fields["checksum"]
    fields["format"] = 2
    text = json.dumps({"checksum": saving.checksum(fields), **fields})
    (path / "state.json").write_text(text)
    assert_same(checkpoint.load(tmp_path, processes=ALONE).state, state_of(4))
    with pytest.raises(UserError, match="is no index of parts"):
        saving.read_parts(written(tmp_path / "other", "{}"), ("weights",))


def written(folder: Path, index: str) -> Path:
    folder.mkdir()
    (folder / "index.json").write_text(index)
    return folder
