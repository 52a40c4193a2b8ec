"""Decoding with key/value caches.

An image goes into the caches first, or is read once where cross-attention looks at it. A prompt follows in chunks, all
but its last token and without the head; from there on every step reads one token of each row and draws the next, at
static shapes, so that one program serves all positions.

With a prefix LM image and prompt, which see each other, are read at once and whole, and then the last token once more.

Shapes: B rows, S tokens of the longest prompt, N new tokens, V vocabulary, E ids that end a row.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kempnerforge_torch.model.cuda_graph import Step, compiled
from kempnerforge_torch.model.kept_steps import Kept, kept_of
from kempnerforge_torch.model.kv_cache import KVCache, new_caches
from kempnerforge_torch.model.modality import ModalityContext, placed
from kempnerforge_torch.model.request import Request, image_tokens, inference, weight_of
from kempnerforge_torch.model.sampling import draw, greedy, wide
from kempnerforge_torch.model.transformer import Transformer
from shared_config.contract.decoding import SamplingConfig

NO_LOGITS = ModalityContext(output_slice=slice(0, 0))


def decode_all(model: Transformer, request: Request, compile: bool) -> Int[Tensor, "B N"]:
    """The new tokens: int64 (B, up to N), on the model's device unless none are asked for."""
    with inference(model):
        new = list(_drawn(model, request, compile))
    nothing = torch.zeros((len(request.prompts.lengths), 0), dtype=torch.int64, device="cpu")
    return torch.stack(new, dim=1) if new else nothing


def steps(model: Transformer, request: Request, compile: bool) -> Iterator[Int[Tensor, "B"]]:
    """The new tokens (B,), on the model's device, as they are drawn. Between steps the model is in its former mode."""
    drawn = _drawn(model, request, compile)
    while True:
        with inference(model):
            tokens_B = next(drawn, None)
        if tokens_B is None:
            return
        yield tokens_B


def prefill(model: Transformer, request: Request) -> tuple[list[KVCache], Int[Tensor, "B"]]:
    """Caches that hold every prompt but for its last token, and these last tokens (B,)."""
    with inference(model):
        return _read(model, request, *_read_from(model, request))


def _read_from(model: Transformer, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (B, S), their lengths (B,), and where they end in the stream but for their last token (B,)."""
    device, prompts = weight_of(model).device, request.prompts
    arrays = prompts.tokens, prompts.lengths, prompts.lengths - 1 + request.image_tokens
    tokens_BS, lengths_B, ends_B = (torch.from_numpy(each).to(device).long() for each in arrays)
    return tokens_BS, lengths_B, ends_B


def _read(
    model: Transformer, request: Request, tokens_BS: Tensor, lengths_B: Tensor, ends_B: Tensor
) -> tuple[list[KVCache], Tensor]:
    """`prefill` of a model in evaluation mode."""
    config, weight, image = model.config, weight_of(model), request.image
    prefix = image_tokens(image)
    heads = config.kv_heads if model.vlm_config is None else model.vlm_config.cached_kv_heads(config)
    shape = (len(tokens_BS), request.cache_length, heads, config.head_size)
    spare = max((size for _, size in request.chunks), default=1) - 1
    caches = new_caches(config.layer_windows, *shape, weight.dtype, weight.device, spare=spare, static=True)
    states = list({id(cache.state): cache.state for cache in caches}.values())
    state = states[0]
    stream = _stream(model, request, tokens_BS) if request.image_within else None
    if prefix and stream is None:
        model.run(tokens_BS[:, :0], modality=image, kv_caches=caches, allow_image_inputs=True)
    modality = NO_LOGITS if image is None or prefix else replace(image, output_slice=NO_LOGITS.output_slice)
    for start, size in request.chunks:
        chunk, had_padding = _chunk(tokens_BS, start, size), state.valid is not None
        if stream is not None:
            chunk, modality = None, _within(stream, start, size)
            had_padding = modality.key_padding_mask is not None
        modality = replace(modality, prefix_lengths=request.prefix_lengths)
        if config.is_moe:
            read_B = ends_B if request.prefix_lengths is None else request.prefix_lengths
            read_BS = state.positions(size) < read_B[:, None]
            real_BS = modality.key_padding_mask if stream is not None else None
            modality = replace(modality, key_padding_mask=read_BS if real_BS is None else read_BS & real_BS)
        model.run(chunk, modality=modality, kv_caches=caches, allow_image_inputs=True)
        for each in states:
            each.truncate(ends_B)
            if not had_padding:
                each.without_padding()
    return caches, tokens_BS.gather(1, lengths_B[:, None] - 1)[:, 0]


def _stream(model: Transformer, request: Request, tokens_BS: Tensor) -> ModalityContext:
    """The prompts with the images within: the stream, and which of its positions are real."""
    image, embed = request.image, model.token_embedding
    assert image is not None
    assert image.prefix_embeds is not None
    assert image.prefix_positions is not None
    assert embed is not None
    text_BSD, real_BS = embed(tokens_BS), image.key_padding_mask
    if real_BS is not None:
        real_BS = placed(real_BS, torch.ones_like(tokens_BS, dtype=torch.bool), image.prefix_positions)
    embeds_BSD = placed(image.prefix_embeds.to(text_BSD.dtype), text_BSD, image.prefix_positions)
    return ModalityContext(inputs_embeds=embeds_BSD, key_padding_mask=real_BS)


def _within(stream: ModalityContext, start: int, size: int) -> ModalityContext:
    """A chunk of it, without logits."""
    assert stream.inputs_embeds is not None
    real_BS = stream.key_padding_mask
    return ModalityContext(
        inputs_embeds=_chunk(stream.inputs_embeds, start, size),
        key_padding_mask=None if real_BS is None else _chunk(real_BS, start, size),
        output_slice=NO_LOGITS.output_slice,
    )


def _chunk(values: Tensor, start: int, size: int) -> Tensor:
    """Of (B, S, ...), with zeros after the end."""
    after = [0] * (2 * values.ndim - 3) + [max(0, start + size - values.shape[1])]
    return F.pad(values, after)[:, start : start + size]


def advance(
    model: Transformer, tokens: Int[Tensor, "B"], caches: list[KVCache], image: ModalityContext | None
) -> Float[Tensor, "B V"]:
    """Read one token (B,) of each row, and the image if it is not in the caches; logits (B, V) of the next."""
    return model.run(tokens[:, None], modality=image, kv_caches=caches).logits[:, -1]


def _drawn(model: Transformer, request: Request, compile: bool) -> Iterator[Tensor]:
    """The new tokens (B,) of a model that is in evaluation mode whenever the next are asked for."""
    if request.max_new_tokens == 0:
        return
    weight = weight_of(model)
    uniforms_BN = None
    if request.uniforms is not None:
        uniforms_BN = torch.from_numpy(request.uniforms).to(weight.device, wide(weight.dtype))
    done_B, eos_ids = None, request.sampling.eos_token_ids
    eos_ids_E = torch.tensor(eos_ids, dtype=torch.int64, device=weight.device)
    kept = kept_of(model) if compile and weight.is_cuda else None
    with _filled(model, request, kept) as (caches, tokens_B), _stepping(model, request, caches, compile, kept) as step:
        for index in range(request.max_new_tokens):
            tokens_B = step(tokens_B, None if uniforms_BN is None else uniforms_BN[:, index])
            yield tokens_B if done_B is None else tokens_B.masked_fill(done_B, request.sampling.pad_token_id)
            if eos_ids:
                ends_B = torch.isin(tokens_B, eos_ids_E)
                done_B = ends_B if done_B is None else done_B | ends_B
                if bool(done_B.all()):
                    return


def _filled(
    model: Transformer, request: Request, kept: Kept | None
) -> contextlib.AbstractContextManager[tuple[list[KVCache], Tensor]]:
    """`prefill`, recorded where a dense model is given text alone, and no cut of a ring must be checked by the host."""
    inputs, read = _read_from(model, request), functools.partial(_read, model, request)
    is_plain = request.image is None and request.prefix_lengths is None and not request.has_windows
    if kept is None or model.config.is_moe or not is_plain:
        return contextlib.nullcontext(read(*inputs))
    return kept.filled((request.cache_length, tuple(request.chunks)), inputs, read)


def _stepping(
    model: Transformer, request: Request, caches: list[KVCache], compile: bool, kept: Kept | None
) -> contextlib.AbstractContextManager[Step]:
    """A function that reads a token of each row and draws the next, recorded where it is compiled for a GPU."""
    sampling, is_greedy = request.sampling, request.uniforms is None
    settings = None if is_greedy else (sampling.temperature, sampling.top_k, sampling.top_p)
    image = request.image_in_every_step

    def step_of(caches: list[KVCache], image: ModalityContext | None) -> Step:
        return functools.partial(_step, model, sampling, caches, image, compile)

    if kept is not None:
        return kept.step(caches, image, settings, step_of)
    return contextlib.nullcontext(step_of(caches, image))


def _step(
    model: Transformer,
    sampling: SamplingConfig,
    caches: list[KVCache],
    image: ModalityContext | None,
    compile: bool,
    tokens_B: Tensor,
    uniforms_B: Tensor | None,
) -> Tensor:
    read = compiled(advance, vectors=tokens_B.is_cuda and len(tokens_B) == 1) if compile else advance
    logits_BV = read(model, tokens_B, caches, image)
    if uniforms_B is None:
        return greedy(logits_BV)
    top_k = sampling.top_k or logits_BV.shape[-1]
    return draw(logits_BV, uniforms_B, sampling.temperature, top_k, sampling.top_p)
