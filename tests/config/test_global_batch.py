"""A run that goes on with another number of data ranks has the same steps, or says what would give them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.interchange import checkpoint
from shared_config.loader import load_config
from shared_config.training.global_batch import accumulation
from shared_config.training.loop import run_training
from tests.config.test_loop import BigramTrainer, config_of, data_for

SMALL = st.integers(1, 12)


@given(SMALL, SMALL, SMALL, SMALL)
def test_the_accumulation_follows_the_number_of_ranks(size: int, steps: int, ranks: int, other: int) -> None:
    """What is noted either keeps the rows of a step, or names fields that do, or says that none can."""
    config = load_config("debug", [f"--train.batch_size={size}", f"--train.grad_accum_steps={steps}"])
    rows = size * steps * ranks
    found = accumulation(config, size * other, config.train, rows)
    assert (found.note == "") == (ranks == other)
    if found.grad_accum_steps * size * other == rows:
        return
    assert rows % (size * other) != 0, "it could have been kept"
    assert found.grad_accum_steps == steps
    assert f"has {steps * size * other} rows from here on, and had {rows}" in found.note
    advised = re.search(r"train\.batch_size = (\d+) and train\.grad_accum_steps = (\d+) would keep", found.note)
    assert (advised is None) == (rows % other > 0)
    if advised is not None:
        assert int(advised[1]) * int(advised[2]) * other == rows
        assert int(advised[1]) <= size


def test_a_pipeline_keeps_a_micro_batch_for_each_stage() -> None:
    config = load_config("debug", ["--train.batch_size=2", "--train.grad_accum_steps=4", "--distributed.pp=4"])
    found = accumulation(config, 4, config.train, 8)
    assert found.grad_accum_steps == 4
    assert "has 16 rows from here on, and had 8" in found.note


@pytest.mark.parametrize(("field", "value"), [("batch_size", 2), ("grad_accum_steps", 2)])
def test_what_a_user_asks_for_is_done_and_noted(field: str, value: int) -> None:
    """On the command line, also where it asks for the value of before; and in the config."""
    config = load_config("debug", ["--train.batch_size=2", "--train.grad_accum_steps=2"])
    found = accumulation(config, 8, config.train, 8, overridden=[f"train.{field}"])
    assert found.grad_accum_steps == 2
    assert found.note == (
        "note: a step has 16 rows from here on, and had 8; "
        "train.batch_size = 2 and train.grad_accum_steps = 1 would keep 8"
    )
    before = config.train.replace(**{field: value + 1})
    assert accumulation(config, 8, before, 8) == found


def run_on(ranks: int, folder: Path, max_steps: int, *overrides: str) -> BigramTrainer:
    """The rows of all ranks, as one process reads them, in batches that say that there are so many ranks."""
    kept = ("eval.steps=0", "eval.interval=0", "scheduler.name=constant")
    config = config_of(folder, *kept, f"train.max_steps={max_steps}", *overrides)
    wide = config.replace(train=config.train.replace(batch_size=2 * ranks))
    trainer = BigramTrainer(config)
    run_training(config, trainer, data_for(wide))
    return trainer


def test_a_run_sees_the_same_rows_on_any_number_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_on(2, tmp_path / "moved", 3)
    on_four = run_on(4, tmp_path / "moved", 6)
    assert set(on_four.seen) == {1}
    assert "note: train.grad_accum_steps 2 -> 1 with 4 data ranks: a step has 8 rows, as before" in (
        capsys.readouterr().err
    )
    assert load_config(str(tmp_path / "moved")).train.grad_accum_steps == 1
    assert checkpoint.load(tmp_path / "moved").rows == 6 * 8
    on_one = run_on(1, tmp_path / "moved", 9, "train.grad_accum_steps=1")
    assert set(on_one.seen) == {4}
    stayed = run_on(2, tmp_path / "stayed", 9)
    np.testing.assert_allclose(on_one.table, stayed.table, rtol=0, atol=1e-5)


def test_a_batch_that_can_not_be_kept_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_on(2, tmp_path, 3)
    assert set(run_on(3, tmp_path, 6).seen) == {2}
    said = "3 data ranks can't share 8 rows evenly: use a number of them that divides 8"
    assert f"note: a step has 12 rows from here on, and had 8; {said}" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_tell_its_rows_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those written before it was told."""
    monkeypatch.setattr("shared_config.training.loop.ROWS_PER_STEP", "unknown")
    run_on(2, tmp_path, 3)
    assert set(run_on(4, tmp_path, 6).seen) == {2}
    assert "rows from here on" not in capsys.readouterr().err
