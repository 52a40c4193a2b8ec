"""Sampling and generation with key/value caches.

An image goes into the caches first, or is read once where cross-attention looks at it. A prompt follows in chunks, all
but its last token and without the head; from there on every step reads one token of each row and draws the next, at
static shapes, so that one program serves all positions.

Shapes: B rows, S tokens of the longest prompt, N new tokens, V vocabulary, E ids that end a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.request import Request, image_tokens, inference, make_request, weight_of
from kempnerforge_torch.model.sampling import draw, wide
from kempnerforge_torch.model.sampling import sample as sample
from kempnerforge_torch.model.state import to_numpy
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import VLMWrapper, inner_transformer
from shared_config.contract.decoding import (
    PREFILL_CHUNK,
)

Step = Callable[[Tensor, Tensor | None], Tensor]
"""The tokens (B,) to read, and of a draw the uniform numbers (B,), to the next tokens."""

PROGRAMS = 128
"""Decode steps that a process may compile; one more is an error of torch, which by itself would refuse the ninth."""

NO_LOGITS = ModalityContext(output_slice=slice(0, 0))


def generate(
    model: Transformer | VLMWrapper,
    prompt_tokens: Any,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    prompt_lengths: Any = None,
    seed: int | torch.Generator | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Any = None,
    frame_mask: Any = None,
    compile: bool = False,
) -> Tensor:
    """Continue prompts. A wrapped model, or one with wrapped or compiled parts, generates as the plain one does.

    A row does not depend on its neighbours: attention and random numbers are its own, and mixtures of experts run
    without capacity limits. The model is in evaluation mode meanwhile.

    Args:
        prompt_tokens: int (B, S), or a sequence of B rows of any lengths.
        temperature, top_k, top_p: as for `sample`.
        eos_token_id: one id or several; a row that has produced one of them is padding from then on.
        pad_token_id: any number of 32 bits.
        prompt_lengths: int (B,), how many tokens of each row of ``prompt_tokens`` count; all if None.
        seed: of the random numbers, the same in both backends; or a generator of torch; None: another one each time.
        uniforms: (B, N) numbers in [0, 1), in place of a seed.
        prefill_chunk: at most so many tokens of a prompt are read at a time.
        pixel_values: (B, 3, h, w) or (B, F, 3, h, w), what a `VLMWrapper` sees before each prompt; None: text alone.
        frame_mask: bool (B, F), False for frames that don't exist.
        compile: compile the decode step, and replay it as a CUDA graph on an NVIDIA GPU.

    Returns:
        int64 (B, W), on the model's device: prompt, the tokens made, and padding up to the longest row; W is S + N,
            unless every row has ended before.

    Raises:
        ValueError: prompts that are empty, too long or hold ids outside the vocabulary; values without meaning;
            images that don't fit the model or the prompts; a model whose routers are not causal.
    """
    request = make_request(
        model, prompt_tokens, max_new_tokens, temperature, top_k, top_p, eos_token_id, pad_token_id, prompt_lengths,
        seed, uniforms, prefill_chunk, pixel_values, frame_mask,
    )  # fmt: skip
    transformer = inner_transformer(model)
    steps = list(_steps(transformer, request, compile))
    rows, device = len(request.prompts.lengths), weight_of(transformer).device
    new_BN = torch.stack(steps, dim=1) if steps else torch.zeros((rows, 0), dtype=torch.int64)
    whole = request.prompts.followed_by(to_numpy(new_BN), pad_token_id, request.eos_token_ids)
    return torch.from_numpy(whole).long().to(device)


def stream(
    model: Transformer | VLMWrapper,
    prompt_tokens: Any,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    prompt_lengths: Any = None,
    seed: int | torch.Generator | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Any = None,
    frame_mask: Any = None,
    compile: bool = False,
) -> Iterator[np.ndarray]:
    """The new tokens of `generate`, int (B,) at a time, as they are drawn; ends early when every row has ended.

    Arguments and errors, which are raised here and not at the first token, are those of `generate`.
    """
    request = make_request(
        model, prompt_tokens, max_new_tokens, temperature, top_k, top_p, eos_token_id, pad_token_id, prompt_lengths,
        seed, uniforms, prefill_chunk, pixel_values, frame_mask,
    )  # fmt: skip
    return (to_numpy(tokens_B) for tokens_B in _steps(inner_transformer(model), request, compile))


def _steps(model: Transformer, request: Request, compile: bool) -> Iterator[Tensor]:
    """The new tokens (B,), on the model's device, as they are drawn."""
    if request.max_new_tokens == 0:
        return
    weight = weight_of(model)
    uniforms_BN = None
    if request.uniforms is not None:
        uniforms_BN = torch.from_numpy(request.uniforms).to(weight.device, wide(weight.dtype))
    caches, tokens_B = _prefill(model, request)
    step = _step(model, request, caches, compile)
    done_B = torch.zeros_like(tokens_B, dtype=torch.bool)
    stops_E = torch.tensor(request.eos_token_ids, dtype=torch.int64, device=weight.device)
    for place in range(request.max_new_tokens):
        tokens_B = step(tokens_B, None if uniforms_BN is None else uniforms_BN[:, place])
        yield tokens_B.masked_fill(done_B, request.pad_token_id)
        if request.eos_token_ids:
            done_B = done_B | torch.isin(tokens_B, stops_E)
            if bool(done_B.all()):
                return


def _prefill(model: Transformer, request: Request) -> tuple[list[KVCache], Tensor]:
    """Caches that hold every prompt but for its last token, and these last tokens (B,)."""
    config, weight, prompts, image = model.config, weight_of(model), request.prompts, request.image
    rows, taken = len(prompts.lengths), image_tokens(image)
    heads = config.kv_heads if model.vlm_config is None else model.vlm_config.cached_kv_heads(config)
    shape = (rows, request.cache_length, heads, config.head_size)
    ring = {"sliding_window": config.sliding_window, "spare": max((size for _, size in request.chunks), default=1) - 1}
    caches = [KVCache(*shape, weight.dtype, weight.device, **ring, static=True) for _ in range(config.n_layers)]
    tokens_BS = torch.from_numpy(prompts.tokens).to(weight.device).long()
    lengths_B = torch.from_numpy(prompts.lengths).to(weight.device).long()
    with inference(model):
        if taken:
            model.run(tokens_BS[:, :0], modality=image, kv_caches=caches, allow_image_inputs=True)
        modality = NO_LOGITS if image is None or taken else replace(image, output_slice=NO_LOGITS.output_slice)
        for start, size in request.chunks:
            chunk = F.pad(tokens_BS, (0, max(0, start + size - tokens_BS.shape[1])))[:, start : start + size]
            noted = caches[0].valid is not None
            if config.is_moe:
                modality = replace(
                    modality, key_padding_mask=caches[0].positions(size) < lengths_B[:, None] - 1 + taken
                )
            model.run(chunk, modality=modality, kv_caches=caches, allow_image_inputs=True)
            for cache in caches:
                cache.cut(lengths_B - 1 + taken)
                if not noted:
                    cache.without_padding()
    return caches, tokens_BS.gather(1, lengths_B[:, None] - 1)[:, 0]


def _advance(model: Transformer, tokens: Tensor, caches: list[KVCache], image: ModalityContext | None) -> Tensor:
    """Read one token (B,) of each row, and the image if it is not in the caches; logits (B, V) of the next."""
    return model.run(tokens[:, None], modality=image, kv_caches=caches).logits[:, -1]


def _step(model: Transformer, request: Request, caches: list[KVCache], compile: bool) -> Step:
    """What reads a token of each row and draws the next."""
    advance = _compiled() if compile else _advance
    seen = None if image_tokens(request.image) else request.image

    def step(tokens_B: Tensor, uniforms_B: Tensor | None) -> Tensor:
        with inference(model):
            logits_BV = advance(model, tokens_B, caches, seen)
            if uniforms_B is None:
                return logits_BV.argmax(dim=-1)
            return draw(logits_BV, uniforms_B, request.temperature, request.top_k, request.top_p)

    return Recorded(step) if compile and weight_of(model).is_cuda else step


@functools.lru_cache
def _compiled() -> Any:
    """`_advance`, of which there is a program for every model, number of rows and length of caches."""
    compiled = torch.compile(_advance, fullgraph=True, dynamic=False)

    def advance(*inputs: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=PROGRAMS):  # pyright: ignore[reportPrivateImportUsage]
            return compiled(*inputs)

    return advance


class Recorded:
    """A step as a CUDA graph, which a host launches at once instead of kernel by kernel.

    The first call runs the step, and compiles it; the second records it. What the step reads and writes besides its
    arguments must stay in its place, as the tensors of static caches do.
    """

    def __init__(self, step: Step):
        self.step = step
        self.calls = 0

    def __call__(self, tokens: Tensor, uniforms: Tensor | None) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            return self.step(tokens, uniforms)
        if self.calls == 2:
            self._record(tokens, uniforms)
        self.tokens.copy_(tokens)
        if uniforms is not None:
            self.uniforms.copy_(uniforms)
        self.graph.replay()
        return self.drawn.clone()

    def _record(self, tokens: Tensor, uniforms: Tensor | None) -> None:
        self.tokens = tokens.clone()
        self.uniforms = tokens.new_zeros(()) if uniforms is None else uniforms.clone()
        with torch.cuda.device(tokens.device):
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.drawn = self.step(self.tokens, None if uniforms is None else self.uniforms)
