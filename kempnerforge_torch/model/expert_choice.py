"""Experts that choose tokens (Zhou et al. 2022, arXiv:2202.09368).

    scores of 6 text tokens, 2 experts, each takes its ceil(6 / 2) = 3 best
    expert 0    .9*  .2   .7*  .1   .8*  .3      a token may be taken by several experts, or by none
    expert 1    .6*  .5*  .1   .1   .7*  .2

Shapes: T tokens, D model dim, E experts, C tokens that an expert may take.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.checks import check_ids, check_mask, check_shape, nan_outside
from kempnerforge_torch.model.mlp import build_mlp
from kempnerforge_torch.model.noise import gumbel_noise
from kempnerforge_torch.model.router import SCORE_EPS, Gate
from kempnerforge_torch.model.stats import ExpertChoiceOutput, MoEOutput, MoEStats, StatsGetters
from shared_config.contract.capacity import choice_capacity, choice_share

MAX_SEED = 2**31 - 1


class ExpertChoiceSigmoidRouter(nn.Module):
    """Each expert takes the tokens with its highest sigmoid(logit), the lowest index among equals."""

    def __init__(self, dim: int, num_experts: int, capacity_factor: float, gumbel_noise: bool = True):
        """
        Args:
            capacity_factor: an expert takes ceil(capacity_factor * tokens); 0 means 1 / experts.
            gumbel_noise: choose by noisy scores where noise is given, and in training mode.
        """
        super().__init__()
        self.num_experts = num_experts
        self.gumbel_noise = gumbel_noise
        self.share = choice_share(num_experts, capacity_factor)
        self.gate = Gate(dim, num_experts)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        valid: Bool[Tensor, "T"] | None = None,
        noise: Float[Tensor, "T E"] | None = None,
        *,
        return_scores: bool = False,
    ) -> tuple[Float[Tensor, "C E"], Int[Tensor, "C E"]] | ExpertChoiceOutput:
        """
        Args:
            x: (T, D).
            valid: bool (T,), False for tokens that no expert may take.
            noise: (T, E), added to the logits for the choice alone; drawn in training mode where none is given.
            return_scores: give an `ExpertChoiceOutput`.

        Returns:
            weights: (C, E) scores of the tokens that each expert takes, in at least float32; 0 where there are fewer
                than C tokens that it may take.
            tokens: int64 (C, E), these tokens, best first; entries beyond those that it may take are meaningless.
        """
        logits_TE = self.gate(x)
        scores_TE = logits_TE.sigmoid()
        noise = self._noise(x, noise)
        ranked_TE = (scores_TE if noise is None else (logits_TE + noise).sigmoid()).detach()
        if valid is not None:
            ranked_TE = ranked_TE.masked_fill(~valid[:, None], -1)
        capacity, num_taken = self.capacity(x, valid)
        tokens_CE = ranked_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
        is_taken_C1 = (torch.arange(capacity, device=x.device) < num_taken)[:, None]
        weights_CE = scores_TE.gather(0, tokens_CE) * is_taken_C1
        return ExpertChoiceOutput(weights_CE, tokens_CE, scores_TE) if return_scores else (weights_CE, tokens_CE)

    def run(
        self, x: Float[Tensor, "T D"], valid: Bool[Tensor, "T"] | None = None, noise: Float[Tensor, "T E"] | None = None
    ) -> ExpertChoiceOutput:
        """The result of a call, with the scores of all tokens. Arguments as for `forward`."""
        return self(x, valid, noise, return_scores=True)

    def capacity(
        self, x: Float[Tensor, "T D"], valid: Bool[Tensor, "T"] | None = None
    ) -> tuple[int, Int[Tensor, ""] | int]:
        """C, and how many of the ``valid`` tokens of ``x`` (T, D) an expert takes, at most C."""
        capacity = choice_capacity(x.shape[0], self.share)
        return capacity, capacity if valid is None else choice_capacity(valid.sum(), self.share)

    def _noise(self, x: Tensor, noise: Tensor | None) -> Tensor | None:
        if not self.gumbel_noise:
            return None
        if noise is not None or not self.training:
            return noise
        seed = torch.randint(MAX_SEED, (), device=x.device)
        return gumbel_noise(seed, 0, 0, x.shape[0], self.num_experts, torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def rerouted(output: ExpertChoiceOutput, tokens_CE: Integer[Tensor, "C E"]) -> ExpertChoiceOutput:
        """What the call would have returned in place of ``output``, had the experts chosen ``tokens_CE``.

        Raises:
            ValueError: choices of another shape, or of tokens that don't exist. Inside a trace their weights are NaN.
        """
        weights_CE, chosen_CE, scores_TE = output
        check_shape("tokens_CE", tokens_CE, chosen_CE.shape)
        check_ids("tokens_CE", tokens_CE, len(scores_TE))
        taken_CE = scores_TE.gather(0, tokens_CE) * (weights_CE != 0)
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
    ):
        """Arguments as for the router, and ``hidden_dim``, the width of every expert."""
        super().__init__()
        self.num_experts = num_experts
        self.router = ExpertChoiceSigmoidRouter(dim, num_experts, capacity_factor, gumbel_noise)
        self.experts = nn.ModuleList(build_mlp(dim, hidden_dim, activation) for _ in range(num_experts))

    def forward(
        self,
        x: Float[Tensor, "... D"],
        valid: Bool[Tensor, "..."] | None = None,
        noise: Float[Tensor, "... E"] | None = None,
        *,
        return_stats: bool = False,
    ) -> Float[Tensor, "... D"] | MoEOutput:
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
        x_TD = x.flatten(0, -2)
        valid_T = None if valid is None else valid.flatten()
        noise_TE = None if noise is None else noise.flatten(0, -2)
        weights_CE, tokens_CE, scores_TE = self.router(x_TD, valid_T, noise_TE, return_scores=True)
        y_TD = torch.zeros(x_TD.shape, dtype=weights_CE.dtype, device=x_TD.device)
        for index, expert in enumerate(self.experts):
            tokens_C, weights_C1 = tokens_CE[:, index], weights_CE[:, index, None]
            y_TD = y_TD.index_add(0, tokens_C, weights_C1 * expert(x_TD[tokens_C]).to(weights_C1.dtype))
        stats = _stats(tokens_CE, scores_TE.detach(), self.router.capacity(x_TD, valid_T)[1], valid_T)
        y = y_TD.to(x.dtype).reshape(x.shape)
        if return_stats:
            return MoEOutput(y, stats)
        self.keep_stats(stats)
        return y

    def run(
        self,
        x: Float[Tensor, "... D"],
        valid: Bool[Tensor, "..."] | None = None,
        noise: Float[Tensor, "... E"] | None = None,
    ) -> MoEOutput:
        """The result of a call, with its stats. Arguments as for `forward`; nothing is kept."""
        return self(x, valid, noise, return_stats=True)


def _stats(tokens_CE: Tensor, scores_TE: Tensor, num_taken: Tensor | int, valid: Tensor | None) -> MoEStats:
    """The stats of one mixture; entropy is that of a token's scores, normalised over the experts."""
    tokens, experts = scores_TE.shape
    valid_T = torch.ones(tokens, dtype=torch.bool, device=scores_TE.device) if valid is None else valid
    zero = scores_TE.new_zeros(())
    counts_E = torch.as_tensor(num_taken, device=scores_TE.device).to(torch.int32).expand(experts)
    is_taken_CE = (torch.arange(len(tokens_CE), device=scores_TE.device) < num_taken)[:, None].expand(tokens_CE.shape)
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
