"""Captioned images drawn by code: what a vision-language model trains on when no data is given.

An image shows one shape; its caption names size, colour, form and place, so a model can know a caption's words only by
looking. Clips show the shape moving, and the caption names where to. Everything follows from the index alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shared_config.contract.initialise import stream

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "purple": (160, 60, 190),
    "white": (240, 240, 240),
}
FORMS = ("circle", "square", "triangle")
SIZES = {"small": 0.11, "large": 0.2}
"""Half the extent of a shape, as a share of the image's side."""
PLACES = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
MOTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
JITTER = 0.06
TRAVEL = 0.5
BACKGROUND, GRAIN = 60, 25


@dataclass(frozen=True)
class Scene:
    """What is drawn; ``x`` and ``y`` are the centre, as shares of the side."""

    size: str
    colour: str
    form: str
    where: str
    x: float
    y: float

    def caption(self, moves: bool = False) -> str:
        """In words."""
        place = f"moving {self.where}" if moves else f"at the {self.where}"
        return f"a {self.size} {self.colour} {self.form} {place}"


def caption_entropy(moves: bool = False) -> float:
    """Nats that a caption carries: what no model without the image can do without."""
    return math.log(len(SIZES) * len(COLOURS) * len(FORMS) * len(MOTIONS if moves else PLACES))


def shape_image(index: int, side: int, split: str = "train") -> tuple[np.ndarray, str]:
    """Image ``index`` of a split: uint8 (side, side, 3), and its caption."""
    rng = stream(index, f"shapes {split}")
    scene = _scene(rng, moves=False)
    return _draw(scene, side, rng), scene.caption()


def shape_clip(
    index: int, side: int, frames: int, split: str = "train", draw_times: bool = False
) -> tuple[np.ndarray, str]:
    """Clip ``index`` of a split: uint8 (frames, side, side, 3), and its caption.

    Args:
        draw_times: the moments shown are drawn, one from each of as many equal segments of the clip; otherwise they are
            equally spaced, first and last moment kept.
    """
    rng = stream(index, f"moving shapes {split}")
    scene = _scene(rng, moves=True)
    dx, dy = MOTIONS[scene.where]
    times = np.arange(frames) / max(frames - 1, 1)
    if draw_times:
        times = (np.arange(frames) + stream(index, f"moments {split}").random(frames)) / frames
    images = []
    for time in times.tolist():
        way = TRAVEL * (time - 0.5)
        moved = Scene(scene.size, scene.colour, scene.form, scene.where, scene.x + way * dx, scene.y + way * dy)
        images.append(_draw(moved, side, rng))
    return np.stack(images), scene.caption(moves=True)


def _scene(rng: np.random.Generator, moves: bool) -> Scene:
    def pick(names: object) -> str:
        choices = list(names)  # type: ignore[call-overload]
        return choices[int(rng.integers(len(choices)))]

    size, colour, form, where = pick(SIZES), pick(COLOURS), pick(FORMS), pick(MOTIONS if moves else PLACES)
    x, y = (0.5, 0.5) if moves else PLACES[where]
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    return Scene(size, colour, form, where, x + float(dx), y + float(dy))


def _draw(scene: Scene, side: int, rng: np.random.Generator) -> np.ndarray:
    """The shape on a grainy background."""
    image = BACKGROUND + rng.integers(-GRAIN, GRAIN + 1, (side, side, 3))
    centres = (np.arange(side) + 0.5) / side
    dx, dy = centres[None, :] - scene.x, centres[:, None] - scene.y
    reach = SIZES[scene.size]
    if scene.form == "circle":
        inside = dx * dx + dy * dy <= reach * reach
    elif scene.form == "square":
        inside = np.maximum(np.abs(dx), np.abs(dy)) <= 0.85 * reach
    else:
        inside = (np.abs(dy) <= reach) & (np.abs(dx) <= (dy + reach) / 2)
    image[inside] = np.array(COLOURS[scene.colour]) + rng.integers(-GRAIN, 1, (int(inside.sum()), 3))
    return np.clip(image, 0, 255).astype(np.uint8)
