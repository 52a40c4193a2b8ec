"""Weights held as integers of 8 bits, by the rule of `shared_config.contract.int8`.

The codes take the place of a weight, "weight" or "up_w"; its scales lie beside it, as "weight_scale" or "up_w_scale".
"""

from __future__ import annotations

import torch
from torch import nn

from kempnerforge_torch.model.state import from_numpy, own_tensors, to_numpy
from kempnerforge_torch.model.wrappers import plain_modules
from shared_config.contract.int8 import is_int8, quantised


@torch.no_grad()
def hold_int8(model: nn.Module) -> None:
    """Put codes and scales in the place of the weights of layers, one after the other. The model is for inference then;
    its dtype is to be what it was, as a cast would round the scales.

    Raises:
        ValueError: a weight that is not finite.
    """
    modules = plain_modules(model)
    for name, weight in own_tensors(model).items():
        if is_int8(name) and weight.is_floating_point():
            path, _, leaf = name.rpartition(".")
            codes, scales = (from_numpy(array).to(weight.device) for array in quantised(to_numpy(weight), name))
            setattr(modules[path], leaf, nn.Parameter(codes, requires_grad=False))
            modules[path].register_buffer(f"{leaf}_scale", scales)
