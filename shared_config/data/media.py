"""Decoding images and clips into arrays of one size: Pillow and PyAV, both optional, imported when a file needs them.

Shapes: F frames, s pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.errors import UserError
from shared_config.reading import opened
from shared_config.schema.video import VideoConfig

MAX_IMAGE_BYTES = 2**30
CLIP_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg"
"""What a clip may be: not a playlist, which names other files."""


class UndecodableError(Exception):
    """A file that holds no picture that can be read; the message says why."""


def read_image(file: Path, side: int) -> np.ndarray:
    """An image file as RGB, stretched to a square: uint8 (s, s, 3).

    Raises:
        UndecodableError: missing, damaged, or of a kind that Pillow does not know.
        UserError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f"{file}: reading images needs Pillow (pip install kempnerforge-twin[images])") from None
    try:
        with opened(file, MAX_IMAGE_BYTES) as stream, Image.open(stream) as image:
            return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    except UserError as error:
        raise UndecodableError(str(error)) from None
    except Exception as error:  # Pillow's decoders raise all sorts of them
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def read_clip(file: Path, side: int, config: VideoConfig) -> np.ndarray:
    """Frames of a video file at the times of `sample_times`, as RGB, stretched to squares: uint8 (F, s, s, 3).

    Frames that can't be decoded are left out; F is what is left of the times asked for.

    Raises:
        UndecodableError: missing, damaged, or without a frame that can be read.
        UserError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{file}: reading clips needs PyAV (pip install kempnerforge-twin[video])") from None
    try:
        times = [time for time, _ in _frames(file, av)]
        if not times:
            raise UndecodableError("holds no frame that can be decoded")
        order = np.argsort(times, kind="stable")
        ordered = [times[index] for index in order]
        wanted = nearest_frames(ordered, sample_times(ordered[0], ordered[-1], len(ordered), config))
        places = {int(order[index]): place for place, index in enumerate(wanted)}
        pictures: dict[int, np.ndarray] = {}
        for index, (_, frame) in enumerate(_frames(file, av)):
            if index in places:
                picture = frame.reformat(width=side, height=side, format="rgb24")
                pictures[places[index]] = picture.to_ndarray()
        return np.stack([pictures[place] for place in sorted(pictures)])
    except UndecodableError:
        raise
    except UserError as error:
        raise UndecodableError(str(error)) from None
    except Exception as error:  # FFmpeg's errors are many
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def sample_times(first: float, last: float, available: int, config: VideoConfig) -> np.ndarray:
    """Seconds at which a clip is sampled: uniformly, first and last frame kept.

    ``fps`` frames a second, at least ``min_frames`` and at most ``max_frames``, and no more than there are.
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
