"""The id that stands for the image in prompts of a Hugging Face folder: it says where the image is, and no text that a
model is given holds it.
"""

from __future__ import annotations

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


def without_image_token(name: str, ids: np.ndarray, image_token: int | None) -> tuple[np.ndarray, int]:
    """A row (S,) without the id that stands for the image, and how many of its ids stand before the image: 0 if no id
    says where that is.

    Raises:
        UserError: it stands there more than once.
    """
    found = [] if image_token is None else np.flatnonzero(ids == image_token).tolist()
    if len(found) > 1:
        raise UserError(
            f"{name} holds {image_token} at {', '.join(map(str, found))}: must at most once, as "
            f"vlm.image_token_id = {image_token} stands for the image, and there is one"
        )
    return np.delete(ids, found), found[0] if found else 0
