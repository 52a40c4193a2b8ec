"""What a `Transformer` builds and does where architectures differ.

Shapes: B batch, S positions of the residual stream, D model dim, A = head_dim / 2 angles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.attention import KVCache
from kempnerforge_torch.model.block import TransformerBlock
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.registry import registry
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

Modules = Mapping[str, nn.Module | None]
"""The modules of `Architecture.extra_modules` by name, as the model holds them now: possibly wrapped, None if removed.
"""
RotaryTable = Callable[
    [Integer[Tensor, "... S"], torch.dtype], tuple[Float[Tensor, "... S A"], Float[Tensor, "... S A"]]
]
"""Positions and a dtype to cos and sin."""


@registry.register("architecture", "joint_decoder")
@dataclass(frozen=True)
class Architecture:
    """What a `Transformer` builds and does where architectures differ. This one is the plain decoder.

    A new architecture is a subclass, registered in category "architecture" under the ``arch`` of its config. It
    overrides what differs: the modules it adds, named in the state dict as in `extra_modules`, and the methods below,
    which depend on their arguments alone. The model owns the modules and passes them in.
    """

    config: ModelConfig
    vlm_config: VLMConfig | None = None

    def build_block(self, layer_idx: int) -> nn.Module:
        """The block of a layer: called with x, the entries of `block_inputs`, ``kv_cache`` and
        ``return_stats=True``; gives a `BlockOutput`.
        """
        return TransformerBlock(self.config, layer_idx)

    def extra_modules(self) -> dict[str, nn.Module]:
        """Modules besides embedding, layers and head, by their name in the transformer; the final norm is one."""
        return {"norm": build_norm(self.config.norm_type, self.config.dim, self.config.norm_eps)}

    def check(self, modality: ModalityContext) -> None:
        """Reject inputs that the architecture would ignore, and require those that it needs."""
        for name in ("image_features", "image_keys_values", "modality_ids"):
            if getattr(modality, name) is not None:
                arch = self.vlm_config.arch if self.vlm_config else "none"
                raise ValueError(f"{name} is given: the architecture ({arch}) has no use for it")

    def block_inputs(
        self,
        inputs: dict[str, object],
        x: Float[Tensor, "B S D"],
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
        rope: RotaryTable,
    ) -> dict[str, object]:
        """The keyword arguments of every block, built once per forward.

        Args:
            inputs: those of the plain block: ``rope_cos``, ``rope_sin``, ``mask``, ``doc_ids``, ``key_padding_mask``
                and ``limit_capacity``.
            x: the stream (B, S, D) that enters the first block.
            rope: for positions other than those in ``inputs``.
        """
        return inputs

    def after_block(
        self, modules: Modules, layer_idx: int, x: Float[Tensor, "B S D"], modality: ModalityContext
    ) -> Float[Tensor, "B S D"]:
        """What happens to the residual stream between two layers."""
        return x

    def precompute_image_kv(self, modules: Modules, modality: ModalityContext) -> ModalityContext:
        """The context for decoding, in which nothing of the image is left to be computed at every step."""
        return modality

    def final_norm(
        self, modules: Modules, x: Float[Tensor, "B S D"], modality: ModalityContext
    ) -> Float[Tensor, "B S D"]:
        """The norm before the head; the stream itself in a pipeline stage without it."""
        norm = modules["norm"]
        return x if norm is None else norm(x)
