"""What a recording sees of a PyTorch function, and what goes on in the place of what it sees."""

from __future__ import annotations

import contextlib
import functools
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from kempnerforge_torch.copies import copied
from kempnerforge_torch.model.state import from_numpy
from kempnerforge_torch.model.wrappers import plain_modules
from kempnerforge_torch.statistics import Keeper, Kept
from shared_config.parity.foreign.containers import INPUT, call_name, map_tensors, tensors_in
from shared_config.parity.foreign.options import Arrays, Options, check_fed, fed_back, fed_to
from shared_config.parity.foreign.recorder import Noise, Store
from shared_config.parity.traces import COTANGENT, GRADIENT

Slope = Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]]
SLOPES: dict[str, Slope] = {
    "tanh": lambda y: (1 - y) * (1 + y),
    "sigmoid": lambda y: y * (1 - y),
    "expm1": lambda y: 1 + y,
}
"""Operations whose results are subtracted from 1, in their derivatives at least, which are computed from the results:
where these are nearly 1, rounding them leaves few digits of what remains.
"""


class Taps:
    """What is recorded, in the order of execution, and what goes on in its place.

    Attributes:
        found: names and what is kept.
        cotangents: gradients of those that have one, by their places.
        others: names of what is not asked for.
        ends: tensors that others went on in place of, whose gradients are given.
        given: those gradients.
    """

    def __init__(self, options: Options, fed: Arrays, noise: Noise | None, store: Store):
        self.found: list[tuple[str, Kept]] = []
        self.cotangents: dict[int, Kept] = {}
        self.others: list[str] = []
        self.ends: list[Tensor] = []
        self.given: list[Tensor] = []
        self._ended: list[tuple[Any, tuple[str, int]]] = []
        self._options, self._fed, self._noise, self._keep = options, fed, noise, Keeper(store)
        self._calls: dict[str, int] = {}
        self._shown: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._generator = torch.Generator().manual_seed(noise.seed if noise else 0)
        self._again = False
        self._moves: dict[str, list[Tensor]] = {}
        self._replacements: dict[str, list[tuple[Tensor, bool]]] = {}
        self._new: dict[str, list[list[bool]]] = {}

    def know(self, arguments: object) -> None:
        """Take what the whole function is given for recorded."""
        self._shown.update({id(tensor): tensor for _, tensor in tensors_in(arguments, is_tensor)})

    def know_aliases(self, arguments: object) -> None:
        """Take for recorded what is recorded as another tensor of the same memory."""
        places = {_place(tensor) for tensor in self._shown.values()}
        given = [tensor for _, tensor in tensors_in(arguments, is_tensor) if isinstance(tensor, Tensor)]
        self._shown.update({id(tensor): tensor for tensor in given if _place(tensor) in places})

    def containers(self, name: str, value: object) -> object:
        """`visit` for every tensor of a value."""
        return map_tensors(self.visit, value, name, is_tensor)

    def inputs(self, name: str, value: object) -> object:
        """`visit` for every floating-point or complex tensor of arguments that nothing recorded put out."""
        tensors = [tensor for _, tensor in tensors_in(value, is_tensor)]
        if self._again:
            new = self._new[name].pop() if self._new.get(name) else []
        else:
            new = [isinstance(t, Tensor) and _is_inexact(t) and id(t) not in self._shown for t in tensors]
            self._new.setdefault(name, []).append(new)
        chosen = {id(tensor) for tensor, is_new in zip(tensors, new, strict=False) if is_new}
        if not chosen:
            return value
        return map_tensors(self.visit, value, name, lambda value: is_tensor(value) and id(value) in chosen)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within, nothing is recorded: what activation checkpointing computes again, the last first, is moved again."""
        self._again = True
        try:
            yield
        finally:
            self._again = False

    def visit(self, name: str, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Record a tensor, and give what goes on: a view, whose gradient is that by all that comes after it, and by
        nothing that used the tensor before. One that is written to later has no gradient: its value is no longer there.
        Complex numbers are recorded as pairs of real ones, along a last axis.
        """
        if isinstance(tensor, Tensor) and tensor.is_complex():
            pairs = self.visit(name, torch.view_as_real(tensor.resolve_conj()))
            tensor = torch.view_as_complex(pairs.contiguous())
            self._shown[id(tensor)] = tensor
            return tensor
        if self._again:
            known = self._replacements.get(name)
            return self._moved(name, _replaced(tensor, *known.pop()) if known else tensor)
        call = self._calls[name] = self._calls.get(name, -1) + 1
        fed = fed_to(self._fed, name, call)
        wanted = self._options.wants(name)
        if wanted:
            self.found.append((name, self._keep(tensor)))
        else:
            self.others.append(name)
        if fed is not None:
            check_fed(name, fed.shape, tensor.shape)
            tensor = self._fed_in_place_of(tensor, name, fed, fed_back(self._fed, name, call))
        tensor = self._moved(name, tensor)
        if wanted and tensor.requires_grad:
            tensor = tensor.view_as(tensor)
            tensor.register_hook(functools.partial(self._differentiated, len(self.found) - 1))
        self._shown[id(tensor)] = tensor
        return tensor

    def _fed_in_place_of(self, tensor: Tensor, name: str, fed: np.ndarray, gradient: np.ndarray | None) -> Tensor:
        """What goes on in place of a tensor; gradients beyond come from that of the other side, if it is known."""
        ends = False
        if gradient is not None and tensor.requires_grad:
            ends = True
            self.ends.append(tensor)
            self.given.append(from_numpy(gradient).to(tensor))
        value = from_numpy(fed).to(tensor, copy=True)
        self._replacements.setdefault(name, []).append((value, ends))
        new = _replaced(tensor, value, ends)
        self._ended += [(new.grad_fn, (name, self._calls[name]))] if ends else []
        return new

    def readers(self, leaves: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, list[str]]:
        """`Recorded.readers`, from the graph of the backward pass, which is there until it has run.

        Args:
            leaves: names of parameters and inputs in a trace.
        """
        names = {end: call_name(*end) if self._calls[end[0]] else end[0] for _, end in self._ended}
        known: dict[Any, str] = {id(leaf): f"{GRADIENT}/{name}" for name, leaf in leaves.items()}
        known |= {node: f"{COTANGENT}/{names[end]}" for node, end in self._ended}
        found: dict[str, list[str]] = {}
        for tensor, (_, end) in zip(self.ends, self._ended, strict=True):
            for origin in _origins(tensor, known):
                found.setdefault(origin, []).append(names[end])
        return found

    def rounding(self) -> contextlib.AbstractContextManager[object]:
        """Within, results of `SLOPES` are moved before they go on, and their derivatives are computed from that."""
        return contextlib.nullcontext() if self._noise is None else _Rounding(self._noise)

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        if self._noise is None or not tensor.is_floating_point() or (self._again and not self._moves.get(name)):
            return tensor
        if self._again:
            self._generator.set_state(self._moves[name].pop())
        else:
            self._moves.setdefault(name, []).append(self._generator.get_state())
        return _times(tensor, self._noise, self._generator)

    def _differentiated(self, place: int, gradient: Shaped[Tensor, "..."]) -> None:
        """Keep the gradient of what was recorded, by its place."""
        self.cotangents[place] = self._keep(gradient)


def _times(tensor: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    moves = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device=generator.device) * 2 - 1
    return tensor * (1 + noise.roundoff * moves).to(tensor)


def _replaced(tensor: Tensor, value: Tensor, ends: bool) -> Tensor:
    """The value in place of a tensor that has a gradient or not, in memory of its own.

    Args:
        ends: whether no gradient goes from the value to the tensor.
    """
    if not tensor.requires_grad:
        return value.clone()
    return value.detach().requires_grad_().clone() if ends else _Passing.apply(tensor, value)


def _origins(tensor: Tensor, known: Mapping[Any, str]) -> list[str]:
    """Names of the known nodes of a graph that a tensor was computed from, with none of these between.

    Args:
        known: by node, of leaves by the id of their tensor.
    """
    found: dict[str, None] = {}
    seen, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        name = known.get(node) or known.get(id(getattr(node, "variable", None)))
        if name is not None:
            found[name] = None
        elif node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return list(found)


class _Passing(torch.autograd.Function):
    """The value, through which gradients go to the tensor."""

    @staticmethod
    def forward(_: Any, tensor: Tensor, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return value.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class Widening(TorchFunctionMode):
    """Casts to float32 that the code asks for are casts to float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **named)


class _Rounding(TorchFunctionMode):
    """Results of `SLOPES` are moved. The moves depend on the values alone: what activation checkpointing computes again
    is moved as it was the first time.
    """

    def __init__(self, noise: Noise):
        super().__init__()
        self._noise = noise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        slope = SLOPES.get(getattr(func, "__name__", ""))
        if slope is None or kwargs or len(args) != 1 or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            result = func(*args)
            key = zlib.crc32(copied(result).tobytes(), self._noise.seed)
            moved = _times(result, self._noise, torch.Generator().manual_seed(key))
        return _Passing.apply(slope(moved) * args[0], moved) if args[0].requires_grad else moved


@contextlib.contextmanager
def observed(call: object, taps: Taps) -> Iterator[None]:
    """Show inputs and outputs of every module within to the taps; the whole is "output", which its caller shows."""
    modules = plain_modules(call) if isinstance(call, nn.Module) else {}
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            if isinstance(module, FSDPModule):  # which hands on its arguments as other tensors
                passed_on = module.register_forward_pre_hook(_known(taps), with_kwargs=True)
                hooks.callback(passed_on.remove)
            if name:
                before = module.register_forward_pre_hook(_before(name, taps), with_kwargs=True)
                after = module.register_forward_hook(lambda _m, _a, output, name=name: taps.containers(name, output))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        yield


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _known(taps: Taps) -> Callable[..., None]:
    return lambda _module, args, kwargs: taps.know_aliases((args, kwargs))


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Of the elements in memory; of a sharded tensor, which has none of its own, the tensor itself."""
    if hasattr(tensor, "full_tensor"):
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _before(name: str, taps: Taps) -> Callable[..., tuple[Any, Any]]:
    def show(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        shown: Any = taps.inputs(f"{name}{INPUT}", (args, kwargs))
        return shown

    return show


def is_tensor(value: object) -> TypeGuard[Shaped[Tensor, "..."] | np.ndarray]:
    """Whether a value is a tensor, or an array that becomes one."""
    return isinstance(value, Tensor | np.ndarray)
