"""Tensors that lie on many ranks, brought to the host of the first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from kempnerforge_torch.distributed.processes import is_main
from kempnerforge_torch.model.state import to_numpy
from shared_config.interchange.states import whole


def host_copies(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, np.ndarray]:
    """Copies of all tensors on the first rank, {} on others; the ranks that hold parts of one put it together."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if is_main():
            found[name] = to_numpy(gathered.to("cpu", copy=True))
    return found
