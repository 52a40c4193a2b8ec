"""A layer of the plain decoder: attention, then a feed-forward part, dense or a mixture of experts.

Shapes: B batch, S new tokens, D model dim, A = head_dim / 2 angles.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

from flax import nnx
from jaxtyping import Array, Bool, Float, Integer

from kempnerforge_jax.model.attention import Attention, KVCache
from kempnerforge_jax.model.mask import Mask
from kempnerforge_jax.model.mlp import build_mlp
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.moe import build_moe_layer
from kempnerforge_jax.model.norm import build_norm
from kempnerforge_jax.model.stats import BlockOutput, keep_stats
from shared_config.schema.model import ModelConfig


class BlockOptions(TypedDict, total=False):
    """Keyword arguments of every block: those of `Attention`, and ``limit_capacity`` of `MoEMLP`."""

    kv_cache: KVCache | None
    doc_ids: Integer[Array, "B S"] | None
    mask: Mask | Bool[Array, "..."] | None
    limit_capacity: bool


class TransformerBlock(Module):
    """x + attention(attention_norm(x)), then x + mlp(mlp_norm(x))."""

    def __init__(self, config: ModelConfig, layer_idx: int, *, rngs: nnx.Rngs | None):
        self.is_moe = config.is_moe_layer(layer_idx)
        self.attention_norm = build_norm(config.norm_type, config.dim, config.norm_eps, rngs=rngs)
        self.attention = build_attention(config, rngs=rngs)
        self.mlp_norm = build_norm(config.norm_type, config.dim, config.norm_eps, rngs=rngs)
        self.mlp = build_feed_forward(config, layer_idx, rngs=rngs)

    def forward(
        self,
        x: Float[Array, "B S D"],
        rope_cos: Float[Array, "... S A"],
        rope_sin: Float[Array, "... S A"],
        *,
        kv_cache: KVCache | None = None,
        doc_ids: Integer[Array, "B S"] | None = None,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        mask: Mask | Bool[Array, "..."] | None = None,
        limit_capacity: bool = True,
        return_stats: bool = False,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], KVCache] | BlockOutput:
        """(B, S, D) -> (B, S, D); given a cache, -> ((B, S, D), new cache). Arguments as for `Attention` and `MoEMLP`.

        Args:
            return_stats: give a `BlockOutput`, and leave the getters of the mixture alone.
        """
        out = self.attention(
            self.attention_norm(x),
            rope_cos,
            rope_sin,
            kv_cache=kv_cache,
            mask=mask,
            doc_ids=doc_ids,
            key_padding_mask=key_padding_mask,
        )
        out, updated = (out, None) if kv_cache is None else out
        x = x + out
        if self.is_moe:
            out, stats = self.mlp(
                self.mlp_norm(x), valid=key_padding_mask, limit_capacity=limit_capacity, return_stats=True
            )
        else:
            out, stats = self.mlp(self.mlp_norm(x)), None
        if return_stats:
            return BlockOutput(x + out, stats, updated)
        keep_stats(self.mlp, stats)
        return x + out if updated is None else (x + out, updated)

    def run(
        self,
        x: Float[Array, "B S D"],
        rope_cos: Float[Array, "... S A"],
        rope_sin: Float[Array, "... S A"],
        *,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        **options: Unpack[BlockOptions],
    ) -> BlockOutput:
        """The result of a call, with the stats of its router. Arguments as for `forward`; nothing is kept."""
        return self(x, rope_cos, rope_sin, key_padding_mask=key_padding_mask, return_stats=True, **options)


def build_attention(config: ModelConfig, *, rngs: nnx.Rngs | None) -> Attention:
    """The self-attention of one layer."""
    return Attention(
        config.dim,
        config.n_heads,
        config.kv_heads,
        config.head_size,
        config.qk_norm,
        config.sdpa_backend,
        bias=config.attention_bias,
        sliding_window=config.sliding_window,
        norm_eps=config.norm_eps,
        rngs=rngs,
    )


def build_feed_forward(config: ModelConfig, layer_idx: int, *, rngs: nnx.Rngs | None) -> Module:
    """The feed-forward part of a layer: dense, or a mixture of experts.

    A mixture is called as ``mlp(x, valid=..., limit_capacity=..., return_stats=True)`` and gives a `MoEOutput`.
    """
    if not config.is_moe_layer(layer_idx):
        return build_mlp(config.dim, config.computed_ffn_hidden_dim, config.activation, rngs=rngs)
    return build_moe_layer(config, rngs=rngs)
