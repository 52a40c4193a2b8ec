"""The id that stands for the image in prompts of a Hugging Face folder: no text may hold it."""

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
            "image, which has its place before the text"
        )
