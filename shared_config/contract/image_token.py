"""The id that stands for an image in prompts of a Hugging Face folder: it says where the image is, and no text that a
model is given holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_config.errors import UserError


def refuse_image_token(name: str, ids: np.ndarray, image_token: int | None) -> None:
    """Refuse text that holds the id of the image.

    Args:
        name: of the ids, for the message.
        ids: integers of any shape.
        image_token: None where there is none.

    Raises:
        UserError: naming the id and its first place.
    """
    if image_token is None:
        return
    found = np.argwhere(np.asarray(ids) == image_token)
    if len(found):
        place = ", ".join(map(str, found[0]))
        raise UserError(
            f"{name} holds {image_token} at {place}: must not, as vlm.image_token_id = {image_token} stands for the "
            "image"
        )


def without_image_tokens(
    name: str, ids: np.ndarray, image_token: int | None, images: int, are_first: bool = False
) -> tuple[np.ndarray, list[int]]:
    """A row (S,) without the ids that stand for its images, and how many of its ids stand before each of these. One
    image for which no id stands is before all text, as are several that have no other place.

    Args:
        image_token: None where no id stands for an image.
        images: how many the row has.
        are_first: whether they can be nowhere else.

    Raises:
        UserError: not as many ids as images.
    """
    found = [] if image_token is None else np.flatnonzero(ids == image_token).tolist()
    if image_token is None or (not found and (images <= 1 or are_first)):
        return ids, [0] * images
    if len(found) != images:
        held = f"holds {image_token} at {', '.join(map(str, found))}" if found else f"does not hold {image_token}"
        count = f"there is {images}" if images == 1 else f"there are {images or 'none'}"
        raise UserError(
            f"{name} {held}: must once for each image, as vlm.image_token_id = {image_token} stands for one; {count}"
        )
    return np.delete(ids, found), [place - index for index, place in enumerate(found)]


def prefix_text(prompt: str) -> str:
    """A prompt as models with ``vlm.prefix_lm`` have it, after the id that begins a text: it ends with a line (Beyer et
    al. 2024, PaliGemma, arXiv:2407.07726).
    """
    return f"{prompt}\n"


def check_first_image(name: str, places: Sequence[int], begin: int) -> None:
    """Refuse an image within text, where image and prompt have attention in both directions.

    Args:
        name: of the text, for the message.
        places: ids of the text that stand before those of its images.
        begin: those of them that begin a text.

    Raises:
        UserError: naming the place.
    """
    for before in places:
        if before > begin:
            raise UserError(f"{name} holds the image at {before}: must begin with it with vlm.prefix_lm = true")
