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
from typing import Unpack

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.architecture import Architecture, Modules, RotaryTable
from kempnerforge_torch.model.attention import KVCache, attend, resolve_head_dim, self_attention_mask
from kempnerforge_torch.model.block import BlockOptions, build_feed_forward
from kempnerforge_torch.model.checks import check_positions
from kempnerforge_torch.model.layout import Layout, Rope, Streams, one_stream, positions_after, stream_layout
from kempnerforge_torch.model.linear import Linear
from kempnerforge_torch.model.mask import Mask
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.model.position import apply_rope
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.model.stats import BlockOutput, MoEStats, keep_stats
from kempnerforge_torch.registry import registry
from shared_config.contract.warm_start import warm_start_state
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoTConfig


class MoTAttention(nn.Module):
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
    ):
        """``image_n_kv_heads`` 0 means ``n_kv_heads``."""
        super().__init__()
        self.modalities = tuple(modalities)
        self.n_heads = n_heads
        self.sdpa_backend = sdpa_backend
        self.sliding_window = sliding_window
        self.kv_heads = {name: (name == "image" and image_n_kv_heads) or n_kv_heads for name in self.modalities}
        self.n_kv_heads = math.lcm(*self.kv_heads.values())
        (self.head_dim,) = {resolve_head_dim(dim, n_heads, count, head_dim) for count in self.kv_heads.values()}

        def projections(inputs: int, outputs: Mapping[str, int]) -> nn.ModuleDict:
            return nn.ModuleDict({name: Linear(inputs, outputs[name], bias=bias) for name in self.modalities})

        def norms() -> nn.ModuleDict | None:
            if not qk_norm:
                return None
            return nn.ModuleDict({name: build_norm(qk_norm_type, self.head_dim, norm_eps) for name in self.modalities})

        kv_widths = {name: count * self.head_dim for name, count in self.kv_heads.items()}
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
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        kv_cache: KVCache | None = None,
        mask: Mask | Bool[Tensor, "..."] | None = None,
        doc_ids: Integer[Tensor, "B S"] | None = None,
    ) -> Streams:
        """Streams (B, _S, D) of modalities, which attend as one sequence in the order of ``modalities`` -> the same;
        or, with ``layout``, one stream (B, S, D) -> the same.

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
        q_BHSh = apply_rope(q_BSHh.transpose(1, 2), rope_cos, rope_sin)
        k_BKMh = apply_rope(k_BSKh.transpose(1, 2), rope_cos, rope_sin)
        v_BKMh = v_BSKh.transpose(1, 2)
        if kv_cache is not None:
            kv_cache.after_image(layout.image_tokens)
            k_BKMh, v_BKMh = kv_cache.update(k_BKMh, v_BKMh, doc_ids=doc_ids, key_padding_mask=key_padding_mask)
            k_BKMh, v_BKMh = k_BKMh.to(x.dtype), v_BKMh.to(x.dtype)
        out_BHSh = attend(q_BHSh, k_BKMh, v_BKMh, mask, sdpa_backend=self.sdpa_backend)
        out_BSX = out_BHSh.transpose(1, 2).flatten(2)
        out_BSD = layout.apply(lambda name, part: self.o_proj[name](part), out_BSX)
        return layout.split(out_BSD) if by_modality else out_BSD

    def _heads(self, kind: str, name: str, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, H or K, h), by one modality's weights; K is common to all modalities."""
        x_BSKh = torch.unflatten(self.get_submodule(f"{kind}_proj.{name}")(x), -1, (-1, self.head_dim))
        if kind != "v" and self.q_norm is not None:
            x_BSKh = self.get_submodule(f"{kind}_norm.{name}")(x_BSKh)
        copies = 1 if kind == "q" else self.n_kv_heads // self.kv_heads[name]
        return x_BSKh if copies == 1 else x_BSKh.repeat_interleave(copies, dim=2)


class MoTBlock(nn.Module):
    """x + attn(attn_norm_m(x)), then x + mlp_m(mlp_norm_m(x)), m the modality of each position.

    Initialised to the identity where the feed-forward part is dense: what writes to the residual stream is 0.
    """

    def __init__(self, config: ModelConfig, modalities: Sequence[str], layer_idx: int, *, image_n_kv_heads: int = 0):
        super().__init__()
        self.modalities = tuple(modalities)
        self.is_moe = config.is_moe_layer(layer_idx)
        self.attn_norm = _norms(config, self.modalities)
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
        )
        self.mlp_norm = _norms(config, self.modalities)
        self.mlp = nn.ModuleDict({name: build_feed_forward(config, layer_idx) for name in self.modalities})
        for name in self.modalities:
            nn.init.zeros_(self.attn.get_parameter(f"o_proj.{name}.weight"))
            if not self.is_moe:
                nn.init.zeros_(self.mlp.get_parameter(f"{name}.down_proj.weight"))

    def forward(
        self,
        streams: Streams,
        rope: Mapping[str, Rope] | Rope,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        kv_cache: KVCache | None = None,
        mask: Mask | Bool[Tensor, "..."] | None = None,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        limit_capacity: bool = True,
        return_stats: bool = False,
    ) -> Streams | BlockOutput:
        """Streams of modalities -> the same, or one stream -> the same. Arguments as for `MoTAttention` and `MoEMLP`.

        Args:
            return_stats: give a `BlockOutput`, and leave the getters alone.
        """
        by_modality = layout is None
        x, rope, layout = one_stream(self.modalities, streams, rope, layout)
        x = x + self.attn(
            layout.apply(lambda name, part: self.attn_norm[name](part), x),
            rope,
            key_padding_mask=key_padding_mask,
            layout=layout,
            kv_cache=kv_cache,
            mask=mask,
            doc_ids=doc_ids,
        )
        normed = layout.apply(lambda name, part: self.mlp_norm[name](part), x)
        if self.is_moe:
            out, stats = self._route(normed, layout, key_padding_mask, limit_capacity)
        else:
            out, stats = layout.apply(lambda name, part: self.mlp[name](part), normed), None
        x = layout.split(x + out) if by_modality else x + out
        if return_stats:
            return BlockOutput(x, stats, kv_cache)
        keep_stats(self.mlp, stats)
        return x

    def run(
        self,
        streams: Streams,
        rope: Mapping[str, Rope] | Rope,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        **options: Unpack[BlockOptions],
    ) -> BlockOutput:
        """The result of a call, with the stats of its routers. Arguments as for `forward`; nothing is kept."""
        return self(streams, rope, key_padding_mask, layout=layout, return_stats=True, **options)

    def _route(
        self, x_BSD: Tensor, layout: Layout, valid: Tensor | None, limit_capacity: bool
    ) -> tuple[Tensor, dict[str, MoEStats]]:
        """The outputs and stats of each modality's experts. Capacity counts its positions in the batch, padding too."""
        outs, stats = {}, {}
        if layout.spans is None:
            for name in self.modalities:
                members_BS = layout.of(name)
                out, stats[name] = self.mlp[name](
                    x_BSD, valid, members=members_BS, limit_capacity=limit_capacity, return_stats=True
                )
                outs[name] = torch.where(members_BS[..., None], out, 0)
            return sum(outs.values(), torch.zeros_like(x_BSD)), stats
        for name, start, stop in layout.spans:
            valid_BS = None if valid is None else valid[:, start:stop]
            outs[name], stats[name] = self.mlp[name](
                x_BSD[:, start:stop], valid_BS, limit_capacity=limit_capacity, return_stats=True
            )
        return torch.cat([outs[name] for name, _, _ in layout.spans], dim=1), stats


@registry.register("architecture", "mot")
@dataclass(frozen=True)
class MoTArchitecture(Architecture):
    """Blocks and a final norm of each modality. Without ``modality_ids`` a prefix is the image, the rest is text."""

    vlm_config: MoTConfig = field(default_factory=MoTConfig)

    def build_block(self, layer_idx: int) -> nn.Module:
        """A `MoTBlock`, which is called with ``rope`` and ``layout``."""
        _, image_kv_heads = self.vlm_config.resolved_image_heads(self.config.n_heads, self.config.kv_heads)
        return MoTBlock(self.config, self.vlm_config.mot_modalities, layer_idx, image_n_kv_heads=image_kv_heads)

    def extra_modules(self) -> dict[str, nn.Module]:
        """The final norms."""
        return {"mot_norms": _norms(self.config, self.vlm_config.mot_modalities)}

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``prefix_embeds``, or within ``inputs_embeds`` with ``modality_ids``."""
        if modality.reads_image:
            raise ValueError("image_features is given: the architecture (mot) takes prefix_embeds or modality_ids")

    def block_inputs(
        self,
        inputs: dict[str, object],
        x: Float[Tensor, "B S D"],
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
        self, modules: Modules, x: Float[Tensor, "B S D"], modality: ModalityContext
    ) -> Float[Tensor, "B S D"]:
        """Each position by its modality's norm."""
        norms = modules["mot_norms"]
        if norms is None:
            return x
        layout = stream_layout(self.vlm_config.mot_modalities, modality, x)
        return layout.apply(lambda name, part: norms.get_submodule(name)(part), x)


def mot_warm_start_from_text_stack(transformer: nn.Module, source_state_dict: Mapping[str, object]) -> None:
    """Copy the weights of a text model into every modality.

    Args:
        source_state_dict: of a `Transformer` of the same config without images, or of a wrapper around one, as tensors
            or NumPy arrays.

    Raises:
        ValueError: a model without an architecture for images.
        UserError: listing every source tensor that is missing or misshapen, and every one that would go unused.
    """
    config, vlm = (getattr(transformer, name, None) for name in ("config", "vlm_config"))
    if config is None or vlm is None:
        raise ValueError(f"transformer.vlm_config = {vlm!r}: must be the config of a mixture of transformers")
    set_state(transformer, warm_start_state(config, vlm, source_state_dict))


def _norms(config: ModelConfig, modalities: Sequence[str]) -> nn.ModuleDict:
    """One of each modality."""
    return nn.ModuleDict({name: build_norm(config.norm_type, config.dim, config.norm_eps) for name in modalities})
