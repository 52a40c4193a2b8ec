"""State dicts as they come: nested or flat, named by wrappers or plainly, with arrays of any library.

A wrapper is a module that holds another and adds its own name to the paths below: `torch.compile` ("_orig_mod"), data
parallelism and averaging ("module"), sharding and checkpointing. It may sit around any part of a model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, overload

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shared_config.errors import UserError

log = logging.getLogger(__name__)

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which wrappers hold what they wrap."""

UNUSED_NORM = re.compile(r"((?:.+\.)?)norm\.(?:weight|bias)")
"""A final norm, which models with one for each modality have in its place."""

COUNTER = "n_averaged"
"""What `torch.optim.swa_utils.AveragedModel` adds to the state of the model that it wraps."""


class AnyArray(Protocol):
    """An array or tensor of any library."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> object:
        """Type of the elements, of the same library."""
        ...

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        ...


T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)
ArrayType = TypeVar("ArrayType", bound=AnyArray)


def plain_name(name: str) -> str:
    """A dotted path without the names of wrappers: "module.layers.0._orig_mod.norm" is "layers.0.norm"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@overload
def plain_state(state: Mapping[str, ArrayType]) -> dict[str, ArrayType]: ...
@overload
def plain_state(state: Mapping[Key, object]) -> dict[str, AnyArray]: ...
def plain_state(state: Mapping[Key, object]) -> Mapping[str, object]:
    """A state as a flat dict with plain names; the values are as they were.

    Args:
        state: flat or nested mappings, or nodes of `flax.nnx` states, whose variables give their arrays. What a
            variable marks as not saved (rotary tables) is left out.

    Raises:
        UserError: two entries with the same plain name.
    """
    flat = dict(_flattened(state))
    names: dict[str, str] = {}
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *path, own = name.split(".")  # the last part names a tensor, which no wrapper is
        plain = ".".join([*(part for part in path if part not in WRAPPERS), own])
        if _counts_averages(name, flat):
            continue
        if plain in result:
            raise UserError(f"the state holds {names[plain]!r} and {name!r}, both of which name {plain!r}")
        names[plain], result[plain] = name, value
    return result


def host_array(name: str, value: object) -> np.ndarray:
    """The values of an array or tensor of any library in NumPy, bfloat16 and float8 as `ml_dtypes`.

    Tensors may be on any device, need gradients, be sharded, and have any strides.

    Raises:
        UserError: naming the tensor, if it holds no values (meta tensors) or can't be converted.
    """
    if isinstance(value, np.ndarray):
        return value
    value = whole(_array_of(value))
    try:
        return _tensor_on_host(value) if hasattr(value, "detach") else np.asarray(value)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"tensor {name!r} ({type(value).__name__}) can't be converted to NumPy: {reason}") from error


def whole(value: T) -> T:
    """All of a tensor that is sharded over processes, each of which has to ask for it; anything else is itself."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def numpy_dtype(dtype: object) -> np.dtype:
    """NumPy's (or ml_dtypes') dtype of that name, given a dtype of any library.

    Raises:
        TypeError: NumPy has none.
    """
    return np.dtype(_known_to_numpy(dtype))


def _known_to_numpy(dtype: Any) -> npt.DTypeLike:
    name = str(dtype).removeprefix("torch.") if type(dtype).__module__.startswith("torch") else dtype
    return getattr(ml_dtypes, name) if isinstance(name, str) and hasattr(ml_dtypes, name) else name


def without_repeats(state: Mapping[str, T]) -> dict[str, T]:
    """The state with each torch tensor once: tied weights, which share memory, are listed under their first name."""
    seen: set[Hashable] = set()
    result: dict[str, T] = {}
    for name, value in state.items():
        place = _memory(value)
        if place is None or place not in seen:
            result[name] = value
        seen.add(place)
    return result


def without_unused(state: Mapping[str, T], own: Collection[str]) -> dict[str, T]:
    """The state without a final norm of mixtures of transformers, which norm by modality and never use it.

    Weights trained elsewhere hold it all the same. A line is logged for what is left out.

    Args:
        own: names of the model's tensors.
    """
    strange = (UNUSED_NORM.fullmatch(name) for name in state if name not in own)
    unused = [found[0] for found in strange if found and any(name.startswith(f"{found[1]}mot_norms.") for name in own)]
    if unused:
        log.warning("%s: left out, as the model norms by modality (mot_norms)", ", ".join(unused))
    return {name: value for name, value in state.items() if name not in unused}


def check_tied(state: Mapping[str, object], aliases: Mapping[str, str]) -> None:
    """Refuse a state that has different values for the names (alias -> name) of one tied weight.

    Raises:
        UserError: naming the two.
    """
    for alias, name in aliases.items():
        if name not in state or state[alias] is state[name]:
            continue
        if not np.array_equal(host_array(alias, state[alias]), host_array(name, state[name])):
            raise UserError(f"{alias}: differs from {name}, to which the model ties it")


def _flattened(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in _items(state):
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        elif getattr(value, "saved", True) is not False:
            yield name, _array_of(value)


def _items(state: Any) -> Iterable[tuple[Any, Any]]:
    """The entries, of paths as keys those joined by dots."""
    for key, value in state.items():
        yield ".".join(map(str, key)) if isinstance(key, tuple) else key, value


def _array_of(value: Any) -> Any:
    """What a variable of Flax holds; anything else is itself."""
    return value.get_value() if hasattr(value, "get_value") else value


def _counts_averages(name: str, state: Collection[str]) -> bool:
    prefix, _, last = name.rpartition(".")
    beside = f"{prefix}.module." if prefix else "module."
    return last == COUNTER and any(other.startswith(beside) for other in state)


def _tensor_on_host(tensor: Any) -> np.ndarray:
    """Of a torch tensor, told by its methods: this package does without torch."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = numpy_dtype(tensor.dtype)
    if dtype.isbuiltin == 1:
        return tensor.numpy(force=True)
    carrier = {1: tensor.new_empty(0).byte, 2: tensor.new_empty(0).short}[dtype.itemsize]().dtype
    return tensor.view(carrier).numpy().view(dtype)


def _memory(value: Any) -> Hashable:
    """What is equal for tensors that are the same numbers in the same memory; None where that isn't known."""
    if not hasattr(value, "data_ptr") or not hasattr(value, "stride") or value.numel() == 0 or value.data_ptr() == 0:
        return None
    return (str(value.device), value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype))
