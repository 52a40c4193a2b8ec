"""What an optimiser keeps for each parameter: moments of the parameter's shape, and the number of updates that it took.

In a state and in checkpoints they are ``<moment>.<parameter>`` and ``t.<parameter>``.
"""

from __future__ import annotations

from shared_config.registry import declaration

MOMENTS = ("m", "v")
"""Those of AdamW: the averages of gradients and of their squares."""
UPDATES = "t"


def moments_of(optimizer: str) -> tuple[str, ...]:
    """The moments of a registered optimiser; AdamW's where none were declared."""
    return declaration("optimizer", optimizer).moments or MOMENTS
