"""Drawing a token of each distribution.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from shared_config.contract.decoding import SamplingConfig


def sample(
    logits: Float[Tensor, "... V"],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    uniforms: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "..."]:
    """Draw a token of each distribution.

    Logits / temperature; tokens sorted by falling logit, equal ones by index; the first ``top_k`` are kept; of these
    the shortest run from the top whose probabilities sum to ``top_p``, the token that crosses it included; of their
    renormalised probabilities, the first token whose cumulative sum exceeds a uniform number.

    Args:
        logits: (..., V); computed with in at least float32.
        temperature: 0 takes the most probable token, of equal ones the first.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        uniforms: (...) numbers in [0, 1); drawn if None.
        generator: what they are drawn with.

    Returns:
        int64 (...).

    Raises:
        ValueError: temperature < 0, top_k < 0, top_p outside (0, 1].
    """
    SamplingConfig(temperature, top_k, top_p)  # which refuses other values
    if temperature == 0:
        return greedy(logits)
    if uniforms is None:
        uniforms = torch.rand(logits.shape[:-1], generator=generator, dtype=wide(logits.dtype), device=logits.device)
    return draw(logits, uniforms, temperature, top_k or logits.shape[-1], top_p)


def greedy(logits: Float[Tensor, "... V"]) -> Int[Tensor, "..."]:
    """The most probable token of each row, of equal ones the first: (..., V) -> int64 (...)."""
    return logits.argmax(dim=-1)


def draw(
    logits: Float[Tensor, "... V"], uniforms: Float[Tensor, "..."], temperature: float, top_k: int, top_p: float
) -> Int[Tensor, "..."]:
    """`sample` at a temperature above 0: (..., V) -> (...)."""
    dtype = wide(logits.dtype)
    sorted_V, order_V = logits.to(dtype).sort(dim=-1, descending=True, stable=True)
    scaled_V = (sorted_V - sorted_V[..., :1]) / max(temperature, torch.finfo(dtype).tiny)
    beyond_k = torch.arange(logits.shape[-1], device=logits.device) >= top_k
    probabilities_V = scaled_V.masked_fill(beyond_k, -torch.inf).softmax(dim=-1)
    before_V = F.pad(probabilities_V.cumsum(dim=-1)[..., :-1], (1, 0))
    kept_V = torch.where(before_V < top_p, probabilities_V, 0)
    cumulative_V = (kept_V / kept_V.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    index = (cumulative_V <= uniforms.to(dtype)[..., None]).sum(dim=-1)
    last_index = ((kept_V > 0).sum(dim=-1) - 1).clamp(min=0)
    return order_V.gather(-1, torch.minimum(index, last_index)[..., None])[..., 0]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that probabilities are computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
