"""Mixture-of-experts feed-forward layer (Shazeer et al. 2017, arXiv:1701.06538).

A token that k experts are chosen for becomes k rows; the rows are sorted by expert, grouped products multiply each
expert's part by its matrices, and the k results of a token are added up by the inverse of the sort.

    T = 3, k = 2, E = 4     assignments by slot, then token  rows, sorted by expert
    token 0 -> 2, 0         t0:2 t1:0 t2:2                   expert    0     1     2     3
    token 1 -> 0, 3         t0:0 t1:3 t2:1                   token   1  0 |  2 | 0  2 |  1
    token 2 -> 2, 1

Shapes: B batch, S sequence, T = B * S tokens, D model dim, F expert width, E experts, k assignments of each token,
R = k * T rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kempnerforge_torch.model.checks import check_ids, check_mask, check_shape, nan_outside
from kempnerforge_torch.model.dispatch import (
    Routes,
    combine,
    dispatch,
    gradient_factors,
    layer_capacity,
    plan_dispatch,
)
from kempnerforge_torch.model.experts import apply_modules, apply_packed
from kempnerforge_torch.model.experts import grouped_expert_forward as grouped_expert_forward
from kempnerforge_torch.model.experts import grouped_expert_forward_packed as grouped_expert_forward_packed
from kempnerforge_torch.model.linear import Linear, matrix
from kempnerforge_torch.model.mlp import ACTIVATIONS, GATES, GEGLUMLP, StandardMLP, SwiGLUMLP, build_mlp
from kempnerforge_torch.model.router import TopKRouter, build_router
from kempnerforge_torch.model.stats import MoEOutput, MoEStats, RouterStats, StatsGetters, keep_stats
from shared_config.contract.capacity import capacity_share
from shared_config.schema.model import ModelConfig

PROJECTIONS = ("gate", "up", "down")


class MoEMLP(StatsGetters):
    """y_t = sum over the assignments j of w_tj expert_{i_tj}(x_t), plus shared_expert(x_t), or
    sigmoid(shared_expert_gate(x_t)) shared_expert(x_t).

    Args:
        router: called as ``router(x_TD, valid_T, batch_size=B, return_stats=True)``, gives a
            `RouterOutput`.
        experts: E feed-forward layers of one kind. One that is neither a `SwiGLUMLP` nor a `StandardMLP` computes all
            rows, of which its own are used.
        shared_expert: applied to every token.
        shared_expert_gate: to one number for each token.
        capacity_factor: each expert takes at most max(1, ceil(T k / E * factor)) assignments, first ones before second
            ones, then in the order of tokens; assignments beyond that are dropped and add nothing. 0: no limit.
        gradient_scale: multiply the gradient that flows through an expert by (mean assignments) / (its assignments).
        packed_experts: hold the experts' weights as ``gate_w``, ``up_w`` (E, D, F) and ``down_w`` (E, F, D).
    """

    def __init__(
        self,
        router: TopKRouter,
        experts: Sequence[nn.Module],
        shared_expert: nn.Module | None = None,
        capacity_factor: float = 0.0,
        gradient_scale: bool = False,
        packed_experts: bool = False,
        shared_expert_gate: Linear | None = None,
    ):
        super().__init__()
        if not 0 <= capacity_factor < float("inf"):
            raise ValueError(f"capacity_factor = {capacity_factor}: must be positive, or 0 for no limit")
        self.activation = _common_activation(experts)
        if packed_experts and self.activation is None:
            kind = type(experts[0]).__name__
            raise ValueError(
                f"packed_experts = True: must be False for experts of type {kind}, which has other weights"
            )
        self.num_experts = len(experts)
        self.capacity_share = capacity_share(capacity_factor)
        self.gradient_scale = gradient_scale
        self.packed_experts = packed_experts
        self.router = router
        if packed_experts:
            for name in _projections(self.activation):
                self.register_parameter(f"{name}_w", nn.Parameter(_stacked(experts, name).detach().contiguous()))
        else:
            self.experts = nn.ModuleList(experts)
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate

    @property
    def capacity_factor(self) -> float:
        """As it was given, and stays: a compiled program holds it. 0: no limit."""
        numerator, denominator = self.capacity_share or (0, 1)
        return numerator / denominator

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        valid: Bool[Tensor, "B S"] | None = None,
        *,
        members: Bool[Tensor, "B S"] | None = None,
        limit_capacity: bool = True,
        return_stats: bool = False,
    ) -> Float[Tensor, "B S D"] | MoEOutput:
        """(B, S, D) -> (B, S, D).

        Args:
            valid: bool (B, S), False for padding, which is sent to no routed expert.
            members: bool (B, S), False at positions that are not this layer's tokens: they are not routed and, unlike
                padding, do not count towards the capacity.
            limit_capacity: False: an expert takes any number of assignments in this call.
            return_stats: give a `MoEOutput`, and leave the getters alone.

        Raises:
            ValueError: masks, or experts that the router names, of another dtype or shape. A token becomes NaN if its
                router names an expert that doesn't exist.
        """
        for name, mask in (("valid", valid), ("members", members)):
            if mask is not None:
                check_mask(name, mask, x.shape[:2])
        x_TD = x.flatten(0, 1)
        valid_T, members_T = (None if mask is None else mask.flatten() for mask in (valid, members))
        if members_T is not None:
            valid_T = members_T if valid_T is None else valid_T & members_T
        weights_Tk, indices_Tk, routed = self.router(x_TD, valid_T, batch_size=x.shape[0], return_stats=True)
        check_shape("indices of the router", indices_Tk, weights_Tk.shape)
        check_ids("indices of the router", indices_Tk)
        weights_Tk = nan_outside(weights_Tk, indices_Tk, self.num_experts)
        indices_Tk = indices_Tk.clamp(0, self.num_experts - 1)
        factor = self.capacity_share if limit_capacity else None
        capacity = layer_capacity(x_TD.shape[0], members_T, indices_Tk.shape[1], self.num_experts, factor)
        plan = plan_dispatch(indices_Tk, valid_T, self.num_experts, capacity)
        factors_Tk = None
        if self.gradient_scale:
            factors_Tk = gradient_factors(routed.expert_counts, weights_Tk.dtype)[indices_Tk]
        limit, complete = capacity if isinstance(capacity, int) else None, valid_T is None and capacity is None
        y_TD = self._routed(x_TD, Routes(weights_Tk, plan, factors_Tk, complete, limit))
        if self.shared_expert is not None:
            y_TD = y_TD + self._shared(self.shared_expert(x_TD), x_TD)
        stats = MoEStats(*routed, dropped=routed.expert_counts.sum(dtype=torch.int32) - plan.ends_E[-1])
        y_BSD = y_TD.to(x.dtype).reshape(x.shape)
        if return_stats:
            return MoEOutput(y_BSD, stats)
        self.keep_stats(stats)
        return y_BSD

    def run(
        self,
        x: Float[Tensor, "B S D"],
        valid: Bool[Tensor, "B S"] | None = None,
        *,
        members: Bool[Tensor, "B S"] | None = None,
        limit_capacity: bool = True,
    ) -> MoEOutput:
        """The result of a call, with its stats. Arguments as for `forward`; nothing is kept."""
        return self(x, valid, members=members, limit_capacity=limit_capacity, return_stats=True)

    def keep_stats(self, stats: RouterStats | MoEStats) -> None:
        """Make the getters report this call, those of the router too. Inside compiled code nothing happens."""
        super().keep_stats(stats)
        keep_stats(self.router, stats)

    def _shared(self, shared_TD: Tensor, x_TD: Tensor) -> Tensor:
        """What the shared expert adds, in at least float32 if there is a gate."""
        if self.shared_expert_gate is None:
            return shared_TD
        gate_T1 = self.shared_expert_gate(x_TD)
        return gate_T1.to(torch.promote_types(gate_T1.dtype, torch.float32)).sigmoid() * shared_TD

    def expert_weights(self, dtype: torch.dtype = torch.float32) -> dict[str, Float[Tensor, "E _ _"]]:
        """``gate`` (if gated), ``up`` (E, D, F) and ``down`` (E, F, D), from wherever they are held; {} for experts of
        another kind.

        Args:
            dtype: of what is held as int8; others have their own.
        """
        names = _projections(self.activation)
        if self.packed_experts:
            return {name: matrix(self, f"{name}_w", dtype) for name in names}
        return {name: _stacked(list(self.experts), name, dtype) for name in names}

    def _routed(self, x_TD: Tensor, routes: Routes) -> Tensor:
        """(T, D): for each token the weighted sum of what its experts make of it, in the dtype of the weights."""
        return combine(self._apply_experts(dispatch(x_TD, routes), routes.plan.ends_E), routes)

    def _apply_experts(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Each row through its expert; anything in rows of no expert."""
        if self.activation is None:
            return apply_modules(x_RD, ends_E, list(self.experts))
        weights = {name: self._matrices(name, x_RD.dtype) for name in _projections(self.activation)}
        up_w, down_w, gate_w = weights["up"], weights["down"], weights.get("gate")
        return apply_packed(x_RD, ends_E, up_w, down_w, gate_w, (GATES | ACTIVATIONS)[self.activation])

    def _matrices(self, name: str, dtype: torch.dtype) -> Tensor | list[Tensor]:
        """The experts' matrices as they are held: packed (E, in, out), or one (in, out) view per expert."""
        if self.packed_experts:
            return matrix(self, f"{name}_w", dtype)
        return [matrix(getattr(expert, f"{name}_proj"), "weight", dtype).t() for expert in self.experts]


def build_moe_layer(config: ModelConfig) -> MoEMLP:
    """The mixture of experts of one layer of a model."""
    return build_moe(
        config.dim,
        config.computed_expert_ffn_hidden_dim,
        config.num_experts,
        config.moe_top_k,
        activation=config.activation,
        router_type=config.moe_router,
        shared_experts=config.moe_shared_experts,
        shared_expert_gate=config.moe_shared_expert_gate,
        capacity_factor=config.moe_capacity_factor,
        gradient_scale=config.moe_gradient_scale,
        sequence_aux_loss_weight=config.moe_sequence_aux_loss_weight,
        bias_schedule=config.moe_bias_schedule,
        packed_experts=config.moe_packed_experts,
        norm_topk_prob=config.moe_norm_topk_prob,
        routed_scaling=config.moe_routed_scaling,
    )


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
    shared_expert_gate: bool = False,
) -> MoEMLP:
    """A layer of ``num_experts`` experts of width ``hidden_dim`` and, if asked for, one shared expert n times as
    wide, with or without a gate.

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
        build_router(router_type, dim, num_experts, top_k, **given),
        [build_mlp(dim, hidden_dim, activation) for _ in range(num_experts)],
        build_mlp(dim, hidden_dim * shared_experts, activation) if shared_experts > 0 else None,
        capacity_factor,
        gradient_scale,
        packed_experts,
        Linear(dim, 1) if shared_expert_gate else None,
    )


def _projections(activation: str | None) -> tuple[str, ...]:
    """The projections of an expert; none are known of one that is not a `SwiGLUMLP` or `StandardMLP`."""
    if activation is None:
        return ()
    return PROJECTIONS if activation in GATES else PROJECTIONS[1:]


def _stacked(experts: Sequence[nn.Module], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(E, in, out): a view of the stacked (out, in) matrices."""
    return torch.stack([matrix(getattr(expert, f"{name}_proj"), "weight", dtype) for expert in experts]).transpose(1, 2)


def _common_activation(experts: Sequence[nn.Module]) -> str | None:
    """The activation of experts that are alike; None for a kind that was registered."""
    kinds = {(type(expert), getattr(expert, "activation", None)) for expert in experts}
    if len(kinds) != 1:
        names = ", ".join(sorted({kind.__name__ for kind, _ in kinds})) or "none"
        raise ValueError(f"experts = {names}: must be layers of one type, all with the same activation")
    kind, activation = kinds.pop()
    gated = {SwiGLUMLP: "silu", GEGLUMLP: "geglu_tanh"}
    return gated.get(kind, activation if kind is StandardMLP else None)
