"""What differs between recordings of a module and of the same module that two processes share, as each finds it.

``python -m tests.distributed.recorded_shards STORE RANK``; all checks run in the same two processes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from kempnerforge_torch.parity import record
from shared_config.errors import UserError
from shared_config.interchange.states import plain_name
from shared_config.parity import Trace, compare_functions
from shared_config.parity.traces import Summary

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
TOKENS = torch.arange(24).reshape(2, 12) * 5 % 11
OPTIONS: dict[str, dict[str, Any]] = {
    "values": {},
    "statistics": {"above": 0},
    "forward": {"backward": False},
    "step": {"optimizer": ADAMW},
    "run": {"optimizer": ADAMW, "batches": [(TOKENS,), (TOKENS.flip(1),)]},
}


class Block(nn.Module):
    """Parameters that two processes can't divide evenly, one that is frozen, one that is not used, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(7), nn.Linear(7, 5), nn.Linear(5, 7)
        self.scale, self.unused = nn.Parameter(torch.rand(7), requires_grad=False), nn.Parameter(torch.rand(3))
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor, *, factor: float) -> Tensor:
        self.calls += 1
        return x + self.down(torch.tanh(self.up(self.norm(x) * self.scale))) * factor


class Model(nn.Module):
    """Logits of tokens, by the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 7), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, factor=0.5)
        return {"logits": self.head(x), "hidden": x}


def plain() -> Model:
    """The same in every process."""
    torch.manual_seed(0)
    return Model()


def sharded(shape: tuple[int, ...] = (2,), **options: Any) -> nn.Module:
    """Each block by itself, and the rest; over all processes, or copied on the first axis."""
    model = plain()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def compiled_part() -> nn.Module:
    """Sharded, and one block compiled in place."""
    model: Any = sharded()
    model.blocks[0].compile(backend="eager")
    return model


WRAPS: dict[str, Callable[[], nn.Module]] = {
    "sharded": sharded,
    "copied and sharded": lambda: sharded((2, 1)),
    "sharded and compiled": lambda: torch.compile(sharded(), backend="eager"),  # type: ignore[return-value]
    "with a compiled part": compiled_part,
    "data-parallel": lambda: DistributedDataParallel(plain(), find_unused_parameters=True),
}


def wrapped_ones() -> Iterator[str]:
    """Every wrapper, whatever is recorded: the same names and bits, and the module is as before."""
    for wrap, made in WRAPS.items():
        for label, options in OPTIONS.items():
            model = made()
            before, kinds = state(model), [type(parameter) for parameter in model.parameters()]
            expected = record(plain(), (TOKENS,), deltas=False, **options)
            for attempt in ("", ", again"):
                found = record(model, (TOKENS,), deltas=False, **options)
                yield from (f"{wrap}, {label}{attempt}: {line}" for line in unequal(expected, found))
                yield from (f"{wrap}, {label}{attempt}: {line}" for line in changed(before, state(model)))
                if [type(parameter) for parameter in model.parameters()] != kinds:
                    yield f"{wrap}, {label}{attempt}: parameters are no longer sharded as before"


def narrow_ones() -> Iterator[str]:
    """With `MixedPrecisionPolicy` the numbers are those of a module in bfloat16, whose gradients are wider."""
    model = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    expected = record(plain(), (TOKENS,), dtype="bfloat16", deltas=False)
    found = record(model, (TOKENS,), deltas=False)
    tensors = {name: value.astype(expected.array(name).dtype) for name, value in arrays(found).items()}
    yield from (f"narrow: {line}" for line in unequal(expected, Trace(tensors, found.meta)))
    if not compare_functions(expected, found).equal:
        yield "narrow: compare_functions finds a difference"


def batches_of_their_own() -> Iterator[str]:
    """Where each process has other inputs, its activations are its own, and gradients are means if they are sharded."""
    rank = dist.get_rank()
    inputs = [TOKENS, TOKENS.flip(1) + TOKENS % 2]
    alone = [record(plain(), (own % 11,), deltas=False) for own in inputs]
    found = record(sharded(), (inputs[rank] % 11,), deltas=False)
    means = {name: (value + arrays(alone[1])[name]) / 2 for name, value in arrays(alone[0]).items()}
    expected = {
        name: means[name] if name.startswith("gradient/") else value for name, value in arrays(alone[rank]).items()
    }
    if list(found.tensors) != list(expected):
        yield f"own batches: names: {sorted(set(found.tensors) ^ set(expected))}"
    for name, value in expected.items():
        if not np.allclose(value, found.array(name), rtol=1e-6, atol=1e-7):  # half of each is summed in other places
            yield f"own batches: {name}: off by {np.abs(value - found.array(name)).max()}"
    model = DistributedDataParallel(plain(), find_unused_parameters=True)
    if rank == 1:  # by itself
        yield from (
            f"data-parallel, own batches: {line}"
            for line in unequal(alone[1], record(model, (inputs[1] % 11,), deltas=False))
        )
    dist.barrier()


def gradients_of_before() -> Iterator[str]:
    """What training left in a module is not added to what is recorded, and is still there afterwards."""
    model: Any = sharded()
    model(TOKENS)["logits"].sum().backward()
    before = gradients(model)
    found = record(model, (TOKENS,), deltas=False)
    yield from (f"after training: {line}" for line in unequal(record(plain(), (TOKENS,), deltas=False), found))
    yield from (f"gradients: {line}" for line in changed(before, gradients(model)))
    with torch.no_grad():
        model(TOKENS)
    found = record(model, (TOKENS,), deltas=False)
    expected = record(plain(), (TOKENS,), deltas=False)
    yield from (f"after a forward pass: {line}" for line in unequal(expected, found))


def refusals() -> Iterator[str]:
    """What can't be is said, by every process."""
    said = "is sharded by FSDP: leave weights, dtype and refeed out"
    yield from refused(sharded(), said, dtype="float64", deltas=False)
    yield from refused(sharded(), said)
    old = FullyShardedDataParallel(nn.Sequential(nn.Linear(6, 4)), device_id=torch.device("cpu"))
    yield from refused(nn.Sequential(old), "function: 0 is a FullyShardedDataParallel", deltas=False)


def refused(model: nn.Module, message: str, **options: Any) -> Iterator[str]:
    """Nothing if an error says so."""
    try:
        record(model, (TOKENS,), **options)
    except UserError as error:
        if message not in str(error):
            yield f"{error}: must say {message!r}"
    else:
        yield f"{message!r}: not said"


def arrays(trace: Trace) -> dict[str, np.ndarray]:
    """All tensors of a trace without statistics."""
    return {name: trace.array(name) for name in trace.tensors}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their plain names, whole."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {plain_name(name): whole(value) for name, value in named}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the parameters that have one."""
    return {name: whole(own.grad) for name, own in model.named_parameters() if own.grad is not None}


def whole(tensor: Any) -> Tensor:
    """A copy of what all processes have of a tensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> Iterator[str]:
    """Names of what is not as it was."""
    for name in before.keys() | after.keys():
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            yield f"{name} has changed"


def unequal(expected: Trace, found: Trace) -> Iterator[str]:
    """Names, order and bits that differ between two traces."""
    if list(expected.tensors) != list(found.tensors):
        yield f"names: {list(found.tensors)}: must be {list(expected.tensors)}"
    for name, value in expected.tensors.items():
        if name in found.tensors and not same_bits(value, found.tensors[name]):
            yield f"{name}: is another one"


def same_bits(a: np.ndarray | Summary, b: np.ndarray | Summary) -> bool:
    """Whether two tensors, or what is kept of them, are the same."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, Summary) and isinstance(b, Summary):
        return repr(a) == repr(b) and np.array_equal(a.sketch, b.sketch)
    return False


CHECKS = (wrapped_ones, narrow_ones, batches_of_their_own, gradients_of_before, refusals)

if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    for check in CHECKS:
        for difference in check():
            print(difference)
    dist.destroy_process_group()
