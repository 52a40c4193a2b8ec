"""What a GPU does again and again, recorded as a CUDA graph; decode steps, which are compiled once and then replayed.

Shapes: B rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from kempnerforge_torch.programs import for_many_inputs

Step = Callable[[Int[Tensor, "B"], Float[Tensor, "B"] | None], Int[Tensor, "B"]]
"""The tokens (B,) to read and, where tokens are drawn, uniform numbers (B,), to the next tokens."""

Result = TypeVar("Result")


def recorded(function: Callable[[], Result]) -> tuple[Result, torch.cuda.CUDAGraph]:
    """What a function returns, and the graph that computes it anew, in the same places of memory: until it is replayed,
    nothing has.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return result, graph


def is_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether what is called for one of some modules is more than its own forward and backward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    anywhere = bool(nn.modules.module._has_any_global_hook())
    return anywhere or any(getattr(module, kind) for module in modules for kind in kinds)


def state_of_torch() -> Hashable:
    """Settings of the process that what is recorded keeps to."""
    return (
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


@functools.lru_cache
def compiled(function: Callable[..., Shaped[Tensor, "..."]], vectors: bool) -> Callable[..., Shaped[Tensor, "..."]]:
    """A function compiled separately for every model, number of rows and length of caches.

    Args:
        vectors: write products of vectors as sums, several of them together, which on a GPU read weights nearer to the
            speed of memory than its libraries' products of matrices do.
    """
    options: Any = {"coordinate_descent_tuning": True, "combo_kernels": True} if vectors else None
    return for_many_inputs(torch.compile(function, fullgraph=True, dynamic=False, options=options))


class CudaGraphStep:
    """A step as a CUDA graph, which the host launches at once instead of kernel by kernel.

    The first call runs the step, and compiles it; the second records it. What the step reads and writes besides its
    arguments must stay in place in memory, as the tensors of static caches do.

    Attributes:
        step: what is run and recorded; not needed once it is.
    """

    def __init__(self, step: Step):
        self.step: Step | None = step
        self.calls = 0

    def __call__(self, tokens: Int[Tensor, "B"], uniforms: Float[Tensor, "B"] | None) -> Int[Tensor, "B"]:
        self.calls += 1
        if self.calls == 1:
            return self._run(tokens, uniforms)
        if self.calls == 2:
            self._record(tokens, uniforms)
        self.tokens.copy_(tokens)
        if uniforms is not None:
            self.uniforms.copy_(uniforms)
        self.graph.replay()
        return self.drawn.clone()

    def _run(self, tokens: Tensor, uniforms: Tensor | None) -> Tensor:
        assert self.step is not None
        return self.step(tokens, uniforms)

    def _record(self, tokens: Tensor, uniforms: Tensor | None) -> None:
        self.tokens = tokens.clone()
        self.uniforms = tokens.new_zeros(()) if uniforms is None else uniforms.clone()
        with torch.cuda.device(tokens.device):
            run = functools.partial(self._run, self.tokens, None if uniforms is None else self.uniforms)
            self.drawn, self.graph = recorded(run)


class CudaGraphCall(Generic[Result]):
    """A function of tensors as a CUDA graph: the first call runs it, the second records it.

    From then on the result is the same object, whose tensors each call writes anew: it must be read before the next.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable[..., Result], inputs: Sequence[Shaped[Tensor, "..."]]) -> Result:
        """What the function returns for these inputs.

        Args:
            function: the same, or one equal to it, at every call.
            inputs: of the same shapes and dtypes at every call.
        """
        self.calls += 1
        if self.calls == 1:
            return function(*inputs)
        if self.calls == 2:
            self._record(function, inputs)
        torch._foreach_copy_(self.inputs, list(inputs))  # pyright: ignore[reportPrivateImportUsage]
        self.graph.replay()
        return self.result

    def _record(self, function: Callable[..., Result], inputs: Sequence[Tensor]) -> None:
        self.inputs = [each.clone() for each in inputs]
        with torch.cuda.device(self.inputs[0].device):
            self.result, self.graph = recorded(functools.partial(function, *self.inputs))
