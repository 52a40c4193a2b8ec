"""Decoding images and clips into arrays of one size: Pillow and PyAV, both optional, imported when a file needs them.

Shapes: F frames, s pixels per side.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.preprocessor import PixelRange
from shared_config.interchange.reading import opened
from shared_config.schema.video import VideoConfig

if typing.TYPE_CHECKING:
    import PIL.Image

MAX_IMAGE_BYTES = 2**30
MAX_PIXELS = 2**27
CLIP_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg"
"""What a clip may be: not a playlist, which names other files."""


class UndecodableError(Exception):
    """A file that holds no picture that can be read; the message says why."""


def read_image(file: Path, pixels: PixelRange) -> np.ndarray:
    """An image file as the encoder takes it, upright and in RGB: uint8 (s, s, 3).

    Raises:
        UndecodableError: missing, damaged, or of a kind that Pillow does not know.
        UserError: Pillow is not installed.
    """
    library = _pillow(file)
    try:
        with opened(file, MAX_IMAGE_BYTES) as stream, library.open(stream) as image:
            return framed(to_rgb(image), pixels)
    except UndecodableError:
        raise
    except UserError as error:
        raise UndecodableError(_reason(file, error)) from None
    except Exception as error:  # Pillow's decoders raise all sorts of them
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def _reason(file: Path, error: UserError) -> str:
    """Why a file can't be read, without its name and the object that a library read it by."""
    return str(error).removeprefix(f"{file}: ").partition(" <")[0]


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A Pillow image of any mode in RGB, turned as its EXIF orientation says.

    What is transparent is laid over white, as transformers does. Pixels of more than eight bits, where Pillow would
    cut off all above 255, are scaled by their range: those of 16 bits by 65535; 32-bit integers and floats by their
    largest value (and from their smallest if that is negative), unless they are bytes (0 to 255), or floats from 0
    to 1, which are scaled by 1.

    Raises:
        UndecodableError: floats that are not finite.
    """
    from PIL import Image, ImageOps

    source, image = image.format, ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_bytes_of(np.asarray(image), image.mode, source))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def framed(image: PIL.Image.Image, pixels: PixelRange) -> np.ndarray:
    """An RGB image resized and cropped: uint8 (s, s, 3).

    Raises:
        UndecodableError: so long and thin that it has too many pixels once it is resized.
    """
    side = pixels.side
    if pixels.stretch:
        image = image.resize((side, side), pixels.resample)
    elif pixels.shortest_edge:
        short, long = sorted(image.size)
        edges = pixels.shortest_edge, int(pixels.shortest_edge * long / short)
        if edges[0] * edges[1] > MAX_PIXELS:
            raise UndecodableError(f"{edges[0]} by {edges[1]} pixels once it is resized; must be at most {MAX_PIXELS}")
        image = image.resize(edges if image.width <= image.height else (edges[1], edges[0]), pixels.resample)
    return _centre(np.asarray(image), side) if pixels.crop else np.asarray(image)


def _centre(picture: np.ndarray, side: int) -> np.ndarray:
    """The square in the centre of (H, W, 3), black around what is smaller."""
    for axis in (0, 1):
        length = picture.shape[axis]
        if length < side:
            before = -(-(side - length) // 2)
            widths = [(0, 0)] * 3
            widths[axis] = (before, side - length - before)
            picture = np.pad(picture, widths)
        else:
            first = (length - side) // 2
            picture = np.take(picture, range(first, first + side), axis)
    return picture


def _bytes_of(values: np.ndarray, mode: str, source: str | None) -> np.ndarray:
    """One channel of wide pixels as uint8 (H, W)."""
    if not np.isfinite(values).all():
        raise UndecodableError("holds pixels that are not finite")
    wide = values.astype(np.float64)
    low, high = min(wide.min(), 0.0), wide.max()
    if mode.startswith("I;16") or source == "PNG":  # a PNG has 16 bits at most
        high = 65535.0
    elif low == 0 and high <= 1 and mode == "F":
        high = 1.0
    elif low == 0 and high <= 255:
        high = 255.0
    return np.rint((wide - low) / (high - low) * 255).astype(np.uint8)


def _pillow(file: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f"{file}: reading images needs Pillow (pip install kempnerforge-twin[images])") from None
    return Image


def read_clip(
    file: Path, pixels: PixelRange, config: VideoConfig, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Frames of a video file, upright and in RGB, as the encoder takes them: uint8 (F, s, s, 3).

    Frames that can't be decoded are left out; F is what is left of the frames asked for.

    Args:
        rng: draws the frames, one from each segment; None: those at the times of `sample_times`.

    Raises:
        UndecodableError: missing, damaged, or without a frame that can be read.
        UserError: PyAV or Pillow is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{file}: reading clips needs PyAV (pip install kempnerforge-twin[video])") from None
    library = _pillow(file)
    try:
        times = [time for time, _ in _frames(file, av)]
        if not times:
            raise UndecodableError("holds no frame that can be decoded")
        order = np.argsort(times, kind="stable")
        ordered = [times[index] for index in order]
        wanted_times = sample_times(ordered[0], ordered[-1], len(ordered), config)
        if rng is None:
            wanted = nearest_frames(ordered, wanted_times)
        else:
            wanted = drawn_frames(len(ordered), len(wanted_times), rng)
        places = {int(order[index]): place for place, index in enumerate(wanted)}
        pictures: dict[int, np.ndarray] = {}
        for index, (_, frame) in enumerate(_frames(file, av)):
            if index in places:
                upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                pictures[places[index]] = framed(library.fromarray(np.ascontiguousarray(upright)), pixels)
        return np.stack([pictures[place] for place in sorted(pictures)])
    except UndecodableError:
        raise
    except UserError as error:
        raise UndecodableError(_reason(file, error)) from None
    except Exception as error:  # FFmpeg's errors are many
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def sample_times(first: float, last: float, available: int, config: VideoConfig) -> np.ndarray:
    """Seconds at which a clip is sampled: uniformly, first and last frame kept.

    ``fps`` frames per second, at least ``min_frames`` and at most ``max_frames``, and no more than there are.
    """
    wanted = round((last - first) * config.fps) + 1
    count = min(max(wanted, config.min_frames), config.max_frames, available)
    return np.linspace(first, last, count)


def nearest_frames(times: Sequence[float], wanted: np.ndarray) -> list[int]:
    """For each wanted time the frame closest to it, the earlier of two equally close; no frame twice, in order."""
    distances = np.abs(np.asarray(times)[None, :] - wanted[:, None])
    chosen: list[int] = []
    for place, row in enumerate(distances):
        low = chosen[-1] + 1 if chosen else 0
        high = len(times) - (len(wanted) - 1 - place)
        chosen.append(low + int(np.argmin(row[low:high])))
    return chosen


def drawn_frames(available: int, count: int, rng: np.random.Generator) -> list[int]:
    """A frame from each of ``count`` equal segments of ``available`` frames, at least as many, in order."""
    bounds = np.arange(count + 1) * available // count
    return rng.integers(bounds[:-1], bounds[1:]).tolist()


def _frames(file: Path, av: Any) -> Iterator[tuple[float, Any]]:
    """Seconds and frames of the first video stream as they are decoded; packets that can't be decoded are passed over.

    One frame is held at a time: a clip is decoded once for its times and once for the pictures that are wanted.
    """
    with opened(file) as stream, av.open(stream, options={"format_whitelist": CLIP_FORMATS}) as container:
        if not container.streams.video:
            raise UndecodableError("holds no video")
        count = 0
        for packet in container.demux(container.streams.video[0]):
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in decoded:
                yield float(count if frame.time is None else frame.time), frame
                count += 1
