"""Records any PyTorch module or function, to be compared with any other implementation of it.

trace = record(model, (tokens,), dtype="float32", path="torch.safetensors")
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parameter import is_lazy

from kempnerforge_torch.copies import copied, deep_copied, left_as_it_is, reshard, restoring
from kempnerforge_torch.model.state import from_numpy, to_numpy
from kempnerforge_torch.model.wrappers import unwrapped
from kempnerforge_torch.observed import Taps, Widening, is_tensor, observed
from kempnerforge_torch.optimizer_states import optimizer_state
from kempnerforge_torch.statistics import AddedToError, Keeper, Kept, fetched
from shared_config.errors import UserError
from shared_config.interchange.files import PathLike
from shared_config.interchange.states import plain_name
from shared_config.parity.foreign.containers import ARGUMENT, OUTPUT, listed, map_tensors, named_leaves, tensors_in
from shared_config.parity.foreign.mapping import Map
from shared_config.parity.foreign.options import EXACT, Arrays, Options, drawn_towards, make_options
from shared_config.parity.foreign.recorder import Noise, Recorded, Store, make_trace
from shared_config.parity.foreign.taps import tap, visiting
from shared_config.parity.foreign.transfer import transfer
from shared_config.parity.traces import Summary, Trace

__all__ = ["optimizer_state", "record", "tap"]

Inputs = Sequence[object] | Mapping[str, object]
Function = nn.Module | Callable[..., object]
Loss = Callable[[object], Shaped[Tensor, "..."]]
OptimizerOf = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_LISTED = 12
"""Names that a message lists one by one."""
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def record(
    function: Function,
    inputs: Inputs,
    *,
    weights: Mapping[str, object] | None = None,
    dtype: str | None = None,
    backward: bool = True,
    loss: Loss | None = None,
    optimizer: OptimizerOf | None = None,
    batches: Sequence[Inputs] = (),
    only: Sequence[str] = (),
    above: int | None = None,
    deltas: bool | int = True,
    seed: int = 0,
    refeed: Trace | None = None,
    names: Map | None = None,
    path: PathLike | None = None,
    chunks: int | None = None,
) -> Trace:
    """Call a module or function once and record every activation by its module's path, every gradient, and a step.

    The output of a module has its path as its name, that of the whole is "output"; parts of tuples, mappings and
    dataclasses have their place or key added, unless there is only one tensor. What a module is given is recorded with
    the end "@in" where no module put it out as it is. What is recorded several times is numbered, "norm@0", "norm@1".
    Integers, as choices of routers, are compared exactly but for what rounding changes.

    The module stays as it is: a copy of it is run, without wrappers of compilation and data parallelism (a compiled
    module is also called as it is, for "output"), and gradients are those of this process's inputs. One that
    `fully_shard` shards is run in place by all its processes, uncompiled, with its own weights and dtype, and has no
    deltas; its gradients are whole, and the means over the processes.

    Args:
        function: an `nn.Module`, or a function; of the latter weights come first, if there are some, and `tap` shows
            what is inside.
        inputs: positional or named arguments; tensors, arrays and anything else, in containers of any kind.
        weights: values by name, in place of the module's own; of a function, nested in any way.
        dtype: of weights and floating-point inputs, of "float64", "float32", "float16", "bfloat16"; None leaves all as
            it is. Buffers stay as they are, but in float64, where casts to float32 in the code count as float64, too.
        backward: whether to record gradients.
        loss: of the output; by default half its mean squared distance from drawn values, or itself if it is a scalar.
        optimizer: makes an optimiser of parameters, as ``functools.partial(torch.optim.AdamW, lr=1e-3)``; the
            parameters after one step are recorded.
        batches: inputs of a short run with that optimiser; its losses are recorded.
        only: glob patterns of names; see `Selection`.
        above: bytes of a tensor above which statistics are kept in place of values.
        deltas: whether to measure in float64 what rounding does to each tensor; a number is that of the runs.
        seed: of drawn values.
        refeed: a trace of another implementation: what follows an activation continues from the value there, so that
            only a wrong module differs; and so do the gradients behind it from those there, so that only a module whose
            own backward pass is wrong differs.
        names: from the names and layouts of ``refeed``, or of what this is to be compared with, to those here. Where
            there is no loss, outputs that have others here are drawn towards the same.
        path: of a file to write the trace to.
        chunks: bytes above which a tensor is written to a file of its own, as soon as it is known.

    Raises:
        UserError: an argument that can't be, or weights that don't fit.
    """
    options = make_options(
        dtype=dtype, backward=backward, only=only, above=above, deltas=deltas, seed=seed, refeed=refeed, names=names
    )
    engine = _Engine(function, inputs, weights, loss, optimizer, batches, options)
    return make_trace(engine, options, path, chunks)


class _Engine:
    """A function of PyTorch; see `Engine`."""

    backend, packages = "torch", ("torch", "transformers")

    def __init__(
        self,
        function: Function,
        inputs: Inputs,
        weights: Mapping[str, object] | None,
        loss: Loss | None,
        optimizer: OptimizerOf | None,
        batches: Sequence[Inputs],
        options: Options,
    ):
        self._given, self._inputs, self._batches = function, inputs, batches
        self._loss, self._optimizer, self._options = loss, optimizer, options
        self._weights = None if isinstance(function, nn.Module) else weights
        if batches and optimizer is None:
            raise UserError("batches: a run needs an optimizer")
        if isinstance(function, nn.Module):
            _check_recordable(function)
            reshard(function)
            self._sharded = any(hasattr(parameter, "full_tensor") for parameter in function.parameters())
            own = {plain_name(name): parameter for name, parameter in function.named_parameters()}
            device = next((parameter.device for parameter in own.values()), torch.device("cpu"))
            shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
            self.weights: Arrays = _on_host(own) if weights is None else transfer(weights, None, shapes)
        else:
            tensors = [tensor for _, tensor in tensors_in((weights, inputs), is_tensor)]
            device = next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), torch.device("cpu"))
            self._sharded, self.weights = False, _on_host(dict(tensors_in(weights, is_tensor)))
        if self._sharded and (weights is not None or options.dtype or options.delta_runs or options.fed):
            raise UserError("function: is sharded by FSDP: leave weights, dtype and refeed out, and set deltas=False")
        self._once = weights is None and optimizer is None and not options.delta_runs
        self._device = device
        self.drawn: list[str] = []
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.inputs: Arrays = _on_host(dict(tensors_in(inputs, is_tensor)))

    def run(
        self, dtype: str, weights: Arrays, inputs: Arrays, fed: Arrays, noise: Noise | None, store: Store
    ) -> Recorded:
        """Call it once; see `Engine.run`."""
        if self._sharded:
            assert isinstance(self._given, nn.Module)
            with left_as_it_is(self._given, self._optimizer is not None):
                return self._run_once(dtype, weights, inputs, fed, noise, store, False)
        try:
            return self._run_once(dtype, weights, inputs, fed, noise, store, self._optimizer is None)
        except AddedToError:
            return self._run_once(dtype, weights, inputs, fed, noise, store, False)

    def _run_once(
        self, dtype: str, weights: Arrays, inputs: Arrays, fed: Arrays, noise: Noise | None, store: Store, let_go: bool
    ) -> Recorded:
        """`run`; of gradients of which a summary is kept nothing else is, if they may be let go."""
        options = self._options
        taps = Taps(options, fed, noise, store)
        call, parameters = self._callable(dtype, weights)
        arguments, leaves = self._arguments(self._inputs, inputs, dtype)
        taps.know(arguments)
        exact = Widening() if dtype == EXACT else contextlib.nullcontext()
        with exact, taps.rounding(), torch.set_grad_enabled(options.backward):
            with observed(call, taps), visiting(taps.containers):
                output = taps.containers(OUTPUT, _called(call, arguments))
            if self._is_compiled and not self._sharded and not dtype and not noise and not fed:
                self._replace_output(taps, arguments, store)
            if not options.backward:
                return Recorded(_activations(taps), others=taps.others)
            loss = self._loss_of(output)
            known = taps.readers({**parameters, **leaves}) if fed and not noise else {}
            wanted = {name: own for name, own in {**parameters, **leaves}.items() if options.wants_gradient(name)}
            early = Keeper(store).let_go(wanted) if let_go else {}
            moved = noise or fed
            with observed(call, taps) if moved else contextlib.nullcontext(), visiting(taps.containers), taps.again():
                # by edges: of tensors, modes of torch are left, and what is computed again would not see them
                edges = [get_gradient_edge(tensor) for tensor in (loss, *taps.ends)]
                torch.autograd.backward(edges, [torch.ones_like(loss), *taps.given])
        gradients = fetched(_gradients(wanted, early, store))
        if fed:
            activations, cotangents = _activations(taps), fetched(taps.cotangents)
            return Recorded(activations, cotangents, to_numpy(loss), gradients, readers=known, others=taps.others)
        losses = self._run(call, parameters, dtype) if self._batches else None
        if losses is None and self._optimizer is not None:
            self._step(parameters)
        updated = {} if self._optimizer is None else _on_host(parameters)
        activations, cotangents = _activations(taps), fetched(taps.cotangents)
        return Recorded(activations, cotangents, to_numpy(loss), gradients, updated, losses, others=taps.others)

    @property
    def _is_compiled(self) -> bool:
        return isinstance(self._given, nn.Module) and hasattr(self._given, "dynamo_ctx")

    def _replace_output(self, taps: Taps, arguments: Any, store: Store) -> None:
        """What the compiled program puts out, in place of what its source does."""
        with torch.no_grad(), restoring(self._given.buffers()):
            outputs = named_leaves(_called(self._given, arguments), OUTPUT, is_tensor)
        taps.found[:] = [
            (name, Keeper(store)(outputs[name]) if name in outputs else value) for name, value in taps.found
        ]

    def _callable(self, dtype: str, weights: Arrays) -> tuple[Any, Mapping[str, Tensor]]:
        """What is called, and its parameters."""
        if not isinstance(self._given, nn.Module):
            if self._weights is None:
                return self._given, {}
            values = {name: _leaf(value, dtype, self._device) for name, value in weights.items()}
            order = iter(values.values())
            tree = map_tensors(lambda *_: next(order), self._weights, "", is_tensor)
            return functools.partial(self._given, tree), values
        if self._sharded:
            return self._given, {plain_name(name): own for name, own in self._given.named_parameters()}
        with unwrapped(self._given) as plain:
            given = {plain_name(name): own for name, own in plain.named_parameters()}
            copied = not (self._once and weights is self.weights)
            parameters = {name: _parameter(own, weights[name], dtype, copied) for name, own in given.items()}
            module = deep_copied(plain, {id(own): parameters[name] for name, own in given.items()})
        for buffer in module.buffers() if dtype == EXACT else ():
            buffer.data = buffer.data.double() if buffer.is_floating_point() else buffer.data
        return module, parameters

    def _arguments(self, given: Any, values: Arrays, dtype: str) -> tuple[Any, dict[str, Tensor]]:
        """Arguments with values by name, in a dtype, and what has their gradients: they may be written to."""
        tensors = {name: from_numpy(value).to(self._device) for name, value in values.items()}
        leaves = {
            f"{ARGUMENT}{name}": tensor.to(DTYPES.get(dtype, tensor.dtype)).requires_grad_(self._options.backward)
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
        order = iter(
            [leaves[key].clone() if (key := f"{ARGUMENT}{name}") in leaves else t for name, t in tensors.items()]
        )
        return map_tensors(lambda *_: next(order), given, "", is_tensor), leaves

    def _loss_of(self, output: object) -> Tensor:
        if self._loss is not None:
            return self._loss(output)
        leaves = named_leaves(output, OUTPUT, lambda value: isinstance(value, Tensor) and value.is_floating_point())
        if len(leaves) == 1 and next(iter(leaves.values())).ndim == 0:
            return next(iter(leaves.values()))
        wide = {name: leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for name, leaf in leaves.items()}
        wide = {name: leaf for name, leaf in wide.items() if leaf.requires_grad}
        drawn = {name: drawn_towards(self._options, name, tuple(leaf.shape)) for name, leaf in wide.items()}
        self.drawn = [one for names, _ in drawn.values() for one in names]
        terms = [(leaf - from_numpy(drawn[name][1]).to(leaf)).square().mean() / 2 for name, leaf in wide.items()]
        if not terms:
            raise UserError("backward: no output depends on a weight or an input with a gradient; set backward=False")
        return torch.stack(terms).sum()

    def _step(self, parameters: Mapping[str, Tensor]) -> None:
        assert self._optimizer is not None
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        self._optimizer(trained).step()  # type: ignore[arg-type]

    def _run(self, call: Any, parameters: Mapping[str, Tensor], dtype: str) -> np.ndarray:
        """Losses of a short run."""
        assert self._optimizer is not None
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        optimizer, losses = self._optimizer(trained), []  # type: ignore[arg-type]
        for batch in self._batches:
            optimizer.zero_grad()
            own = _on_host(dict(tensors_in(batch, is_tensor)))
            loss = self._loss_of(_called(call, self._arguments(batch, own, dtype)[0]))
            loss.backward()
            optimizer.step()
            losses.append(to_numpy(loss))
        return np.asarray(losses, np.float64)


def _check_recordable(module: nn.Module) -> None:
    """Refuse a module that can't be watched or copied.

    Raises:
        UserError: naming the parts.
    """
    scripted = [name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        raise UserError(f"function: {scripted[0] or 'it'} is a program of torch.jit: give the module it was made of")
    flat = [name for name, part in module.named_modules() if isinstance(part, FullyShardedDataParallel)]
    if flat:
        raise UserError(
            f"function: {flat[0] or 'it'} is a FullyShardedDataParallel, whose parameters have lost their shapes: "
            "shard it with fully_shard, or record it before it is wrapped"
        )
    lazy = [name for name, own in module.named_parameters() if is_lazy(own)]
    if lazy:
        raise UserError(f"function: {', '.join(lazy)}: not initialised yet: call the module once before")
    empty = [name for name, own in (*module.named_parameters(), *module.named_buffers()) if own.is_meta]
    if empty:
        raise UserError(
            f"function: {', '.join(empty[:_LISTED])}: on the meta device, without values: load weights before"
        )


def _called(call: Any, arguments: Any) -> object:
    return listed(call(**arguments) if isinstance(arguments, Mapping) else call(*arguments))


def _activations(taps: Taps) -> list[tuple[str, np.ndarray | Summary]]:
    values = fetched(dict(enumerate(value for _, value in taps.found)))
    return [(name, values[place]) for place, (name, _) in enumerate(taps.found)]


def _gradients(parameters: Mapping[str, Tensor], early: Mapping[str, Kept], store: Store) -> dict[str, Kept]:
    """What is kept of gradients, of some of them already known; 0 of what nothing depends on."""
    keep, trained = Keeper(store), {name: one for name, one in parameters.items() if one.requires_grad}
    return {
        name: early[name] if name in early else keep(torch.zeros_like(one) if one.grad is None else one.grad)
        for name, one in trained.items()
    }


def _parameter(own: nn.Parameter, value: np.ndarray, dtype: str, copied: bool) -> nn.Parameter:
    """With a value in a dtype and its hooks, in place of a parameter; if not ``copied``, its own, maybe where it is."""
    wanted = DTYPES.get(dtype, own.dtype) if own.is_floating_point() else own.dtype
    given = from_numpy(value) if copied or own.device.type == "cpu" else own.detach().clone()
    made = nn.Parameter(given.to(own.device, wanted, copy=copied), own.requires_grad)
    for hook in (own._backward_hooks or {}).values():
        made.register_hook(hook)
    return made


def _leaf(value: np.ndarray, dtype: str, device: torch.device) -> Tensor:
    tensor = from_numpy(value).to(device, copy=True)
    is_trained = tensor.is_floating_point()
    return tensor.to(DTYPES.get(dtype, tensor.dtype)).requires_grad_() if is_trained else tensor


def _on_host(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: copied(t) if isinstance(t, Tensor) else np.asarray(t) for name, t in tensors.items()}
