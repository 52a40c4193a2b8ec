"""Batches of images, or clips, with text: from a folder, or drawn by code where none is given.

A folder holds pictures and a ``metadata.jsonl`` (as Hugging Face's ImageFolder has it), one JSON object per line:

    {"file_name": "cats/1.png", "text": "a cat on a chair"}
    {"file_name": "2.jpg", "prompt": "What is this? ", "text": "a boat"}
    {"file_name": "clips/3.mp4", "text": "a dog runs"}                        with a [video] section
    {"file_name": ["f/1.png", "f/2.png"], "text": "frames, in order"}         with a [video] section
    {"text": "no picture at all"}

What can't be decoded is counted, told once, and masked: its row is trained as text alone.

Shapes: B rows of a batch on one rank, T text positions of a row, F frames, s pixels per side.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.contract.initialise import stream
from shared_config.data.batches import IGNORED, Batch, permute
from shared_config.data.jsonl import MAX_TEXT_BYTES, lines, parse_object, refuse, text_problem
from shared_config.data.media import UndecodableError, drawn_frames, nearest_frames, read_clip, read_image
from shared_config.data.shapes import shape_clip, shape_image
from shared_config.data.tokenizer import Tokenizer, build_tokenizer, check_vocabulary
from shared_config.errors import UserError
from shared_config.interchange.preprocessor import PixelRange
from shared_config.interchange.reading import check_inside, read_text
from shared_config.interchange.vision import picture_format
from shared_config.schema.job import JobConfig
from shared_config.schema.video import VideoConfig
from shared_config.schema.vlm import MoMaConfig

METADATA = "metadata.jsonl"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
SHAPES_VERSION = "shapes 1"
MAX_SEED = 2**31

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A row before it becomes arrays.

    Attributes:
        frames: uint8 (F, s, s, 3); an image has one frame, a row without a picture none.
        prompt: what stands before the text and is not learned.
    """

    frames: np.ndarray
    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Shapes:
    """Endless training examples and as many held-out ones, drawn by code."""

    side: int
    video: VideoConfig | None = None
    name: str = "shapes drawn by code"

    @property
    def fingerprint(self) -> str:
        """Tells whether two runs see the same pictures."""
        return hashlib.sha256(f"{SHAPES_VERSION} {self.side} {self.video}".encode()).hexdigest()[:32]

    def example(self, index: int, split: str) -> Example:
        """Example ``index`` of a split, from 0 and without end."""
        if self.video is None:
            image, caption = shape_image(index, self.side, split)
            return Example(image[None], caption)
        spread = self.video.max_frames - self.video.min_frames + 1
        frames = self.video.min_frames + int(stream(index, f"frames {split}").integers(spread))
        return Example(*shape_clip(index, self.side, frames, split, draws_frames(self.video, split)))


@dataclass
class Folder:
    """Examples of a folder on disk.

    Attributes:
        rows: the lines of its metadata, by split.
        undecodable: file -> why it can't be decoded, of those met so far.
        follow_symlinks: whether links may lead out of the folder.
    """

    path: Path
    pixels: PixelRange
    video: VideoConfig | None
    rows: dict[str, list[dict[str, Any]]]
    undecodable: dict[str, str] = field(default_factory=dict)
    follow_symlinks: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells whether two runs see the same rows; the pictures themselves are not read."""
        content = json.dumps([self.rows["train"], self.rows["heldout"]], sort_keys=True)
        return hashlib.sha256(f"{self.pixels} {self.video} {content}".encode()).hexdigest()[:32]

    def example(self, index: int, split: str, visit: str = "") -> Example:
        """Example ``index`` of a split.

        Args:
            visit: which visit of a run to the row this is; where frames are drawn, another one draws others.
        """
        row = self.rows[split][index]
        rng = stream(index, f"frames {split} {visit}") if draws_frames(self.video, split) else None
        frames = [picture for name in _files(row) for picture in self._pictures(name, rng)]
        limit = 1 if self.video is None else self.video.max_frames
        shown = [frames[place] for place in _places(len(frames), limit, rng)]
        empty = np.zeros((0, self.pixels.side, self.pixels.side, 3), np.uint8)
        return Example(np.stack(shown) if shown else empty, row["text"], row.get("prompt", ""))

    def _pictures(self, name: str, rng: np.random.Generator | None) -> Sequence[np.ndarray]:
        try:
            if problem := check_inside(self.path, name, self.follow_symlinks):
                raise UndecodableError(problem)
            return _frames_of(self.path / name, self.pixels, self.video, rng)
        except UndecodableError as error:
            self._report(name, str(error))
            return []

    def _report(self, name: str, reason: str) -> None:
        if name not in self.undecodable:
            self.undecodable[name] = reason
            log.warning(
                "%s can't be decoded, %d so far, and is masked: %s", self.path / name, len(self.undecodable), reason
            )


class ImageTextData:
    """Training batches by index, and a fixed set of held-out batches; see `shared_config.data.batches.TextData`.

    Attributes:
        rows_per_batch: rows of a batch over all ranks.
        tokens_per_batch: text positions of a batch over all ranks.
        notes: what a user should know of the data, a line each.
    """

    def __init__(
        self,
        source: Shapes | Folder,
        *,
        tokenizer: Tokenizer,
        pixels: PixelRange,
        batch_size: int,
        text_len: int,
        vocab_size: int,
        frames: int = 0,
        text_mask: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        heldout_batch_size: int | None = None,
        heldout_steps: int = 8,
    ):
        """
        Args:
            pixels: how bytes become numbers.
            frames: F of clips; 0 for images, which have no axis of frames.
            text_mask: also give which text positions are real, for experts not to be sent padding.

        Raises:
            UserError: a vocabulary that is too small, or no row to train on has a label within ``text_len``.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank}: must be at least 0 and below world_size = {world_size}")
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size = {vocab_size}: must be at least that of the tokenizer, {tokenizer.vocab_size}"
            )
        self.source, self.tokenizer, self.pixels = source, tokenizer, pixels
        self.batch_size, self.text_len, self.frames, self.text_mask = batch_size, text_len, frames, text_mask
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.heldout_batch_size = heldout_batch_size or batch_size
        self.heldout_steps = heldout_steps
        self.rows_per_batch = batch_size * world_size
        self.tokens_per_batch = self.rows_per_batch * text_len
        self.notes: tuple[str, ...] = ()
        self._rows = {"train": [], "heldout": []} if isinstance(source, Shapes) else self._check_labels(source)

    def _check_labels(self, folder: Folder) -> dict[str, list[int]]:
        """The rows that have a label, by split: those whose prompt fills ``text_len`` have none."""
        kept = {
            split: [index for index, row in enumerate(rows) if self._has_label(row)]
            for split, rows in folder.rows.items()
        }
        every, left = (sum(map(len, parts.values())) for parts in (folder.rows, kept))
        if left < every:
            self.notes = (
                f"data.path = {folder.name!r}: {every - left} of {every} rows have no label within "
                f"train.seq_len = {self.text_len} and are left out",
            )
        if not kept["train"]:
            raise UserError(
                f"data.path = {folder.name!r}: none of its {len(folder.rows['train'])} rows to train on has a label "
                f"within train.seq_len = {self.text_len}; the prompts are longer"
            )
        return kept

    def _has_label(self, row: Mapping[str, Any]) -> bool:
        _, learned = _tokens(row["text"], row.get("prompt", ""), self.tokenizer)
        return bool(learned[1 : self.text_len + 1].any())

    @property
    def fingerprint(self) -> str:
        """Tells whether two runs see the same rows."""
        return self.source.fingerprint

    def batch(self, index: int) -> Batch:
        """Training batch ``index`` (from 0) of this rank; see `collate`."""
        if index < 0:
            raise ValueError(f"index = {index}: must be at least 0")
        first = (index * self.world_size + self.rank) * self.batch_size
        rows = range(first, first + self.batch_size)
        if isinstance(self.source, Shapes):
            start = self.seed << 32  # another seed, other pictures
            return self._collated([self.source.example(start + row, "train") for row in rows])
        kept = self._rows["train"]
        visits = [f"{self.seed} {row // len(kept)}" for row in rows]
        chosen = [kept[self._shuffled(row, len(kept))] for row in rows]
        return self._collated(
            [self.source.example(row, "train", visit) for row, visit in zip(chosen, visits, strict=True)]
        )

    def heldout(self) -> list[Batch]:
        """The evaluation batches of this rank, the same at every call and for every seed; a short last one is filled up
        with rows whose labels are all -100.
        """
        size, total = self.heldout_batch_size, self.heldout_steps * self.heldout_batch_size * self.world_size
        available = total if isinstance(self.source, Shapes) else min(len(self._rows["heldout"]), total)
        steps = -(-available // (size * self.world_size))
        starts = [(index * self.world_size + self.rank) * size for index in range(steps)]
        return [self._heldout_batch(range(start, min(start + size, available))) for start in starts]

    def _heldout_batch(self, rows: range) -> Batch:
        kept = self._rows["heldout"]
        examples = [
            self.source.example(row if isinstance(self.source, Shapes) else kept[row], "heldout") for row in rows
        ]
        missing = self.heldout_batch_size - len(examples)
        blank = Example(np.zeros((0, self.pixels.side, self.pixels.side, 3), np.uint8), "")
        batch = self._collated([*examples, *[blank] * missing])
        batch["labels"][len(examples) :] = IGNORED
        return batch

    def _shuffled(self, row: int, count: int) -> int:
        """The example of a row: every epoch visits all of them in an order of its own."""
        epoch, place = divmod(row, count)
        return int(permute(np.array([place], np.uint64), count, f"images {self.seed} {epoch}")[0])

    def _collated(self, examples: Sequence[Example]) -> Batch:
        batch = collate(examples, self.tokenizer, self.pixels, self.text_len, self.frames)
        if isinstance(self.source, Shapes) and self.frames == 0:
            del batch["frame_mask"]  # all are there, and attention needs no mask
        if not self.text_mask:
            del batch["text_mask"]
        return batch


def collate(
    examples: Sequence[Example], tokenizer: Tokenizer, pixels: PixelRange, text_len: int, frames: int = 0
) -> Batch:
    """Rows of fixed length.

    Text is begin, prompt, text, end, as far as ``text_len`` + 1 tokens go; labels are the next tokens, -100 where the
    prompt or padding comes next.

    Returns:
        input_ids, labels: int32 (B, T).
        text_mask: bool (B, T), True at real tokens.
        pixel_values: float32 (B, 3, s, s), or (B, F, 3, s, s) with ``frames``.
        frame_mask: bool (B, 1) or (B, F), True where there is a picture.
    """
    shape = (len(examples), text_len)
    input_ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    text_mask, frame_mask = np.zeros(shape, bool), np.zeros((len(examples), max(frames, 1)), bool)
    pictures = np.zeros((len(examples), max(frames, 1), 3, pixels.side, pixels.side), np.float32)
    for row, example in enumerate(examples):
        ids, learned = _tokens(example.text, example.prompt, tokenizer)
        ids, learned = ids[: text_len + 1], learned[: text_len + 1]
        count = max(len(ids) - 1, 0)
        input_ids[row, :count] = ids[:-1]
        labels[row, :count] = np.where(learned[1:], ids[1:], IGNORED)
        text_mask[row, :count] = True
        shown = example.frames[: max(frames, 1)]
        pictures[row, : len(shown)] = pixels.numbers(shown)
        frame_mask[row, : len(shown)] = True
    return {
        "input_ids": input_ids,
        "labels": labels,
        "text_mask": text_mask,
        "pixel_values": pictures if frames else pictures[:, 0],
        "frame_mask": frame_mask,
    }


def open_image_data(config: JobConfig, *, rank: int = 0, world_size: int = 1) -> ImageTextData:
    """The data of a vision-language job, for one of ``world_size`` data-parallel ranks.

    Raises:
        UserError: a folder that can't be read, or a vocabulary that is too small.
    """
    assert config.vision_encoder is not None
    pixels = picture_format(config.vision_encoder, config.video)
    source: Shapes | Folder
    if config.data.path:
        source = open_folder(
            config.data.path,
            pixels,
            config.video,
            config.data.heldout_fraction,
            follow_symlinks=config.data.follow_symlinks,
        )
    else:
        source = Shapes(pixels.side, config.video)
    tokenizer = build_tokenizer(config.data.tokenizer, config.data.eos_id)
    check_vocabulary(tokenizer, config.data.tokenizer, config.model.vocab_size)
    return ImageTextData(
        source,
        tokenizer=tokenizer,
        pixels=pixels,
        batch_size=config.train.batch_size,
        text_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        frames=config.video.max_frames if config.video is not None else 0,
        text_mask=config.model.is_moe or isinstance(config.vlm, MoMaConfig),
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
        heldout_batch_size=config.eval.batch_size,
        heldout_steps=config.eval.steps,
    )


def open_folder(
    path: str | Path,
    pixels: PixelRange,
    video: VideoConfig | None,
    heldout_fraction: float,
    *,
    follow_symlinks: bool = False,
) -> Folder:
    """The rows of a folder, parted by a hash of what they show, so that adding rows moves none.

    Args:
        follow_symlinks: whether links may lead out of the folder.

    Raises:
        UserError: no such folder, no metadata, or lines that can't be used: all of them are listed.
    """
    root = Path(path)
    try:
        text = read_text(root / METADATA, MAX_TEXT_BYTES)
    except UserError as error:
        raise UserError(f"data.path = {str(path)!r}: must be a folder with a {METADATA}: {error}") from None
    if problem := check_inside(root, METADATA, follow_symlinks):
        raise UserError(f"{root / METADATA}: {problem}")
    rows, problems = [], []
    for number, line in lines(text):
        row, problem = _parsed(line, video)
        problem = problem or _file_problem(root, row, follow_symlinks)
        rows.append(row)
        problems += [f"{root / METADATA}:{number}: {problem}"] if problem else []
    refuse(problems)
    held = [_is_held_out(row, heldout_fraction) for row in rows]
    parts = {
        split: [row for row, is_held in zip(rows, held, strict=True) if is_held == (split == "heldout")]
        for split in ("train", "heldout")
    }
    if not parts["train"]:
        raise UserError(f"data.path = {str(path)!r}: holds {len(rows)} rows; none is left to train on")
    return Folder(root, pixels, video, parts, follow_symlinks=follow_symlinks)


def read_pictures(files: Sequence[Path], pixels: PixelRange, video: VideoConfig | None) -> np.ndarray:
    """The frames of pictures and clips, in order: uint8 (F, s, s, 3).

    Raises:
        UserError: a file that can't be decoded, or more frames than the config has.
    """
    frames: list[np.ndarray] = []
    for file in files:
        try:
            frames += _frames_of(file, pixels, video)
        except UndecodableError as error:
            raise UserError(f"{file}: can't be decoded: {error}") from None
    limit = 1 if video is None else video.max_frames
    if len(frames) > limit:
        allowed = f"video.max_frames = {limit}" if video is not None else "one, as the config has no [video] section"
        raise UserError(f"{', '.join(map(str, files))}: {len(frames)} pictures, must be at most {allowed}")
    return np.stack(frames)


def with_noise_seeds(
    config: JobConfig, micro_batches: Sequence[Mapping[str, np.ndarray]], step: int
) -> Sequence[Mapping[str, np.ndarray]]:
    """The micro-batches of a step, each with the seed of its routing noise where experts choose with noise."""
    if not isinstance(config.vlm, MoMaConfig) or not config.vlm.moma_gumbel_noise:
        return micro_batches
    first = config.train.seed * 1_000_003 + step * len(micro_batches)
    seeds = [np.asarray((first + index) % MAX_SEED, np.int32) for index in range(len(micro_batches))]
    return [{**batch, "noise_seed": seed} for batch, seed in zip(micro_batches, seeds, strict=True)]


def draws_frames(video: VideoConfig | None, split: str) -> bool:
    """Whether the frames of a clip are drawn at random; held-out clips are always sampled uniformly."""
    return video is not None and video.sampling_policy == "random_segments" and split == "train"


def _places(available: int, limit: int, rng: np.random.Generator | None) -> list[int]:
    """Which of the pictures of a row are shown: all, as far as the limit goes, else some from all over."""
    if available <= limit:
        return list(range(available))
    if rng is not None:
        return drawn_frames(available, limit, rng)
    return nearest_frames(range(available), np.linspace(0, available - 1, limit))


def _frames_of(
    file: Path, pixels: PixelRange, video: VideoConfig | None, rng: np.random.Generator | None = None
) -> list[np.ndarray]:
    if file.suffix.lower() not in VIDEO_SUFFIXES:
        return [read_image(file, pixels)]
    return list(read_clip(file, pixels, video or VideoConfig(max_frames=1, min_frames=1), rng))


def _tokens(text: str, prompt: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a row, and which of them are learned."""
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos is None else [tokenizer.eos]
    asked, told = tokenizer.encode(prompt).tolist(), tokenizer.encode(text).tolist()
    ids = np.array([*before, *asked, *told, *after], np.int64)
    learned = np.arange(len(ids)) >= len(before) + len(asked)
    return ids, learned


def _parsed(line: str, video: VideoConfig | None) -> tuple[dict[str, Any], str]:
    """A row, and what is wrong with it."""
    row, problem = parse_object(line)
    if problem:
        return {}, problem
    if not isinstance(row.get("text"), str) or not isinstance(row.get("prompt", ""), str):
        return {}, "must be an object with a string 'text', and 'prompt' a string if there is one"
    files = row.get("file_name", [])
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return {}, "'file_name' must be a string or a list of strings"
    if len(names) > 1 and video is None:
        return {}, f"file_name = {files!r}: several pictures need a [video] section"
    problem = text_problem(row["text"]) or text_problem(row.get("prompt", ""))
    return row, problem


def _file_problem(root: Path, row: Mapping[str, Any], follow_symlinks: bool) -> str:
    problems = ((name, check_inside(root, name, follow_symlinks)) for name in _files(row))
    return next((f"file_name = {name!r}: {problem}" for name, problem in problems if problem), "")


def _files(row: Mapping[str, Any]) -> list[str]:
    files = row.get("file_name", [])
    return [files] if isinstance(files, str) else list(files)


def _is_held_out(row: Mapping[str, Any], fraction: float) -> bool:
    name = json.dumps(_files(row) or row["text"])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64
