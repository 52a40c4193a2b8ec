"""Where the numbers of a run go: ``metrics.jsonl`` in its folder, and optionally TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from shared_config.errors import UserError
from shared_config.interchange.files import file_errors, folder_target, make_folder, regular_target, written_aside
from shared_config.interchange.reading import check_regular, parse_json, read_text
from shared_config.interchange.run_layout import METRICS
from shared_config.interchange.toml import config_to_dict
from shared_config.schema.job import JobConfig

MAX_ID_BYTES = 2**10

Record = Mapping[str, float | None]

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Takes the record of a step. A value is None where it was not finite.

    Each method raises UserError or OSError if something can't be written, say for lack of space; it may be called again
    all the same.
    """

    def write(self, step: int, record: Record) -> None:
        """Take the record of a step."""
        ...

    def sync(self) -> None:
        """Make sure that what was written outlives the process and, for files, the machine."""
        ...

    def close(self) -> None:
        """End what was begun."""
        ...


@contextmanager
def open_loggers(config: JobConfig, folder: Path, resumed_step: int) -> Iterator[list[Logger]]:
    """The loggers that ``config.metrics`` asks for, to continue after ``resumed_step``; closed at the end.

    Raises:
        UserError: a package is missing, or a file can't be written.
    """
    with ExitStack() as opened:
        loggers: list[Logger] = []

        def add(logger: Logger) -> None:
            opened.callback(_close, logger)
            loggers.append(logger)

        add(JsonLinesLogger(folder / METRICS, resumed_step))
        if config.metrics.tensorboard:
            add(TensorBoardLogger(folder / "tensorboard"))
        if config.metrics.wandb_project:
            add(WandbLogger(config, folder))
        yield loggers


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without a last line that was cut off."""
    with file_errors(file, "the metrics can't be read"):
        check_regular(file)
        lines = Path(file).read_text(encoding="utf-8", errors="replace").split("\n")
    return [record for record in map(_parse, lines) if record is not None]


class JsonLinesLogger:
    """One JSON object per line, with ``step`` first; numbers are written in full, so they read back exactly.

    Records of steps after ``resumed_step``, which will be taken again, are dropped, so that the file has each step
    once. Records that can't be written are kept, and written before the next ones once that is possible.
    """

    def __init__(self, file: Path, resumed_step: int):
        regular_target(file)
        kept = [record for record in read_metrics(file) if record["step"] <= resumed_step] if file.exists() else []
        with written_aside(file) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = file
        self._unwritten = b""
        with self._errors():
            self._stream = file.open("ab", buffering=0)

    def write(self, step: int, record: Record) -> None:
        """Append a line."""
        self._unwritten += json.dumps({"step": step, **record}, allow_nan=False).encode() + b"\n"
        self._write_all()

    def sync(self) -> None:
        """Make sure that the lines are on the disk."""
        self._write_all()
        with self._errors():
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Sync, and let go of the file."""
        try:
            self._write_all()
        finally:
            self._stream.close()

    def _write_all(self) -> None:
        with self._errors():
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]

    def _errors(self) -> AbstractContextManager[None]:
        return file_errors(self._file, "can't be written")


class TensorBoardLogger:
    """Scalars in event files below ``folder``."""

    def __init__(self, folder: Path):
        try:
            from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise _missing("metrics.tensorboard = true", "tensorboard") from None
        with file_errors(folder, "can't be written"):
            self._writer = Writer(str(make_folder(folder)))

    def write(self, step: int, record: Record) -> None:
        """Add a scalar for each number."""
        for name, value in record.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered, and let go of the file."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run. Its id is kept in the run's folder, so that a resumed run continues there, too."""

    def __init__(self, config: JobConfig, folder: Path):
        project = config.metrics.wandb_project
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise _missing(f"metrics.wandb_project = {project!r}", "wandb") from None
        folder_target(folder / "wandb")
        identity = regular_target(folder / "wandb_id")
        if not identity.exists():
            identity.write_text(secrets.token_hex(8), encoding="ascii")
        name = read_text(identity, MAX_ID_BYTES).strip()
        self._run = wandb.init(project=project, dir=str(folder), id=name, resume="allow", config=config_to_dict(config))

    def write(self, step: int, record: Record) -> None:
        """Send the numbers."""
        self._run.log(dict(record), step=step)

    def sync(self) -> None:
        """Nothing: the service's own process has the records already."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _close(logger: Logger) -> None:
    """Close a logger of a run that is over: what it could not write does not undo that."""
    try:
        logger.close()
    except (OSError, UserError) as error:
        log.warning("%s; records of the last steps are missing", error)


def _missing(field: str, package: str) -> UserError:
    return UserError(f"{field}: the package {package} is not installed; pip install {package}")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
