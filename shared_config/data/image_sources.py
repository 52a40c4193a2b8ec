"""Where image-text examples come from: drawn shapes, or a folder of pictures or clips with a metadata.jsonl."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict, TypeGuard

import numpy as np

from shared_config.contract.image_token import check_first_image, prefix_text, without_image_tokens
from shared_config.contract.initialise import stream
from shared_config.data.jsonl import MAX_TEXT_BYTES, lines, parse_object, refuse, text_problem
from shared_config.data.media import UndecodableError, drawn_frames, nearest_frames, read_clip, read_image
from shared_config.data.shapes import shape_clip, shape_image
from shared_config.data.tokenizer import Tokenizer
from shared_config.errors import UserError
from shared_config.interchange.preprocessor import PixelRange
from shared_config.interchange.reading import check_inside, read_text
from shared_config.schema.video import VideoConfig

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
SHAPES_VERSION = "shapes 1"
SEVERAL = "neither a [video] section nor vlm.image_token_id nor vlm.prefix_lm"
"""What may hold several pictures."""


@dataclass(frozen=True)
class Example:
    """A row before it becomes arrays.

    Attributes:
        frames: uint8 (F, s, s, 3); an image has one frame, a row without a picture none.
        prompt: what stands before the text and is not learned.
        exists: bool (F,), False for frames that can't be decoded, which are black; None: all can.
    """

    frames: np.ndarray
    text: str
    prompt: str = ""
    exists: np.ndarray | None = None


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


class PictureRow(TypedDict):
    """A line of the metadata, which may say more."""

    text: str
    prompt: NotRequired[str]
    file_name: NotRequired[str | list[str]]


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
    rows: dict[str, list[PictureRow]]
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
        by_file = [self._pictures(name, rng) for name in _files(row)]
        if self.video is None:
            shown = [next(iter(pictures), None) for pictures in by_file]
        else:
            frames = [picture for pictures in by_file for picture in pictures]
            shown = [frames[place] for place in _places(len(frames), self.video.max_frames, rng)]
            shown = shown or [None] * bool(by_file)
        black = np.zeros((self.pixels.side, self.pixels.side, 3), np.uint8)
        pictures = np.array([black if frame is None else frame for frame in shown], np.uint8).reshape(-1, *black.shape)
        exists = np.array([frame is not None for frame in shown], bool)
        return Example(pictures, row["text"], row.get("prompt", ""), exists)

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


def open_folder(
    path: str | Path,
    pixels: PixelRange,
    video: VideoConfig | None,
    heldout_fraction: float,
    *,
    follow_symlinks: bool = False,
    most: int | None = None,
) -> Folder:
    """The rows of a folder, parted by a hash of what they show, so that adding rows moves none.

    Args:
        most: pictures that a row may have and that are no clip, as ``data.max_images`` says; None: only one.
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
        row, problem = _parsed(line, most, video)
        problem = problem or _file_problem(root, row, follow_symlinks)
        rows.append(row)
        problems += [f"{root / METADATA}:{number}: {problem}"] if problem else []
    refuse(problems)
    held = [is_held_out_row(row, heldout_fraction) for row in rows]
    parts = {
        split: [row for row, is_held in zip(rows, held, strict=True) if is_held == (split == "heldout")]
        for split in ("train", "heldout")
    }
    if not parts["train"]:
        raise UserError(f"data.path = {str(path)!r}: holds {len(rows)} rows; none is left to train on")
    return Folder(root, pixels, video, parts, follow_symlinks=follow_symlinks)


def read_pictures(
    files: Sequence[Path], pixels: PixelRange, video: VideoConfig | None, several: bool = False
) -> np.ndarray:
    """The frames of pictures and clips, in order: uint8 (F, s, s, 3).

    Args:
        several: whether there may be several pictures that are no clip.

    Raises:
        UserError: a file that can't be decoded, or more frames than the config has.
    """
    frames: list[np.ndarray] = []
    if video is not None and len(files) > 1 and (clip := next(filter(_is_clip, files), None)):
        raise UserError(f"{clip}: must stand alone, as the config has one clip; its frames may be given as pictures")
    for file in files:
        try:
            frames += _frames_of(file, pixels, video)
        except UndecodableError as error:
            raise UserError(f"{file}: can't be decoded: {error}") from None
    limit = 1 if video is None else video.max_frames
    if len(frames) > limit and (video is not None or not several):
        own = f"one, as the config has {SEVERAL}"
        allowed = own if video is None else f"video.max_frames = {limit}"
        raise UserError(f"{', '.join(map(str, files))}: {len(frames)} pictures, must be at most {allowed}")
    return np.stack(frames)


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


def _is_clip(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def _frames_of(
    file: Path, pixels: PixelRange, video: VideoConfig | None, rng: np.random.Generator | None = None
) -> list[np.ndarray]:
    if not _is_clip(file):
        return [read_image(file, pixels)]
    return list(read_clip(file, pixels, video or VideoConfig(max_frames=1, min_frames=1), rng))


def row_tokens(
    text: str,
    prompt: str,
    tokenizer: Tokenizer,
    image_token: int | None = None,
    images: int = 0,
    has_prefix: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The ids of a row without those of its images, which of them are learned, and how many stand before each image.

    Args:
        has_prefix: the prompt has attention in both directions: it is written as `prefix_text`, after the image.

    Raises:
        UserError: not an id for each image, or one that does not stand first in a prompt with such attention.
    """
    begin = tokenizer.begin if has_prefix else tokenizer.bos
    before = [] if begin is None else [begin]
    after = [] if tokenizer.eos is None else [tokenizer.eos]
    prompt = prefix_text(prompt) if has_prefix else prompt
    asked, told = (tokenizer.encode_with_images(part, image_token).tolist() for part in (prompt, text))
    ids = np.array([*before, *asked, *told, *after], np.int64)
    learned = np.arange(len(ids)) >= len(before) + len(asked)
    name = f"prompt {prompt!r} and text {text!r}"
    kept, places = without_image_tokens(name, ids, image_token, images, has_prefix)
    if has_prefix:
        check_first_image(name, places, len(before))
    return kept, learned if len(kept) == len(ids) else learned[ids != image_token], places


def _parsed(line: str, most: int | None, video: VideoConfig | None) -> tuple[PictureRow, str]:
    """A row, and what is wrong with it."""
    row, problem = parse_object(line)
    problem = problem or _row_problem(row, most, video)
    return (row, "") if _is_usable(row, problem) else ({"text": ""}, problem)


def _is_usable(row: Mapping[str, object], problem: str) -> TypeGuard[PictureRow]:
    """Whether `_row_problem` found none."""
    return not problem


def _row_problem(row: Mapping[str, object], most: int | None, video: VideoConfig | None) -> str:
    text, prompt = row.get("text"), row.get("prompt", "")
    if not isinstance(text, str) or not isinstance(prompt, str):
        return "must be an object with a string 'text', and 'prompt' a string if there is one"
    files = row.get("file_name", [])
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "'file_name' must be a string or a list of strings"
    return _number_problem(names, most, video) or text_problem(text) or text_problem(prompt)


def _number_problem(names: Sequence[str], most: int | None, video: VideoConfig | None) -> str:
    """What is wrong with how many pictures or clips a row has."""
    said = f"file_name = {list(names)!r}"
    if video is not None:
        mixed = len(names) > 1 and any(_is_clip(Path(name)) for name in names)
        return f"{said}: must be one clip, or pictures that are its frames; a row has one clip" if mixed else ""
    if most is None:
        return f"{said}: must be one picture, as the config has {SEVERAL}" if len(names) > 1 else ""
    return f"{said}: {len(names)} pictures, must be at most data.max_images = {most}" if len(names) > most else ""


def _file_problem(root: Path, row: PictureRow, follow_symlinks: bool) -> str:
    problems = ((name, check_inside(root, name, follow_symlinks)) for name in _files(row))
    return next((f"file_name = {name!r}: {problem}" for name, problem in problems if problem), "")


def images_of(row: PictureRow, video: VideoConfig | None) -> int:
    """How many pictures or clips a row has."""
    return len(_files(row)) if video is None else min(1, len(_files(row)))


def _files(row: PictureRow) -> list[str]:
    files = row.get("file_name", [])
    return [files] if isinstance(files, str) else list(files)


def is_held_out_row(row: PictureRow, fraction: float) -> bool:
    """Whether a row of metadata.jsonl goes to the held-out share: by a hash of its files and texts."""
    name = json.dumps(_files(row) or row["text"])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64
