"""What a model that sees images is given in a proof, drawn from a seed.

Shapes: B rows, N images of a row, T text tokens, F frames of a clip, s pixels per side.
"""

from __future__ import annotations

import numpy as np

from shared_config.interchange.vision import picture_format, tokens_per_image
from shared_config.parity.validation import validation_pixels, validation_positions, validation_prompts
from shared_config.schema.job import JobConfig

MOST = 2
"""Images of a row that may have several."""


def image_token(config: JobConfig) -> int | None:
    """The id that no text of a job may hold."""
    return None if config.vlm is None else config.vlm.image_token


def images_of(config: JobConfig) -> int:
    """N: `MOST` images where a row may have several, if there is room for them beside the text; else one, or a clip."""
    if config.vlm is None or config.video is not None or not config.vlm.takes_several:
        return 1
    beside = MOST * tokens_per_image(config) + config.vlm.max_text_len
    return MOST if beside <= config.model.max_seq_len else 1


def pixels(config: JobConfig, batch_size: int, seed: int) -> np.ndarray | None:
    """Drawn pixels that fit the encoder of a job: float32 (B, 3, s, s), (B, N, 3, s, s) or (B, F, 3, s, s); None for a
    text model.
    """
    if config.vlm is None or config.vision_encoder is None:
        return None
    side, images = picture_format(config.vision_encoder, config.video).side, images_of(config)
    several = (images,) if images > 1 else ()
    shape = (*several, 3, side, side) if config.video is None else (config.video.max_frames, 3, side, side)
    return validation_pixels((batch_size, *shape), seed)


def image_positions(config: JobConfig, shape: tuple[int, ...], seed: int) -> np.ndarray | None:
    """Drawn places of the images in text (B, T), as `validation_positions`; None where images have one place."""
    if config.vision_encoder is None or config.vlm is None or not config.vlm.places_image:
        return None
    return validation_positions(shape[0], shape[1], seed, images_of(config))


def prompt_lengths(config: JobConfig, shape: tuple[int, ...], seed: int) -> np.ndarray | None:
    """Drawn lengths of the prompts of text (B, T), as `validation_prompts`; None where all attention is causal."""
    if config.vision_encoder is None or config.vlm is None or not config.vlm.has_prefix:
        return None
    return validation_prompts(shape[0], shape[1], seed)
