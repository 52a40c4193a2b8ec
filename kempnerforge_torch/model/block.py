"""A layer of the plain decoder: attention, then a feed-forward part, dense or a mixture of experts.

Shapes: B batch, S new tokens, D model dim, A = head_dim / 2 angles.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.attention import Attention, KVCache
from kempnerforge_torch.model.factors import scaled
from kempnerforge_torch.model.mask import Mask
from kempnerforge_torch.model.mlp import build_mlp
from kempnerforge_torch.model.moe import build_moe_layer
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.model.stats import BlockOutput, keep_stats
from shared_config.schema.model import ModelConfig


class BlockOptions(TypedDict, total=False):
    """Keyword arguments of every block: those of `Attention`, and ``limit_capacity`` of `MoEMLP`."""

    kv_cache: KVCache | None
    doc_ids: Integer[Tensor, "B S"] | None
    mask: Mask | Bool[Tensor, "..."] | None
    limit_capacity: bool


class TransformerBlock(nn.Module):
    """x + attention(attention_norm(x)), then x + mlp(mlp_norm(x)).

    With norms after, x + attention_post_norm(attention(x)), then x + mlp_post_norm(mlp(x)); or both. What is added is
    multiplied by ``residual_scale``.
    """

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.is_moe = config.is_moe_layer(layer_idx)
        self.residual_scale = config.residual_scale
        before, after = config.norm_placement != "after", config.norm_placement != "before"

        def norm(exists: bool) -> nn.Module | None:
            return build_norm(config.norm_type, config.dim, config.norm_eps) if exists else None

        self.attention_norm = norm(before)
        self.attention = build_attention(config, layer_idx)
        self.attention_post_norm = norm(after)
        self.mlp_norm = norm(before)
        self.mlp = build_feed_forward(config, layer_idx)
        self.mlp_post_norm = norm(after)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope_cos: Float[Tensor, "... S A"],
        rope_sin: Float[Tensor, "... S A"],
        *,
        kv_cache: KVCache | None = None,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        mask: Mask | Bool[Tensor, "..."] | None = None,
        limit_capacity: bool = True,
        return_stats: bool = False,
    ) -> Float[Tensor, "B S D"] | BlockOutput:
        """(B, S, D) -> (B, S, D). Arguments as for `Attention` and `MoEMLP`.

        Args:
            return_stats: give a `BlockOutput`, and leave the getters of the mixture alone.
        """
        out = self.attention(
            _normed(self.attention_norm, x),
            rope_cos,
            rope_sin,
            kv_cache=kv_cache,
            mask=mask,
            doc_ids=doc_ids,
            key_padding_mask=key_padding_mask,
        )
        x = self._added(x, _normed(self.attention_post_norm, out))
        normed_BSD = _normed(self.mlp_norm, x)
        if self.is_moe:
            out, stats = self.mlp(normed_BSD, valid=key_padding_mask, limit_capacity=limit_capacity, return_stats=True)
        else:
            out, stats = self.mlp(normed_BSD), None
        x = self._added(x, _normed(self.mlp_post_norm, out))
        if return_stats:
            return BlockOutput(x, stats, kv_cache)
        keep_stats(self.mlp, stats)
        return x

    def run(
        self,
        x: Float[Tensor, "B S D"],
        rope_cos: Float[Tensor, "... S A"],
        rope_sin: Float[Tensor, "... S A"],
        *,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        **options: Unpack[BlockOptions],
    ) -> BlockOutput:
        """The result of a call, with the stats of its router. Arguments as for `forward`; nothing is kept."""
        return self(x, rope_cos, rope_sin, key_padding_mask=key_padding_mask, return_stats=True, **options)

    def _added(self, x: Tensor, out: Tensor) -> Tensor:
        return x + scaled(out, self.residual_scale)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def build_attention(config: ModelConfig, layer_idx: int) -> Attention:
    """The self-attention of one layer."""
    return Attention(
        config.dim,
        config.n_heads,
        config.kv_heads,
        config.head_size,
        config.qk_norm,
        config.sdpa_backend,
        bias=config.attention_bias,
        output_bias=config.attention_bias and config.attention_output_bias,
        sliding_window=config.layer_windows[layer_idx],
        norm_eps=config.norm_eps,
        qk_norm_over=config.qk_norm_over,
        scale=config.score_scale,
        rotary=config.layer_rotates[layer_idx],
        softcap=config.attention_softcap,
        qk_norm_type=config.qk_norm_type,
    )


def build_feed_forward(config: ModelConfig, layer_idx: int) -> nn.Module:
    """The feed-forward part of a layer: dense, or a mixture of experts.

    A mixture is called as ``mlp(x, valid=..., limit_capacity=..., return_stats=True)`` and gives a `MoEOutput`.
    """
    if not config.is_moe_layer(layer_idx):
        return build_mlp(config.dim, config.computed_ffn_hidden_dim, config.activation, bias=config.mlp_bias)
    return build_moe_layer(config)
