"""The folder of a training run: held by one run at a time, with the config that it was started with."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_config.errors import UserError
from shared_config.interchange.files import make_folder, regular_target, written_aside
from shared_config.interchange.outputs import claim_run_folder
from shared_config.interchange.tokens import TOKENIZER, keep_tokenizer
from shared_config.interchange.toml import config_to_toml
from shared_config.schema.job import JobConfig


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make the run's folder and hold its lock, which the system lets go of however the process ends.

    Raises:
        UserError: it can't be made or written, or another process holds it.
    """
    field = f"checkpoint.dir = {str(folder)!r}"
    claim_run_folder(folder)
    try:
        make_folder(folder)
        lock = regular_target(folder / ".lock").open("w")
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}: can't be written ({reason})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{field}: another run is using this folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        yield


def write_config(config: JobConfig, folder: Path) -> None:
    """Write the resolved config and the tokenizer; remove what writers of these files left when they were killed."""
    for left in (*folder.glob(".config.toml.*.part"), *folder.glob(".metrics.jsonl.*.part")):
        left.unlink()
    paths = [config.data.path, *(source.path for source in config.data.sources)]
    prepared = (Path(path) / TOKENIZER for path in paths if path)
    kept = keep_tokenizer(config, folder, next((tokens for tokens in prepared if tokens.is_dir()), None))
    with written_aside(folder / "config.toml") as aside:
        aside.write_text(config_to_toml(kept), encoding="utf-8")
