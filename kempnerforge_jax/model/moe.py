"""Mixture-of-experts feed-forward layer (Shazeer et al. 2017, arXiv:1701.06538).

A token that k experts are chosen for becomes k rows; the rows are sorted by expert, grouped products multiply each
expert's part by its matrices, and the k results of a token are added up by the inverse of the sort.

    T = 3, k = 2, E = 4     choices by slot, then token      rows, sorted by expert
    token 0 -> 2, 0         t0:2 t1:0 t2:2                   expert    0     1     2     3
    token 1 -> 0, 3         t0:0 t1:3 t2:1                   token   1  0 |  2 | 0  2 |  1
    token 2 -> 2, 1

Shapes: B batch, S sequence, T = B * S tokens, D model dim, F expert width, E experts, k choices of each token,
R = k * T rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from kempnerforge_jax.model.checks import check_ids, check_mask, check_shape, nan_outside
from kempnerforge_jax.model.experts import apply_modules, apply_packed
from kempnerforge_jax.model.experts import grouped_expert_forward as grouped_expert_forward
from kempnerforge_jax.model.experts import grouped_expert_forward_packed as grouped_expert_forward_packed
from kempnerforge_jax.model.mlp import ACTIVATIONS, StandardMLP, SwiGLUMLP, build_mlp
from kempnerforge_jax.model.module import Module, Numbered
from kempnerforge_jax.model.router import TopKRouter, build_router
from shared_config.contract.capacity import token_capacities

PROJECTIONS = ("gate", "up", "down")


class MoEStats(NamedTuple):
    """What one call of a layer counted, and its losses, over the valid tokens.

    Attributes:
        aux_loss, z_loss: the router's losses, unweighted.
        expert_counts: int32 (E,), choices of each expert, before capacity.
        entropy: mean entropy of the tokens' distributions over experts, in nats, without a gradient.
        dropped: int32, choices that found no room.
    """

    aux_loss: jax.Array
    z_loss: jax.Array
    expert_counts: jax.Array
    entropy: jax.Array
    dropped: jax.Array


class Dispatch(NamedTuple):
    """Which row holds which choice. Choice j * T + t is choice j of token t: first choices come before second ones.

    Attributes:
        choice_R: the choice that each row holds; rows of no expert (padding, no room) come last.
        row_R: the row of each choice.
        ends_E: int32, row after the last one of each expert.
    """

    choice_R: jax.Array
    row_R: jax.Array
    ends_E: jax.Array


class MoEMLP(Module):
    """y_t = sum over the choices j of w_tj expert_{i_tj}(x_t), plus shared_expert(x_t).

    Args:
        router: called as ``router(x_TD, valid_T, batch_size=B, return_stats=True)``, gives weights, indices and stats.
        experts: E feed-forward layers of one kind. What is neither a `SwiGLUMLP` nor a `StandardMLP` computes all rows,
            of which its own are taken.
        shared_expert: applied to every token.
        capacity_factor: each expert takes at most max(1, ceil(T k / E * factor)) choices, first choices before second
            ones, then in the order of tokens; what finds no room is not computed and adds nothing. 0: no limit.
        gradient_scale: multiply what flows back through an expert by (mean choices) / (its choices).
        packed_experts: hold the experts' weights as ``gate_w``, ``up_w`` (E, D, F) and ``down_w`` (E, F, D).
    """

    def __init__(
        self,
        router: TopKRouter,
        experts: Sequence[Module],
        shared_expert: Module | None = None,
        capacity_factor: float = 0.0,
        gradient_scale: bool = False,
        packed_experts: bool = False,
    ):
        if capacity_factor < 0:
            raise ValueError(f"capacity_factor = {capacity_factor}: must be positive, or 0 for no limit")
        self.activation = _common_activation(experts)
        if packed_experts and self.activation is None:
            kind = type(experts[0]).__name__
            raise ValueError(
                f"packed_experts = True: must be False for experts of type {kind}, which has other weights"
            )
        self.num_experts = len(experts)
        self.capacity_factor = capacity_factor
        self.gradient_scale = gradient_scale
        self.packed_experts = packed_experts
        self.router = router
        if packed_experts:
            for name in _projections(self.activation):
                setattr(self, f"{name}_w", nnx.Param(_stacked(experts, name)))
        else:
            self.experts: nnx.Dict[Any] = Numbered({str(i): expert for i, expert in enumerate(experts)})
        self.shared_expert = shared_expert

    def forward(
        self,
        x: jax.Array,
        valid: jax.Array | None = None,
        *,
        members: jax.Array | None = None,
        limit_capacity: bool = True,
        return_stats: bool = False,
    ) -> Any:
        """(B, S, D) -> (B, S, D).

        Args:
            valid: bool (B, S), False for padding, which is sent to no routed expert.
            members: bool (B, S), False at positions that are none of this layer's tokens: they are not routed, and in
                contrast to padding they do not count for the capacity.
            limit_capacity: False: an expert takes any number of choices in this call.
            return_stats: also give `MoEStats`.

        Raises:
            ValueError: masks, or experts that the router names, of another dtype or shape. A token becomes NaN if its
                router names an expert that doesn't exist.
        """
        for name, mask in (("valid", valid), ("members", members)):
            if mask is not None:
                check_mask(name, mask, x.shape[:2])
        x_TD = x.reshape(-1, x.shape[-1])
        valid_T, members_T = (None if mask is None else mask.ravel() for mask in (valid, members))
        if members_T is not None:
            valid_T = members_T if valid_T is None else valid_T & members_T
        weights_Tk, indices_Tk, routed = self.router(x_TD, valid_T, batch_size=x.shape[0], return_stats=True)
        check_shape("indices of the router", indices_Tk, weights_Tk.shape)
        check_ids("indices of the router", indices_Tk)
        weights_Tk = nan_outside(weights_Tk, indices_Tk, self.num_experts)
        indices_Tk = jnp.clip(indices_Tk, 0, self.num_experts - 1)
        factor = self.capacity_factor if limit_capacity else 0.0
        room = layer_capacity(x_TD.shape[0], members_T, indices_Tk.shape[1], self.num_experts, factor)
        plan = plan_dispatch(indices_Tk, valid_T, self.num_experts, room)
        rows_RD: jax.Array = _spread(x_TD, plan.choice_R, plan.row_R, indices_Tk.shape[1])
        out_RD = self._apply_experts(rows_RD, plan.ends_E)
        factors_Tk = None
        if self.gradient_scale:
            factors_Tk = gradient_factors(routed.expert_counts, weights_Tk.dtype)[indices_Tk]
        y_TD = combine(out_RD, weights_Tk, plan, factors_Tk)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD).astype(y_TD.dtype)
        stats = MoEStats(*routed, dropped=routed.expert_counts.sum(dtype=jnp.int32) - plan.ends_E[-1])
        self.keep(stats=stats)
        y_BSD = y_TD.astype(x.dtype).reshape(x.shape)
        return (y_BSD, stats) if return_stats else y_BSD

    @property
    def aux_loss(self) -> jax.Array:
        """Balancing loss of the last call outside jit; 0 before any."""
        stats = self.kept("stats")
        return self.router.aux_loss if stats is None else stats.aux_loss

    @property
    def z_loss(self) -> jax.Array:
        """Router z-loss of the last call outside jit; 0 before any."""
        stats = self.kept("stats")
        return self.router.z_loss if stats is None else stats.z_loss

    @property
    def expert_counts(self) -> jax.Array:
        """(E,) choices of each expert in the last call outside jit; 0 before any."""
        stats = self.kept("stats")
        return self.router.expert_counts if stats is None else stats.expert_counts

    def expert_weights(self) -> dict[str, jax.Array]:
        """``gate`` (silu only), ``up`` (E, D, F) and ``down`` (E, F, D), from wherever they are held; {} for experts of
        another kind.
        """
        names = _projections(self.activation)
        if self.packed_experts:
            return {name: getattr(self, f"{name}_w").get_value() for name in names}
        return {name: _stacked(list(self.experts.values()), name) for name in names}

    def _apply_experts(self, x_RD: jax.Array, ends_E: jax.Array) -> jax.Array:
        """Each row through its expert; 0 for rows of no expert."""
        if self.activation is None:
            return apply_modules(x_RD, ends_E, list(self.experts.values()))
        weights, activation = self.expert_weights(), ACTIVATIONS[self.activation]
        return apply_packed(x_RD, ends_E, weights["up"], weights["down"], weights.get("gate"), activation)


def build_moe(
    dim: int,
    hidden_dim: int,
    num_experts: int,
    top_k: int,
    activation: str = "silu",
    router_type: str = "softmax_topk",
    shared_experts: int = 0,
    capacity_factor: float = 0.0,
    gradient_scale: bool = False,
    sequence_aux_loss_weight: float = 0.0,
    bias_schedule: str = "constant",
    packed_experts: bool = False,
    *,
    norm_topk_prob: bool = True,
    routed_scaling: float = 1.0,
    rngs: nnx.Rngs,
) -> MoEMLP:
    """A layer of ``num_experts`` experts of width ``hidden_dim`` and, if asked for, one shared expert n times as wide.

    Raises:
        KeyError: an unknown router or activation, with the names that exist.
        ValueError: values that no layer can have.
    """
    options = {
        "sequence_aux_loss_weight": (sequence_aux_loss_weight, 0.0),
        "bias_schedule": (bias_schedule, "constant"),
        "norm_topk_prob": (norm_topk_prob, True),
        "routed_scaling": (routed_scaling, 1.0),
    }
    given = {name: value for name, (value, default) in options.items() if value != default}
    return MoEMLP(
        build_router(router_type, dim, num_experts, top_k, rngs=rngs, **given),
        [build_mlp(dim, hidden_dim, activation, rngs=rngs) for _ in range(num_experts)],
        build_mlp(dim, hidden_dim * shared_experts, activation, rngs=rngs) if shared_experts > 0 else None,
        capacity_factor,
        gradient_scale,
        packed_experts,
    )


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int | None:
    """Choices that an expert takes: max(1, ceil(tokens k / E * factor)), exact on the decimal digits of the factor.

    None, no limit, for factor 0.
    """
    if factor == 0:
        return None
    exact = Fraction(str(factor))
    return max(1, -(-tokens * top_k * exact.numerator // (num_experts * exact.denominator)))


def layer_capacity(
    tokens: int, members_T: jax.Array | None, top_k: int, num_experts: int, factor: float
) -> int | jax.Array | None:
    """`capacity` of all tokens, or of those that are True in ``members_T``: an array, as their number is one."""
    if members_T is None or factor == 0:
        return capacity(tokens, top_k, num_experts, factor)
    return jnp.asarray(token_capacities(tokens, top_k, num_experts, factor))[members_T.sum(dtype=jnp.int32)]


def plan_dispatch(
    indices_Tk: jax.Array, valid_T: jax.Array | None, num_experts: int, room: int | jax.Array | None = None
) -> Dispatch:
    """Sort the choices by expert, those of equal expert slot by slot and then by token.

    Args:
        valid_T: tokens whose choices count; None means all.
        room: choices that an expert takes, a number or an array of one; None means any number.
    """
    tokens, top_k = indices_Tk.shape
    expert_R = indices_Tk.T.ravel()
    if valid_T is not None:
        expert_R = jnp.where(jnp.tile(valid_T, top_k), expert_R, num_experts)
    rows_R = jnp.arange(tokens * top_k, dtype=jnp.int32)
    expert_R, choice_R = lax.sort((expert_R, rows_R), num_keys=1, is_stable=True)
    ends_E = _ends(expert_R, num_experts)
    if room is not None and not (isinstance(room, int) and room >= tokens * top_k):
        starts = jnp.pad(ends_E, (1, 0))
        expert_R = jnp.where(rows_R - starts[expert_R] < room, expert_R, num_experts)
        expert_R, choice_R = lax.sort((expert_R, choice_R), num_keys=1, is_stable=True)
        ends_E = _ends(expert_R, num_experts)
    row_R = jnp.zeros_like(choice_R).at[choice_R].set(rows_R, unique_indices=True)
    return Dispatch(choice_R, row_R, ends_E)


def combine(
    out_RD: jax.Array, weights_Tk: jax.Array, plan: Dispatch, gradient_factors_Tk: jax.Array | None = None
) -> jax.Array:
    """(T, D): for each token the weighted sum of its rows, in the dtype of the weights."""
    tokens, top_k = weights_Tk.shape
    out_kTD = _permute(out_RD, plan.row_R, plan.choice_R).reshape(top_k, tokens, out_RD.shape[1])
    if gradient_factors_Tk is not None:
        out_kTD = _scale_gradient(out_kTD, gradient_factors_Tk.T[:, :, None])
    return (out_kTD.astype(weights_Tk.dtype) * weights_Tk.T[:, :, None]).sum(axis=0)


def gradient_factors(counts_E: jax.Array, dtype: Any) -> jax.Array:
    """mean count / count of each expert; 1 for an expert without tokens, to which no gradient flows."""
    wide_E = counts_E.astype(dtype)
    return jnp.where(counts_E > 0, wide_E.sum() / (jnp.maximum(wide_E, 1) * counts_E.shape[0]), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_TD: jax.Array, choice_R: jax.Array, row_R: jax.Array, top_k: int) -> jax.Array:
    """Row r is the token of choice r; backward adds up the rows of a token, in the order of its choices."""
    return x_TD[choice_R % max(x_TD.shape[0], 1)]


def _spread_forward(x_TD: jax.Array, choice_R: jax.Array, row_R: jax.Array, top_k: int) -> tuple[jax.Array, Any]:
    return _spread(x_TD, choice_R, row_R, top_k), (choice_R, row_R)


def _spread_backward(top_k: int, saved: Any, dy_RD: jax.Array) -> tuple[jax.Array, None, None]:
    choice_R, row_R = saved
    dx_kTD = _permute(dy_RD, row_R, choice_R).reshape(top_k, -1, dy_RD.shape[1])
    return dx_kTD.sum(axis=0), None, None


@jax.custom_vjp
def _permute(x_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """x[order]; backward takes by the inverse order, where JAX, not knowing that rows occur once, would add."""
    return x_RD[order_R]


def _permute_forward(x_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> tuple[jax.Array, Any]:
    return x_RD[order_R], (order_R, inverse_R)


def _permute_backward(saved: Any, dy_RD: jax.Array) -> tuple[jax.Array, None, None]:
    order_R, inverse_R = saved
    return _permute(dy_RD, inverse_R, order_R), None, None


@jax.custom_vjp
def _scale_gradient(x: jax.Array, factors: jax.Array) -> jax.Array:
    """The identity; backward multiplies by the factors."""
    return x


def _scale_gradient_forward(x: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, factors


def _scale_gradient_backward(factors: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (dy * factors).astype(dy.dtype), jnp.zeros_like(factors)


_spread.defvjp(_spread_forward, _spread_backward)
_permute.defvjp(_permute_forward, _permute_backward)
_scale_gradient.defvjp(_scale_gradient_forward, _scale_gradient_backward)


def _ends(expert_R: jax.Array, num_experts: int) -> jax.Array:
    experts = jnp.arange(num_experts, dtype=expert_R.dtype)
    return jnp.searchsorted(expert_R, experts, side="right", method="compare_all").astype(jnp.int32)


def _projections(activation: str | None) -> tuple[str, ...]:
    """What an expert consists of; of one that is no `SwiGLUMLP` or `StandardMLP` nothing is known."""
    if activation is None:
        return ()
    return PROJECTIONS if activation == "silu" else PROJECTIONS[1:]


def _stacked(experts: Sequence[Any], name: str) -> jax.Array:
    """(E, in, out): the transposed stack of the (out, in) matrices."""
    return jnp.stack([getattr(expert, f"{name}_proj").weight.get_value() for expert in experts]).swapaxes(1, 2)


def _common_activation(experts: Sequence[Module]) -> str | None:
    """The activation of experts that are alike; None for a kind that was registered."""
    kinds = {(type(expert), getattr(expert, "activation", None)) for expert in experts}
    if len(kinds) != 1:
        names = ", ".join(sorted({kind.__name__ for kind, _ in kinds})) or "none"
        raise ValueError(f"experts = {names}: must be layers of one type, all with the same activation")
    kind, activation = kinds.pop()
    return "silu" if kind is SwiGLUMLP else activation if kind is StandardMLP else None
