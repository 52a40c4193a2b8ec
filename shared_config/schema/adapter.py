"""The adapter between vision features and the language model's width."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Annotated

from shared_config.registry import declaration
from shared_config.schema.base import Count, PositiveInt, Section, registered, section


@section
class AdapterConfig(Section):
    """``hidden_dim`` 0 means the output width. The pooling types merge ``pool_window`` x ``pool_window`` cells of a
    square grid; attentional_pool does so with ``pool_heads`` heads of the encoder's width.
    """

    type: Annotated[str, registered("adapter")] = "mlp_2layer"
    hidden_dim: Count = 0
    activation: Annotated[str, registered("activation")] = "gelu"
    pool_window: PositiveInt = 2
    pool_heads: PositiveInt = 16

    def idle(self) -> Collection[str]:
        used = {
            "mlp_2layer": ("hidden_dim", "activation"),
            "linear": (),
            "avgpool": ("pool_window",),
            "attentional_pool": ("pool_window", "pool_heads"),
        }
        names = {"hidden_dim", "activation", "pool_window", "pool_heads"}
        return names - set(used.get(self.type, names))

    def output_num_tokens(self, num_input_tokens: int) -> int:
        """Tokens that leave the adapter when ``num_input_tokens`` enter.

        Raises:
            ValueError: a pooling type whose tokens form no square grid, or one that its window does not divide.
        """
        if self.type == "avgpool":
            return pooled_token_count(num_input_tokens, self.pool_window)
        if self.type == "attentional_pool":
            return pooled_token_count(num_input_tokens, self.pool_window, require_divisible=True)
        own = declaration("adapter", self.type).output_num_tokens
        return num_input_tokens if own is None else own(self, num_input_tokens)

    def problems_with(self, num_tokens: int, feature_dim: int = 0) -> Iterator[str]:
        """What does not fit an encoder of ``num_tokens`` tokens of width ``feature_dim`` (0: not known yet)."""
        try:
            self.output_num_tokens(num_tokens)
        except ValueError as error:
            yield f"type = {self.type!r}: {error}"
        if self.type == "attentional_pool" and feature_dim % self.pool_heads != 0:
            yield f"pool_heads = {self.pool_heads}: must divide the encoder's feature_dim = {feature_dim}"


def pooled_token_count(num_input_tokens: int, window: int, *, require_divisible: bool = False) -> int:
    """Number of windows over a square grid of ``num_input_tokens`` cells; ragged edge windows count unless refused.

    Raises:
        ValueError: if ``num_input_tokens`` is not a square, the window has no cell, or ``require_divisible`` and it
            does not divide the grid.
    """
    check_sizes(window=window)
    side = math.isqrt(num_input_tokens)
    if num_input_tokens < 1 or side * side != num_input_tokens:
        raise ValueError(f"num_input_tokens = {num_input_tokens}: must be a square number to be pooled as a grid")
    if require_divisible and side % window != 0:
        raise ValueError(f"pool_window = {window}: must divide the grid side {side} ({num_input_tokens} tokens)")
    return (-(-side // window)) ** 2


def check_sizes(**sizes: int) -> None:
    """Refuse numbers of which an adapter needs at least 1.

    Raises:
        ValueError: naming the first that is less.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
