"""Mixture of modality-aware experts (Lin et al. 2024, arXiv:2407.21770): within each modality, experts choose tokens.

    scores of 6 text tokens, 2 experts, each takes its ceil(6 / 2) = 3 best
    expert 0    .9*  .2   .7*  .1   .8*  .3      a token may be taken by several experts, or by none
    expert 1    .6*  .5*  .1   .1   .7*  .2

A choice depends on all tokens of the batch, later ones too: such a model can't generate token by token.

Shapes: B batch, S sequence, T = B * S tokens, D model dim, E experts of a modality, C tokens that an expert may take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge_torch.model.attention import KVCache
from kempnerforge_torch.model.checks import check_ids, check_mask, check_shape, nan_outside
from kempnerforge_torch.model.mlp import build_mlp
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.moe import MoEStats
from kempnerforge_torch.model.mot import Layout, stream_layout
from kempnerforge_torch.model.noise import gumbel_noise
from kempnerforge_torch.model.norm import build_norm
from kempnerforge_torch.model.router import SCORE_EPS, Gate
from kempnerforge_torch.model.transformer import Architecture, Transformer, build_attention
from kempnerforge_torch.registry import registry
from shared_config.contract.capacity import choice_capacity, choice_share
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoMaConfig

MAX_SEED = 2**31 - 1


class ExpertChoiceSigmoidRouter(nn.Module):
    """Each expert takes the tokens with its highest sigmoid(logit), the lowest index among equals (Zhou et al. 2022,
    arXiv:2202.09368).
    """

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.gate = Gate(dim, num_experts)

    def forward(
        self, x_TD: Tensor, room: int, taken: Tensor | int, valid: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            room: C, the most that an expert may take.
            taken: how many it does take, at most C.
            valid: bool (T,), False for tokens that no expert may take.
            noise: (T, E), added to the logits for the choice alone.

        Returns:
            weights: (C, E) scores of the tokens that each expert takes, in at least float32, and 0 beyond ``taken``.
            tokens: (C, E) these tokens, best first; beyond ``taken`` they mean nothing.
            scores: (T, E) of all tokens.
        """
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        ranked_TE = (scores_TE if noise is None else (logits_TE + noise).sigmoid()).detach()
        if valid is not None:
            ranked_TE = ranked_TE.masked_fill(~valid[:, None], -1)
        tokens_CE = ranked_TE.sort(dim=0, descending=True, stable=True).indices[:room]
        is_taken_C1 = (torch.arange(room, device=x_TD.device) < taken)[:, None]
        return scores_TE.gather(0, tokens_CE) * is_taken_C1, tokens_CE, scores_TE

    @staticmethod
    def taking(output: tuple[Tensor, Tensor, Tensor], tokens_CE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the call that gave ``output`` would have given, had the experts chosen ``tokens_CE``.

        Raises:
            ValueError: choices of another shape, or of tokens that don't exist. Inside a trace these weigh NaN.
        """
        weights_CE, own_CE, scores_TE = output
        check_shape("tokens_CE", tokens_CE, own_CE.shape)
        check_ids("tokens_CE", tokens_CE, len(scores_TE))
        taken_CE = scores_TE.gather(0, tokens_CE) * (weights_CE != 0)
        return nan_outside(taken_CE, tokens_CE, len(scores_TE)), tokens_CE, scores_TE


class ExpertChoiceMoE(nn.Module):
    """y_t = sum over the experts that take token t of score * expert(x_t); 0 for a token that none takes."""

    def __init__(self, router: ExpertChoiceSigmoidRouter, experts: Sequence[nn.Module], capacity_factor: float = 0.0):
        """An expert takes ceil(capacity_factor * tokens); factor 0 means 1 / experts."""
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(experts)
        self.share = choice_share(len(experts), capacity_factor)

    def forward(
        self, x_BSD: Tensor, valid: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, MoEStats]:
        """(B, S, D) -> (B, S, D), and what was counted: there are no losses; dropped are the tokens that none takes.

        Args:
            valid: bool (B, S), the tokens that take part; None means all.
            noise: (B, S, E), see the router.

        Raises:
            ValueError: a mask of another dtype or shape.
        """
        if valid is not None:
            check_mask("valid", valid, x_BSD.shape[:2])
        x_TD = x_BSD.flatten(0, 1)
        valid_T = None if valid is None else valid.flatten()
        count = x_TD.shape[0] if valid_T is None else valid_T.sum()
        room, taken = choice_capacity(x_TD.shape[0], self.share), choice_capacity(count, self.share)
        noise_TE = None if noise is None else noise.flatten(0, 1)
        weights_CE, tokens_CE, scores_TE = self.router(x_TD, room, taken, valid_T, noise_TE)
        y_TD = torch.zeros(x_TD.shape, dtype=weights_CE.dtype, device=x_TD.device)
        for index, expert in enumerate(self.experts):
            tokens_C, weights_C1 = tokens_CE[:, index], weights_CE[:, index, None]
            y_TD = y_TD.index_add(0, tokens_C, weights_C1 * expert(x_TD[tokens_C]).to(weights_C1.dtype))
        return y_TD.to(x_BSD.dtype).reshape(x_BSD.shape), _stats(tokens_CE, scores_TE.detach(), taken, valid_T)


class MoMaFFN(nn.Module):
    """A mixture of experts of each modality, ``experts`` by its name. A modality with no tokens costs nothing."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        experts_per_modality: Mapping[str, int],
        activation: str = "silu",
        capacity_factor: float = 0.0,
        layer_idx: int = 0,
    ):
        super().__init__()
        self.modalities = tuple(experts_per_modality)
        self.layer_idx = layer_idx
        mixtures: dict[str, nn.Module] = {}
        for name, number in experts_per_modality.items():
            experts = [build_mlp(dim, hidden_dim, activation) for _ in range(number)]
            router = ExpertChoiceSigmoidRouter(dim, number)
            mixtures[name] = ExpertChoiceMoE(router, experts, capacity_factor)
        self.experts = nn.ModuleDict(mixtures)

    def forward(
        self,
        x_BSD: Tensor,
        layout: Layout,
        valid: Tensor | None = None,
        noise_seed: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, MoEStats]]:
        """(B, S, D) -> (B, S, D), and the stats of each modality.

        Args:
            valid: bool (B, S), False for padding, which no expert takes.
            noise_seed: int (); given, Gumbel noise moves the choices.
        """
        if layout.spans is None:
            outs, stats = {}, {}
            for name in self.modalities:
                mine_BS = layout.of(name, x_BSD)
                valid_BS = mine_BS if valid is None else mine_BS & valid
                outs[name], stats[name] = self._experts(name)(x_BSD, valid_BS, self._noise(name, x_BSD, noise_seed))
            return layout.known(sum(outs.values(), torch.zeros_like(x_BSD))), stats
        outs, stats = {}, {}
        for name, start, stop in layout.spans:
            noise = self._noise(name, x_BSD, noise_seed)
            outs[name], stats[name] = self._experts(name)(
                x_BSD[:, start:stop],
                None if valid is None else valid[:, start:stop],
                None if noise is None else noise[:, start:stop],
            )
        return torch.cat([outs[name] for name, _, _ in layout.spans], dim=1), stats

    def _experts(self, name: str) -> ExpertChoiceMoE:
        experts = self.experts[name]
        assert isinstance(experts, ExpertChoiceMoE)
        return experts

    def _noise(self, name: str, x_BSD: Tensor, seed: Tensor | None) -> Tensor | None:
        """(B, S, E): a number for each position of the whole stream, however the modalities lie in it."""
        if seed is None:
            return None
        batch, length, _ = x_BSD.shape
        router = self._experts(name).router
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        group = self.modalities.index(name)
        noise_TE = gumbel_noise(seed, self.layer_idx, group, batch * length, router.num_experts, dtype)
        return noise_TE.unflatten(0, (batch, length))


class MoMaBlock(nn.Module):
    """x + attention(attention_norm(x)), shared by all modalities; then x + mlp(mlp_norm(x)), by experts of each."""

    def __init__(self, config: ModelConfig, vlm: MoMaConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = build_norm(config.norm_type, config.dim, config.norm_eps)
        self.attention = build_attention(config)
        self.mlp_norm = build_norm(config.norm_type, config.dim, config.norm_eps)
        self.mlp = MoMaFFN(
            config.dim,
            config.computed_expert_ffn_hidden_dim,
            {name: vlm.moma_experts_per_modality[name] for name in vlm.moma_modalities},
            config.activation,
            vlm.moma_capacity_factor,
            layer_idx,
        )

    def forward(
        self,
        x: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        *,
        layout: Layout,
        noise_seed: Tensor | None = None,
        kv_cache: None = None,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        limit_capacity: bool = True,
    ) -> tuple[Tensor, dict[str, MoEStats]]:
        """(B, S, D) -> (B, S, D) and the stats of each modality. Arguments as for `Attention` and `MoMaFFN`.

        Experts that choose tokens have a share of them and no other capacity: ``limit_capacity`` changes nothing.
        """
        x = x + self.attention(
            self.attention_norm(x), rope_cos, rope_sin, mask=mask, doc_ids=doc_ids, key_padding_mask=key_padding_mask
        )
        out, stats = self.mlp(self.mlp_norm(x), layout, key_padding_mask, noise_seed)
        return x + out, stats


@registry.register("architecture", "moma")
@dataclass(frozen=True)
class MoMaArchitecture(Architecture):
    """Blocks with experts of each modality. Without ``modality_ids`` a prefix is the image, and the rest is text."""

    @property
    def moma(self) -> MoMaConfig:
        """The config."""
        assert isinstance(self.vlm_config, MoMaConfig)
        return self.vlm_config

    def build_block(self, layer_idx: int) -> nn.Module:
        """A `MoMaBlock`, which is also called with ``layout`` and ``noise_seed``."""
        return MoMaBlock(self.config, self.moma, layer_idx)

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``prefix_embeds``, or within ``inputs_embeds`` with ``modality_ids``."""
        if modality.reads_image:
            raise ValueError("image_features is given: the architecture (moma) takes prefix_embeds or modality_ids")

    def block_inputs(
        self,
        model: Transformer,
        inputs: dict[str, Any],
        x: Tensor,
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
    ) -> dict[str, Any]:
        """The layout, and in training mode the seed of the noise, drawn where none is given."""
        if kv_caches is not None:
            raise ValueError(
                "kv_caches is given: the experts of moma choose among all tokens of the batch, later ones too, so it "
                "can't generate token by token; it needs causal routers first"
            )
        seed = modality.noise_seed
        if not self.moma.moma_gumbel_noise:
            seed = None
        elif seed is None and model.training:
            seed = torch.randint(MAX_SEED, (), device=x.device)
        return {**inputs, "layout": stream_layout(self.moma.moma_modalities, modality, x), "noise_seed": seed}


def _stats(tokens_CE: Tensor, scores_TE: Tensor, taken: Tensor | int, valid: Tensor | None) -> MoEStats:
    """What one mixture counted; entropy is that of a token's scores over the experts, as shares."""
    tokens, experts = scores_TE.shape
    valid_T = torch.ones(tokens, dtype=torch.bool, device=scores_TE.device) if valid is None else valid
    zero = scores_TE.new_zeros(())
    counts_E = torch.as_tensor(taken, device=scores_TE.device).to(torch.int32).expand(experts)
    is_taken_CE = (torch.arange(len(tokens_CE), device=scores_TE.device) < taken)[:, None].expand(tokens_CE.shape)
    hits_T = torch.zeros(tokens, dtype=torch.int32, device=scores_TE.device)
    hits_T = hits_T.index_add(0, tokens_CE.flatten(), is_taken_CE.flatten().to(torch.int32))
    shares_TE = scores_TE / (scores_TE.sum(dim=1, keepdim=True) + SCORE_EPS)
    entropy_T = torch.special.entr(shares_TE).sum(dim=1).masked_fill(~valid_T, 0)
    return MoEStats(
        aux_loss=zero,
        z_loss=zero,
        expert_counts=counts_E,
        entropy=entropy_T.sum() / valid_T.sum().clamp(min=1),
        dropped=(valid_T & (hits_T == 0)).sum(dtype=torch.int32),
    )
