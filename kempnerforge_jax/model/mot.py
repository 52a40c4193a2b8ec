"""Mixture of transformers (Liang et al. 2024, arXiv:2411.04996): own weights for each modality, one joint attention.

Shapes: B batch, S positions of the residual stream, M keys, D model dim, H query heads, K key/value heads, h head_dim.

    sequence    image image image text text text
    position      0     1     2     0    1    2       rotary positions count within a modality
    attention   causal in the order of the sequence, across modalities
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kempnerforge_jax.model.attention import KVCache, attend, resolve_head_dim, self_attention_mask
from kempnerforge_jax.model.checks import check_ids, check_positions, check_shape, nan_outside
from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.norm import RMSNorm, build_norm
from kempnerforge_jax.model.position import apply_rope
from kempnerforge_jax.model.state import set_state
from kempnerforge_jax.model.transformer import Architecture, Transformer, build_feed_forward
from kempnerforge_jax.registry import registry
from shared_config.contract.warm_start import warm_start_state
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoTConfig

Span = tuple[str, int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """Which positions of the residual stream belong to which modality: spans known beforehand, or ids by position.

    Attributes:
        modalities: names, by index.
        spans: (modality, start, stop) in the order of the sequence; empty ones count. None where ids say it.
        ids: int (B, S), index into the modalities.
    """

    modalities: tuple[str, ...]
    spans: tuple[Span, ...] | None = None
    ids: jax.Array | None = None

    def apply(self, function: Callable[[str, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """``function(modality, x)``, each position by its own modality: (B, S, ...) -> (B, S, ...).

        Spans cost what one modality costs; ids cost every modality at every position.
        """
        if self.spans is not None:
            spans = [span for span in self.spans if span[1] < span[2]]
            return jnp.concatenate([function(name, x[:, start:stop]) for name, start, stop in spans], axis=1)
        first, *others = self.modalities
        out = function(first, x)
        for name in others:
            theirs = function(name, x)
            out = jnp.where(self.of(name, x).reshape(*x.shape[:2], *[1] * (theirs.ndim - 2)), theirs, out)
        return self.known(out)

    def known(self, x: jax.Array) -> jax.Array:
        """``x`` (B, S, ...), NaN where the id names no modality."""
        return x if self.ids is None else nan_outside(x, self.ids, len(self.modalities))

    def of(self, modality: str, x: jax.Array) -> jax.Array:
        """bool (B, S): the positions of one modality in ``x`` (B, S, ...)."""
        if self.spans is None:
            assert self.ids is not None
            return self.ids == self.modalities.index(modality)
        places_S = jnp.arange(x.shape[1])
        mine_S = jnp.zeros_like(places_S, dtype=bool)
        for name, start, stop in self.spans:
            if name == modality:
                mine_S = mine_S | ((places_S >= start) & (places_S < stop))
        return jnp.broadcast_to(mine_S, x.shape[:2])

    @property
    def image_tokens(self) -> int:
        """How many of the first positions are known to be an image's."""
        return max((stop for name, start, stop in self.spans or () if name == "image" and start == 0), default=0)

    def positions(self, x: jax.Array) -> jax.Array:
        """How many earlier positions have the same modality: (S,), or (B, S) where rows differ."""
        if self.spans is not None:
            return jnp.concatenate([jnp.arange(stop - start, dtype=jnp.int32) for _, start, stop in self.spans])
        counts = [(self.of(name, x).cumsum(axis=1, dtype=jnp.int32) - 1, self.of(name, x)) for name in self.modalities]
        return sum((jnp.where(mine, count, 0) for count, mine in counts), jnp.zeros_like(counts[0][0]))


def stream_layout(modalities: Sequence[str], modality: ModalityContext, x: jax.Array) -> Layout:
    """The layout of ``x`` (B, S, D): by ``modality_ids`` if given, else a prefix of the image and then text.

    Raises:
        ValueError: ids of another shape, not integers, or outside the modalities. Where values can't be seen, such a
            position becomes NaN.
    """
    names, length = tuple(modalities), x.shape[1]
    if modality.modality_ids is not None:
        check_shape("modality_ids", modality.modality_ids, x.shape[:2])
        check_ids("modality_ids", modality.modality_ids, len(names))
        return Layout(names, ids=modality.modality_ids)
    prefix = 0 if modality.prefix_embeds is None else modality.prefix_embeds.shape[1]
    return Layout(names, spans=(("image", 0, prefix), ("text", prefix, length)))


class MoTAttention(Module):
    """Each modality's own projections; one causal attention over all of them.

    Query head i of a token reads head i // (H / K) of a key, K being the key/value heads of the key's modality.
    """

    def __init__(
        self,
        config: ModelConfig,
        modalities: Sequence[str],
        image_n_kv_heads: int = 0,
        *,
        rngs: nnx.Rngs,
    ):
        """``image_n_kv_heads`` 0 means those of the text."""
        dim, heads = config.dim, config.n_heads
        self.modalities = tuple(modalities)
        self.n_heads = heads
        self.head_dim = config.head_size
        self.sliding_window = config.sliding_window
        kv_heads = {name: (name == "image" and image_n_kv_heads) or config.kv_heads for name in self.modalities}
        self.n_kv_heads = math.lcm(*kv_heads.values())
        for number in kv_heads.values():
            resolve_head_dim(dim, heads, number, config.head_dim)

        def projections(inputs: int, outputs: Mapping[str, int]) -> nnx.Dict[Any]:
            bias = config.attention_bias
            return nnx.Dict({name: Linear(inputs, outputs[name], bias, rngs=rngs) for name in self.modalities})

        def norms() -> nnx.Dict[Any] | None:
            if not config.qk_norm:
                return None
            return nnx.Dict({name: RMSNorm(self.head_dim, config.norm_eps, rngs=rngs) for name in self.modalities})

        kv_widths = {name: number * self.head_dim for name, number in kv_heads.items()}
        self.q_proj = projections(dim, dict.fromkeys(self.modalities, heads * self.head_dim))
        self.k_proj = projections(dim, kv_widths)
        self.v_proj = projections(dim, kv_widths)
        self.o_proj = projections(heads * self.head_dim, dict.fromkeys(self.modalities, dim))
        self.q_norm = norms()
        self.k_norm = norms()

    def forward(
        self,
        x: jax.Array,
        rope_cos: jax.Array,
        rope_sin: jax.Array,
        *,
        layout: Layout,
        kv_cache: KVCache | None = None,
        mask: jax.Array | None = None,
        doc_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
    ) -> Any:
        """(B, S, D) -> (B, S, D); given a cache, -> ((B, S, D), new cache).

        Rotary tables are those of the positions within a modality; else as `Attention`.
        """
        check_positions(x.shape[:2], doc_ids, key_padding_mask)
        if mask is None:
            mask = self_attention_mask(
                x.shape[1],
                kv_cache=kv_cache,
                doc_ids=doc_ids,
                key_padding_mask=key_padding_mask,
                sliding_window=self.sliding_window,
            )
        q_BSHh, k_BSKh, v_BSKh = (
            layout.apply(lambda name, part, to=to: self._heads(to, name, part), x) for to in ("q", "k", "v")
        )
        q_BHSh = apply_rope(q_BSHh.swapaxes(1, 2), rope_cos, rope_sin)
        k_BKMh = apply_rope(k_BSKh.swapaxes(1, 2), rope_cos, rope_sin)
        v_BKMh = v_BSKh.swapaxes(1, 2)
        updated = None
        if kv_cache is not None:
            updated, k_BKMh, v_BKMh = kv_cache.update(
                k_BKMh, v_BKMh, doc_ids=doc_ids, key_padding_mask=key_padding_mask
            )
            updated = updated.after_image(max(kv_cache.image_tokens, layout.image_tokens))
            k_BKMh, v_BKMh = k_BKMh.astype(x.dtype), v_BKMh.astype(x.dtype)
        out_BHSh = attend(q_BHSh, k_BKMh, v_BKMh, mask)
        out_BSX = out_BHSh.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        out_BSD = layout.apply(lambda name, part: self.o_proj[name](part), out_BSX)
        if kv_cache is None:
            return out_BSD
        past_end_BS = kv_cache.positions(x.shape[1]) >= kv_cache.max_seq_len
        return jnp.where(past_end_BS[..., None], jnp.nan, out_BSD), updated

    def _heads(self, to: str, name: str, x: jax.Array) -> jax.Array:
        """(B, S, D) -> (B, S, H or K, h), by one modality's weights; K is common to all modalities."""
        x_BSKh = getattr(self, f"{to}_proj")[name](x).reshape(*x.shape[:2], -1, self.head_dim)
        if to != "v" and self.q_norm is not None:
            x_BSKh = getattr(self, f"{to}_norm")[name](x_BSKh)
        copies = 1 if to == "q" else self.n_kv_heads // x_BSKh.shape[2]
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
        rngs: nnx.Rngs,
    ):
        self.modalities = tuple(modalities)
        self.is_moe = config.is_moe_layer(layer_idx)

        def norms() -> nnx.Dict[Any]:
            return nnx.Dict(
                {name: build_norm(config.norm_type, config.dim, config.norm_eps, rngs=rngs) for name in self.modalities}
            )

        self.attn_norm = norms()
        self.attn = MoTAttention(config, self.modalities, image_n_kv_heads, rngs=rngs)
        self.mlp_norm = norms()
        self.mlp: nnx.Dict[Any] = nnx.Dict(
            {name: build_feed_forward(config, layer_idx, rngs=rngs) for name in self.modalities}
        )
        for name in self.modalities:
            _silence(self.attn.o_proj[name])
            if not self.is_moe:
                _silence(self.mlp[name].down_proj)

    def forward(
        self,
        x: jax.Array,
        rope_cos: jax.Array,
        rope_sin: jax.Array,
        *,
        layout: Layout,
        kv_cache: KVCache | None = None,
        mask: jax.Array | None = None,
        doc_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        limit_capacity: bool = True,
    ) -> Any:
        """(B, S, D) -> (B, S, D) and, with experts, the stats of each modality's router, by name; given a cache, also
        the new cache.
        """
        out = self.attn(
            layout.apply(lambda name, part: self.attn_norm[name](part), x),
            rope_cos,
            rope_sin,
            layout=layout,
            kv_cache=kv_cache,
            mask=mask,
            doc_ids=doc_ids,
            key_padding_mask=key_padding_mask,
        )
        out, updated = (out, None) if kv_cache is None else out
        x = x + out
        normed = layout.apply(lambda name, part: self.mlp_norm[name](part), x)
        stats: dict[str, Any] | None = None
        if not self.is_moe:
            out = layout.apply(lambda name, part: self.mlp[name](part), normed)
        else:
            out, stats = self._route(normed, layout, key_padding_mask, limit_capacity)
        x = x + out
        return (x, stats) if kv_cache is None else (x, stats, updated)

    def _route(
        self, x_BSD: jax.Array, layout: Layout, valid: jax.Array | None, limit_capacity: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """What the experts of each modality make of its tokens, and their stats, by name. Capacity is that of the
        modality's positions in the batch, padding included.
        """
        outs, stats = {}, {}
        if layout.spans is None:
            for name in self.modalities:
                mine_BS = layout.of(name, x_BSD)
                out, stats[name] = self.mlp[name](
                    x_BSD, valid, members=mine_BS, limit_capacity=limit_capacity, return_stats=True
                )
                outs[name] = jnp.where(mine_BS[..., None], out, 0)
            return sum(outs.values(), jnp.zeros_like(x_BSD)), stats
        for name, start, stop in layout.spans:
            own = None if valid is None else valid[:, start:stop]
            outs[name], stats[name] = self.mlp[name](
                x_BSD[:, start:stop], own, limit_capacity=limit_capacity, return_stats=True
            )
        return jnp.concatenate([outs[name] for name, _, _ in layout.spans], axis=1), stats


@registry.register("architecture", "mot")
@dataclass(frozen=True)
class MoTArchitecture(Architecture):
    """Blocks and a final norm of each modality. Without ``modality_ids`` a prefix is the image, the rest is text."""

    @property
    def mot(self) -> MoTConfig:
        """The config."""
        assert isinstance(self.vlm_config, MoTConfig)
        return self.vlm_config

    def build_block(self, layer_idx: int, *, rngs: nnx.Rngs) -> Module:
        """A `MoTBlock`, which is also called with ``layout``."""
        _, image_kv_heads = self.mot.resolved_image_heads(self.config.n_heads, self.config.kv_heads)
        return MoTBlock(self.config, self.mot.mot_modalities, layer_idx, image_n_kv_heads=image_kv_heads, rngs=rngs)

    def extra_modules(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """The final norms."""
        config = self.config
        norms = {
            name: build_norm(config.norm_type, config.dim, config.norm_eps, rngs=rngs)
            for name in self.mot.mot_modalities
        }
        return {"mot_norms": nnx.Dict(norms)}

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``prefix_embeds``, or within ``inputs_embeds`` with ``modality_ids``."""
        if modality.reads_image:
            raise ValueError("image_features is given: the architecture (mot) takes prefix_embeds or modality_ids")

    def block_inputs(
        self,
        model: Transformer,
        inputs: dict[str, Any],
        x: jax.Array,
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
    ) -> dict[str, Any]:
        """Rotary tables of the positions within a modality, and the layout."""
        layout = stream_layout(self.mot.mot_modalities, modality, x)
        positions = layout.positions(x)
        if kv_caches is not None:
            positions = _positions_after(kv_caches[0], modality, positions)
        rope_cos, rope_sin = model.rope(positions, x.dtype)
        return {**inputs, "rope_cos": rope_cos, "rope_sin": rope_sin, "layout": layout}

    def final_norm(self, model: Transformer, x: jax.Array, modality: ModalityContext) -> jax.Array:
        """Each position by its modality's norm."""
        layout = stream_layout(self.mot.mot_modalities, modality, x)
        norms: Any = getattr(model, "mot_norms")  # noqa: B009
        return layout.apply(lambda name, part: norms[name](part), x)


def mot_warm_start_from_text_stack(transformer: Transformer, source_state_dict: Mapping[str, Any]) -> None:
    """Copy the weights of a text model into every modality.

    Args:
        source_state_dict: of a `Transformer` of the same config without images, or of a wrapper around one, as JAX or
            NumPy arrays.

    Raises:
        UserError: listing every source tensor that is missing or misshapen, and every one that would go unused.
    """
    assert isinstance(transformer.vlm_config, MoTConfig)
    set_state(transformer, warm_start_state(transformer.config, transformer.vlm_config, source_state_dict))


def _positions_after(kv_cache: KVCache, modality: ModalityContext, positions: jax.Array) -> jax.Array:
    """An image comes first, into empty caches; text goes on where the cached text ended."""
    if modality.modality_ids is not None:
        raise ValueError("modality_ids is given: with kv_caches the image must come as prefix_embeds")
    if modality.prefix_embeds is not None:
        return positions
    return kv_cache.positions(len(positions)) - kv_cache.image_tokens


def _repeated(x_BSKh: jax.Array, copies: int) -> jax.Array:
    """Each head several times over; gradients of its copies are summed in at least float32."""
    wide_BSKh = x_BSKh.astype(jnp.promote_types(x_BSKh.dtype, jnp.float32))
    return jnp.repeat(wide_BSKh, copies, axis=2).astype(x_BSKh.dtype)


def _silence(linear: Any) -> None:
    linear.weight.set_value(jnp.zeros_like(linear.weight.get_value()))
