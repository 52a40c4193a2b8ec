"""Routers of a mixture of experts: which experts a token goes to, and with what weight.

Shapes: T tokens = B sequences of S tokens, D model dim, E experts, k assignments of each token.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.model.module import Buffer
from kempnerforge_jax.model.stats import RouterOutput, RouterStats, StatsGetters
from kempnerforge_jax.model.within_map import measured
from kempnerforge_jax.registry import registry
from shared_config.contract.bias_schedule import schedule_factor, training_progress

SCORE_EPS = 1e-20


class Gate(Linear):
    """The linear map to logits, in at least float32 whatever the dtypes of input and weight, and on every device: what
    decides a route does not follow `jax.default_matmul_precision`.
    """

    def __init__(self, dim: int, num_experts: int, *, rngs: nnx.Rngs | None):
        super().__init__(dim, num_experts, rngs=rngs)

    def forward(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """(T, D) -> (T, E)."""
        assert self.weight is not None
        weight = self.weight.get_value()
        dtype = _at_least_float32(jnp.promote_types(x.dtype, weight.dtype))
        return jnp.matmul(x.astype(dtype), weight.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)


class TopKRouter(StatsGetters):
    """The k experts with the best scores, ties to the lowest index. Other routers override `_score` and the methods
    after it.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        norm_topk_prob: bool = True,
        routed_scaling: float = 1.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k}: must be from 1 to num_experts = {num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling = routed_scaling
        self.gate = Gate(dim, num_experts, rngs=rngs)

    def forward(
        self,
        x: Float[Array, "T D"],
        valid: Bool[Array, "T"] | None = None,
        *,
        batch_size: int = 1,
        return_stats: bool = False,
    ) -> tuple[Float[Array, "T k"], Int[Array, "T k"]] | RouterOutput:
        """Combine weights (T, k), at least float32, and expert indices int32 (T, k), best first.

        Args:
            x: (T, D), the tokens, sequence by sequence.
            valid: bool (T,), False for padding, which counts nowhere.
            batch_size: B, number of sequences; all have T / B tokens.
            return_stats: give a `RouterOutput`, and leave the getters alone.
        """
        logits_TE = self.gate(x)
        scores_TE = self._score(logits_TE)
        indices_Tk = top_k_lowest_first(self._preference(jax.lax.stop_gradient(scores_TE)), self.top_k)
        weights_Tk = self._weigh(jnp.take_along_axis(scores_TE, indices_Tk, axis=1))
        whole = functools.partial(measured, batch_size=batch_size)
        whole_valid = None if valid is None else whole(valid)
        stats = self._measure(whole(logits_TE), whole(scores_TE), whole(indices_Tk), whole_valid, batch_size)
        if return_stats:
            return RouterOutput(weights_Tk, indices_Tk, stats)
        self.keep_stats(stats)
        return weights_Tk, indices_Tk

    def run(
        self, x: Float[Array, "T D"], valid: Bool[Array, "T"] | None = None, *, batch_size: int = 1
    ) -> RouterOutput:
        """The result of a call, with its stats. Arguments as for `forward`; nothing is kept."""
        return self(x, valid, batch_size=batch_size, return_stats=True)

    def _score(self, logits_TE: jax.Array) -> jax.Array:
        """Non-negative scores of all experts."""
        raise NotImplementedError(f"{type(self).__name__} defines no _score")

    def _preference(self, scores_TE: jax.Array) -> jax.Array:
        """The values by which experts are chosen, without a gradient."""
        return scores_TE

    def _weigh(self, chosen_Tk: jax.Array) -> jax.Array:
        """Combine weights from the scores of the chosen experts."""
        if self.norm_topk_prob:
            chosen_Tk = chosen_Tk / (chosen_Tk.sum(axis=-1, keepdims=True) + SCORE_EPS)
        return chosen_Tk * self.routed_scaling

    def _shares(self, scores_TE: jax.Array) -> jax.Array:
        """The scores as distributions over experts."""
        return scores_TE

    def _balance(self, shares_BSE: jax.Array, chosen_BSE: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
        """The balancing loss."""
        raise NotImplementedError(f"{type(self).__name__} defines no _balance")

    def _measure(
        self,
        logits_TE: jax.Array,
        scores_TE: jax.Array,
        indices_Tk: jax.Array,
        valid_T: jax.Array | None,
        batch_size: int,
    ) -> RouterStats:
        shares_TE = self._shares(scores_TE)
        chosen_TE = (indices_Tk[:, :, None] == jnp.arange(self.num_experts)).any(axis=1)
        if valid_T is not None:
            chosen_TE = chosen_TE & valid_T[:, None]
        shape = (batch_size, logits_TE.shape[0] // max(batch_size, 1), self.num_experts)
        valid_BS = None if valid_T is None else valid_T.reshape(shape[:2])
        entropy_T = jax.scipy.special.entr(jax.lax.stop_gradient(shares_TE)).sum(axis=-1)
        return RouterStats(
            aux_loss=self._balance(shares_TE.reshape(shape), chosen_TE.reshape(shape), valid_BS),
            z_loss=masked_mean(jnp.square(jax.nn.logsumexp(logits_TE, axis=-1)), valid_T, axis=0),
            expert_counts=chosen_TE.sum(axis=0, dtype=jnp.int32),
            entropy=masked_mean(entropy_T, valid_T, axis=0),
        )


class SoftmaxTopKRouter(TopKRouter):
    """Softmax over all experts, the k most probable, their probabilities renormalised.

    aux_loss = E sum_e f_e P_e (Fedus et al. 2022, arXiv:2101.03961): f_e the share of assignments, P_e the mean
    probability.
    """

    def _score(self, logits_TE: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits_TE, axis=-1)

    def _balance(self, shares_BSE: jax.Array, chosen_BSE: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
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
        *,
        rngs: nnx.Rngs | None,
    ):
        super().__init__(dim, num_experts, top_k, norm_topk_prob, routed_scaling, rngs=rngs)
        self.bias_update_rate = bias_update_rate
        self.ema_decay = ema_decay
        self.sequence_aux_loss_weight = sequence_aux_loss_weight
        self.bias_schedule = bias_schedule
        schedule_factor(bias_schedule, 0.0)
        self.expert_bias = Buffer(jnp.zeros(num_experts, jnp.float32))
        self.expert_ema = Buffer(jnp.full((num_experts,), 1.0 / num_experts, jnp.float32))

    def set_step(self, step: int, max_steps: int) -> None:
        """Set the progress of training, for the schedule of the bias update rate. Kept beside the module, whose graph
        is static: inside jit, give ``progress`` to `update_bias`.
        """
        self.keep(progress=training_progress(step, max_steps, _namespace(step)))

    def update_bias(self, counts_E: Num[Array, "... E"], progress: Float[Array, ""] | float | None = None) -> None:
        """Move the average and the bias by the assignments of one optimiser step: all its micro-batches, all ranks.

        Args:
            counts_E: assignments to each expert; if there are none at all, nothing changes.
            progress: share of training done; None means that of `set_step`.
        """
        progress = self.kept("progress", 0.0) if progress is None else progress
        factor = schedule_factor(self.bias_schedule, progress, _namespace(progress))
        bias_E, ema_E = updated_bias(
            self.expert_bias.get_value(),
            self.expert_ema.get_value(),
            counts_E,
            self.bias_update_rate * factor,
            self.ema_decay,
        )
        self.expert_bias.set_value(bias_E)
        self.expert_ema.set_value(ema_E)

    def _score(self, logits_TE: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(logits_TE)

    def _preference(self, scores_TE: jax.Array) -> jax.Array:
        return scores_TE + self.expert_bias.get_value().astype(scores_TE.dtype)

    def _shares(self, scores_TE: jax.Array) -> jax.Array:
        return scores_TE / (scores_TE.sum(axis=-1, keepdims=True) + SCORE_EPS)

    def _balance(self, shares_BSE: jax.Array, chosen_BSE: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
        if self.sequence_aux_loss_weight == 0.0:
            return jnp.zeros((), shares_BSE.dtype)
        losses_B = balance_losses(shares_BSE, chosen_BSE, valid_BS)
        counted_B = None if valid_BS is None else valid_BS.any(axis=1)
        return masked_mean(losses_B, counted_B, axis=0) * self.sequence_aux_loss_weight


def build_router(
    router_type: str, dim: int, num_experts: int, top_k: int, *, rngs: nnx.Rngs | None, **options: float | str | bool
) -> TopKRouter:
    """The router registered as ``router_type``, built as ``builder(dim, num_experts, top_k, rngs=rngs, **options)``.

    Args:
        options: those that are not at their default, of sequence_aux_loss_weight, bias_schedule, norm_topk_prob and
            routed_scaling.

    Raises:
        KeyError: "Unknown router: ..." with the names that exist.
        ValueError: an option that the router does not have.
    """
    builder = registry.get("router", router_type)
    try:
        return builder(dim, num_experts, top_k, rngs=rngs, **options)
    except TypeError as error:
        raise ValueError(f"moe_router = {router_type!r}: can't be built with {options}: {error}") from error


def top_k_lowest_first(scores_TE: Float[Array, "T E"], k: int) -> Int[Array, "T k"]:
    """Indices of the k largest of each row, largest first, equal ones by index, as `jax.lax.top_k` promises.

    It orders bits: -0 below 0, and NaN at either end by its sign. Here zeros are equal, and NaN is the largest.
    """
    scores_TE = jnp.where(jnp.isnan(scores_TE), jnp.nan, jnp.where(scores_TE == 0, 0, scores_TE))
    return jax.lax.top_k(scores_TE, k)[1]


def balance_losses(
    shares_BSE: Float[Array, "B S E"], chosen_BSE: Shaped[Array, "B S E"], valid_BS: Bool[Array, "B S"] | None
) -> Float[Array, "B"]:
    """(B,): E sum_e f_e P_e over the valid tokens of each sequence, 0 without any; 1 when both are uniform.

    f_e is the share of the assignments that fell on e, P_e the mean share of e.
    """
    counts_BE = chosen_BSE.sum(axis=1).astype(shares_BSE.dtype)
    f_BE = counts_BE / jnp.maximum(counts_BE.sum(axis=1, keepdims=True), 1)
    return shares_BSE.shape[-1] * (f_BE * masked_mean(shares_BSE, valid_BS, axis=1)).sum(axis=1)


def masked_mean(values: Float[Array, "..."], valid: Bool[Array, "..."] | None, axis: int) -> Float[Array, "..."]:
    """Mean along ``axis`` of the positions where ``valid`` (of the leading axes) is True; 0 if there is none."""
    if valid is None:
        return values.sum(axis=axis) / max(values.shape[axis], 1)
    valid = valid.reshape(valid.shape + (1,) * (values.ndim - valid.ndim))
    count = jnp.maximum(valid.sum(axis=axis), 1).astype(values.dtype)
    return jnp.where(valid, values, 0).sum(axis=axis) / count


def updated_bias(
    bias_E: Float[Array, "... E"],
    ema_E: Float[Array, "... E"],
    counts_E: Num[Array, "... E"],
    rate: Float[Array, ""] | float,
    ema_decay: float,
) -> tuple[Float[Array, "... E"], Float[Array, "... E"]]:
    """ema <- decay ema + (1 - decay) counts / sum(counts); bias <- bias + rate (1/E - ema). No counts: no change."""
    counts_E = counts_E.astype(ema_E.dtype)
    total = counts_E.sum(axis=-1, keepdims=True)
    moved_E = ema_decay * ema_E + (1 - ema_decay) * (counts_E / jnp.maximum(total, 1))
    new_ema_E = jnp.where(total > 0, moved_E, ema_E)
    step_E = (rate * (1 / ema_E.shape[-1] - new_ema_E)).astype(bias_E.dtype)
    return jnp.where(total > 0, bias_E + step_E, bias_E), new_ema_E


def _namespace(value: object) -> types.ModuleType:
    """What computes with a value: JAX within a trace."""
    return jnp if isinstance(value, Tracer) else np


def _at_least_float32(dtype: DTypeLike) -> np.dtype:
    return jnp.promote_types(dtype, jnp.float32)


registry.register("router", "softmax_topk")(SoftmaxTopKRouter)
registry.register("router", "sigmoid_topk")(SigmoidTopKRouter)
