"""Texts that a model writes while it is trained: one at each evaluation, kept in ``samples.jsonl`` of the run's folder.

Numbers that decide them are drawn from the seed of the run, the same in both backends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_config.contract.initialise import stream
from shared_config.data import build_tokenizer
from shared_config.errors import UserError
from shared_config.interchange.files import file_errors, regular_target, written_aside
from shared_config.interchange.reading import parse_json
from shared_config.schema.job import JobConfig
from shared_config.training.metrics import Logger, Record

SAMPLES = "samples.jsonl"


Continue = Callable[[Sequence[int], np.ndarray], list[int]]
"""Gives the tokens that continue a prompt, one for each of the uniform numbers (1, N) that decide them."""


@dataclass(frozen=True)
class Sample:
    """The prompt and what the model wrote after so many updates."""

    step: int
    text: str


class SampleLogger:
    """Takes a sample whenever there is a held-out loss.

    Args:
        continued: what the model of the run does.
    """

    def __init__(self, config: JobConfig, continued: Continue):
        self._config, self._continued = config, continued
        self._tokenizer = build_tokenizer(config.data.tokenizer, config.data.eos_id)
        has_prefix = config.vlm is not None and config.vlm.has_prefix
        encode = self._tokenizer.encode_prefix if has_prefix else self._tokenizer.encode_prompt
        self._prompt = encode(config.eval.sample_prompt)
        positions, most = len(self._prompt) + config.eval.sample_tokens, config.model.max_seq_len
        if positions > most:
            raise UserError(
                f"eval.sample_tokens = {config.eval.sample_tokens}: with the prompt {positions} positions, must be at "
                f"most model.max_seq_len = {most}"
            )

    def write(self, step: int, record: Record) -> None:
        """Append what the model writes now to the file of the run, in place of what it wrote at this step or later."""
        if "heldout_loss" not in record:
            return
        wanted = self._config.eval
        uniforms = stream(self._config.train.seed, f"sample/{step}").random((1, wanted.sample_tokens))
        text = wanted.sample_prompt + self._tokenizer.decode(self._continued(self._prompt, uniforms))
        file = regular_target(Path(self._config.checkpoint.dir) / SAMPLES)
        kept = [sample for sample in read_samples(file) if sample.step < step]
        lines = [json.dumps({"step": sample.step, "text": sample.text}) for sample in (*kept, Sample(step, text))]
        with file_errors(file, "can't be written"), written_aside(file) as aside:
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def sync(self) -> None:
        """Nothing: each sample is on disk already."""

    def close(self) -> None:
        """Nothing is open."""


def sample_loggers(config: JobConfig, continued: Continue, devices: int) -> list[Logger]:
    """What takes the samples that a job asks for, if it asks for some.

    Raises:
        UserError: they can't be made: several devices, or more positions than the model has.
    """
    if not config.eval.sample_prompt:
        return []
    if devices > 1:
        raise UserError(f"eval.sample_prompt = {config.eval.sample_prompt!r}: must be empty on {devices} devices")
    return [SampleLogger(config, continued)]


def read_samples(file: Path) -> list[Sample]:
    """The samples of a file, without a last line that was cut off; none if there is no file."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(Sample(record["step"], str(record.get("text", ""))))
    return found
