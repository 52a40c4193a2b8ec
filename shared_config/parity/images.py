"""What a model that sees images is given in a proof, drawn from a seed.

Shapes: B rows, T text tokens, F frames of a clip, s pixels per side.
"""

from __future__ import annotations

import numpy as np

from shared_config.interchange.vision import picture_format
from shared_config.parity.validation import validation_pixels, validation_positions, validation_prompts
from shared_config.schema.job import JobConfig


def image_token(config: JobConfig) -> int | None:
    """The id that no text of a job may hold."""
    return None if config.vlm is None else config.vlm.image_token


def pixels(config: JobConfig, batch_size: int, seed: int) -> np.ndarray | None:
    """Drawn pixels that fit the encoder of a job; None for a text model."""
    if config.vlm is None or config.vision_encoder is None:
        return None
    side = picture_format(config.vision_encoder, config.video).side
    shape = (3, side, side) if config.video is None else (config.video.max_frames, 3, side, side)
    return validation_pixels((batch_size, *shape), seed)


def image_positions(config: JobConfig, shape: tuple[int, ...], seed: int) -> np.ndarray | None:
    """Drawn places of the images in text (B, T), as `validation_positions`; None where images have one place."""
    if config.vision_encoder is None or config.vlm is None or not config.vlm.places_image:
        return None
    return validation_positions(shape[0], shape[1], seed)


def prompt_lengths(config: JobConfig, shape: tuple[int, ...], seed: int) -> np.ndarray | None:
    """Drawn lengths of the prompts of text (B, T), as `validation_prompts`; None where all attention is causal."""
    if config.vision_encoder is None or config.vlm is None or not config.vlm.has_prefix:
        return None
    return validation_prompts(shape[0], shape[1], seed)
