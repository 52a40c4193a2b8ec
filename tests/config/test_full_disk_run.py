"""A run on a disk that gets full: it goes on without its metrics, and its checkpoints are those that find room."""

from __future__ import annotations

import errno
import io
import logging
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from shared_config.training.metrics import JsonLinesLogger, Record, read_metrics
from tests.config.test_loop import BigramTrainer, config_of, end_state, train

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    """Take all the room that is left."""
    with file.open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(512)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017


class Filling(BigramTrainer):
    """Finds the disk full in its 5th step, and with room again after its 60th."""

    filler: Path

    def step(self, micro_batches: Sequence[Any]) -> dict[str, float]:
        if self.updates == 4:
            fill(self.filler)
        elif self.updates == 60:
            self.filler.unlink()
        return super().step(micro_batches)


@pytest.mark.parametrize("method", ["write", "sync", "close"])
def test_metrics_that_cannot_be_written_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    def full(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(JsonLinesLogger, method, full)
    config = config_of(tmp_path / "run")
    assert train(config).step == 12
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    train(config_of(tmp_path / "whole"))
    whole, run = (checkpoint.load(tmp_path / name).state for name in ("whole", "run"))
    assert whole.weights["table"].tobytes() == run.weights["table"].tobytes()


def test_records_that_found_no_room_are_written_once_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = JsonLinesLogger(tmp_path / "metrics.jsonl", 0)
    logger.write(1, {"loss": 1.0})
    real, parts = logger._stream, [5]

    class Full(io.RawIOBase):
        """Takes a few bytes, then none."""

        def write(self, data: Any, /) -> int:
            if not parts:
                raise FULL
            return real.write(data[: parts.pop()])

    monkeypatch.setattr(logger, "_stream", Full())
    record: Record = {"loss": 2.0}
    for step in (2, 3):
        with pytest.raises(UserError, match="No space left on device"):
            logger.write(step, record)
    monkeypatch.setattr(logger, "_stream", real)
    logger.write(4, record)
    logger.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_on_a_full_disk_goes_on_and_its_records_come_once_there_is_room(
    disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = ("train.max_steps=70", "checkpoint.interval=0", "eval.interval=0")
    config = config_of(disk / "run", *long)
    trainer = Filling(config)
    trainer.filler = disk / "filler"
    assert train(config, trainer).step == 70
    assert caplog.text.count("No space left on device") == 1
    assert [record["step"] for record in read_metrics(disk / "run" / "metrics.jsonl")] == list(range(1, 71))
    train(config_of(tmp_path / "whole", *long))
    whole, run = end_state(tmp_path / "whole"), end_state(disk / "run")
    assert run == whole


def test_a_checkpoint_without_room_ends_the_run_and_one_started_again_goes_on(disk: Path, tmp_path: Path) -> None:
    config = config_of(disk / "run", "checkpoint.interval=3", "checkpoint.keep_last_n=2")
    trainer = Filling(config)
    trainer.filler = disk / "filler"
    with pytest.raises(UserError, match=r"No space left on device.*kept: step_00000003"):
        train(config, trainer)
    trainer.filler.unlink()
    assert train(config).resumed_from == 3
    train(config_of(tmp_path / "whole", "checkpoint.interval=3", "checkpoint.keep_last_n=2"))
    assert end_state(disk / "run") == end_state(tmp_path / "whole")


def test_old_checkpoints_make_room_for_new_ones(disk: Path) -> None:
    """The disk holds all that ``keep_last_n`` keeps, but not one more."""
    config = config_of(disk / "run", "checkpoint.interval=1", "checkpoint.keep_last_n=2", "train.max_steps=3")
    train(config)
    one = sum(file.stat().st_size for file in (disk / "run" / "step_00000003").iterdir())
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - one // 2))
    config = config_of(disk / "run", "checkpoint.interval=1", "checkpoint.keep_last_n=2", "train.max_steps=8")
    assert train(config).resumed_from == 3
    assert [path.name for path in sorted((disk / "run").glob("step_*"))] == ["step_00000007", "step_00000008"]


@pytest.mark.parametrize("error", [FULL, BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error")])
def test_lines_that_cannot_be_printed_end_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    class Lost(io.StringIO):
        def write(self, text: str, /) -> int:
            raise error

    summary = train(config_of(tmp_path), console=Console(file=Lost()))
    assert (summary.step, summary.exit_status) == (12, 0)
    assert caplog.text.count("goes on in silence") == 1


def test_a_bar_on_a_terminal_that_is_gone_ends_no_run(tmp_path: Path) -> None:
    class Lost(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(errno.EIO, "I/O error")

    console = Console(file=Lost(), force_terminal=True)
    assert train(config_of(tmp_path), console=console).step == 12
