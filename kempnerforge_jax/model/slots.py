"""Where a cache keeps the tokens of a row: each in the slot of its position, or in a ring.

Shapes: B batch, M slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class LinearSlots:
    """The slot of a token is its position, and none is overwritten.

    Attributes:
        count: slots of a row.
    """

    count: int

    @property
    def window(self) -> None:
        """Tokens that each one may see, at most; None: all."""

    @property
    def spare(self) -> int:
        """Tokens held per row beyond those that the next one may see."""
        return self.count

    def check_window(self, sliding_window: int | None) -> None:
        """Check that a window is held: any is."""

    def fits(self, length: int) -> bool:
        """Whether ``length`` more tokens overwrite nothing that one of them may see."""
        return True

    def stored(self, length: int) -> int:
        """How many of ``length`` new tokens are stored, the last ones."""
        return length

    def slots_of(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """The slots of tokens at these positions."""
        return positions

    def positions(self, slots: int, lengths: Int[Array, "B"]) -> None:
        """Positions of what the first slots hold after ``lengths`` tokens (B,); None: 0, 1, ..."""

    def first_seen(self, lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first position (B,) that the next token may see, after ``lengths`` tokens (B,)."""
        return jnp.zeros_like(lengths)


@dataclass(frozen=True)
class RingSlots:
    """A token overwrites one that no later token may see:

        window 3, 4 slots, 6 tokens seen        slot     0 1 2 3
                                                holds    4 5 2 3

    Attributes:
        count: slots of a row.
        window: tokens that each one may see, at most.
    """

    count: int
    window: int

    @property
    def spare(self) -> int:
        """Tokens held per row beyond those that the next one may see."""
        return self.count - self.window

    def check_window(self, sliding_window: int | None) -> None:
        """Check that a window is held.

        Raises:
            ValueError: if it is not.
        """
        if not 0 < (sliding_window or 0) <= self.window:
            raise ValueError(f"sliding_window = {sliding_window}: must be at most the cache's, {self.window}")

    def fits(self, length: int) -> bool:
        """Whether ``length`` more tokens overwrite nothing that one of them may see."""
        return length <= self.spare + 1

    def stored(self, length: int) -> int:
        """How many of ``length`` new tokens are stored, the last ones."""
        return min(length, self.count)

    def slots_of(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """The slots of tokens at these positions."""
        return positions % self.count

    def positions(self, slots: int, lengths: Int[Array, "B"]) -> Int[Array, "B M"]:
        """Positions (B, M) of what the first slots hold after ``lengths`` tokens (B,); negative for empty slots."""
        slots_M = jnp.arange(slots, dtype=jnp.int32)
        last_B1 = lengths[:, None] - 1
        return last_B1 - (last_B1 - slots_M) % self.count

    def first_seen(self, lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first position (B,) that the next token may see, after ``lengths`` tokens (B,)."""
        return jnp.maximum(lengths + 1 - self.window, 0)


Slots = LinearSlots | RingSlots


def slots_for(max_seq_len: int, sliding_window: int | None, spare: int) -> Slots:
    """A ring of ``sliding_window + spare`` slots, if that is less than ``max_seq_len``; else one slot per position."""
    if sliding_window is None or sliding_window + spare >= max_seq_len:
        return LinearSlots(max_seq_len)
    return RingSlots(sliding_window + spare, sliding_window)
