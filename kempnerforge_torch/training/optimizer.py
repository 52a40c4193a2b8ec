"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and clipping by the global norm.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)        t = 1, 2, ...

t counts the updates of each parameter: a frozen one gets none. The decay acts where the parameter table says so.
Checkpoints hold the moments as ``m.<parameter>`` and ``v.<parameter>``, the counts as ``t.<parameter>``.

Another optimiser is registered in category "optimizer" under the name that ``optimizer.name`` gives. It is called with
groups of parameters, each with its ``weight_decay``, and the config. Its state of a parameter, which exists and is 0 at
the start, is a ``step`` and the moments that `shared_config.registry.declare` names: "m" as ``exp_avg``, "v" as
``exp_avg_sq``, others under their names; without a declaration these two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kempnerforge_torch.distributed.ranks import global_norm, local
from kempnerforge_torch.model.state import assign
from kempnerforge_torch.registry import registry
from kempnerforge_torch.training import lion, muon, schedule_free  # noqa: F401 (they register)
from kempnerforge_torch.training.groups import Group
from shared_config.contract.moments import AVERAGE, moments_of, optimizer_of, optimizers_of
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import ParameterTable, check_names
from shared_config.interchange.parts import Parts
from shared_config.schema.optimizer import OptimizerConfig

FOUND_INF = "found_inf"
"""The attribute in which `torch.amp.GradScaler` tells fused optimisers to skip a step."""
_DECAYS = "decays"
_MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}


def build_optimizer(
    parameters: Mapping[str, Float[Tensor, "..."]], table: ParameterTable, config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimiser of the named parameters, its moments 0; set its rates before each step."""
    parts = []
    for kind in optimizers_of(config):
        own = {name: tensor for name, tensor in parameters.items() if optimizer_of(config, name, table[name]) == kind}
        groups: list[Group] = [
            {"params": [tensor for name, tensor in own.items() if table[name].decay == decays], _DECAYS: decays}
            for decays in (True, False)
        ]
        for group in groups:
            group["weight_decay"] = config.weight_decay if group[_DECAYS] else 0.0
        part = registry.get("optimizer", kind)(groups, config)
        for name, tensor in own.items():
            part.state[tensor] = _initial_state(tensor, moments_of(config, name, table[name]))
        parts.append(part)
    optimizer = parts[0] if len(parts) == 1 else _Together(parts)
    optimizer.defaults[AVERAGE] = config.ema_decay
    return optimizer


@registry.register("optimizer", "adamw")
def adamw(groups: list[Group], config: OptimizerConfig) -> AdamW:
    """AdamW of groups of parameters, fused unless all are on the CPU."""
    on_cpu = all(tensor.device.type == "cpu" for group in groups for tensor in _parameters(group))
    return AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        amsgrad=False,
        maximize=False,
        capturable=False,
        differentiable=False,
        foreach=on_cpu,
        fused=not on_cpu,
    )


class AdamW(torch.optim.AdamW):
    """torch's, but each rank updates its shards as plain tensors, element by element."""

    def _init_group(self, *args: Any, **kwargs: Any) -> bool:
        is_complex = super()._init_group(*args, **kwargs)
        for tensors in args:
            if isinstance(tensors, list):
                tensors[:] = map(local, tensors)
        return is_complex


class _Together(torch.optim.Optimizer):
    """Several optimisers as one, which has their groups and their states."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            self.state.update(part.state)
            part.state = self.state

    def step(self, closure: None = None) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """The rates of the next step."""
    for group in optimizer.param_groups:
        group["lr"], group["average"] = rates.lr, rates.average
        group["weight_decay"] = rates.decay if group[_DECAYS] else 0.0


def update(optimizer: torch.optim.Optimizer, rates: Rates, finite: Bool[Tensor, ""] | None = None) -> None:
    """One step with the gradients of the parameters; where ``finite`` (a bool scalar) is false nothing changes.

    The device decides: the host does not wait for it.
    """
    set_rates(optimizer, rates)
    averages = bool(optimizer.defaults.get(AVERAGE))
    if finite is None or (finite.device.type == "cpu" and finite):
        _step(optimizer)
    elif finite.device.type != "cpu" and (averages or not isinstance(optimizer, torch.optim.AdamW)):
        before = _snapshot(optimizer)
        _step(optimizer)
        _restore(before, finite)
    elif finite.device.type != "cpu":
        setattr(optimizer, FOUND_INF, (~finite).to(torch.float32))
        optimizer.step()
        delattr(optimizer, FOUND_INF)


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer) -> None:
    """A step, and that of the average of the weights, where there is one: ema <- d (ema + p before) - d p after."""
    decay_rate = optimizer.defaults.get(AVERAGE, 0.0)
    parameters = _with_gradients(optimizer) if decay_rate else []
    averages = [local(optimizer.state[tensor][AVERAGE]) for tensor in parameters]
    values = [local(tensor.detach()) for tensor in parameters]
    for average, value in zip(averages, values, strict=True):
        average.add_(value)
    optimizer.step()
    for average, value in zip(averages, values, strict=True):
        average.sub_(value).mul_(decay_rate)


@torch.no_grad()
def stays_finite(optimizer: torch.optim.Optimizer, rates: Rates) -> Bool[Tensor, ""]:
    """Whether the next step leaves parameters and moments finite, a bool scalar; of sharded ones, this rank's shards.
    AdamW's step is computed one tensor at a time; another optimiser takes the step, and its changes are undone.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        before = _snapshot(optimizer)
        set_rates(optimizer, rates)
        _step(optimizer)
        is_finite = torch.stack([tensor.isfinite().all() for tensor, _ in before]).all()
        _restore(before, torch.zeros_like(is_finite))
        return is_finite
    finite = []
    for group in optimizer.param_groups:
        b1, b2 = group["betas"]
        decay = rates.decay if group[_DECAYS] else 0.0
        for tensor in group["params"]:
            if tensor.grad is None:
                continue
            state = {name: local(value) for name, value in optimizer.state[tensor].items()}
            parameter, gradient, step = local(tensor), local(tensor.grad), state["step"] + 1
            m = state["exp_avg"].lerp(gradient, 1 - b1)
            v = torch.addcmul(state["exp_avg_sq"] * b2, gradient, gradient, value=1 - b2)
            updated = parameter - rates.lr * (m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + group["eps"]))
            finite.append((updated - rates.lr * decay * parameter).isfinite().all() & v.isfinite().all())
    return torch.stack(finite).all()


class Step:
    """One step of an optimiser, whose gradients may be narrower than the parameters. `fused_adamw` has AdamW's, in one
    pass over memory.
    """

    @torch.no_grad()
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Mapping[Float[Tensor, "..."], Float[Tensor, "..."]],
        rates: Rates,
        factor: Float[Tensor, ""] | None = None,
    ):
        """
        Args:
            gradients: by parameter; they are changed.
            factor: of all gradients; 1 if None.
        """
        self._optimizer, self._rates = optimizer, rates
        for parameter, gradient in gradients.items():
            parameter.grad = gradient.to(parameter.dtype)
        if factor is not None:
            _scale([parameter.grad for parameter in gradients if parameter.grad is not None], factor)

    def stays_finite(self) -> Bool[Tensor, ""]:
        """See `stays_finite`."""
        return stays_finite(self._optimizer, self._rates)

    def take(self, finite: Bool[Tensor, ""] | None = None) -> None:
        """Take the step, see `update`, and forget the gradients."""
        update(self._optimizer, self._rates, finite)
        self._optimizer.zero_grad(set_to_none=True)


def get_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Float[Tensor, "..."]]
) -> dict[str, Shaped[Tensor, "..."]]:
    """Moments (the tensors of the optimiser themselves) and counts of updates (int32 scalars) by name."""
    kept = {name: _moments(optimizer.state[tensor]) for name, tensor in parameters.items()}
    kinds = dict.fromkeys(kind for own in sorted(kept.values(), key=len, reverse=True) for kind in own)
    moments = {f"{kind}.{name}": own[kind] for kind in kinds for name, own in kept.items() if kind in own}
    steps = {f"t.{name}": optimizer.state[tensor]["step"].to(torch.int32) for name, tensor in parameters.items()}
    return moments | steps


def set_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Float[Tensor, "..."]],
    state: Mapping[str, Shaped[Tensor, "..."] | np.ndarray | Parts],
    step: int,
) -> None:
    """Copy moments and counts (tensors, NumPy arrays or their parts) into the optimiser; counts that are not given are
    ``step``.

    Raises:
        UserError: lists every missing, unknown and misshapen name; the optimiser is unchanged.
    """
    own = get_optimizer_state(optimizer, parameters)
    values = {f"t.{name}": np.asarray(step) for name in parameters} | dict(state)
    check_names(
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        {name: tuple(value.shape) for name, value in values.items()},
    )
    for name, tensor in parameters.items():
        tensor_state = optimizer.state[tensor]
        for moment, tensor_of_moment in _moments(tensor_state).items():
            assign(tensor_of_moment, values[f"{moment}.{name}"])
        assign(tensor_state["step"], values[f"t.{name}"])


@torch.no_grad()
def clip_by_global_norm(
    gradients: Mapping[str, Float[Tensor, "..."]], max_norm: float, stages: int = 1
) -> tuple[Mapping[str, Float[Tensor, "..."]], Float[Tensor, ""]]:
    """Scale all gradients, in place, by max_norm / max(norm, max_norm); ``max_norm`` 0 leaves them as they are.

    Args:
        stages: of a pipeline, each with the gradients of its own parameters; the norm is that of all.

    Returns:
        The gradients, and their Euclidean norm before, in at least float32.
    """
    tensors = list(gradients.values())
    norm = global_norm(tensors, stages)
    if (factor := clip_factor(norm, max_norm)) is not None:
        _scale(tensors, factor)
    return gradients, norm


def clip_factor(norm: Float[Tensor, ""], max_norm: float) -> Float[Tensor, ""] | None:
    """What clips gradients of this norm, as a factor of all; None where ``max_norm`` is 0."""
    return max_norm / norm.clamp(min=max_norm) if max_norm > 0 else None


def _scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    if tensors:
        torch._foreach_mul_([local(tensor) for tensor in tensors], factor)  # pyright: ignore[reportPrivateImportUsage]


def _moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moment -> what the state of a tensor keeps of it."""
    return {_MOMENTS.get(key, key): value for key, value in state.items() if key != "step"}


def _initial_state(tensor: Tensor, moments: Sequence[str]) -> dict[str, Tensor]:
    keys = {moment: key for key, moment in _MOMENTS.items()}
    zeros = {keys.get(moment, moment): torch.zeros_like(tensor, requires_grad=False) for moment in moments}
    return {"step": torch.zeros((), dtype=torch.float32, device=tensor.device), **zeros}


def _snapshot(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """What a step changes on this rank, parameters first, each with a copy of it."""
    parameters = _with_gradients(optimizer)
    states = [value for tensor in parameters for value in optimizer.state[tensor].values() if isinstance(value, Tensor)]
    return [(local(tensor.detach()), local(tensor.detach()).clone()) for tensor in (*parameters, *states)]


@torch.no_grad()
def _restore(before: list[tuple[Tensor, Tensor]], keep: Tensor) -> None:
    """Restore the saved value of each tensor, unless the bool scalar is true."""
    for tensor, saved in before:
        tensor.copy_(torch.where(keep, tensor, saved))


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.grad is not None]


def _parameters(group: Group) -> list[Tensor]:
    tensors = group["params"]
    assert isinstance(tensors, list)
    return tensors
