"""What scenarios work with: a backend, the config and weights, and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from shared_config.contract.initialise import stream
from shared_config.contract.labels import IGNORED
from shared_config.interchange.checkpoint import TrainingState
from shared_config.parity.images import image_positions, image_token, pixels, prompt_lengths
from shared_config.parity.request import Arrays, default_length
from shared_config.parity.validation import drawn_tokens
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

NEW_TOKENS, PREFILL_CHUNK = 14, 5


class Sampling(TypedDict):
    """How tokens are drawn; see `SamplingConfig`."""

    temperature: float
    top_k: int
    top_p: float


SAMPLING: Sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
ROWS = 2
DOCUMENT_LENGTHS = ((9, 15), (3, 1, 20))
REAL = ((0, 20), (9, 24))
"""Lengths of documents in each row; where text starts and ends in rows that have padding after it, or before."""


@dataclass(frozen=True)
class Trained:
    """What a trainer did.

    Attributes:
        metrics: of each step.
        states: after each step.
        evaluations: losses of each held-out batch, before the first step and after the last.
    """

    metrics: Sequence[Mapping[str, float]]
    states: Sequence[TrainingState]
    evaluations: np.ndarray


@dataclass(frozen=True)
class Decoding:
    """What to generate.

    Attributes:
        prompts: int32 rows of any lengths.
        pixels: float32 (B, [F,] 3, s, s) or (B, N, 3, s, s); None without images.
        places: of each prompt, how many of its tokens stand before each of its images, N at most; None: they have none.
    """

    prompts: Sequence[np.ndarray]
    pixels: np.ndarray | None
    places: Sequence[Sequence[int]] | None = None
    new_tokens: int = NEW_TOKENS
    prefill_chunk: int = PREFILL_CHUNK
    seed: int = 0
    sampling: Sampling = field(default_factory=SAMPLING.copy)

    def followed_by(self, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prompts and all but the last of the new tokens (B, N), int32 (B, S) with zeros after the end, and the places
        (B, N) whose logits the new tokens were drawn from.
        """
        tokens = np.zeros((len(self.prompts), self.prompt_lengths.max() + new.shape[1] - 1), np.int32)
        for row, prompt in enumerate(self.prompts):
            known = np.concatenate([prompt, new[row, :-1]])
            tokens[row, : len(known)] = known
        return tokens, self.prompt_lengths[:, None] - 1 + np.arange(new.shape[1])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 (B,)."""
        return np.array([len(prompt) for prompt in self.prompts], np.int32)

    def placed(self, length: int) -> dict[str, np.ndarray]:
        """What a forward of ``length`` tokens is told of images that have places of their own."""
        if self.places is None:
            return {}
        counts = np.array([len(row) for row in self.places])
        exists = np.arange(counts.max()) < counts[:, None]
        positions = np.full(exists.shape, length, np.int32)
        positions[exists] = np.concatenate(self.places)
        return {"image_positions": positions, "frame_mask": exists}


class Backend(Protocol):
    """What the module ``scenarios`` of a backend provides. All arithmetic is in float64, but for `train`."""

    NAME: str

    def train(
        self,
        config: JobConfig,
        state: TrainingState,
        steps: Sequence[Sequence[Batch]],
        held_out: Sequence[Batch],
        *,
        dtype: str,
        device: str | None,
    ) -> Trained:
        """Steps of micro-batches from a state on, by the trainer that `train` has; "bfloat16" and "fp8" are mixed
        precision.
        """
        ...

    def decode(self, config: JobConfig, weights: Arrays, decoding: Decoding, *, device: str | None) -> Arrays:
        """``streamed`` and ``generated``: int (B, N), by both ways to generate; ``cached``: logits (B, N, V) of the
        static caches fed with these tokens; ``whole``: those of a forward over all of them, without caches.
        """
        ...

    def captured(
        self,
        config: JobConfig,
        weights: Arrays,
        tokens: np.ndarray,
        images: Mapping[str, np.ndarray],
        *,
        device: str | None,
    ) -> tuple[Arrays, Arrays]:
        """The outputs of every module, as `ActivationStore` and `extract_representations` give them; the latter is
        empty where there are images: ``pixel_values``, with ``image_positions`` or ``prompt_lengths`` where a trace
        has them.
        """
        ...

    def device_name(self, device: str | None) -> str:
        """As traces have it."""
        ...


@dataclass(frozen=True)
class Work:
    """A scenario to be done.

    Attributes:
        config: as `scenario_config` makes it.
        runs: folder of the checkpoints of a run that changes backends.
    """

    config: JobConfig
    dtype: str
    seed: int
    weights: Arrays
    deltas: bool
    device: str | None
    runs: Path | None

    @property
    def state(self) -> TrainingState:
        """Where training starts."""
        return TrainingState(0, dict(self.weights), {})


def scenario_batch(
    work: Work, name: str, *, ignored: float = 0.2, documents: bool = False, padded: bool = False
) -> dict[str, np.ndarray]:
    """A micro-batch: drawn ids and labels, images where the model sees them, documents or padding where asked for."""
    config, draw = work.config, stream(work.seed, f"scenario/{name}")
    length = default_length(config)
    size = (config.model.vocab_size, (ROWS, length), image_token(config))
    tokens, labels = (drawn_tokens(draw, *size) for _ in range(2))
    labels = np.where(draw.random(labels.shape) < ignored, np.int32(IGNORED), labels)
    batch = {"tokens" if config.vlm is None else "input_ids": tokens, "labels": labels}
    if documents:
        starts = [np.cumsum(lengths[:-1]) for lengths in DOCUMENT_LENGTHS]
        batch["doc_ids"] = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in starts])
        batch["doc_ids"] = batch["doc_ids"].astype(np.int32)
    if padded:
        starts, ends = np.array(REAL).T[..., None]
        real = (np.arange(length) >= starts) & (np.arange(length) < ends)
        batch |= {"text_mask": real, "labels": np.where(real, labels, np.int32(IGNORED))}
    shown = pixels(config, ROWS, work.seed)
    if shown is not None:
        batch["pixel_values"] = shown
        places = image_positions(config, tokens.shape, work.seed)
        batch |= {} if places is None else {"image_positions": places}
        prompts = prompt_lengths(config, tokens.shape, work.seed)
        batch |= {} if prompts is None else {"prompt_lengths": prompts}
        if padded and shown.ndim == 5:
            batch["frame_mask"] = np.arange(shown.shape[1]) < np.array([[shown.shape[1]], [1]])
    return batch


def unpadded(batch: Batch) -> dict[str, np.ndarray]:
    """A mask of padding for a batch that has none, so that all steps are one program."""
    tokens = batch["tokens"] if "tokens" in batch else batch["input_ids"]
    mask = {"text_mask": batch.get("text_mask", np.ones(tokens.shape, bool))}
    pixels = batch.get("pixel_values")
    if pixels is not None and pixels.ndim == 5:
        mask["frame_mask"] = batch.get("frame_mask", np.ones(pixels.shape[:2], bool))
    return mask
