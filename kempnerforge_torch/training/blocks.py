"""Blocks of a model made ready for training: recomputed in the backward pass, compiled."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kempnerforge_torch.model.grouped import GROUPED_MATMUL
from kempnerforge_torch.model.vlm import inner_transformer
from kempnerforge_torch.programs import compile_module

_log = logging.getLogger(__name__)

_MATRIX_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_mm.default,
        GROUPED_MATMUL,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)

_FACTORS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten._scaled_mm.default: (0, 1),
    GROUPED_MATMUL: (0, 1),
}
"""Products with weights: which arguments are the input and the weight."""


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Let each block save less for its backward pass, and recompute the rest (Chen et al. 2016, arXiv:1604.06174).

    What is kept of a dense block, in numbers for each token (D model dim, H h outputs of q, K h of k and of v, F of
    gate and of up), and for llama3_8b (D = H h = 4096, K h = 1024, F = 14336, 32 layers) in bfloat16 for 4 x 4096
    tokens:

        mode        kept                                     numbers               8b, a layer    all layers
        full        the block's input                        D                          128 MiB         4 GiB
        narrow      also q, k, v, attention's output and o   3 D + 2 H h + 2 K h        576 MiB        18 GiB
        selective   also gate and up                         ... + 2 F                1,472 MiB        46 GiB

    Uncompiled blocks keep down as well, D more (4 GiB), which no backward pass reads, and of attention a float32 number
    for each query and head (64 MiB). Where "full" takes 41 GB in all, as on each of 4 GPUs with float32 masters,
    "narrow" then takes about 56 GB and "selective" 86.

    Args:
        mode: "none"; "full" keeps the block's input; "selective" also the outputs of matrix products and attention;
            "narrow" those without products that have more outputs than inputs.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode in _POLICIES:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _POLICIES[mode])
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
        compile_module(block, backend=backend, fullgraph=fullgraph)


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


def _keeps_narrow_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _FACTORS and _widens(*(args[place] for place in _FACTORS[operation])):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return _keeps_products(context, operation, *args, **kwargs)


def _widens(x: Tensor, weight: Tensor | Sequence[Tensor]) -> bool:
    """Whether x (..., I) times weight (..., I, O), or one of several, has more outputs than inputs."""
    outputs = weight.shape[-1] if isinstance(weight, Tensor) else weight[0].shape[-1]
    return outputs > x.shape[-1]


_POLICIES = {"narrow": _keeps_narrow_products, "selective": _keeps_products}
