"""Generation: prompts, and images, continued token by token.

Shapes: B rows, S tokens of the longest prompt, N new tokens, L tokens of the longest row with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from kempnerforge_torch.model.decode import decode_all, steps
from kempnerforge_torch.model.request import PromptTokens, make_request, weight_of
from kempnerforge_torch.model.sampling import sample as sample
from kempnerforge_torch.model.state import to_numpy
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import VLMWrapper, inner_transformer
from shared_config.contract.decoding import PREFILL_CHUNK, SamplingConfig


def generate(
    model: Transformer | VLMWrapper,
    prompt_tokens: PromptTokens,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    prompt_lengths: Integer[Tensor, "B"] | np.ndarray | Sequence[int] | int | None = None,
    seed: int | torch.Generator | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Float[Tensor, "B ... 3 h w"] | np.ndarray | None = None,
    frame_mask: Bool[Tensor, "B F"] | np.ndarray | None = None,
    image_positions: Integer[Tensor, "B ..."] | np.ndarray | Sequence[int] | Sequence[Sequence[int]] | None = None,
    compile: bool = False,
) -> Int[Tensor, "B L"]:
    """Continue prompts. A wrapped model, or one with wrapped or compiled parts, generates as the plain one does.

    A row does not depend on its neighbours: attention and random numbers are its own, and mixtures of experts run
    without capacity limits. The model is in evaluation mode during the call.

    Args:
        prompt_tokens: int (B, S), or a sequence of B rows of any lengths.
        temperature, top_k, top_p: as for `sample`.
        eos_token_id: one id or several; a row that has produced one of them is padding from then on.
        pad_token_id: any 32-bit number.
        prompt_lengths: int (B,), how many tokens of each row of ``prompt_tokens`` count; all if None.
        seed: of the random numbers, the same in both backends; or a generator of torch; None: a new one each time.
        uniforms: (B, N) numbers in [0, 1), in place of a seed.
        prefill_chunk: maximum number of prompt tokens that are read at once; with ``vlm.prefix_lm`` all are.
        pixel_values: (B, 3, h, w) or (B, F, 3, h, w), what a `VLMWrapper` sees before each prompt; None: text alone.
        frame_mask: bool (B, F), False for frames that don't exist.
        image_positions: int (B,), how many tokens of each prompt stand before its image or clip, fewer than it has; or
            B rows, before each of its images, of which one row has F and others may have fewer; None: none.
        compile: compile the decode step, and replay it as a CUDA graph on an NVIDIA GPU.

    Returns:
        int64 (B, W), on the model's device: prompt, new tokens, and padding up to the longest row; W is S + N, unless
            every row ended earlier.

    Raises:
        ValueError: prompts that are empty, too long or hold ids outside the vocabulary; values without meaning;
            images that don't fit the model or the prompts; a model whose routers are not causal.
    """
    sampling = SamplingConfig(temperature, top_k, top_p, eos_token_id, pad_token_id, seed)
    request = make_request(
        model, prompt_tokens, max_new_tokens, sampling,
        prompt_lengths=prompt_lengths, uniforms=uniforms, prefill_chunk=prefill_chunk, pixel_values=pixel_values,
        frame_mask=frame_mask, image_positions=image_positions,
    )  # fmt: skip
    transformer = inner_transformer(model)
    new_BN = decode_all(transformer, request, compile)
    whole = request.prompts.followed_by(to_numpy(new_BN), pad_token_id, sampling.eos_token_ids)
    return torch.from_numpy(whole).long().to(weight_of(transformer).device)


def stream(
    model: Transformer | VLMWrapper,
    prompt_tokens: PromptTokens,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    prompt_lengths: Integer[Tensor, "B"] | np.ndarray | Sequence[int] | int | None = None,
    seed: int | torch.Generator | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Float[Tensor, "B ... 3 h w"] | np.ndarray | None = None,
    frame_mask: Bool[Tensor, "B F"] | np.ndarray | None = None,
    image_positions: Integer[Tensor, "B ..."] | np.ndarray | Sequence[int] | Sequence[Sequence[int]] | None = None,
    compile: bool = False,
) -> Iterator[np.ndarray]:
    """The new tokens of `generate`, int (B,) at a time, as they are drawn; ends early when every row has ended.

    Arguments and errors, which are raised here and not at the first token, are those of `generate`.
    """
    sampling = SamplingConfig(temperature, top_k, top_p, eos_token_id, pad_token_id, seed)
    request = make_request(
        model, prompt_tokens, max_new_tokens, sampling,
        prompt_lengths=prompt_lengths, uniforms=uniforms, prefill_chunk=prefill_chunk, pixel_values=pixel_values,
        frame_mask=frame_mask, image_positions=image_positions,
    )  # fmt: skip
    return (to_numpy(tokens_B).copy() for tokens_B in steps(inner_transformer(model), request, compile))
