"""Decode steps on accelerators: compiled once, and replayed as a CUDA graph.

Shapes: B rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Step = Callable[[Int[Tensor, "B"], Float[Tensor, "B"] | None], Int[Tensor, "B"]]
"""The tokens (B,) to read and, where tokens are drawn, uniform numbers (B,), to the next tokens."""

PROGRAMS = 128
"""Decode steps that a process may compile, beyond which torch raises an error; its own limit is 8."""


@functools.lru_cache
def compiled(function: Callable[..., Shaped[Tensor, "..."]]) -> Callable[..., Shaped[Tensor, "..."]]:
    """A function compiled separately for every model, number of rows and length of caches."""
    program = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*inputs: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=PROGRAMS):  # pyright: ignore[reportPrivateImportUsage]
            return program(*inputs)

    return call


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
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.drawn = self._run(self.tokens, None if uniforms is None else self.uniforms)
