"""Recorded decode steps that are kept for the next call: of each model the last few, with the caches that they read and
write. A call that asks for the same step fills these caches, and replays from its first token on. Prompts are read so,
too: those of a shape run once, are recorded the second time, and replayed from then on.

What is recorded reads the weights where they were: it is dropped once one of them lies elsewhere. What an optimiser or
`load_state_dict` writes into them it reads as any other step does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kempnerforge_torch.model.cuda_graph import CudaGraphCall, CudaGraphStep, Step, is_hooked, state_of_torch
from kempnerforge_torch.model.decode_state import DecodeState
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.modality import ModalityContext
from shared_config.schema.base import Section

KEPT = 4
"""Steps of a model, and as many shapes of prompts."""

_FACTS = (bool, int, float, str, NoneType, torch.dtype, FunctionType, BuiltinFunctionType, Section)
"""What an attribute may be that a recorded step has taken in."""

_OF_A_STATE = ("lengths", "valid", "doc_ids", "oldest")

StepOf = Callable[[list[KVCache], ModalityContext | None], Step]
"""The caches, and what is read of an image at every step, to a step."""

Filled = tuple[list[KVCache], Shaped[Tensor, "B"]]
"""Caches that hold prompts but for their last tokens, and these."""


@dataclass
class _Recorded:
    """A step, and the tensors that it reads and writes besides weights."""

    step: CudaGraphStep
    caches: list[KVCache]
    image: ModalityContext | None


@dataclass
class Kept:
    """What is kept of a model as it was, the last used last."""

    model: Hashable
    steps: OrderedDict[Hashable, _Recorded] = field(default_factory=OrderedDict)
    prompts: OrderedDict[Hashable, CudaGraphCall[Filled]] = field(default_factory=OrderedDict)

    @contextlib.contextmanager
    def step(
        self, caches: list[KVCache], image: ModalityContext | None, settings: Hashable, step_of: StepOf
    ) -> Iterator[Step]:
        """A recorded step that goes on from these caches, in others: recorded prompts are read into these again. While
        one call has it, no other does.

        Args:
            settings: what else the step depends on.
            step_of: makes the step that is recorded; it depends on nothing but its arguments, the model and
                ``settings``.
        """
        key = (settings, state_of_torch(), _structure(caches, image))
        found = self.steps.pop(key, None)
        if found is None:
            caches = copy.deepcopy(caches)
            found = _Recorded(CudaGraphStep(step_of(caches, image)), caches, image)
        else:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                _tensors(found.caches, found.image), _tensors(caches, image)
            )
            found.step.step = step_of(found.caches, found.image)
        with contextlib.suppress(GeneratorExit):  # the caller wants no more tokens
            yield found.step
        found.step.step = None  # which holds the model
        _put_back(self.steps, key, found)

    @contextlib.contextmanager
    def filled(
        self, settings: Hashable, inputs: Sequence[Shaped[Tensor, "..."]], read: Callable[..., Filled]
    ) -> Iterator[Filled]:
        """What ``read`` makes of prompts. While one call has these caches, no other does.

        Args:
            settings: what else reading depends on.
            inputs: tensors that ``read`` takes; it depends on nothing but them, the model and ``settings``.
        """
        key = (settings, state_of_torch(), *((each.shape, each.dtype) for each in inputs))
        found = self.prompts.pop(key, None) or CudaGraphCall()
        with contextlib.suppress(GeneratorExit):
            yield found(read, inputs)
        _put_back(self.prompts, key, found)


_Value = TypeVar("_Value")
_kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def kept_of(model: nn.Module) -> Kept:
    """What is kept of a model as it is now."""
    if is_hooked(model.modules()):  # a replay calls no hooks
        return Kept(None)
    state = _state_of(model)
    if model not in _kept or _kept[model].model != state:
        _kept[model] = Kept(state)
    return _kept[model]


def forget_steps(model: nn.Module) -> None:
    """Free the memory of what is recorded of a model."""
    _kept.pop(model, None)


def _put_back(kept: OrderedDict[Hashable, _Value], key: Hashable, value: _Value) -> None:
    kept[key] = value
    while len(kept) > KEPT:
        kept.popitem(last=False)


def _state_of(model: nn.Module) -> Hashable:
    """Where the weights lie, and what modules know besides."""
    tensors = [*model.parameters(), *model.buffers()]
    places = tuple((each.data_ptr(), each.shape, each.stride(), each.dtype) for each in tensors)
    return places, tuple((id(module), _facts(module)) for module in model.modules())


def _facts(module: nn.Module) -> Hashable:
    return tuple((name, value) for name, value in vars(module).items() if _is_fact(type(value)))


@functools.lru_cache
def _is_fact(kind: type) -> bool:
    return issubclass(kind, _FACTS)


def _structure(caches: Sequence[KVCache], image: ModalityContext | None) -> Hashable:
    """What must be equal for the tensors of one call to take the places of another's."""
    states = _states(caches)
    counts = [(state.image_tokens, state.max_seq_len, state.policy, state.static) for state in states]
    shared = [next(place for place, state in enumerate(states) if state is cache.state) for cache in caches]
    given = [getattr(state, name) is not None for state in states for name in _OF_A_STATE]
    seen = [each.name for each in fields(ModalityContext) if image and getattr(image, each.name) is not None]
    tensors = _tensors(caches, image)
    return *counts, *shared, *given, *seen, *((each.shape, each.dtype, each.device) for each in tensors)


def _tensors(caches: Sequence[KVCache], image: ModalityContext | None) -> list[Shaped[Tensor, "..."]]:
    """All tensors of the caches and of the states that they share, and of what is read of an image."""
    found = [getattr(state, name) for state in _states(caches) for name in _OF_A_STATE]
    for cache in caches:
        found += [cache.k, cache.v]
    for each in fields(ModalityContext) if image else ():
        found += tree_leaves(getattr(image, each.name))
    return [each for each in found if isinstance(each, Tensor)]


def _states(caches: Sequence[KVCache]) -> list[DecodeState]:
    return list({id(cache.state): cache.state for cache in caches}.values())
