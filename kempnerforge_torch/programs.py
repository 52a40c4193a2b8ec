"""Programs of torch's compiler, each of which may serve more kinds of model and input than torch allows by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
PROGRAMS = 128
"""For how many kinds of input a process may compile a function, beyond which torch raises an error; its own limit is 8,
which all modules that a process compiles share.
"""


def compile_module(module: nn.Module, *, backend: str = "inductor", fullgraph: bool = True) -> None:
    """Compile a module in place, as it is first called, for `PROGRAMS` kinds of input."""
    module.compile(fullgraph=fullgraph, backend=backend)
    assert module._compiled_call_impl is not None
    module._compiled_call_impl = for_many_inputs(module._compiled_call_impl)


def for_many_inputs(program: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """What `torch.compile` returned, for `PROGRAMS` kinds of input."""

    @functools.wraps(program)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch._dynamo.config.patch(recompile_limit=PROGRAMS):  # pyright: ignore[reportPrivateImportUsage]
            return program(*args, **kwargs)

    return call
