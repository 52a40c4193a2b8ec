"""Where training runs."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from shared_config.errors import UserError
from shared_config.training.speed import resident_peak


def find_device(name: torch.device | str | None) -> torch.device:
    """The device of a name, as "cpu" or "cuda:1"; None is the accelerator, or the CPU where there is none.

    Raises:
        UserError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    allowed = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name)
        known = device.type in allowed and torch.empty(1, device=device).numel() == 1
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"device = {str(name)!r}: {str(error).splitlines()[0]}; torch has {', '.join(allowed)}"
        ) from None
    if not known:
        raise UserError(f"device = {str(name)!r}: must be one of {', '.join(allowed)}, or one with its index, as cpu:0")
    return device


def device_kind(device: torch.device) -> str:
    """The model of an accelerator as its driver calls it, or "cpu"."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name is None else name(device)


def to_device(array: Shaped[np.ndarray, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """The array on a device. A GPU reads it from pinned memory when its turn comes, so that the host needn't wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors of this process have held on a device at once; of a CPU, what the process has. None
    where that is not known.
    """
    if device.type == "cpu":
        return resident_peak()
    most = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if most is None else most(device)


def process_count() -> int:
    """How many processes the framework has joined to work together; 1 without."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
