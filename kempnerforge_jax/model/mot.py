"""Mixture of transformers (Liang et al. 2024, arXiv:2411.04996): own weights for each modality, one joint attention.

Shapes: B batch, S positions of the residual stream, M keys, D model dim, H query heads, K key/value heads, h head_dim.

    sequence    image image image text text text
    position      0     1     2     0    1    2       rotary positions count within a modality
    attention   causal in the order of the sequence, across modalities
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Integer

from kempnerforge_jax.model.architecture import Architecture, Modules, RotaryTable
from kempnerforge_jax.model.attention import KVCache, attend, resolve_head_dim, self_attention_mask
from kempnerforge_jax.model.block import BlockOptions, build_feed_forward
from kempnerforge_jax.model.checks import check_positions
from kempnerforge_jax.model.layout import Layout, Rope, Streams, one_stream, positions_after, stream_layout
from kempnerforge_jax.model.linear import Linear, silence
from kempnerforge_jax.model.mask import Mask
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.norm import build_norm
from kempnerforge_jax.model.position import apply_rope
from kempnerforge_jax.model.state import set_state
from kempnerforge_jax.model.stats import BlockOutput, MoEStats, keep_stats
from kempnerforge_jax.registry import registry
from shared_config.contract.warm_start import warm_start_state
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoTConfig


class MoTAttention(Module):
    """Each modality's own projections; one causal attention over all of them.

    Query head i of a token reads head i // (H / K) of a key, K being the key/value heads of the key's modality.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        modalities: Sequence[str],
        head_dim: int | None = None,
        qk_norm: bool = False,
        sdpa_backend: str = "auto",
        *,
        bias: bool = False,
        sliding_window: int | None = None,
        norm_eps: float = 1e-5,
        image_n_kv_heads: int = 0,
        qk_norm_type: str = "rmsnorm",
        rngs: nnx.Rngs | None,
    ):
        """``image_n_kv_heads`` 0 means ``n_kv_heads``."""
        self.modalities = tuple(modalities)
        self.n_heads = n_heads
        self.sdpa_backend = sdpa_backend
        self.sliding_window = sliding_window
        kv_heads = {name: (name == "image" and image_n_kv_heads) or n_kv_heads for name in self.modalities}
        self.n_kv_heads = math.lcm(*kv_heads.values())
        (self.head_dim,) = {resolve_head_dim(dim, n_heads, count, head_dim) for count in kv_heads.values()}

        def projections(inputs: int, outputs: Mapping[str, int]) -> nnx.Dict[Linear]:
            return nnx.Dict({name: Linear(inputs, outputs[name], bias, rngs=rngs) for name in self.modalities})

        def norms() -> nnx.Dict[Module] | None:
            built = {name: build_norm(qk_norm_type, self.head_dim, norm_eps, rngs=rngs) for name in self.modalities}
            return nnx.Dict(built) if qk_norm else None

        kv_widths = {name: count * self.head_dim for name, count in kv_heads.items()}
        self.q_proj = projections(dim, dict.fromkeys(self.modalities, n_heads * self.head_dim))
        self.k_proj = projections(dim, kv_widths)
        self.v_proj = projections(dim, kv_widths)
        self.o_proj = projections(n_heads * self.head_dim, dict.fromkeys(self.modalities, dim))
        self.q_norm, self.k_norm = norms(), norms()

    def forward(
        self,
        streams: Streams,
        rope: Mapping[str, Rope] | Rope,
        is_causal: bool = True,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        kv_cache: KVCache | None = None,
        mask: Mask | Bool[Array, "..."] | None = None,
        doc_ids: Integer[Array, "B S"] | None = None,
    ) -> Streams | tuple[Streams, KVCache | None]:
        """Streams (B, _S, D) of modalities, which attend as one sequence in the order of ``modalities`` -> the same;
        or, with ``layout``, one stream (B, S, D) -> the same; given a cache, -> (that, new cache).

        Args:
            rope: of the positions within each modality; with ``layout`` one pair for the whole stream.
            is_causal: False: a position also sees those after it.
            key_padding_mask: bool (B, S), of the whole sequence, True where a position is real.
            layout: which modality each position of one stream has.
            kv_cache, mask, doc_ids: as for `Attention`; over the whole sequence, which is causal then.

        Raises:
            ValueError: modalities that don't exist or have no rotary tables; masks of another dtype or shape.
        """
        by_modality = layout is None
        x, (rope_cos, rope_sin), layout = one_stream(self.modalities, streams, rope, layout)
        check_positions(x.shape[:2], doc_ids, key_padding_mask)
        if not is_causal:
            mask = Mask(key_valid=key_padding_mask)
        elif mask is None:
            mask = self_attention_mask(
                x.shape[1],
                kv_cache=kv_cache,
                doc_ids=doc_ids,
                key_padding_mask=key_padding_mask,
                sliding_window=self.sliding_window,
            )
        q_BSHh, k_BSKh, v_BSKh = (
            layout.apply(lambda name, part, kind=kind: self._heads(kind, name, part), x) for kind in ("q", "k", "v")
        )
        q_BHSh = apply_rope(q_BSHh.swapaxes(1, 2), rope_cos, rope_sin)
        k_BKMh = apply_rope(k_BSKh.swapaxes(1, 2), rope_cos, rope_sin)
        v_BKMh = v_BSKh.swapaxes(1, 2)
        updated = None
        if kv_cache is not None:
            updated, k_BKMh, v_BKMh = kv_cache.update(
                k_BKMh, v_BKMh, doc_ids=doc_ids, key_padding_mask=key_padding_mask
            )
            updated = updated.after_image(layout.image_tokens)
            k_BKMh, v_BKMh = k_BKMh.astype(x.dtype), v_BKMh.astype(x.dtype)
        out_BHSh = attend(q_BHSh, k_BKMh, v_BKMh, mask)
        out_BSX = out_BHSh.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        out_BSD = layout.apply(lambda name, part: self.o_proj[name](part), out_BSX)
        if kv_cache is not None:
            past_end_BS = kv_cache.positions(x.shape[1]) >= kv_cache.max_seq_len
            out_BSD = jnp.where(past_end_BS[..., None], jnp.nan, out_BSD)
        out = layout.split(out_BSD) if by_modality else out_BSD
        return out if kv_cache is None else (out, updated)

    def _heads(self, kind: str, name: str, x: jax.Array) -> jax.Array:
        """(B, S, D) -> (B, S, H or K, h), by one modality's weights; K is common to all modalities."""
        x_BSKh = getattr(self, f"{kind}_proj")[name](x).reshape(*x.shape[:2], -1, self.head_dim)
        if kind != "v" and self.q_norm is not None:
            x_BSKh = getattr(self, f"{kind}_norm")[name](x_BSKh)
        copies = 1 if kind == "q" else self.n_kv_heads // x_BSKh.shape[2]
        return x_BSKh if copies == 1 else _repeated(x_BSKh, copies)


class MoTBlock(Module):
    """x + attn(attn_norm_m(x)), then x + mlp_m(mlp_norm_m(x)), m the modality of each position.

    Initialised to the identity where the feed-forward part is dense: what writes to the residual stream is 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        modalities: Sequence[str],
        layer_idx: int,
        *,
        image_n_kv_heads: int = 0,
        rngs: nnx.Rngs | None,
    ):
        self.modalities = tuple(modalities)
        self.is_moe = config.is_moe_layer(layer_idx)
        self.attn_norm = _norms(config, self.modalities, rngs=rngs)
        self.attn = MoTAttention(
            config.dim,
            config.n_heads,
            config.kv_heads,
            self.modalities,
            config.head_size,
            config.qk_norm,
            config.sdpa_backend,
            bias=config.attention_bias,
            sliding_window=config.sliding_window,
            norm_eps=config.norm_eps,
            image_n_kv_heads=image_n_kv_heads,
            qk_norm_type=config.qk_norm_type,
            rngs=rngs,
        )
        self.mlp_norm = _norms(config, self.modalities, rngs=rngs)
        feed_forwards: Any = nnx.Dict({m: build_feed_forward(config, layer_idx, rngs=rngs) for m in self.modalities})
        self.mlp: nnx.Dict[Module] = feed_forwards
        for name in self.modalities:
            silence(self.attn.o_proj[name])
            if not self.is_moe:
                silence(feed_forwards[name].down_proj)

    def forward(
        self,
        streams: Streams,
        rope: Mapping[str, Rope] | Rope,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        kv_cache: KVCache | None = None,
        mask: Mask | Bool[Array, "..."] | None = None,
        doc_ids: Integer[Array, "B S"] | None = None,
        limit_capacity: bool = True,
        return_stats: bool = False,
    ) -> Streams | tuple[Streams, KVCache] | BlockOutput:
        """Streams of modalities -> the same, or one stream -> the same; given a cache, -> (that, new cache).

        Arguments as for `MoTAttention` and `MoEMLP`.

        Args:
            return_stats: give a `BlockOutput`, and leave the getters alone.
        """
        by_modality = layout is None
        x, rope, layout = one_stream(self.modalities, streams, rope, layout)
        out = self.attn(
            layout.apply(lambda name, part: self.attn_norm[name](part), x),
            rope,
            key_padding_mask=key_padding_mask,
            layout=layout,
            kv_cache=kv_cache,
            mask=mask,
            doc_ids=doc_ids,
        )
        out, updated = (out, None) if kv_cache is None else out
        x = x + out
        normed = layout.apply(lambda name, part: self.mlp_norm[name](part), x)
        if self.is_moe:
            out, stats = self._route(normed, layout, key_padding_mask, limit_capacity)
        else:
            out, stats = layout.apply(lambda name, part: self.mlp[name](part), normed), None
        x = layout.split(x + out) if by_modality else x + out
        if return_stats:
            return BlockOutput(x, stats, updated)
        keep_stats(self.mlp, stats)
        return x if updated is None else (x, updated)

    def run(
        self,
        streams: Streams,
        rope: Mapping[str, Rope] | Rope,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        **options: Unpack[BlockOptions],
    ) -> BlockOutput:
        """The result of a call, with the stats of its routers. Arguments as for `forward`; nothing is kept."""
        return self(streams, rope, key_padding_mask, layout=layout, return_stats=True, **options)

    def _route(
        self, x_BSD: jax.Array, layout: Layout, valid: jax.Array | None, limit_capacity: bool
    ) -> tuple[jax.Array, dict[str, MoEStats]]:
        """The outputs and stats of each modality's experts. Capacity counts its positions in the batch, padding too."""
        outs, stats = {}, {}
        if layout.spans is None:
            for name in self.modalities:
                members_BS = layout.of(name)
                out, stats[name] = self.mlp[name](
                    x_BSD, valid, members=members_BS, limit_capacity=limit_capacity, return_stats=True
                )
                outs[name] = jnp.where(members_BS[..., None], out, 0)
            return sum(outs.values(), jnp.zeros_like(x_BSD)), stats
        for name, start, stop in layout.spans:
            valid_BS = None if valid is None else valid[:, start:stop]
            outs[name], stats[name] = self.mlp[name](
                x_BSD[:, start:stop], valid_BS, limit_capacity=limit_capacity, return_stats=True
            )
        return jnp.concatenate([outs[name] for name, _, _ in layout.spans], axis=1), stats


@registry.register("architecture", "mot")
@dataclass(frozen=True)
class MoTArchitecture(Architecture):
    """Blocks and a final norm of each modality. Without ``modality_ids`` a prefix is the image, the rest is text."""

    vlm_config: MoTConfig = field(default_factory=MoTConfig)

    def build_block(self, layer_idx: int, *, rngs: nnx.Rngs | None) -> Module:
        """A `MoTBlock`, which is called with ``rope`` and ``layout``."""
        _, image_kv_heads = self.vlm_config.resolved_image_heads(self.config.n_heads, self.config.kv_heads)
        return MoTBlock(
            self.config, self.vlm_config.mot_modalities, layer_idx, image_n_kv_heads=image_kv_heads, rngs=rngs
        )

    def extra_modules(self, *, rngs: nnx.Rngs | None) -> dict[str, nnx.Module]:
        """The final norms."""
        return {"mot_norms": _norms(self.config, self.vlm_config.mot_modalities, rngs=rngs)}

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``prefix_embeds``, or within ``inputs_embeds`` with ``modality_ids``."""
        if modality.reads_image:
            raise ValueError("image_features is given: the architecture (mot) takes prefix_embeds or modality_ids")

    def block_inputs(
        self,
        inputs: dict[str, object],
        x: Float[Array, "B S D"],
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
        rope: RotaryTable,
    ) -> dict[str, object]:
        """Rotary tables of the positions within a modality, and the layout."""
        layout = stream_layout(self.vlm_config.mot_modalities, modality, x)
        positions = layout.positions(x)
        if kv_caches is not None:
            positions = positions_after(kv_caches[0], modality, positions)
        shared = {name: value for name, value in inputs.items() if name not in ("rope_cos", "rope_sin")}
        return {**shared, "rope": rope(positions, x.dtype), "layout": layout}

    def final_norm(
        self, modules: Modules, x: Float[Array, "B S D"], modality: ModalityContext
    ) -> Float[Array, "B S D"]:
        """Each position by its modality's norm."""
        norms = modules["mot_norms"]
        if norms is None:
            return x
        assert isinstance(norms, nnx.Dict)
        layout = stream_layout(self.vlm_config.mot_modalities, modality, x)
        return layout.apply(lambda name, part: norms[name](part), x)


def mot_warm_start_from_text_stack(transformer: nnx.Module, source_state_dict: Mapping[str, object]) -> None:
    """Copy the weights of a text model into every modality.

    Args:
        source_state_dict: of a `Transformer` of the same config without images, or of a wrapper around one, as JAX or
            NumPy arrays.

    Raises:
        ValueError: a model without an architecture for images.
        UserError: listing every source tensor that is missing or misshapen, and every one that would go unused.
    """
    config, vlm = (getattr(transformer, name, None) for name in ("config", "vlm_config"))
    if config is None or vlm is None:
        raise ValueError(f"transformer.vlm_config = {vlm!r}: must be the config of a mixture of transformers")
    set_state(transformer, warm_start_state(config, vlm, source_state_dict))


def _repeated(x_BSKh: jax.Array, copies: int) -> jax.Array:
    """Each head several times over; gradients of its copies are summed in at least float32."""
    wide_BSKh = x_BSKh.astype(jnp.promote_types(x_BSKh.dtype, jnp.float32))
    return jnp.repeat(wide_BSKh, copies, axis=2).astype(x_BSKh.dtype)


def _norms(config: ModelConfig, modalities: Sequence[str], *, rngs: nnx.Rngs | None) -> nnx.Dict[Module]:
    """One of each modality."""
    return nnx.Dict({name: build_norm(config.norm_type, config.dim, config.norm_eps, rngs=rngs) for name in modalities})
