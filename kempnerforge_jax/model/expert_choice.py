"""Experts that choose tokens (Zhou et al. 2022, arXiv:2202.09368).

    scores of 6 text tokens, 2 experts, each takes its ceil(6 / 2) = 3 best
    expert 0    .9*  .2   .7*  .1   .8*  .3      a token may be taken by several experts, or by none
    expert 1    .6*  .5*  .1   .1   .7*  .2

Shapes: T tokens, D model dim, E experts, C tokens that an expert may take.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from kempnerforge_jax.model.checks import check_ids, check_mask, check_shape, nan_outside
from kempnerforge_jax.model.mlp import build_mlp
from kempnerforge_jax.model.module import Module, Numbered
from kempnerforge_jax.model.router import SCORE_EPS, Gate
from kempnerforge_jax.model.stats import ExpertChoiceOutput, MoEOutput, MoEStats, StatsGetters
from shared_config.contract.capacity import choice_capacity, choice_share


class ExpertChoiceSigmoidRouter(Module):
    """Each expert takes the tokens with its highest sigmoid(logit), the lowest index among equals."""

    def __init__(
        self, dim: int, num_experts: int, capacity_factor: float, gumbel_noise: bool = True, *, rngs: nnx.Rngs | None
    ):
        """
        Args:
            capacity_factor: an expert takes ceil(capacity_factor * tokens); 0 means 1 / experts.
            gumbel_noise: choose by noisy scores where noise is given.
        """
        self.num_experts = num_experts
        self.gumbel_noise = gumbel_noise
        self.share = choice_share(num_experts, capacity_factor)
        self.gate = Gate(dim, num_experts, rngs=rngs)

    def forward(
        self,
        x: Float[Array, "T D"],
        valid: Bool[Array, "T"] | None = None,
        noise: Float[Array, "T E"] | None = None,
        *,
        return_scores: bool = False,
    ) -> tuple[Float[Array, "C E"], Int[Array, "C E"]] | ExpertChoiceOutput:
        """
        Args:
            x: (T, D).
            valid: bool (T,), False for tokens that no expert may take.
            noise: (T, E), added to the logits for the choice alone. None is drawn: JAX has no training mode.
            return_scores: give an `ExpertChoiceOutput`.

        Returns:
            weights: (C, E) scores of the tokens that each expert takes, in at least float32; 0 where there are fewer
                than C tokens that it may take.
            tokens: int32 (C, E), these tokens, best first; entries beyond those that it may take are meaningless.
        """
        logits_TE = self.gate(x)
        scores_TE = jax.nn.sigmoid(logits_TE)
        noise = noise if self.gumbel_noise else None
        ranked_TE = jax.lax.stop_gradient(scores_TE if noise is None else jax.nn.sigmoid(logits_TE + noise))
        if valid is not None:
            ranked_TE = jnp.where(valid[:, None], ranked_TE, -1)
        capacity, num_taken = self.capacity(x, valid)
        tokens_CE = jnp.argsort(ranked_TE, axis=0, descending=True, stable=True)[:capacity]
        is_taken_C1 = (jnp.arange(capacity) < num_taken)[:, None]
        weights_CE = jnp.take_along_axis(scores_TE, tokens_CE, axis=0) * is_taken_C1
        return ExpertChoiceOutput(weights_CE, tokens_CE, scores_TE) if return_scores else (weights_CE, tokens_CE)

    def run(
        self, x: Float[Array, "T D"], valid: Bool[Array, "T"] | None = None, noise: Float[Array, "T E"] | None = None
    ) -> ExpertChoiceOutput:
        """The result of a call, with the scores of all tokens. Arguments as for `forward`."""
        return self(x, valid, noise, return_scores=True)

    def capacity(
        self, x: Float[Array, "T D"], valid: Bool[Array, "T"] | None = None
    ) -> tuple[int, Int[Array, ""] | int]:
        """C, and how many of the ``valid`` tokens of ``x`` (T, D) an expert takes, at most C."""
        capacity = choice_capacity(x.shape[0], self.share)
        return capacity, capacity if valid is None else choice_capacity(valid.sum(dtype=jnp.int32), self.share)

    @staticmethod
    def rerouted(output: ExpertChoiceOutput, tokens_CE: Integer[Array, "C E"]) -> ExpertChoiceOutput:
        """What the call would have returned in place of ``output``, had the experts chosen ``tokens_CE``.

        Raises:
            ValueError: choices of another shape, or of tokens that don't exist. Inside a trace their weights are NaN.
        """
        weights_CE, chosen_CE, scores_TE = output
        check_shape("tokens_CE", tokens_CE, chosen_CE.shape)
        check_ids("tokens_CE", tokens_CE, len(scores_TE))
        taken_CE = jnp.take_along_axis(scores_TE, tokens_CE, axis=0) * (weights_CE != 0)
        return ExpertChoiceOutput(nan_outside(taken_CE, tokens_CE, len(scores_TE)), tokens_CE, scores_TE)


class ExpertChoiceMoE(StatsGetters):
    """y_t = sum over the experts that take token t of score * expert(x_t); 0 for a token that none takes."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        capacity_factor: float,
        activation: str = "silu",
        gumbel_noise: bool = True,
        *,
        rngs: nnx.Rngs | None,
    ):
        """Arguments as for the router, and ``hidden_dim``, the width of every expert."""
        self.num_experts = num_experts
        self.router = ExpertChoiceSigmoidRouter(dim, num_experts, capacity_factor, gumbel_noise, rngs=rngs)
        experts = {str(i): build_mlp(dim, hidden_dim, activation, rngs=rngs) for i in range(num_experts)}
        self.experts = Numbered(experts)

    def forward(
        self,
        x: Float[Array, "... D"],
        valid: Bool[Array, "..."] | None = None,
        noise: Float[Array, "... E"] | None = None,
        *,
        return_stats: bool = False,
    ) -> Float[Array, "... D"] | MoEOutput:
        """(..., D) -> (..., D).

        Args:
            valid: bool (...), the tokens that take part; None means all.
            noise: (..., E), see the router.
            return_stats: give a `MoEOutput`, and leave the getters alone. There are no losses; ``dropped`` counts the
                tokens that no expert takes.

        Raises:
            ValueError: a mask of another dtype or shape.
        """
        if valid is not None:
            check_mask("valid", valid, x.shape[:-1])
        x_TD = x.reshape(-1, x.shape[-1])
        valid_T = None if valid is None else valid.ravel()
        noise_TE = None if noise is None else noise.reshape(-1, noise.shape[-1])
        weights_CE, tokens_CE, scores_TE = self.router(x_TD, valid_T, noise_TE, return_scores=True)
        y_TD = jnp.zeros(x_TD.shape, weights_CE.dtype)
        for index, expert in enumerate(self.experts.values()):
            tokens_C, weights_C1 = tokens_CE[:, index], weights_CE[:, index, None]
            rows_CD = x_TD.at[tokens_C].get(unique_indices=True)
            out_CD = weights_C1 * expert(rows_CD).astype(weights_C1.dtype)
            y_TD = y_TD.at[tokens_C].add(out_CD, unique_indices=True)
        num_taken = self.router.capacity(x_TD, valid_T)[1]
        stats = _stats(tokens_CE, jax.lax.stop_gradient(scores_TE), num_taken, valid_T)
        y = y_TD.astype(x.dtype).reshape(x.shape)
        if return_stats:
            return MoEOutput(y, stats)
        self.keep_stats(stats)
        return y

    def run(
        self,
        x: Float[Array, "... D"],
        valid: Bool[Array, "..."] | None = None,
        noise: Float[Array, "... E"] | None = None,
    ) -> MoEOutput:
        """The result of a call, with its stats. Arguments as for `forward`; nothing is kept."""
        return self(x, valid, noise, return_stats=True)


def _stats(tokens_CE: jax.Array, scores_TE: jax.Array, num_taken: jax.Array | int, valid: jax.Array | None) -> MoEStats:
    """The stats of one mixture; entropy is that of a token's scores, normalised over the experts."""
    tokens, experts = scores_TE.shape
    valid_T = jnp.ones(tokens, bool) if valid is None else valid
    zero = jnp.zeros((), scores_TE.dtype)
    counts_E = jnp.broadcast_to(jnp.asarray(num_taken, jnp.int32), (experts,))
    is_taken_CE = jnp.broadcast_to((jnp.arange(len(tokens_CE)) < num_taken)[:, None], tokens_CE.shape)
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
