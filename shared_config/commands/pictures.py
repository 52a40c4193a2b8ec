"""The pictures that commands show a model: read from files, and placed where a prompt has them.

Shapes: N pictures, F frames of a clip, s pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_config.contract.image_token import check_first_image, without_image_tokens
from shared_config.data.image_sources import read_pictures
from shared_config.errors import UserError
from shared_config.interchange.vision import picture_format, tokens_per_image
from shared_config.schema.job import JobConfig


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        ids: of the text.
        pixels: float32 (1, 3, s, s), (1, N, 3, s, s) or (1, F, 3, s, s); None without pictures.
        image_positions: how many ids stand before the picture, or the pictures, of the one row; None: none do.
        length: positions of the residual stream.
    """

    ids: list[int]
    pixels: np.ndarray | None
    image_positions: Sequence[int] | Sequence[Sequence[int]] | None
    length: int


def image_token_of(config: JobConfig) -> int | None:
    """The id that stands for a picture in prompts."""
    return None if config.vlm is None else config.vlm.image_token


def takes_several(config: JobConfig) -> bool:
    """Whether a prompt may have several pictures; those of a clip are one."""
    return config.vlm is not None and config.vlm.takes_several and config.video is None


def user_message(text: str, pictures: int, config: JobConfig) -> dict[str, object]:
    """A message for a chat template. Its pictures come first if ids say where they stand; others have one place."""
    if not pictures or config.vlm is None or not config.vlm.places_image:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}


def read_frames(files: Sequence[str], config: JobConfig) -> np.ndarray:
    """Pictures, or the frames of a clip: uint8 (N, s, s, 3).

    Raises:
        UserError: a file that can't be read, or more than a model takes.
    """
    assert config.vision_encoder is not None
    pixels = picture_format(config.vision_encoder, config.video)
    return read_pictures([Path(file) for file in files], pixels, config.video, several=takes_several(config))


def prompt_with(name: str, ids: Sequence[int], frames: np.ndarray | None, config: JobConfig) -> Prompt:
    """The prompt that ids, some of which stand for pictures, and frames uint8 (N, s, s, 3) make.

    Args:
        name: of the ids, for messages.

    Raises:
        UserError: not an id for each picture, or nothing after the last of them.
    """
    count = 0 if frames is None else 1 if config.video is not None else len(frames)
    has_prefix = config.vlm is not None and config.vlm.has_prefix
    text, places = without_image_tokens(name, np.asarray(ids), image_token_of(config), count, has_prefix)
    if has_prefix:
        check_first_image(name, places, 1)
    stated = len(text) < len(ids)
    if stated and places[-1] == len(text):
        raise UserError(f"{name} ends with the id of the image, {ids[-1]}: must go on with text")
    if frames is None or config.vision_encoder is None or config.vlm is None:
        return Prompt(text.tolist(), None, None, len(text))
    numbers = picture_format(config.vision_encoder, config.video).numbers(frames)
    tokens = config.vlm.residual_stream_image_tokens(len(frames) * tokens_per_image(config))
    positions = [places] if len(places) > 1 else places
    return Prompt(
        text.tolist(),
        numbers[None] if config.video is not None or len(frames) > 1 else numbers,
        positions if stated and not has_prefix else None,
        len(text) + tokens,
    )
