"""The vision encoder of a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from shared_config.schema.base import Count, Section, registered, section


@section
class VisionEncoderConfig(Section):
    """Which encoder turns pixels into image tokens.

    ``path`` is a local Hugging Face folder (config.json and safetensors), needed by every type but ``random``.
    ``feature_dim`` and ``num_tokens`` 0 mean what the encoder says; ``random`` has no folder to ask and needs both.
    """

    type: Annotated[str, registered("vision_encoder")] = "random"
    path: str = ""
    feature_dim: Count = 0
    num_tokens: Count = 0

    def problems(self) -> Iterator[str]:
        if self.type == "random":
            for field in ("feature_dim", "num_tokens"):
                if getattr(self, field) == 0:
                    yield f"{field} = 0: type 'random' has no folder to ask; give a positive number"
        elif self.type in ("siglip2", "clip") and not self.path:
            yield f"path = '': type {self.type!r} needs a local folder with config.json and safetensors weights"
