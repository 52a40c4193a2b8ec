"""Text that attends to image features, in separate blocks between those of the decoder.

Shapes: B batch, S text positions, N image tokens, D model dim, H query heads, K key/value heads, h head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kempnerforge_torch.model.architecture import Architecture, Modules
from kempnerforge_torch.model.attention import attend, resolve_head_dim
from kempnerforge_torch.model.checks import check_mask
from kempnerforge_torch.model.linear import Linear
from kempnerforge_torch.model.mask import Mask
from kempnerforge_torch.model.mlp import build_mlp
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.model.wrappers import unwrap
from kempnerforge_torch.registry import registry
from shared_config.errors import ConfigError
from shared_config.schema.vlm import CrossAttentionConfig


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(h)) v, queries from text, keys and values from the image; no positions, no causality."""

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int | None = None, sdpa_backend: str = "auto"
    ):
        super().__init__()
        head_dim = resolve_head_dim(dim, n_heads, n_kv_heads, head_dim)
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.sdpa_backend = sdpa_backend
        self.q_proj = Linear(dim, n_heads * head_dim, bias=False)
        self.k_proj = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(dim, n_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(n_heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        image_features: Float[Tensor, "B N D"] | None,
        image_mask: Bool[Tensor, "B N"] | None = None,
        *,
        keys_values: tuple[Float[Tensor, "B K N h"], Float[Tensor, "B K N h"]] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """(B, S, D), (B, N, D) -> (B, S, D).

        Args:
            image_mask: bool (B, N), True = attend. A row that may attend to nothing gives 0.
            keys_values: the result of `keys_values` for the features, which are then not needed.

        Raises:
            ValueError: a mask of another dtype or shape.
        """
        if keys_values is None:
            assert image_features is not None
            keys_values = self.keys_values(image_features)
        q_BHSh = self._heads_first(self.q_proj(x))
        k_BKNh, v_BKNh = (part.to(x.dtype) for part in keys_values)
        if image_mask is not None:
            check_mask("image_mask", image_mask, (len(k_BKNh), k_BKNh.shape[2]))
        mask = Mask(key_valid=image_mask)
        out_BHSh = attend(q_BHSh, k_BKNh, v_BKNh, mask, sdpa_backend=self.sdpa_backend)
        return self.o_proj(out_BHSh.transpose(1, 2).flatten(2))

    def keys_values(
        self, image_features: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B K N h"], Float[Tensor, "B K N h"]]:
        """(B, N, D) -> the keys and values of the image, (B, K, N, h) each."""
        return self._heads_first(self.k_proj(image_features)), self._heads_first(self.v_proj(image_features))

    def _heads_first(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)


class CrossAttentionBlock(nn.Module):
    """x + attn(attn_norm(x), image), then x + mlp(mlp_norm(x)); the image features are not normalised.

    Initialised to the identity: what writes to the residual stream is 0.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        ffn_hidden_dim: int,
        norm_type: str = "rmsnorm",
        activation: str = "silu",
        *,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        sdpa_backend: str = "auto",
    ):
        super().__init__()
        self.attn_norm = build_norm(norm_type, dim, norm_eps)
        self.attn = CrossAttention(dim, n_heads, n_kv_heads, head_dim, sdpa_backend)
        self.mlp_norm = build_norm(norm_type, dim, norm_eps)
        self.mlp = build_mlp(dim, ffn_hidden_dim, activation)
        nn.init.zeros_(self.attn.o_proj.weight)
        nn.init.zeros_(self.mlp.get_submodule("down_proj").get_parameter("weight"))

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        image_features: Float[Tensor, "B N D"] | None,
        image_mask: Bool[Tensor, "B N"] | None = None,
        *,
        keys_values: tuple[Float[Tensor, "B K N h"], Float[Tensor, "B K N h"]] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """(B, S, D), (B, N, D) -> (B, S, D). Arguments as for `CrossAttention`."""
        x = x + self.attn(self.attn_norm(x), image_features, image_mask, keys_values=keys_values)
        return x + self.mlp(self.mlp_norm(x))


@registry.register("architecture", "cross_attention")
@dataclass(frozen=True)
class CrossAttentionArchitecture(Architecture):
    """The decoder with a block that reads the image after every n-th layer. Rows without an image skip
    it.
    """

    vlm_config: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)

    def __post_init__(self) -> None:
        if self.config.n_layers < self.every:
            raise ConfigError(
                [
                    f"vlm.cross_attention_every_n_layers = {self.every}: must be at most model.n_layers = "
                    f"{self.config.n_layers}, else no block sees the image"
                ]
            )

    @property
    def every(self) -> int:
        """Layers from one block to the next."""
        return self.vlm_config.cross_attention_every_n_layers

    def extra_modules(self) -> dict[str, nn.Module]:
        """The cross-attention blocks, then the final norm."""
        config = self.config
        heads, kv_heads = self.vlm_config.resolved_heads(config.n_heads)
        blocks = [
            CrossAttentionBlock(
                config.dim,
                heads,
                kv_heads,
                config.computed_ffn_hidden_dim,
                config.norm_type,
                config.activation,
                head_dim=self.vlm_config.resolved_head_dim(config),
                norm_eps=config.norm_eps,
                sdpa_backend=config.sdpa_backend,
            )
            for _ in range(config.n_layers // self.every)
        ]
        return {
            "cross_attention_layers": nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}),
            **super().extra_modules(),
        }

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``image_features``."""
        for name in ("prefix_embeds", "modality_ids"):
            if getattr(modality, name) is not None:
                raise ValueError(f"{name} is given: the architecture (cross_attention) takes image_features")

    def after_block(
        self, modules: Modules, layer_idx: int, x: Float[Tensor, "B S D"], modality: ModalityContext
    ) -> Float[Tensor, "B S D"]:
        """Block k fires after layer i if (i + 1) = (k + 1) * every; rows that may look at no image token skip it."""
        if (layer_idx + 1) % self.every != 0 or not modality.reads_image:
            return x
        index = (layer_idx + 1) // self.every - 1
        block = self._blocks(modules).get_submodule(str(index))
        if modality.image_keys_values is not None:
            out_BSD = block(x, None, modality.image_mask, keys_values=modality.image_keys_values[index])
        else:
            assert modality.image_features is not None
            out_BSD = block(x, modality.image_features.to(x.dtype), modality.image_mask)
        if modality.image_mask is None:
            return out_BSD
        return torch.where(modality.image_mask.any(dim=1)[:, None, None], out_BSD, x)

    @staticmethod
    def _blocks(modules: Modules) -> nn.Module:
        """The blocks by number."""
        blocks = modules["cross_attention_layers"]
        assert blocks is not None, "a stage that reads an image has cross-attention blocks"
        return blocks

    def precompute_image_kv(self, modules: Modules, modality: ModalityContext) -> ModalityContext:
        """The keys and values of all blocks, in place of the features."""
        assert modality.image_features is not None
        keys_values: tuple[tuple[Tensor, Tensor], ...] = ()
        for block in self._blocks(modules).children():
            attention = unwrap(unwrap(block).get_submodule("attn"))
            assert isinstance(attention, CrossAttention)
            keys_values += (attention.keys_values(modality.image_features),)
        return replace(modality, image_features=None, image_keys_values=keys_values)
