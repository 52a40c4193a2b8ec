"""Generation: prompts, and images, continued token by token.

Shapes: B rows, S tokens of the longest prompt, N new tokens, L tokens of the longest row with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from kempnerforge_jax.model.decode import decode_all, steps
from kempnerforge_jax.model.request import PromptTokens, make_request
from kempnerforge_jax.model.sampling import sample as sample
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.vlm import VLMWrapper, inner_transformer
from kempnerforge_jax.model.wrappers import unwrapped
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
    prompt_lengths: Integer[Array, "B"] | np.ndarray | Sequence[int] | int | None = None,
    seed: int | Shaped[Array, "..."] | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Float[Array, "B ... 3 h w"] | np.ndarray | None = None,
    frame_mask: Bool[Array, "B F"] | np.ndarray | None = None,
    image_positions: Integer[Array, "B ..."] | np.ndarray | Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Int[Array, "B L"]:
    """Continue prompts. A wrapped model, or one with wrapped parts, generates as the plain one does.

    A row does not depend on its neighbours: attention and random numbers are its own, and mixtures of experts run
    without capacity limits. Programs are compiled for a number of rows and a few lengths (powers of two).

    Args:
        prompt_tokens: int (B, S), or a sequence of B rows of any lengths.
        temperature, top_k, top_p: as for `sample`.
        eos_token_id: one id or several; a row that has produced one of them is padding from then on.
        pad_token_id: any 32-bit number.
        prompt_lengths: int (B,), how many tokens of each row of ``prompt_tokens`` count; all if None.
        seed: of the random numbers, the same in both backends; or a JAX key; None: a new one each time.
        uniforms: (B, N) numbers in [0, 1), in place of a seed.
        prefill_chunk: maximum number of prompt tokens that are read at once; with ``vlm.prefix_lm`` all are.
        pixel_values: (B, 3, h, w) or (B, F, 3, h, w), what a `VLMWrapper` sees before each prompt; None: text alone.
        frame_mask: bool (B, F), False for frames that don't exist.
        image_positions: int (B,), how many tokens of each prompt stand before its image or clip, fewer than it has; or
            B rows, before each of its images, of which one row has F and others may have fewer; None: none.

    Returns:
        int32 (B, W): prompt, new tokens, and padding up to the longest row; W is S + N, unless every row ended earlier.

    Raises:
        ValueError: prompts that are empty, too long or hold ids outside the vocabulary; values without meaning;
            images that don't fit the model or the prompts; a model whose routers are not causal.
    """
    model = unwrapped(model)
    sampling = SamplingConfig(temperature, top_k, top_p, eos_token_id, pad_token_id, seed)
    request = make_request(
        model, prompt_tokens, max_new_tokens, sampling,
        prompt_lengths=prompt_lengths, uniforms=uniforms, prefill_chunk=prefill_chunk, pixel_values=pixel_values,
        frame_mask=frame_mask, image_positions=image_positions,
    )  # fmt: skip
    new_BN = decode_all(inner_transformer(model), request)
    whole = request.prompts.followed_by(np.asarray(new_BN), pad_token_id, sampling.eos_token_ids)
    return jax.device_put(whole.astype(np.int32))


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
    prompt_lengths: Integer[Array, "B"] | np.ndarray | Sequence[int] | int | None = None,
    seed: int | Shaped[Array, "..."] | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Float[Array, "B ... 3 h w"] | np.ndarray | None = None,
    frame_mask: Bool[Array, "B F"] | np.ndarray | None = None,
    image_positions: Integer[Array, "B ..."] | np.ndarray | Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Iterator[np.ndarray]:
    """The new tokens of `generate`, int (B,) at a time, as they are drawn; ends early when every row has ended.

    Arguments and errors, which are raised here and not at the first token, are those of `generate`.
    """
    model = unwrapped(model)
    sampling = SamplingConfig(temperature, top_k, top_p, eos_token_id, pad_token_id, seed)
    request = make_request(
        model, prompt_tokens, max_new_tokens, sampling,
        prompt_lengths=prompt_lengths, uniforms=uniforms, prefill_chunk=prefill_chunk, pixel_values=pixel_values,
        frame_mask=frame_mask, image_positions=image_positions,
    )  # fmt: skip
    return (np.asarray(tokens_B) for tokens_B in steps(inner_transformer(model), request))
