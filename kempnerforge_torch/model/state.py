"""The state of a model as a flat dict, named as in the parameter table, and tensors from and to NumPy and DLPack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from kempnerforge_torch.distributed.ranks import box_of, local
from shared_config.contract.specs import check_names
from shared_config.interchange.states import check_tied, host_array, plain_state, whole, without_unused

# Types that NumPy lacks: torch's, ml_dtypes', and an integer type of the same width to carry the bits.
_EXTENSIONS = (
    (torch.bfloat16, np.dtype(ml_dtypes.bfloat16), torch.int16, np.dtype(np.int16)),
    (torch.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn), torch.uint8, np.dtype(np.uint8)),
    (torch.float8_e5m2, np.dtype(ml_dtypes.float8_e5m2), torch.uint8, np.dtype(np.uint8)),
)


State = dict[str, Shaped[Tensor, "..."]]


def get_state(model: nn.Module) -> State:
    """Parameters and persistent buffers by name, each tensor once: a tied weight is listed under its first name.

    The tensors are the model's own, detached. Names are plain, however the model or parts of it are wrapped.
    """
    return {name: tensor.detach() for name, tensor in own_tensors(model).items()}


def set_state(model: nn.Module, state: Mapping[str, object]) -> None:
    """Copy the values of ``state`` (arrays or tensors of any library) into the model, in the model's dtypes.

    Args:
        model: may be wrapped, as a whole or in parts.
        state: what `plain_state` accepts, with one name or all names of a tied weight. The final norm that mixtures of
            transformers don't use is left out, which is logged.

    Raises:
        UserError: lists every missing, unknown and misshapen name; the model is unchanged.
    """
    own, first_names = own_tensors(model), _first_names(model)
    given = plain_state(state)
    aliases = {alias: first for alias, first in first_names.items() if alias != first and alias in given}
    check_tied(given, aliases)
    given = {first_names.get(name, name): value for name, value in reversed(given.items())}
    given = without_unused(given, own)
    check_names(
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        {name: tuple(value.shape) for name, value in given.items()},
    )
    for name, tensor in own.items():
        assign(tensor, given[name])


def own_tensors(model: nn.Module) -> State:
    """The parameters and persistent buffers themselves, each once, by plain name."""
    tensors = plain_state(model.state_dict(keep_vars=True))
    first = _first_names(model)
    return {name: tensor for name, tensor in tensors.items() if first[name] == name}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every plain name, and the first that the same tensor has."""
    first: dict[int, str] = {}
    tensors = plain_state(model.state_dict(keep_vars=True))
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


@torch.no_grad()
def assign(target: Shaped[Tensor, "..."], value: object) -> None:
    """Copy a tensor, or array of any library, into ``target``. Both may be sharded (a DTensor), and ``value`` may be
    `shared_config.interchange.parts.Parts`: each process reads what it holds of the target.
    """
    values: Any = whole(value)
    if hasattr(target, "placements"):
        values, target = values[box_of(target)], local(target)
    target.copy_(values if isinstance(values, Tensor) else from_numpy(host_array("value", values)))


def to_numpy(array: Shaped[Tensor, "..."]) -> np.ndarray:
    """The values on the host, of a sharded tensor all; bfloat16 and float8 as `ml_dtypes`. Shares memory with a
    contiguous CPU tensor.
    """
    tensor = whole(array.detach()).cpu().contiguous()
    for torch_type, numpy_type, torch_bits, _ in _EXTENSIONS:
        if tensor.dtype == torch_type:
            return tensor.view(torch_bits).numpy().view(numpy_type)
    return tensor.numpy()


def from_numpy(array: np.ndarray, dtype: torch.dtype | None = None) -> Shaped[Tensor, "..."]:
    """A tensor of these values, in ``dtype`` if given. Shares memory with a writable, contiguous array."""
    array = np.require(array, requirements=["C", "W"])
    tensor = None
    for torch_type, numpy_type, _, numpy_bits in _EXTENSIONS:
        if array.dtype == numpy_type:
            tensor = torch.from_numpy(array.view(numpy_bits)).view(torch_type)
    tensor = torch.from_numpy(array) if tensor is None else tensor
    return tensor if dtype is None else tensor.to(dtype)


def share(state: Mapping[str, object]) -> State:
    """Tensors that share the memory of another library's arrays (DLPack), on the CPU or on the same GPU, without a
    copy.

    Writing to the tensors would change arrays that may be taken for immutable: read them, or copy with `set_state`.
    """
    return {name: torch.from_dlpack(array) for name, array in state.items()}
