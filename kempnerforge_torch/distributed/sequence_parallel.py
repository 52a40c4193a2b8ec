"""Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): between the products that "tp" splits, each rank
along it has a part of the positions of the residual stream. Norms and sums work on that part.

    S = 4 on 2 ranks    rank 0        rank 1
    stream, norms       0 1           2 3         a part of the positions, all of the model dim
    gathered            0 1 2 3       0 1 2 3     for q, k, v, gate and up, of whose outputs each rank has some
    o, down             0 1 2 3       0 1 2 3     a summand of each position
    reduce-scattered    0 1           2 3

Per layer and pass that sends as much as two sums over ranks of the whole stream, which it replaces, and less in the
backward pass: the gradients of q, k and v, and of gate and up, are summed in one exchange. A mixture of experts sees
all positions, as its router counts over whole sequences, and keeps its own sums.

Shapes: B batch, S positions, D model dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from kempnerforge_torch.distributed.collectives import cut, gathered, gathered_alike, scattered
from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.distributed.tensor_parallel import mark_partial, some_inputs, some_outputs
from kempnerforge_torch.model.block import TransformerBlock
from kempnerforge_torch.model.cross_attention import CrossAttention, CrossAttentionBlock
from kempnerforge_torch.model.mlp import StandardMLP, SwiGLUMLP
from kempnerforge_torch.model.moma import MoMaBlock
from kempnerforge_torch.model.vlm import VLMWrapper, inner_transformer
from shared_config.schema.job import JobConfig

AXIS = 1
"""The positions of a stream (B, S, D)."""
Blocks = (TransformerBlock, MoMaBlock, CrossAttentionBlock)


def can_split_stream(model: nn.Module, config: JobConfig, mesh: Mesh) -> bool:
    """Whether every block of a model has a form for a part of the positions, and "tp" divides their number."""
    length = config.train.seq_len // mesh.layout.cp
    if isinstance(model, VLMWrapper):
        length += config.data.max_images * model.num_image_tokens
    return length % mesh.layout.tp == 0 and all(isinstance(block, Blocks) for block in _blocks(model))


def split_stream(model: nn.Module, mesh: Mesh) -> None:
    """Let each rank along "tp" hold its part of the positions between the blocks of a model whose tensors are split.

    The model is called, and answers, as before.
    """
    group = mesh.group("tp")
    for block in _blocks(model):
        for name, part in block.named_children():
            if name in ("attention", "attn") or isinstance(part, SwiGLUMLP | StandardMLP):
                _compute_for_all(part, group)
            elif name == "mlp":
                _work_on_all(part, group)
                continue
            mark_partial(part)
    transformer: Any = inner_transformer(model)
    run_layers = transformer._run_layers

    def on_own_positions(x_BSD: Tensor, *inputs: Any) -> tuple[Tensor, Any]:
        if x_BSD.shape[AXIS] % group.size():
            raise ValueError(f"positions = {x_BSD.shape[AXIS]}: must be a multiple of distributed.tp = {group.size()}")
        x_BSD, stats = run_layers(cut(x_BSD, AXIS, group), *inputs)
        return gathered_alike(x_BSD, AXIS, group), stats

    transformer._run_layers = on_own_positions


def _blocks(model: nn.Module) -> list[nn.Module]:
    transformer = inner_transformer(model)
    return [*transformer.layers.children(), *transformer.cross_attention_layers.children()]


def _compute_for_all(part: nn.Module, group: dist.ProcessGroup) -> None:
    """Attention, or a dense feed-forward layer: own positions in, and those after the sum over ranks out."""
    forward: Callable[..., Any] = part.forward
    of_image = ("k_proj", "v_proj") if isinstance(part, CrossAttention) else ()
    for name, module in part.named_children():
        changed: Any = module
        if name in ("o_proj", "down_proj"):
            changed.forward = some_inputs(changed, functools.partial(scattered, axis=AXIS, group=group))
        elif isinstance(module, nn.Linear) and name not in of_image:
            changed.forward = some_outputs(changed, _as_it_is)

    def of_all(x_BSD: Tensor, *others: Any, **options: Any) -> Tensor:
        return forward(gathered(x_BSD, AXIS, group), *others, **options)

    changed = part
    changed.forward = of_all


def _work_on_all(part: nn.Module, group: dist.ProcessGroup) -> None:
    """A mixture of experts: every rank routes all positions, and keeps the results of its own."""
    forward: Callable[..., Any] = part.forward

    def of_all(x_BSD: Tensor, *others: Any, **options: Any) -> Any:
        found = forward(gathered_alike(x_BSD, AXIS, group), *others, **options)
        if isinstance(found, Tensor):
            return cut(found, AXIS, group)
        return found._replace(x=cut(found.x, AXIS, group))

    changed: Any = part
    changed.forward = of_all


def _as_it_is(x: Tensor) -> Tensor:
    return x
