"""A module that FSDP shards over two processes, or that is data-parallel, is recorded as the plain one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="takes seconds")
def test_a_module_of_several_processes_is_recorded_as_the_plain_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed.recorded_shards", str(tmp_path / "store")]
    files = [tmp_path / f"said{rank}" for rank in range(2)]
    started = [start([*command, str(rank)], file) for rank, file in enumerate(files)]
    assert [process.wait(timeout=300) for process in started] == [0, 0], [file.read_text("utf-8") for file in files]
    assert [file.read_text("utf-8") for file in files] == ["", ""]


def start(command: list[str], file: Path) -> subprocess.Popen[bytes]:
    """A process of this project that says all into a file, so that none waits for a reader."""
    with file.open("wb") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
