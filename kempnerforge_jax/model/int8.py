"""Weights held as integers of 8 bits, by the rule of `shared_config.contract.int8`.

The codes take the place of a weight, "weight" or "up_w"; its scales lie beside it, as "weight_scale" or "up_w_scale".
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from kempnerforge_jax.model.module import Buffer
from kempnerforge_jax.model.state import own_variables, to_numpy
from kempnerforge_jax.model.wrappers import plain_modules
from shared_config.contract.int8 import is_int8, quantised


def hold_int8(model: nnx.Module) -> None:
    """Put codes and scales in the place of the weights of layers, one after the other. The model is for inference then.

    Raises:
        ValueError: a weight that is not finite.
    """
    modules = plain_modules(model)
    for name, variable in own_variables(model).items():
        weight = variable.get_value()
        if is_int8(name) and jnp.issubdtype(weight.dtype, jnp.floating):
            path, _, leaf = name.rpartition(".")
            codes, scales = (jnp.asarray(array) for array in quantised(to_numpy(weight), name))
            variable.set_value(codes)
            setattr(modules[path], f"{leaf}_scale", Buffer(scales))
