"""The vision encoder of a vision-language model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated

from shared_config.schema.base import KEEPS_FUNCTION, Count, Section, registered, section

DEFAULT_IMAGE_SIZE = 32


@section
class VisionEncoderConfig(Section):
    """Which encoder turns pixels into image tokens.

    random: noise that depends on the image; needs ``feature_dim`` and ``num_tokens``, takes images of any size.
    siglip2, clip: a tower from ``path``, a Hugging Face folder (config.json and safetensors), which says the rest.
    vit: a tower of the SigLIP kind, trained from scratch; ``image_size``, ``patch_size``,
    ``feature_dim``, ``n_heads`` and ``n_layers`` describe it.

    0 means what the encoder says.
    """

    type: Annotated[str, registered("vision_encoder")] = "random"
    path: Annotated[str, KEEPS_FUNCTION] = ""
    feature_dim: Count = 0
    num_tokens: Count = 0
    image_size: Count = 0
    patch_size: Count = 0
    n_layers: Count = 0
    n_heads: Count = 0

    def idle(self) -> Collection[str]:
        """The folder of a tower says its sizes, or they are the same."""
        return ("feature_dim", "num_tokens", "image_size") if self.type in ("siglip2", "clip") else ()

    def resolved(self) -> Mapping[str, object]:
        return {"num_tokens": self.known_num_tokens, "image_size": self.known_image_size}

    def problems(self) -> Iterator[str]:
        if self.type == "random":
            yield from self._needed("feature_dim", "num_tokens", why="type 'random' has no folder to ask")
        elif self.type in ("siglip2", "clip") and not self.path:
            yield f"path = '': type {self.type!r} needs a local folder with config.json and safetensors weights"
        elif self.type == "vit":
            yield from self._tower_problems()
        if self.type in ("random", "siglip2", "clip"):
            for name in ("patch_size", "n_layers", "n_heads"):
                if getattr(self, name):
                    yield f"{name} = {getattr(self, name)}: must be 0, it describes encoders of type 'vit'"

    def _tower_problems(self) -> Iterator[str]:
        missing = list(self._needed("feature_dim", "image_size", "patch_size", "n_heads", why="type 'vit' needs it"))
        yield from missing
        if missing:
            return
        if self.image_size % self.patch_size != 0:
            yield f"patch_size = {self.patch_size}: must divide image_size = {self.image_size}"
        elif self.num_tokens not in (0, self.known_num_tokens):
            yield f"num_tokens = {self.num_tokens}: must be 0 or the number of patches, {self.known_num_tokens}"
        if self.feature_dim % self.n_heads != 0:
            yield f"n_heads = {self.n_heads}: must divide feature_dim = {self.feature_dim}"

    def _needed(self, *names: str, why: str) -> Iterator[str]:
        for name in names:
            if getattr(self, name) == 0:
                yield f"{name} = 0: {why}; give a positive number"

    @property
    def known_num_tokens(self) -> int:
        """Tokens per image as far as the config alone says; 0: ask the encoder."""
        if self.type == "vit":
            return (self.image_size // self.patch_size) ** 2
        return self.num_tokens

    @property
    def known_image_size(self) -> int:
        """Pixels per side of the images, as far as the config alone says; 0: ask the encoder."""
        return self.image_size or (DEFAULT_IMAGE_SIZE if self.type == "random" else 0)
