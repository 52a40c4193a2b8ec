"""Runs of two processes of which one finds the disk full as it writes a checkpoint: it alone says so, both end, and
what is left is the checkpoint before. By day one run; of both backends and either process under
HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import settings

from shared_config.interchange import checkpoint
from shared_config.interchange.toml import config_to_toml
from tests.distributed.test_killed_runs import run_unlucky
from tests.jobs import text_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
FULL = """
        from shared_config.interchange import saving
        def full(path, *_):
            path.write_bytes(b"a part")
            raise OSError(28, "No space left on device")
        saving.write_tensors = full
"""
STEPS, MOMENT, BOUND = 6, 2, 60.0


@pytest.mark.parametrize(
    ("backend", "unlucky", "in_background"),
    [("torch", 1, True), *([("torch", 0, False), ("jax", 0, True), ("jax", 1, False)] if NIGHTLY else [])],
)
def test_a_full_disk_is_told_once_and_ends_all(backend: str, unlucky: int, in_background: bool, tmp_path: Path) -> None:
    job = text_job(
        tmp_path,
        train={"max_steps": STEPS, "grad_accum_steps": 2},
        checkpoint={"async_save": in_background, "keep_last_n": 1},
        eval={"steps": 0},
    )
    (tmp_path / "job.toml").write_text(config_to_toml(job))
    began = time.monotonic()
    ended = run_unlucky(tmp_path, tmp_path / "run", backend, FULL, moment=MOMENT, unlucky=unlucky)
    assert time.monotonic() - began < BOUND
    assert [status for status, _ in ended] == [2, 2]
    said = [[line for line in text.splitlines() if "kempnerforge: " in line] for _, text in ended]
    (line,) = said[unlucky]
    assert said[1 - unlucky] == []
    assert line.startswith(
        "kempnerforge: " + f"rank {unlucky}: " * (unlucky > 0) + f"{tmp_path / 'run'}: No space left"
    )
    (left,) = (tmp_path / "run").glob("*step_*")
    assert line.endswith(f"; kept: {left.name}; free some space and start the run again")
    assert not any("Traceback" in text for _, text in ended)
    reached = checkpoint.load(left).parts.step
    assert MOMENT - in_background <= reached <= MOMENT  # the one before may still be on its way
