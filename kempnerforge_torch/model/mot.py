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

import torch
from torch import Tensor, nn

from kempnerforge_torch.model.attention import KVCache, attend, resolve_head_dim, self_attention_mask
from kempnerforge_torch.model.checks import check_ids, check_positions, check_shape, nan_outside
from kempnerforge_torch.model.matvec import Linear
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.norm import RMSNorm, build_norm
from kempnerforge_torch.model.position import apply_rope
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.model.transformer import Architecture, Transformer, build_feed_forward
from kempnerforge_torch.registry import registry
from shared_config.contract.warm_start import warm_start_state
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoTConfig

Span = tuple[str, int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """Which positions of the residual stream belong to which modality: spans known beforehand, or ids by position.

    Attributes:
        modalities: names, by index.
        spans: (modality, start, stop) in the order of the sequence; empty ones count, so that every weight has a
            gradient. None where ids say it.
        ids: int (B, S), index into the modalities.
    """

    modalities: tuple[str, ...]
    spans: tuple[Span, ...] | None = None
    ids: Tensor | None = None

    def apply(self, function: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(modality, x)``, each position by its own modality: (B, S, ...) -> (B, S, ...).

        Spans cost what one modality costs; ids cost every modality at every position.
        """
        if self.spans is not None:
            spans = [span for span in self.spans if span[1] < span[2] or torch.is_grad_enabled()]
            return torch.cat([function(name, x[:, start:stop]) for name, start, stop in spans], dim=1)
        first, *others = self.modalities
        out = function(first, x)
        for name in others:
            theirs = function(name, x)
            out = torch.where(self.of(name, x).reshape(*x.shape[:2], *[1] * (theirs.ndim - 2)), theirs, out)
        return self.known(out)

    def known(self, x: Tensor) -> Tensor:
        """``x`` (B, S, ...), NaN where the id names no modality."""
        return x if self.ids is None else nan_outside(x, self.ids, len(self.modalities))

    def of(self, modality: str, x: Tensor) -> Tensor:
        """bool (B, S): the positions of one modality in ``x`` (B, S, ...)."""
        if self.spans is None:
            assert self.ids is not None
            return self.ids == self.modalities.index(modality)
        places_S = torch.arange(x.shape[1], device=x.device)
        mine_S = torch.zeros_like(places_S, dtype=torch.bool)
        for name, start, stop in self.spans:
            if name == modality:
                mine_S = mine_S | ((places_S >= start) & (places_S < stop))
        return mine_S.expand(x.shape[:2])

    @property
    def image_tokens(self) -> int:
        """How many of the first positions are known to be an image's."""
        return max([0, *(stop for name, start, stop in self.spans or () if name == "image" and start == 0)])

    def positions(self, x: Tensor) -> Tensor:
        """How many earlier positions have the same modality: (S,), or (B, S) where rows differ."""
        if self.spans is not None:
            return torch.cat([torch.arange(stop - start, device=x.device) for _, start, stop in self.spans])
        counts = [(self.of(name, x).cumsum(dim=1) - 1, self.of(name, x)) for name in self.modalities]
        return sum((torch.where(mine, count, 0) for count, mine in counts), torch.zeros_like(counts[0][0]))


def stream_layout(modalities: Sequence[str], modality: ModalityContext, x: Tensor) -> Layout:
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


class MoTAttention(nn.Module):
    """Each modality's own projections; one causal attention over all of them.

    Query head i of a token reads head i // (H / K) of a key, K being the key/value heads of the key's modality.
    """

    def __init__(
        self,
        config: ModelConfig,
        modalities: Sequence[str],
        image_n_kv_heads: int = 0,
    ):
        """``image_n_kv_heads`` 0 means those of the text."""
        super().__init__()
        dim, heads = config.dim, config.n_heads
        self.modalities = tuple(modalities)
        self.n_heads = heads
        self.head_dim = config.head_size
        self.sdpa_backend = config.sdpa_backend
        self.sliding_window = config.sliding_window
        self.kv_heads = {name: (name == "image" and image_n_kv_heads) or config.kv_heads for name in self.modalities}
        self.n_kv_heads = math.lcm(*self.kv_heads.values())
        for kv_heads in self.kv_heads.values():
            resolve_head_dim(dim, heads, kv_heads, config.head_dim)

        def projections(inputs: int, outputs: Mapping[str, int]) -> nn.ModuleDict:
            bias = config.attention_bias
            return nn.ModuleDict({name: Linear(inputs, outputs[name], bias=bias) for name in self.modalities})

        def norms() -> nn.ModuleDict | None:
            if not config.qk_norm:
                return None
            return nn.ModuleDict({name: RMSNorm(self.head_dim, config.norm_eps) for name in self.modalities})

        kv_widths = {name: kv_heads * self.head_dim for name, kv_heads in self.kv_heads.items()}
        self.q_proj = projections(dim, dict.fromkeys(self.modalities, heads * self.head_dim))
        self.k_proj = projections(dim, kv_widths)
        self.v_proj = projections(dim, kv_widths)
        self.o_proj = projections(heads * self.head_dim, dict.fromkeys(self.modalities, dim))
        self.q_norm = norms()
        self.k_norm = norms()

    def forward(
        self,
        x: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        *,
        layout: Layout,
        kv_cache: KVCache | None = None,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D). Rotary tables are those of the positions within a modality; else as `Attention`."""
        check_positions(x.shape[:2], doc_ids, key_padding_mask)
        if mask is None:
            mask = self_attention_mask(
                x.shape[1],
                kv_cache=kv_cache,
                doc_ids=doc_ids,
                key_padding_mask=key_padding_mask,
                sliding_window=self.sliding_window,
                device=x.device,
            )
        q_BSHh, k_BSKh, v_BSKh = (
            layout.apply(lambda name, part, to=to: self._heads(to, name, part), x) for to in ("q", "k", "v")
        )
        q_BHSh = apply_rope(q_BSHh.transpose(1, 2), rope_cos, rope_sin)
        k_BKMh = apply_rope(k_BSKh.transpose(1, 2), rope_cos, rope_sin)
        v_BKMh = v_BSKh.transpose(1, 2)
        if kv_cache is not None:
            kv_cache.image_tokens = max(kv_cache.image_tokens, layout.image_tokens)
            k_BKMh, v_BKMh = kv_cache.update(k_BKMh, v_BKMh, doc_ids=doc_ids, key_padding_mask=key_padding_mask)
            k_BKMh, v_BKMh = k_BKMh.to(x.dtype), v_BKMh.to(x.dtype)
        out_BHSh = attend(q_BHSh, k_BKMh, v_BKMh, mask, sdpa_backend=self.sdpa_backend)
        return layout.apply(lambda name, part: self.o_proj[name](part), out_BHSh.transpose(1, 2).flatten(2))

    def _heads(self, to: str, name: str, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, H or K, h), by one modality's weights; K is common to all modalities."""
        x_BSKh = self.get_submodule(f"{to}_proj.{name}")(x).unflatten(-1, (-1, self.head_dim))
        if to != "v" and self.q_norm is not None:
            x_BSKh = self.get_submodule(f"{to}_norm.{name}")(x_BSKh)
        copies = 1 if to == "q" else self.n_kv_heads // self.kv_heads[name]
        return x_BSKh if copies == 1 else x_BSKh.repeat_interleave(copies, dim=2)


class MoTBlock(nn.Module):
    """x + attn(attn_norm_m(x)), then x + mlp_m(mlp_norm_m(x)), m the modality of each position.

    Initialised to the identity where the feed-forward part is dense: what writes to the residual stream is 0.
    """

    def __init__(self, config: ModelConfig, modalities: Sequence[str], layer_idx: int, *, image_n_kv_heads: int = 0):
        super().__init__()
        self.modalities = tuple(modalities)
        self.is_moe = config.is_moe_layer(layer_idx)

        def norms() -> nn.ModuleDict:
            return nn.ModuleDict(
                {name: build_norm(config.norm_type, config.dim, config.norm_eps) for name in self.modalities}
            )

        self.attn_norm = norms()
        self.attn = MoTAttention(config, self.modalities, image_n_kv_heads)
        self.mlp_norm = norms()
        self.mlp = nn.ModuleDict({name: build_feed_forward(config, layer_idx) for name in self.modalities})
        for name in self.modalities:
            nn.init.zeros_(self.attn.get_parameter(f"o_proj.{name}.weight"))
            if not self.is_moe:
                nn.init.zeros_(self.mlp.get_parameter(f"{name}.down_proj.weight"))

    def forward(
        self,
        x: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        *,
        layout: Layout,
        kv_cache: KVCache | None = None,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        limit_capacity: bool = True,
    ) -> tuple[Tensor, Any]:
        """(B, S, D) -> (B, S, D) and, with experts, the stats of each modality's router, by name."""
        x = x + self.attn(
            layout.apply(lambda name, part: self.attn_norm[name](part), x),
            rope_cos,
            rope_sin,
            layout=layout,
            kv_cache=kv_cache,
            mask=mask,
            doc_ids=doc_ids,
            key_padding_mask=key_padding_mask,
        )
        normed = layout.apply(lambda name, part: self.mlp_norm[name](part), x)
        if not self.is_moe:
            return x + layout.apply(lambda name, part: self.mlp[name](part), normed), None
        out, stats = self._route(normed, layout, key_padding_mask, limit_capacity)
        return x + out, stats

    def _route(
        self, x_BSD: Tensor, layout: Layout, valid: Tensor | None, limit_capacity: bool
    ) -> tuple[Tensor, dict[str, Any]]:
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
                outs[name] = torch.where(mine_BS[..., None], out, 0)
            return sum(outs.values(), torch.zeros_like(x_BSD)), stats
        for name, start, stop in layout.spans:
            own = None if valid is None else valid[:, start:stop]
            outs[name], stats[name] = self.mlp[name](
                x_BSD[:, start:stop], own, limit_capacity=limit_capacity, return_stats=True
            )
        return torch.cat([outs[name] for name, _, _ in layout.spans], dim=1), stats


@registry.register("architecture", "mot")
@dataclass(frozen=True)
class MoTArchitecture(Architecture):
    """Blocks and a final norm of each modality. Without ``modality_ids`` a prefix is the image, the rest is text."""

    @property
    def mot(self) -> MoTConfig:
        """The config."""
        assert isinstance(self.vlm_config, MoTConfig)
        return self.vlm_config

    def build_block(self, layer_idx: int) -> nn.Module:
        """A `MoTBlock`, which is also called with ``layout``."""
        _, image_kv_heads = self.mot.resolved_image_heads(self.config.n_heads, self.config.kv_heads)
        return MoTBlock(self.config, self.mot.mot_modalities, layer_idx, image_n_kv_heads=image_kv_heads)

    def extra_modules(self) -> dict[str, nn.Module]:
        """The final norms."""
        config = self.config
        norms = {name: build_norm(config.norm_type, config.dim, config.norm_eps) for name in self.mot.mot_modalities}
        return {"mot_norms": nn.ModuleDict(norms)}

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``prefix_embeds``, or within ``inputs_embeds`` with ``modality_ids``."""
        if modality.reads_image:
            raise ValueError("image_features is given: the architecture (mot) takes prefix_embeds or modality_ids")

    def block_inputs(
        self,
        model: Transformer,
        inputs: dict[str, Any],
        x: Tensor,
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

    def final_norm(self, model: Transformer, x: Tensor, modality: ModalityContext) -> Tensor:
        """Each position by its modality's norm."""
        layout = stream_layout(self.mot.mot_modalities, modality, x)
        return layout.apply(lambda name, part: model.get_submodule(f"mot_norms.{name}")(part), x)


def mot_warm_start_from_text_stack(transformer: Transformer, source_state_dict: Mapping[str, Any]) -> None:
    """Copy the weights of a text model into every modality.

    Args:
        source_state_dict: of a `Transformer` of the same config without images, or of a wrapper around one, as tensors
            or NumPy arrays.

    Raises:
        UserError: listing every source tensor that is missing or misshapen, and every one that would go unused.
    """
    assert isinstance(transformer.vlm_config, MoTConfig)
    set_state(transformer, warm_start_state(transformer.config, transformer.vlm_config, source_state_dict))


def _positions_after(kv_cache: KVCache, modality: ModalityContext, positions: Tensor) -> Tensor:
    """An image comes first, into empty caches; text goes on where the cached text ended."""
    if modality.modality_ids is not None:
        raise ValueError("modality_ids is given: with kv_caches the image must come as prefix_embeds")
    if modality.prefix_embeds is not None:
        return positions
    return kv_cache.positions(len(positions)) - kv_cache.image_tokens
