"""The kernel for masks that know more than causality: FlexAttention (Dong et al. 2024, arXiv:2412.05496), which skips
blocks that no query sees.

Shapes: B batch, H query heads, K key/value heads, S queries, M keys, h head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kempnerforge_torch.model.mask import Mask, Tokens, sees
from kempnerforge_torch.programs import for_many_inputs


def has_kernel(
    mask: Mask, queries: int, keys: int, head_dim: int, dtype: torch.dtype, device: torch.device | None = None
) -> bool:
    """Whether the device has the kernel, which is for CUDA, and the mask and heads suit it."""
    on_cuda = device is not None and device.type == "cuda"
    narrow = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return on_cuda and narrow and queries > 1 and head_dim >= 16 and mask.of_tokens


def with_fused(mask: Mask, queries: int, keys: int, device: torch.device | None = None) -> Mask:
    """A mask that `has_kernel`, with its form for it: which blocks are seen, in part or whole.

    Every pair of a query and a key is looked at, and none kept.
    """
    facts = (mask.query_positions, mask.key_positions, mask.query_doc_ids, mask.key_doc_ids, mask.key_valid)
    batch = max((len(each) for each in facts if each is not None and each.ndim == 2), default=1)
    batch = batch if mask.prefix_lengths is None else len(mask.prefix_lengths)
    rule = _rule(mask, keys - queries)
    return replace(mask, fused=_compiled(create_block_mask)(rule, batch, None, queries, keys, device))


def fused_attention(
    q: Float[Tensor, "B H S h"],
    k: Float[Tensor, "B K M h"],
    v: Float[Tensor, "B K M h"],
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H S h"]:
    """softmax(scale q k^T) v, by the form of a mask `with_fused`; 0 in rows that may attend to nothing.

    Args:
        scale: None: h^-0.5.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.
    """
    grouped, capping = q.shape[1] != k.shape[1], _capping if torch.compiler.is_compiling() else _kept_capping
    change = None if softcap is None else capping(softcap)
    options = {"score_mod": change, "block_mask": mask.fused, "scale": scale, "enable_gqa": grouped}
    out = _compiled(flex_attention)(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out


def _capping(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The change of a score."""

    def change(score: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return change


_kept_capping = functools.cache(_capping)
"""For one cap the same function, so that a program is not compiled anew."""


def _rule(mask: Mask, offset: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, by their indices. What it refers to are tensors and numbers, as compilers need it."""
    causal, window = mask.causal, mask.window
    query_positions, key_positions = mask.query_positions, mask.key_positions
    query_doc_ids, key_doc_ids, key_valid = mask.query_doc_ids, mask.key_doc_ids, mask.key_valid
    prefix_lengths = mask.prefix_lengths

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        def of(facts: Tensor | None, token: Tensor) -> Tensor | None:
            return None if facts is None else facts[token] if facts.ndim == 1 else facts[row, token]

        query_position = query + offset if query_positions is None else of(query_positions, query)
        key_position = key if key_positions is None else of(key_positions, key)
        prefix = None if prefix_lengths is None else prefix_lengths[row]
        seen = sees(
            Tokens(query_position, of(query_doc_ids, query), prefix=prefix),
            Tokens(key_position, of(key_doc_ids, key), of(key_valid, key)),
            causal,
            window,
        )
        return key >= 0 if seen is None else seen

    return rule


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    """A program of its own, or a part of the one that is being compiled."""
    return function if torch.compiler.is_compiling() else _program(function)


@functools.cache
def _program(function: Callable[..., object]) -> Callable[..., object]:
    return for_many_inputs(torch.compile(function, fullgraph=True))
