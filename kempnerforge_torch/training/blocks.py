"""Blocks of a model made ready for training: recomputed in the backward pass, compiled."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kempnerforge_torch.model.grouped import GROUPED_MATMUL
from kempnerforge_torch.model.vlm import inner_transformer

_log = logging.getLogger(__name__)

_MATRIX_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        GROUPED_MATMUL,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Let each block save less for its backward pass, and recompute the rest.

    Args:
        mode: "none"; "full" keeps the block's input; "selective" also the outputs of matrix products and attention.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keeps_products)
    for block in blocks(model):
        _wrap_forward(block, functools.partial(checkpoint, **options))


def compile_blocks(
    model: nn.Module, device: torch.device, backend: str = "inductor", *, fullgraph: bool = True
) -> None:
    """Compile each block as it is first called; on a CPU without a C++ compiler, log that and do nothing.

    Args:
        fullgraph: each as one program, or raise an error.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        _log.warning("train.compile_model: no C++ compiler (%s) on this machine; the model runs uncompiled", compiler)
        return
    for block in blocks(model):
        block.compile(fullgraph=fullgraph, backend=backend)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model and of its encoder."""
    for owner in (inner_transformer(model), getattr(model, "vision_encoder", None)):
        for stack in ("layers", "cross_attention_layers"):
            yield from getattr(owner, stack, nn.ModuleDict()).children()


def _wrap_forward(block: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Replace ``forward`` by a plain function, as compilation skips other callables."""
    forward = block.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(forward, *args, **kwargs)

    block.forward = wrapped


def _keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
