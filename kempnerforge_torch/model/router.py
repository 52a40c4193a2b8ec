"""Routers of a mixture of experts: which experts a token goes to, and with what weight.

Shapes: T tokens = B sequences of S tokens, D model dim, E experts, k assignments of each token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor, nn

from kempnerforge_torch.model.stats import RouterOutput, RouterStats, StatsGetters
from kempnerforge_torch.registry import registry
from shared_config.contract.bias_schedule import schedule_factor, training_progress

SCORE_EPS = 1e-20


class Gate(nn.Linear):
    """The linear map to logits, in at least float32 whatever the dtypes of input and weight."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__(dim, num_experts, bias=False)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """(T, D) -> (T, E)."""
        dtype = _at_least_float32(torch.promote_types(x.dtype, self.weight.dtype))
        return F.linear(x.to(dtype), self.weight.to(dtype))


class TopKRouter(StatsGetters):
    """The k experts with the best scores, ties to the lowest index. Other routers override `_score` and the methods
    after it.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, norm_topk_prob: bool = True, routed_scaling: float = 1.0
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k}: must be from 1 to num_experts = {num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling = routed_scaling
        self.gate = Gate(dim, num_experts)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        valid: Bool[Tensor, "T"] | None = None,
        *,
        batch_size: int = 1,
        return_stats: bool = False,
    ) -> tuple[Float[Tensor, "T k"], Int[Tensor, "T k"]] | RouterOutput:
        """Combine weights (T, k), at least float32, and expert indices int64 (T, k), best first.

        Args:
            x: (T, D), the tokens, sequence by sequence.
            valid: bool (T,), False for padding, which counts nowhere.
            batch_size: B, number of sequences; all have T / B tokens.
            return_stats: give a `RouterOutput`, and leave the getters alone.
        """
        logits_TE = self.gate(x)
        scores_TE = self._score(logits_TE)
        indices_Tk = top_k_lowest_first(self._preference(scores_TE.detach()), self.top_k)
        weights_Tk = self._weigh(scores_TE.gather(1, indices_Tk))
        stats = self._measure(logits_TE, scores_TE, indices_Tk, valid, batch_size)
        if return_stats:
            return RouterOutput(weights_Tk, indices_Tk, stats)
        self.keep_stats(stats)
        return weights_Tk, indices_Tk

    def run(
        self, x: Float[Tensor, "T D"], valid: Bool[Tensor, "T"] | None = None, *, batch_size: int = 1
    ) -> RouterOutput:
        """The result of a call, with its stats. Arguments as for `forward`; nothing is kept."""
        return self(x, valid, batch_size=batch_size, return_stats=True)

    def _score(self, logits_TE: Tensor) -> Tensor:
        """Non-negative scores of all experts."""
        raise NotImplementedError(f"{type(self).__name__} defines no _score")

    def _preference(self, scores_TE: Tensor) -> Tensor:
        """The values by which experts are chosen, without a gradient."""
        return scores_TE

    def _weigh(self, chosen_Tk: Tensor) -> Tensor:
        """Combine weights from the scores of the chosen experts."""
        if self.norm_topk_prob:
            chosen_Tk = chosen_Tk / (chosen_Tk.sum(dim=-1, keepdim=True) + SCORE_EPS)
        return chosen_Tk * self.routed_scaling

    def _shares(self, scores_TE: Tensor) -> Tensor:
        """The scores as distributions over experts."""
        return scores_TE

    def _balance(self, shares_BSE: Tensor, chosen_BSE: Tensor, valid_BS: Tensor | None) -> Tensor:
        """The balancing loss."""
        raise NotImplementedError(f"{type(self).__name__} defines no _balance")

    def _measure(
        self, logits_TE: Tensor, scores_TE: Tensor, indices_Tk: Tensor, valid_T: Tensor | None, batch_size: int
    ) -> RouterStats:
        shares_TE = self._shares(scores_TE)
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, indices_Tk, True)
        if valid_T is not None:
            chosen_TE = chosen_TE & valid_T[:, None]
        shape = (batch_size, logits_TE.shape[0] // max(batch_size, 1), self.num_experts)
        valid_BS = None if valid_T is None else valid_T.reshape(shape[:2])
        return RouterStats(
            aux_loss=self._balance(shares_TE.reshape(shape), chosen_TE.reshape(shape), valid_BS),
            z_loss=masked_mean(torch.logsumexp(logits_TE, dim=-1).square(), valid_T, axis=0),
            expert_counts=chosen_TE.sum(dim=0, dtype=torch.int32),
            entropy=masked_mean(torch.special.entr(shares_TE.detach()).sum(dim=-1), valid_T, axis=0),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> TopKRouter:
        """Casts leave buffers in at least float32: an update of 0.001 is lost in a bfloat16 bias."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            assert after is not None
            dtype = _at_least_float32(after.dtype) if after.is_floating_point() else after.dtype
            if after.dtype != dtype:
                self._buffers[name] = buffer.to(after.device, dtype)
        return self


class SoftmaxTopKRouter(TopKRouter):
    """Softmax over all experts, the k most probable, their probabilities renormalised.

    aux_loss = E sum_e f_e P_e (Fedus et al. 2022, arXiv:2101.03961): f_e the share of assignments, P_e the mean
    probability.
    """

    def _score(self, logits_TE: Tensor) -> Tensor:
        return torch.softmax(logits_TE, dim=-1)

    def _balance(self, shares_BSE: Tensor, chosen_BSE: Tensor, valid_BS: Tensor | None) -> Tensor:
        valid_1T = None if valid_BS is None else valid_BS.reshape(1, -1)
        shares_1TE, chosen_1TE = (array.reshape(1, -1, self.num_experts) for array in (shares_BSE, chosen_BSE))
        return balance_losses(shares_1TE, chosen_1TE, valid_1T)[0]


class SigmoidTopKRouter(TopKRouter):
    """Chosen by sigmoid(logits) + expert_bias, weighted by the scores alone (DeepSeek-V3, arXiv:2412.19437, section
    2.1.2).

    The bias moves outside forward, once per optimiser step (`update_bias`), towards equal use of the experts.

    Attributes:
        expert_bias: (E,), at least float32.
        expert_ema: (E,), at least float32, moving average of each expert's share of the assignments.
        aux_loss: ``sequence_aux_loss_weight`` times the mean over sequences of E sum_e f_e P_e within the sequence.
    """

    expert_bias: Float[Tensor, "E"]
    expert_ema: Float[Tensor, "E"]

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        bias_update_rate: float = 0.001,
        ema_decay: float = 0.99,
        sequence_aux_loss_weight: float = 0.0,
        bias_schedule: str = "constant",
        norm_topk_prob: bool = True,
        routed_scaling: float = 1.0,
    ):
        super().__init__(dim, num_experts, top_k, norm_topk_prob, routed_scaling)
        self.bias_update_rate = bias_update_rate
        self.ema_decay = ema_decay
        self.sequence_aux_loss_weight = sequence_aux_loss_weight
        self.bias_schedule = bias_schedule
        self._progress = 0.0
        schedule_factor(bias_schedule, self._progress)
        self.register_buffer("expert_bias", torch.zeros(num_experts))
        self.register_buffer("expert_ema", torch.full((num_experts,), 1.0 / num_experts))

    def set_step(self, step: int, max_steps: int) -> None:
        """Set the progress of training, for the schedule of the bias update rate."""
        self._progress = training_progress(step, max_steps)

    def update_bias(self, counts_E: Num[Tensor, "... E"], progress: float | None = None) -> None:
        """Move the average and the bias by the assignments of one optimiser step: all its micro-batches, all ranks.

        Args:
            counts_E: assignments to each expert; if there are none at all, nothing changes.
            progress: share of training done; None means that of `set_step`.
        """
        factor = schedule_factor(self.bias_schedule, self._progress if progress is None else progress)
        bias_E, ema_E = updated_bias(
            self.expert_bias, self.expert_ema, counts_E, self.bias_update_rate * factor, self.ema_decay
        )
        self.expert_bias.copy_(bias_E)
        self.expert_ema.copy_(ema_E)

    def _score(self, logits_TE: Tensor) -> Tensor:
        return torch.sigmoid(logits_TE)

    def _preference(self, scores_TE: Tensor) -> Tensor:
        return scores_TE + self.expert_bias.to(scores_TE.dtype)

    def _shares(self, scores_TE: Tensor) -> Tensor:
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + SCORE_EPS)

    def _balance(self, shares_BSE: Tensor, chosen_BSE: Tensor, valid_BS: Tensor | None) -> Tensor:
        if self.sequence_aux_loss_weight == 0.0:
            return shares_BSE.new_zeros(())
        losses_B = balance_losses(shares_BSE, chosen_BSE, valid_BS)
        counted_B = None if valid_BS is None else valid_BS.any(dim=1)
        return masked_mean(losses_B, counted_B, axis=0) * self.sequence_aux_loss_weight


def build_router(router_type: str, dim: int, num_experts: int, top_k: int, **options: float | str | bool) -> TopKRouter:
    """The router registered as ``router_type``, built as ``builder(dim, num_experts, top_k, **options)``.

    Args:
        options: those that are not at their default, of sequence_aux_loss_weight, bias_schedule, norm_topk_prob and
            routed_scaling.

    Raises:
        KeyError: "Unknown router: ..." with the names that exist.
        ValueError: an option that the router does not have.
    """
    builder = registry.get("router", router_type)
    try:
        return builder(dim, num_experts, top_k, **options)
    except TypeError as error:
        raise ValueError(f"moe_router = {router_type!r}: can't be built with {options}: {error}") from error


def top_k_lowest_first(scores_TE: Float[Tensor, "T E"], k: int) -> Int[Tensor, "T k"]:
    """Indices of the k largest of each row, largest first, equal ones by index, as `torch.topk` does not promise."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def balance_losses(
    shares_BSE: Float[Tensor, "B S E"], chosen_BSE: Shaped[Tensor, "B S E"], valid_BS: Bool[Tensor, "B S"] | None
) -> Float[Tensor, "B"]:
    """(B,): E sum_e f_e P_e over the valid tokens of each sequence, 0 without any; 1 when both are uniform.

    f_e is the share of the assignments that fell on e, P_e the mean share of e.
    """
    counts_BE = chosen_BSE.sum(dim=1).to(shares_BSE.dtype)
    f_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    return shares_BSE.shape[-1] * (f_BE * masked_mean(shares_BSE, valid_BS, axis=1)).sum(dim=1)


def masked_mean(values: Float[Tensor, "..."], valid: Bool[Tensor, "..."] | None, axis: int) -> Float[Tensor, "..."]:
    """Mean along ``axis`` of the positions where ``valid`` (of the leading axes) is True; 0 if there is none."""
    if valid is None:
        return values.sum(dim=axis) / max(values.shape[axis], 1)
    valid = valid.reshape(valid.shape + (1,) * (values.ndim - valid.ndim))
    return torch.where(valid, values, 0.0).sum(dim=axis) / valid.sum(dim=axis).clamp(min=1)


@torch.no_grad()
def updated_bias(
    bias_E: Float[Tensor, "... E"],
    ema_E: Float[Tensor, "... E"],
    counts_E: Num[Tensor, "... E"],
    rate: float,
    ema_decay: float,
) -> tuple[Float[Tensor, "... E"], Float[Tensor, "... E"]]:
    """ema <- decay ema + (1 - decay) counts / sum(counts); bias <- bias + rate (1/E - ema). No counts: no change."""
    counts_E = counts_E.to(ema_E.dtype)
    total = counts_E.sum(dim=-1, keepdim=True)
    moved_E = ema_decay * ema_E + (1 - ema_decay) * (counts_E / total.clamp(min=1))
    new_ema_E = torch.where(total > 0, moved_E, ema_E)
    step_E = rate * (1 / ema_E.shape[-1] - new_ema_E)
    return torch.where(total > 0, bias_E + step_E, bias_E), new_ema_E


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


registry.register("router", "softmax_topk")(SoftmaxTopKRouter)
registry.register("router", "sigmoid_topk")(SigmoidTopKRouter)
