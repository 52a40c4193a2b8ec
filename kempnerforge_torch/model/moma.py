"""Mixture of modality-aware experts (Lin et al. 2024, arXiv:2407.21770): within each modality, experts choose tokens.

A choice depends on all tokens of the batch, later ones too: such a model can't generate token by token.

Shapes: B batch, S sequence, T = B * S tokens, D model dim, E experts of a modality, A = head_dim / 2
angles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Unpack

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.architecture import Architecture, RotaryTable
from kempnerforge_torch.model.attention import KVCache
from kempnerforge_torch.model.block import BlockOptions, build_attention
from kempnerforge_torch.model.expert_choice import ExpertChoiceMoE, ExpertChoiceSigmoidRouter
from kempnerforge_torch.model.layout import Layout, layout_of, stream_layout
from kempnerforge_torch.model.mask import Mask
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.noise import gumbel_noise
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.model.stats import BlockOutput, MoEStats, MoMaOutput, keep_stats
from kempnerforge_torch.registry import registry
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoMaConfig

__all__ = ["ExpertChoiceMoE", "ExpertChoiceSigmoidRouter", "MoMaArchitecture", "MoMaBlock", "MoMaFFN"]


class MoMaFFN(nn.Module):
    """A mixture of experts of each modality, ``experts`` by its name. A modality with no tokens costs nothing."""

    layer: Integer[Tensor, ""]

    def __init__(
        self,
        config: ModelConfig,
        modalities: Sequence[str],
        experts_per_modality: Mapping[str, int],
        capacity_factor_per_modality: Mapping[str, float],
        gumbel_noise: bool = True,
        *,
        layer_idx: int = 0,
    ):
        """
        Args:
            experts_per_modality: their number.
            capacity_factor_per_modality, gumbel_noise: as for the router.
            layer_idx: layers have different noise under one seed.
        """
        super().__init__()
        self.modalities = tuple(modalities)
        self.gumbel_noise = gumbel_noise
        self.layer_idx = layer_idx
        self.register_buffer("layer", torch.tensor(layer_idx, dtype=torch.int32), persistent=False)
        mixtures: dict[str, nn.Module] = {
            name: ExpertChoiceMoE(
                config.dim,
                config.computed_expert_ffn_hidden_dim,
                experts_per_modality[name],
                capacity_factor_per_modality[name],
                config.activation,
                gumbel_noise,
            )
            for name in self.modalities
        }
        self.experts = nn.ModuleDict(mixtures)

    def reset(self) -> None:
        """Set the layer's number (after `to_empty`): a tensor, nothing static, so that layers have one program."""
        self.layer.fill_(self.layer_idx)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        modality_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        noise_seed: Integer[Tensor, ""] | None = None,
        return_stats: bool = False,
    ) -> Float[Tensor, "B S D"] | MoMaOutput:
        """(B, S, D) -> (B, S, D).

        Args:
            modality_ids: int (B, S), the modality of each position, by index in ``modalities``.
            key_padding_mask: bool (B, S), False for padding, which no expert takes.
            layout: in place of ids, where it is known beforehand.
            noise_seed: int (); given, Gumbel noise moves the choices.
            return_stats: give a `MoMaOutput`, and leave the getters alone.

        Raises:
            ValueError: ids and masks of another dtype or shape. A position is NaN if its id names no modality.
        """
        layout = layout_of(self.modalities, modality_ids, x) if layout is None else layout
        outs, stats = self._by_span(x, layout, key_padding_mask, noise_seed)
        if layout.spans is None:
            out_BSD = layout.known(sum(outs.values(), torch.zeros_like(x)))
        else:
            out_BSD = torch.cat([outs[name] for name, _, _ in layout.spans], dim=1)
        if return_stats:
            return MoMaOutput(out_BSD, stats)
        keep_stats(self.experts, stats)
        return out_BSD

    def run(
        self,
        x: Float[Tensor, "B S D"],
        modality_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        *,
        layout: Layout | None = None,
        noise_seed: Integer[Tensor, ""] | None = None,
    ) -> MoMaOutput:
        """The result of a call, with the stats of each modality. Arguments as for `forward`; nothing is kept."""
        return self(x, modality_ids, key_padding_mask, layout=layout, noise_seed=noise_seed, return_stats=True)

    def _by_span(
        self, x: Tensor, layout: Layout, valid: Tensor | None, noise_seed: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, MoEStats]]:
        """The outputs of each modality's experts for its span, or for its positions in the whole stream, and their
        stats.
        """
        outs: dict[str, Tensor] = {}
        stats: dict[str, MoEStats] = {}
        if layout.spans is None:
            for name in self.modalities:
                members_BS = layout.of(name)
                valid_BS = members_BS if valid is None else members_BS & valid
                noise = self._noise(name, x, noise_seed)
                outs[name], stats[name] = self._experts(name)(x, valid_BS, noise, return_stats=True)
            return outs, stats
        for name, start, stop in layout.spans:
            noise = self._noise(name, x, noise_seed)
            outs[name], stats[name] = self._experts(name)(
                x[:, start:stop],
                None if valid is None else valid[:, start:stop],
                None if noise is None else noise[:, start:stop],
                return_stats=True,
            )
        return outs, stats

    def _experts(self, name: str) -> ExpertChoiceMoE:
        experts = self.experts[name]
        assert isinstance(experts, ExpertChoiceMoE)
        return experts

    def _noise(self, name: str, x_BSD: Tensor, seed: Tensor | None) -> Tensor | None:
        """(B, S, E): a number for each position of the whole stream, however the modalities lie in it."""
        if seed is None or not self.gumbel_noise:
            return None
        batch, length, _ = x_BSD.shape
        router = self._experts(name).router
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        group = self.modalities.index(name)
        noise_TE = gumbel_noise(seed, self.layer, group, batch * length, router.num_experts, dtype)
        return torch.unflatten(noise_TE, 0, (batch, length))


class MoMaBlock(nn.Module):
    """x + attention(attention_norm(x)), shared by all modalities; then x + mlp(mlp_norm(x)), by experts of each."""

    def __init__(
        self,
        config: ModelConfig,
        modalities: Sequence[str],
        experts_per_modality: Mapping[str, int],
        capacity_factor_per_modality: Mapping[str, float],
        gumbel_noise: bool,
        layer_idx: int,
    ):
        super().__init__()
        self.attention_norm = build_norm(config.norm_type, config.dim, config.norm_eps)
        self.attention = build_attention(config, layer_idx)
        self.mlp_norm = build_norm(config.norm_type, config.dim, config.norm_eps)
        self.mlp = MoMaFFN(
            config,
            modalities,
            experts_per_modality,
            capacity_factor_per_modality,
            gumbel_noise,
            layer_idx=layer_idx,
        )

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rope_cos: Float[Tensor, "... S A"],
        rope_sin: Float[Tensor, "... S A"],
        modality_ids: Integer[Tensor, "B S"] | None = None,
        *,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        layout: Layout | None = None,
        noise_seed: Integer[Tensor, ""] | None = None,
        kv_cache: None = None,
        mask: Mask | Bool[Tensor, "..."] | None = None,
        limit_capacity: bool = True,
        return_stats: bool = False,
    ) -> Float[Tensor, "B S D"] | BlockOutput:
        """(B, S, D) -> (B, S, D). Arguments as for `Attention` and `MoMaFFN`.

        Experts that choose tokens have a share of them and no other capacity: ``limit_capacity`` changes nothing.

        Args:
            return_stats: give a `BlockOutput`, and leave the getters alone.
        """
        x = x + self.attention(
            self.attention_norm(x), rope_cos, rope_sin, mask=mask, doc_ids=doc_ids, key_padding_mask=key_padding_mask
        )
        out_BSD, stats = self.mlp(
            self.mlp_norm(x), modality_ids, key_padding_mask, layout=layout, noise_seed=noise_seed, return_stats=True
        )
        if return_stats:
            return BlockOutput(x + out_BSD, stats)
        keep_stats(self.mlp, stats)
        return x + out_BSD

    def run(
        self,
        x: Float[Tensor, "B S D"],
        rope_cos: Float[Tensor, "... S A"],
        rope_sin: Float[Tensor, "... S A"],
        modality_ids: Integer[Tensor, "B S"] | None = None,
        *,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        layout: Layout | None = None,
        noise_seed: Integer[Tensor, ""] | None = None,
        **options: Unpack[BlockOptions],
    ) -> BlockOutput:
        """The result of a call, with the stats of each modality. Arguments as for `forward`; nothing is kept."""
        own = {"key_padding_mask": key_padding_mask, "layout": layout, "noise_seed": noise_seed}
        return self(x, rope_cos, rope_sin, modality_ids, **own, return_stats=True, **options)


@registry.register("architecture", "moma")
@dataclass(frozen=True)
class MoMaArchitecture(Architecture):
    """Blocks with experts of each modality. Without ``modality_ids`` a prefix is the image, and the rest is text."""

    vlm_config: MoMaConfig = field(default_factory=MoMaConfig)

    def build_block(self, layer_idx: int) -> nn.Module:
        """A `MoMaBlock`, which is also called with ``layout`` and ``noise_seed``."""
        return MoMaBlock(
            self.config,
            self.vlm_config.moma_modalities,
            self.vlm_config.moma_experts_per_modality,
            {name: self.vlm_config.effective_capacity_factor(name) for name in self.vlm_config.moma_modalities},
            self.vlm_config.moma_gumbel_noise,
            layer_idx,
        )

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``prefix_embeds``, or within ``inputs_embeds`` with ``modality_ids``."""
        if modality.reads_image:
            raise ValueError("image_features is given: the architecture (moma) takes prefix_embeds or modality_ids")

    def block_inputs(
        self,
        inputs: dict[str, object],
        x: Float[Tensor, "B S D"],
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
        rope: RotaryTable,
    ) -> dict[str, object]:
        """The layout, and the seed of the noise. Without a seed there is no noise."""
        if kv_caches is not None:
            raise ValueError(
                "kv_caches is given: the experts of moma choose among all tokens of the batch, later ones too, so it "
                "can't generate token by token; it needs causal routers first"
            )
        seed = modality.noise_seed if self.vlm_config.moma_gumbel_noise else None
        return {**inputs, "layout": stream_layout(self.vlm_config.moma_modalities, modality, x), "noise_seed": seed}
