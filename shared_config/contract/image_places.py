"""Where the images of prompts stand: before the text, or within it.

Shapes: B rows, N images of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from shared_config.contract.decoding import Prompts
from shared_config.errors import UserError


@dataclass(frozen=True)
class ImagePlaces:
    """Where the images of prompts stand.

    Attributes:
        positions: int32 (B,), how many tokens of each prompt stand before its image or clip; or (B, N), before each of
            its images. One that a prompt does not have stands behind all tokens.
        exists: bool (B, N), the images that prompts have; None: all.
    """

    positions: np.ndarray
    exists: np.ndarray | None = None

    def tokens(self, all_images: int) -> np.ndarray:
        """int32 (B,): positions of the stream that the images of each prompt take, of ``all_images`` in a row with all
        of them.
        """
        if self.exists is None:
            return np.full(len(self.positions), all_images, np.int32)
        return (self.exists.sum(axis=1) * (all_images // self.exists.shape[1])).astype(np.int32)


def check_images(shape: Sequence[int], rows: int) -> None:
    """Check that there is an image for each prompt.

    Raises:
        UserError: if there isn't.
    """
    if len(shape) not in (4, 5) or shape[0] != rows:
        raise UserError(
            f"pixel_values.shape = {tuple(shape)}: must be (prompts, 3, height, width) or (prompts, frames, 3, height, "
            f"width), for {rows} prompts"
        )


def check_image_positions(given: Iterable[ArrayLike] | None, prompts: Prompts, images: int) -> ImagePlaces | None:
    """Where the images of each prompt stand; None: before it.

    Args:
        given: an integer for each prompt, for its image or clip, or a row of them, one for each of its images.
        images: how many a row of pixels has, where they may stand anywhere in the text; else 0.

    Raises:
        UserError: positions for no such image, not of each prompt, of more images than there are, or with no token
            after the image.
    """
    if given is None:
        return None
    rows, count = [np.asarray(row) for row in (given if isinstance(given, Iterable) else [given])], len(prompts.lengths)
    said = f"image_positions = {[row.tolist() for row in rows]}"
    if not images:
        raise UserError(f"{said}: must be None without an image that has no fixed place")
    axes = {row.ndim for row in rows}
    if len(rows) != count or axes not in ({0}, {1}) or any(row.size and row.dtype.kind not in "iu" for row in rows):
        raise UserError(f"{said}: must be one integer for each of {count} prompts, or a row of them")
    for place, (row, length) in enumerate(zip(rows, prompts.lengths.tolist(), strict=True)):
        for position in np.atleast_1d(row).tolist():
            if not 0 <= position < length:
                allowed = f"[0, {length}), as text follows the image"
                raise UserError(f"image_positions[{place}] = {row.tolist()}: must be in {allowed}")
    if axes == {0}:
        return ImagePlaces(np.array(rows, np.int32))
    longest = max(map(len, rows))
    if longest != images:
        raise UserError(f"{said}: the most in a row are {longest}, must be {images}, the images of pixel_values")
    exists = np.arange(images) < np.array([len(row) for row in rows])[:, None]
    positions = np.full(exists.shape, prompts.tokens.shape[1], np.int32)
    positions[exists] = np.concatenate(rows)
    return ImagePlaces(positions, None if exists.all() else exists)
