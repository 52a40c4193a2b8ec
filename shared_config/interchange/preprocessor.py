"""How pictures become the numbers that an encoder takes, as the preprocessor_config.json of its folder has it.

What CLIPImageProcessor and SiglipImageProcessor of transformers do, in their order: resize, crop the centre, rescale,
normalise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.reading import read_json

PLAIN_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of the pixels that towers were trained with."""

BICUBIC = 3
RESAMPLES = range(6)
"""Pillow's numbers of the filters: nearest, lanczos, bilinear, bicubic, box, hamming."""
FILES = ("preprocessor_config.json", "processor_config.json")
PROCESSORS = {
    "clip": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"),
    "siglip2": ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"),
}
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
WITHOUT_EFFECT = (
    "image_processor_type",
    "image_seq_length",
    "feature_extractor_type",
    "processor_class",
    "default_to_square",
    "size",
    "crop_size",
    "resample",
    "rescale_factor",
    "image_mean",
    "image_std",
    "data_format",
    "input_data_format",
    "return_tensors",
    "device",
    "disable_grouping",
)
"""What is read elsewhere here, or tells transformers where and in which form to compute."""


@dataclass(frozen=True)
class PixelRange:
    """The pictures that an encoder takes: squares of ``side`` pixels, as (byte * scale - mean) / std.

    Attributes:
        shortest_edge: the shorter edge becomes this many pixels, the longer one in proportion; 0: see ``stretch``.
        stretch: both edges become ``side`` pixels.
        resample: Pillow's number of the filter.
        crop: the square of ``side`` pixels in the centre is taken, black around pictures that are smaller.
    """

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float = 1 / 255
    shortest_edge: int = 0
    stretch: bool = True
    resample: int = BICUBIC
    crop: bool = False

    def numbers(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (F, s, s, 3) -> float32 (F, 3, s, s)."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (frames.astype(np.float64) * self.scale).astype(np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))


def read_preprocessor(folder: str, kind: str, side: int) -> PixelRange:
    """The pictures that an encoder's folder asks for, else what its kind usually takes.

    Pictures become RGB whatever ``do_convert_rgb`` says, as the encoder has three channels.

    Args:
        folder: "" for an encoder without one.
        kind: the type of the encoder.
        side: of the encoder's pictures.

    Raises:
        UserError: the file can't be read, or settings that can't be followed: all of them are listed.
    """
    file, fields = _fields(folder)
    kind = next((name for name, types in PROCESSORS.items() if _type(fields) in types), kind)
    is_clip = kind == "clip"
    usual_mean, usual_std = CLIP_PIXELS if is_clip else PLAIN_PIXELS
    given = {
        "do_resize": True,
        "do_center_crop": is_clip,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"shortest_edge": side} if is_clip else {"height": side, "width": side},
        "crop_size": side,
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": list(usual_mean),
        "image_std": list(usual_std),
        "default_to_square": not is_clip,
        **fields,
    }
    problems = list(_problems(given, side))
    if problems:
        raise UserError("\n".join(f"{file}: {problem}" for problem in problems))
    edge = _shortest_edge(given)
    return PixelRange(
        side,
        _three(given["image_mean"]) if given["do_normalize"] else (0.0, 0.0, 0.0),
        _three(given["image_std"]) if given["do_normalize"] else (1.0, 1.0, 1.0),
        scale=float(given["rescale_factor"]) if given["do_rescale"] else 1.0,
        shortest_edge=edge if given["do_resize"] else 0,
        stretch=bool(given["do_resize"]) and not edge,
        resample=given["resample"],
        crop=bool(given["do_center_crop"]),
    )


def _fields(folder: str) -> tuple[Path, dict[str, Any]]:
    """The file that says how pictures are prepared, and its content: {} without one."""
    for name in FILES if folder else ():
        file = Path(folder) / name
        if file.exists():
            fields = read_json(file)
            if name == FILES[0]:
                return file, fields
            nested = fields.get("image_processor")
            return file, nested if isinstance(nested, dict) else {}
    return Path(folder) / FILES[0], {}


def _problems(given: Mapping[str, Any], side: int) -> Iterator[str]:
    known = [name for names in PROCESSORS.values() for name in names]
    if _type(given) is not None and _type(given) not in known:
        yield f"image_processor_type = {_type(given)!r}: must be one of {', '.join(known)}"
    for name in given:
        if name in SWITCHES and not isinstance(given[name], bool | None):
            yield f"{name} = {given[name]!r}: must be true or false"
        elif name not in SWITCHES and name not in WITHOUT_EFFECT and given[name] not in (None, False):
            yield f"{name} = {given[name]!r}: is not supported; must be left out"
    if given["do_resize"]:
        yield from _size_problems(given, side)
    elif not given["do_center_crop"]:
        yield "do_resize = false: needs do_center_crop = true, as the encoder takes pictures of one size"
    if given["do_center_crop"] and _height_and_width(given["crop_size"]) != (side, side):
        yield f"crop_size = {given['crop_size']!r}: must be the encoder's image size, {side}"
    if given["do_rescale"] and not (_is_number(given["rescale_factor"]) and given["rescale_factor"] > 0):
        yield f"rescale_factor = {given['rescale_factor']!r}: must be a positive number"
    if given["do_normalize"]:
        for name in ("image_mean", "image_std"):
            values = given[name]
            if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
                yield f"{name} = {values!r}: must be three numbers"
            elif name == "image_std" and min(values) <= 0:
                yield f"image_std = {values!r}: must be positive"


def _size_problems(given: Mapping[str, Any], side: int) -> Iterator[str]:
    resample, size = given["resample"], given["size"]
    if not isinstance(resample, int) or isinstance(resample, bool) or resample not in RESAMPLES:
        yield f"resample = {resample!r}: must be one of {', '.join(map(str, RESAMPLES))}"
    edge, both = _shortest_edge(given), _height_and_width(size)
    if not edge and both is None:
        yield f"size = {size!r}: must be a positive number, 'height' and 'width', or 'shortest_edge'"
    elif edge and not given["do_center_crop"]:
        yield f"size = {size!r}: needs do_center_crop = true, as the encoder takes square pictures only"
    elif not edge and both != (side, side):
        yield f"size = {size!r}: must be the encoder's image size, {side}"


def _shortest_edge(given: Mapping[str, Any]) -> int:
    """Pixels of the shorter edge; 0 if ``size`` is not of that form."""
    size = given["size"]
    if _is_count(size):
        return 0 if given["default_to_square"] else size
    if isinstance(size, dict) and set(size) == {"shortest_edge"} and _is_count(size["shortest_edge"]):
        return size["shortest_edge"]
    return 0


def _height_and_width(size: Any) -> tuple[int, int] | None:
    if _is_count(size):
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(map(_is_count, size)):
        return size[0], size[1]
    if isinstance(size, dict) and set(size) == {"height", "width"} and all(map(_is_count, size.values())):
        return size["height"], size["width"]
    return None


def _type(fields: Mapping[str, Any]) -> Any:
    return fields.get("image_processor_type", fields.get("feature_extractor_type"))


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
