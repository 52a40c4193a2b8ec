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

import jax
import jax.numpy as jnp
from flax import nnx

from kempnerforge_jax.model.attention import KVCache
from kempnerforge_jax.model.checks import check_ids, check_mask, check_shape, nan_outside
from kempnerforge_jax.model.mlp import build_mlp
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.module import Module, Numbered, Table
from kempnerforge_jax.model.moe import MoEStats
from kempnerforge_jax.model.mot import Layout, stream_layout
from kempnerforge_jax.model.noise import gumbel_noise
from kempnerforge_jax.model.norm import build_norm
from kempnerforge_jax.model.router import SCORE_EPS, Gate
from kempnerforge_jax.model.transformer import Architecture, Transformer, build_attention
from kempnerforge_jax.registry import registry
from shared_config.contract.capacity import choice_capacity, choice_share
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import MoMaConfig


class ExpertChoiceSigmoidRouter(Module):
    """Each expert takes the tokens with its highest sigmoid(logit), the lowest index among equals (Zhou et al. 2022,
    arXiv:2202.09368).
    """

    def __init__(self, dim: int, num_experts: int, *, rngs: nnx.Rngs):
        self.num_experts = num_experts
        self.gate = Gate(dim, num_experts, rngs=rngs)

    def forward(
        self,
        x_TD: jax.Array,
        room: int,
        taken: jax.Array | int,
        valid: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """
        Args:
            room: C, the most that an expert may take; static.
            taken: how many it does take, at most C.
            valid: bool (T,), False for tokens that no expert may take.
            noise: (T, E), added to the logits for the choice alone.

        Returns:
            weights: (C, E) scores of the tokens that each expert takes, in at least float32, and 0 beyond ``taken``.
            tokens: (C, E) these tokens, best first; beyond ``taken`` they mean nothing.
            scores: (T, E) of all tokens.
        """
        logits_TE = self.gate(x_TD)
        scores_TE = jax.nn.sigmoid(logits_TE)
        ranked_TE = jax.lax.stop_gradient(scores_TE if noise is None else jax.nn.sigmoid(logits_TE + noise))
        if valid is not None:
            ranked_TE = jnp.where(valid[:, None], ranked_TE, -1)
        tokens_CE = jnp.argsort(ranked_TE, axis=0, descending=True, stable=True)[:room]
        is_taken_C1 = (jnp.arange(room) < taken)[:, None]
        weights_CE = jnp.take_along_axis(scores_TE, tokens_CE, axis=0) * is_taken_C1
        return weights_CE, tokens_CE, scores_TE

    @staticmethod
    def taking(
        output: tuple[jax.Array, jax.Array, jax.Array], tokens_CE: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the call that gave ``output`` would have given, had the experts chosen ``tokens_CE``.

        Raises:
            ValueError: choices of another shape, or of tokens that don't exist. Inside a trace these weigh NaN.
        """
        weights_CE, own_CE, scores_TE = output
        check_shape("tokens_CE", tokens_CE, own_CE.shape)
        check_ids("tokens_CE", tokens_CE, len(scores_TE))
        taken_CE = jnp.take_along_axis(scores_TE, tokens_CE, axis=0) * (weights_CE != 0)
        return nan_outside(taken_CE, tokens_CE, len(scores_TE)), tokens_CE, scores_TE


class ExpertChoiceMoE(Module):
    """y_t = sum over the experts that take token t of score * expert(x_t); 0 for a token that none takes."""

    def __init__(self, router: ExpertChoiceSigmoidRouter, experts: Sequence[Module], capacity_factor: float = 0.0):
        """An expert takes ceil(capacity_factor * tokens); factor 0 means 1 / experts."""
        self.router = router
        self.experts: nnx.Dict[Any] = Numbered({str(i): expert for i, expert in enumerate(experts)})
        self.share = choice_share(len(experts), capacity_factor)

    def forward(
        self, x_BSD: jax.Array, valid: jax.Array | None = None, noise: jax.Array | None = None
    ) -> tuple[jax.Array, MoEStats]:
        """(B, S, D) -> (B, S, D), and what was counted: there are no losses; dropped are the tokens that none takes.

        Args:
            valid: bool (B, S), the tokens that take part; None means all.
            noise: (B, S, E), see the router.

        Raises:
            ValueError: a mask of another dtype or shape.
        """
        if valid is not None:
            check_mask("valid", valid, x_BSD.shape[:2])
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        valid_T = None if valid is None else valid.ravel()
        count = x_TD.shape[0] if valid_T is None else valid_T.sum(dtype=jnp.int32)
        room, taken = choice_capacity(x_TD.shape[0], self.share), choice_capacity(count, self.share)
        noise_TE = None if noise is None else noise.reshape(-1, noise.shape[-1])
        weights_CE, tokens_CE, scores_TE = self.router(x_TD, room, taken, valid_T, noise_TE)
        y_TD = jnp.zeros(x_TD.shape, weights_CE.dtype)
        for index, expert in enumerate(self.experts.values()):
            tokens_C, weights_C1 = tokens_CE[:, index], weights_CE[:, index, None]
            rows_CD = x_TD.at[tokens_C].get(unique_indices=True)
            out_CD = weights_C1 * expert(rows_CD).astype(weights_C1.dtype)
            y_TD = y_TD.at[tokens_C].add(out_CD, unique_indices=True)
        stats = _stats(tokens_CE, jax.lax.stop_gradient(scores_TE), taken, valid_T)
        return y_TD.astype(x_BSD.dtype).reshape(x_BSD.shape), stats


class MoMaFFN(Module):
    """A mixture of experts of each modality, ``experts`` by its name. A modality with no tokens costs nothing."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        experts_per_modality: Mapping[str, int],
        activation: str = "silu",
        capacity_factor: float = 0.0,
        layer_idx: int = 0,
        *,
        rngs: nnx.Rngs,
    ):
        self.modalities = tuple(experts_per_modality)
        self.layer = Table(jnp.asarray(layer_idx, jnp.int32))
        mixtures: dict[str, Module] = {}
        for name, number in experts_per_modality.items():
            experts = [build_mlp(dim, hidden_dim, activation, rngs=rngs) for _ in range(number)]
            router = ExpertChoiceSigmoidRouter(dim, number, rngs=rngs)
            mixtures[name] = ExpertChoiceMoE(router, experts, capacity_factor)
        self.experts: nnx.Dict[Any] = nnx.Dict(mixtures)

    def set_layer(self, layer_idx: int) -> None:
        """Set the layer's number: an array, nothing static, so that layers have one structure and can be stacked."""
        self.layer.set_value(jnp.asarray(layer_idx, jnp.int32))

    def forward(
        self,
        x_BSD: jax.Array,
        layout: Layout,
        valid: jax.Array | None = None,
        noise_seed: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, MoEStats]]:
        """(B, S, D) -> (B, S, D), and the stats of each modality.

        Args:
            valid: bool (B, S), False for padding, which no expert takes.
            noise_seed: int (); given, Gumbel noise moves the choices.
        """
        outs: dict[str, jax.Array] = {}
        stats: dict[str, MoEStats] = {}
        if layout.spans is None:
            for name in self.modalities:
                mine_BS = layout.of(name, x_BSD)
                valid_BS = mine_BS if valid is None else mine_BS & valid
                outs[name], stats[name] = self._experts(name)(x_BSD, valid_BS, self._noise(name, x_BSD, noise_seed))
            return layout.known(sum(outs.values(), jnp.zeros_like(x_BSD))), stats
        for name, start, stop in layout.spans:
            noise = self._noise(name, x_BSD, noise_seed)
            outs[name], stats[name] = self._experts(name)(
                x_BSD[:, start:stop],
                None if valid is None else valid[:, start:stop],
                None if noise is None else noise[:, start:stop],
            )
        return jnp.concatenate([outs[name] for name, _, _ in layout.spans], axis=1), stats

    def _experts(self, name: str) -> ExpertChoiceMoE:
        return self.experts[name]

    def _noise(self, name: str, x_BSD: jax.Array, seed: jax.Array | None) -> jax.Array | None:
        """(B, S, E): a number for each position of the whole stream, however the modalities lie in it."""
        if seed is None:
            return None
        batch, length, _ = x_BSD.shape
        router = self._experts(name).router
        dtype = jnp.promote_types(x_BSD.dtype, jnp.float32)
        group = self.modalities.index(name)
        layer = self.layer.get_value()
        noise_TE = gumbel_noise(seed, layer, group, batch * length, router.num_experts, dtype)
        return noise_TE.reshape(batch, length, -1)


class MoMaBlock(Module):
    """x + attention(attention_norm(x)), shared by all modalities; then x + mlp(mlp_norm(x)), by experts of each."""

    def __init__(self, config: ModelConfig, vlm: MoMaConfig, layer_idx: int, *, rngs: nnx.Rngs):
        self.attention_norm = build_norm(config.norm_type, config.dim, config.norm_eps, rngs=rngs)
        self.attention = build_attention(config, rngs=rngs)
        self.mlp_norm = build_norm(config.norm_type, config.dim, config.norm_eps, rngs=rngs)
        self.mlp = MoMaFFN(
            config.dim,
            config.computed_expert_ffn_hidden_dim,
            {name: vlm.moma_experts_per_modality[name] for name in vlm.moma_modalities},
            config.activation,
            vlm.moma_capacity_factor,
            layer_idx,
            rngs=rngs,
        )

    def forward(
        self,
        x: jax.Array,
        rope_cos: jax.Array,
        rope_sin: jax.Array,
        *,
        layout: Layout,
        noise_seed: jax.Array | None = None,
        kv_cache: None = None,
        mask: jax.Array | None = None,
        doc_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        limit_capacity: bool = True,
    ) -> tuple[jax.Array, dict[str, MoEStats]]:
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

    def build_block(self, layer_idx: int, *, rngs: nnx.Rngs) -> Module:
        """A `MoMaBlock`, which is also called with ``layout`` and ``noise_seed``."""
        return MoMaBlock(self.config, self.moma, layer_idx, rngs=rngs)

    def check(self, modality: ModalityContext) -> None:
        """The image comes as ``prefix_embeds``, or within ``inputs_embeds`` with ``modality_ids``."""
        if modality.reads_image:
            raise ValueError("image_features is given: the architecture (moma) takes prefix_embeds or modality_ids")

    def block_inputs(
        self,
        model: Transformer,
        inputs: dict[str, Any],
        x: jax.Array,
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
    ) -> dict[str, Any]:
        """The layout, and the seed of the noise. Without a seed there is no noise: JAX has no mode to draw one in."""
        if kv_caches is not None:
            raise ValueError(
                "kv_caches is given: the experts of moma choose among all tokens of the batch, later ones too, so it "
                "can't generate token by token; it needs causal routers first"
            )
        seed = modality.noise_seed if self.moma.moma_gumbel_noise else None
        return {**inputs, "layout": stream_layout(self.moma.moma_modalities, modality, x), "noise_seed": seed}


def _stats(tokens_CE: jax.Array, scores_TE: jax.Array, taken: jax.Array | int, valid: jax.Array | None) -> MoEStats:
    """What one mixture counted; entropy is that of a token's scores over the experts, as shares."""
    tokens, experts = scores_TE.shape
    valid_T = jnp.ones(tokens, bool) if valid is None else valid
    zero = jnp.zeros((), scores_TE.dtype)
    counts_E = jnp.broadcast_to(jnp.asarray(taken, jnp.int32), (experts,))
    is_taken_CE = jnp.broadcast_to((jnp.arange(len(tokens_CE)) < taken)[:, None], tokens_CE.shape)
    hits_T = jnp.zeros(tokens, jnp.int32).at[tokens_CE.ravel()].add(is_taken_CE.ravel().astype(jnp.int32))
    shares_TE = scores_TE / (scores_TE.sum(axis=1, keepdims=True) + SCORE_EPS)
    entropy_T = jnp.where(valid_T, jax.scipy.special.entr(shares_TE).sum(axis=1), 0)
    return MoEStats(
        aux_loss=zero,
        z_loss=zero,
        expert_counts=counts_E,
        entropy=entropy_T.sum() / jnp.maximum(valid_T.sum(), 1).astype(scores_TE.dtype),
        dropped=(valid_T & (hits_T == 0)).sum(dtype=jnp.int32),
    )
