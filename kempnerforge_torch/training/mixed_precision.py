"""What training computes in: the compute dtype, copies of the masters in it, products in FP8, and the precision of
float32 products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kempnerforge_torch.model.linear import Linear
from shared_config.contract.fp8 import is_fp8
from shared_config.schema.job import JobConfig


class Copies:
    """The masters in the dtype of the arithmetic: leaves of the graph, frozen as the masters are, which are cast again
    only once they have changed.

    Gradients of one micro-batch stay in this dtype; those of several are summed in the dtype of the masters.
    """

    def __init__(self, masters: Mapping[str, Float[Tensor, "..."]], dtype: torch.dtype):
        self._masters = dict(masters)
        self._copies = {name: torch.empty_like(master, dtype=dtype) for name, master in masters.items()}
        self._cast_from: dict[str, tuple[int, int] | None] = {}
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def current(self) -> dict[str, Float[Tensor, "..."]]:
        """The copies by name, with the values that the masters have now."""
        stale = [name for name, master in self._masters.items() if self._cast_from.get(name) != _version(master)]
        if stale:
            _copy([self._masters[name] for name in stale], [self._copies[name] for name in stale])
        self.note_update(stale, is_copied=True)
        for name, master in self._masters.items():
            self._copies[name].requires_grad_(master.requires_grad)
        return dict(self._copies)

    def by_master(self) -> dict[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """What `current` gives, by the master that each is a copy of."""
        return {self._masters[name]: copy for name, copy in self.current().items()}

    def note_update(self, names: Iterable[str], *, is_copied: bool) -> None:
        """Remember that masters were written to, and whether their copies, of those that have some, were so as well."""
        for name in self._masters.keys() & set(names):
            self._cast_from[name] = _version(self._masters[name]) if is_copied else None

    @torch.no_grad()
    def add_up(self) -> None:
        """Move the gradients of a micro-batch to the sums over micro-batches."""
        given = self._taken()
        first, further = ([name for name in given if (name in self._sums) == summed] for summed in (False, True))
        sums = {name: torch.empty_like(self._masters[name], requires_grad=False) for name in first}
        if first:
            _copy([given[name] for name in first], list(sums.values()))
        if further:
            torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
                [self._sums[name] for name in further], [given[name] for name in further]
            )
        self._sums |= sums

    def take_gradients(self) -> dict[str, Float[Tensor, "..."]]:
        """The gradients by name, of all micro-batches since they were last taken."""
        sums, self._sums = self._sums, {}
        return {**self._taken(), **sums}

    def _taken(self) -> dict[str, Tensor]:
        taken = {name: copy.grad for name, copy in self._copies.items() if copy.grad is not None}
        for copy in self._copies.values():
            copy.grad = None
        return taken


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor is written to, or gets other memory."""
    return tensor._version, tensor.data_ptr()


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """All at once: one by one they keep the host busy."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


@contextlib.contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """How float32 matrices are multiplied: "highest" as float32, "high" as TF32 or as three bfloat16 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def arithmetic(dtype: str) -> Iterator[torch.dtype]:
    """In which tensors may be of the dtype of this name, which it yields; in torch they always may."""
    yield getattr(torch, dtype)


def compute_dtype(config: JobConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, given that of the masters."""
    return torch.bfloat16 if config.train.casts and dtype == torch.float32 else dtype


def use_fp8(model: nn.Module, config: JobConfig) -> None:
    """Let the linear modules that `shared_config.contract.fp8` names compute in FP8, where the config asks for it."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and config.train.mixed_precision == "fp8":
            module.fp8 = is_fp8(path, config.model.n_layers)
