"""How clips become frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from shared_config.schema.base import PositiveFloat, PositiveInt, Section, section


@section
class VideoConfig(Section):
    """Frames sampled from a clip: ``fps`` per second, between ``min_frames`` and ``max_frames``; shorter clips are
    padded and masked.

    uniform: equal spacing in time, first and last frame kept.
    random_segments: in training, a frame drawn at random from each of as many equal segments as there are frames to be
    sampled (Wang et al. 2016, "Temporal segment networks", arXiv:1608.00859), by ``train.seed``, row and epoch;
    everywhere else uniform.
    """

    max_frames: PositiveInt = 16
    min_frames: PositiveInt = 4
    fps: PositiveFloat = 2.0
    frame_size: PositiveInt = 224
    sampling_policy: Literal["uniform", "random_segments"] = "uniform"

    def problems(self) -> Iterator[str]:
        if self.min_frames > self.max_frames:
            yield f"min_frames = {self.min_frames}: must be at most max_frames = {self.max_frames}"
