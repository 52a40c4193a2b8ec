"""What limits depend on, of the config of a trace: how far a step goes, whether tokens are routed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shared_config.errors import UserError
from shared_config.interchange.toml import number_of, section_of
from shared_config.parity.traces import Trace
from shared_config.parity.validation import MOMENT_STEPS


def step_sensitivity(config: Mapping[str, object], norm: float, parameters: int) -> float:
    """Steps of a learning rate of 1 for each unit of a gradient, of AdamW with `validation_moments`.

    Args:
        norm: of all gradients together, which are clipped.
        parameters: how many numbers that is; the drawn second moments are 1 over this.
    """
    beta1, beta2 = _betas(section_of(config, "optimizer").get("betas", (0.9, 0.95)))
    clip = number_of(config, "train", "grad_clip_norm", 1.0)
    clipped = min(1.0, clip / norm) if clip and norm else 1.0
    steps = MOMENT_STEPS + 1
    first = (1 - beta1) / (1 - beta1**steps)
    second = math.sqrt((1 - beta2**steps) / max(beta2, 1e-2))
    return clipped * first * second * math.sqrt(parameters)


def _betas(values: object) -> tuple[float, float]:
    if not isinstance(values, list | tuple):
        raise UserError(f"optimizer.betas = {values!r}: must be two numbers")
    beta1, beta2 = values
    return beta1, beta2


def has_kinks(config: Mapping[str, object]) -> bool:
    """Whether an activation of the model of a config, as nested dicts, has a derivative that jumps."""
    return any(section_of(config, section).get("activation") == "relu" for section in ("model", "adapter"))


def has_experts(config: Mapping[str, object]) -> bool:
    """Whether the model of a config, as nested dicts, routes tokens to experts."""
    return number_of(config, "model", "num_experts", 0) > 0 or experts_choose_tokens(config)


def experts_choose_tokens(config: Mapping[str, object]) -> bool:
    """Whether experts take tokens, instead of tokens experts."""
    return "moma_experts_per_modality" in section_of(config, "vlm")


def learning_rate(trace: Trace) -> float:
    """The sum of the rates of the steps that a trace of training was to record."""
    lr = trace.meta.extra["lr"]
    assert isinstance(lr, int | float)
    return lr
