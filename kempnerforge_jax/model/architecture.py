"""What a `Transformer` builds and does where architectures differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from kempnerforge_jax.model.attention import KVCache
from kempnerforge_jax.model.block import TransformerBlock
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.norm import build_norm
from kempnerforge_jax.registry import registry
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

if TYPE_CHECKING:
    from kempnerforge_jax.model.transformer import Transformer


@registry.register("architecture", "joint_decoder")
@dataclass(frozen=True)
class Architecture:
    """What a `Transformer` builds and does where architectures differ. This one is the plain decoder.

    An architecture of its own is a subclass, registered in category "architecture" under the ``arch`` of its config.
    """

    config: ModelConfig
    vlm_config: VLMConfig | None = None

    def build_block(self, layer_idx: int, *, rngs: nnx.Rngs) -> Module:
        """The block of a layer: called with x, the entries of `block_inputs`, ``kv_cache`` and
        ``return_stats=True``; gives a `BlockOutput`.
        """
        return TransformerBlock(self.config, layer_idx, rngs=rngs)

    def extra_modules(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Modules besides embedding, layers and head, by their name in the transformer; the final norm is one."""
        return {"norm": build_norm(self.config.norm_type, self.config.dim, self.config.norm_eps, rngs=rngs)}

    def check(self, modality: ModalityContext) -> None:
        """Refuse inputs that the architecture would ignore, and ask for those that it needs."""
        for name in ("image_features", "image_keys_values", "modality_ids"):
            if getattr(modality, name) is not None:
                arch = self.vlm_config.arch if self.vlm_config else "none"
                raise ValueError(f"{name} is given: the architecture ({arch}) has no use for it")

    def block_inputs(
        self,
        model: Transformer,
        inputs: dict[str, Any],
        x: jax.Array,
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
    ) -> dict[str, Any]:
        """The keyword arguments of every block, from those of the plain one and the stream ``x`` that enters."""
        return inputs

    def breaks_after(self, layer_idx: int) -> bool:
        """Whether `after_block` does something after this layer, so that no scan may run across it."""
        return False

    def after_block(self, model: Transformer, layer_idx: int, x: jax.Array, modality: ModalityContext) -> jax.Array:
        """What happens to the residual stream between two layers."""
        return x

    def read_once(self, model: Transformer, modality: ModalityContext) -> ModalityContext:
        """What decoding is called with for an image that it has to read anew at every step."""
        return modality

    def final_norm(self, model: Transformer, x: jax.Array, modality: ModalityContext) -> jax.Array:
        """The norm before the head."""
        return x if model.norm is None else model.norm(x)
