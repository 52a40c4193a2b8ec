"""Decoding with key/value caches.

An image goes into the caches first, or is read once where cross-attention looks at it. A prompt follows in chunks, all
but its last token and without the head; from there on every step reads one token of each row and draws the next, at
static shapes, so that one program serves all positions.

With a prefix LM image and prompt, which see each other, are read at once and whole, and then the last token once more.

Shapes: B rows, S tokens of the longest prompt, N new tokens, V vocabulary, E ids that end a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kempnerforge_jax.model.checks import MAX_ID
from kempnerforge_jax.model.kv_cache import KVCache, SharedCaches, new_caches
from kempnerforge_jax.model.modality import ModalityContext, placed
from kempnerforge_jax.model.request import Request, image_tokens, weight_of
from kempnerforge_jax.model.sampling import draw, greedy, wide
from kempnerforge_jax.model.state import State, merge, split
from kempnerforge_jax.model.transformer import Transformer
from shared_config.contract.decoding import bucket

NO_LOGITS = ModalityContext(output_slice=slice(0, 0))
STEPS_TOGETHER = 16
"""Of which a GPU's host is told at once: between two of its loop it waits for the device to say whether to go on."""


class _State(NamedTuple):
    """What one step passes to the next: the tokens (B,) to read, and which rows have ended (B,)."""

    tokens: jax.Array
    done: jax.Array


class _Options(NamedTuple):
    """Arguments of a compiled step, none of which is compiled in.

    Attributes:
        sampling: temperature, top_k and top_p; None: greedy.
        eos_token_ids: int32 (E,), of which -1 is none.
    """

    sampling: tuple[jax.Array, ...] | None
    eos_token_ids: jax.Array
    pad_token_id: jax.Array


def _start(tokens: jax.Array) -> _State:
    """The state in which no row (B,) has ended."""
    return _State(tokens, jnp.zeros(tokens.shape, jnp.bool_))


def decode_all(model: Transformer, request: Request) -> Int[Array, "B N"]:
    """All new tokens (B, N), in one program."""
    rows, count = len(request.prompts.lengths), request.max_new_tokens
    if count == 0:
        return jnp.zeros((rows, 0), jnp.int32)
    parts = graphdef, params, buffers = split(model)
    each, tokens_B = _read(model, request, parts)
    max_steps = bucket(count, model.config.max_seq_len + 1)
    uniforms_BN, options = _numbers(model, request, max_steps)
    loop = _compiled_loop(graphdef)
    image, state = request.image_in_every_step, _start(tokens_B)
    new_BN, _ = loop(params, buffers, SharedCaches.of(each), state, image, uniforms_BN, options, np.int32(count))
    return jax.device_put(np.asarray(new_BN)[:, :count])  # a slice on the device would be a program for each length


def steps(model: Transformer, request: Request) -> Iterator[Int[Array, "B"]]:
    """The new tokens (B,) as they are drawn."""
    if request.max_new_tokens == 0:
        return
    parts = graphdef, params, buffers = split(model)
    each, tokens_B = _read(model, request, parts)
    caches, state = SharedCaches.of(each), _start(tokens_B)
    uniforms_BN, options = _numbers(model, request, request.max_new_tokens)
    step, image = _compiled_step(graphdef), request.image_in_every_step
    for index in range(request.max_new_tokens):
        output_B, state, caches = step(params, buffers, caches, state, image, uniforms_BN[:, index], options)
        yield output_B
        if request.sampling.eos_token_ids and np.asarray(state.done).all():
            return


def prefill(model: Transformer, request: Request) -> tuple[list[KVCache], Int[Array, "B"]]:
    """Caches that hold every prompt but for its last token, and these last tokens (B,)."""
    return _read(model, request, split(model))


def _read(model: Transformer, request: Request, parts: tuple[Any, State, State]) -> tuple[list[KVCache], jax.Array]:
    """`prefill` of a model that is already split, as splitting takes a while."""
    config, dtype, prompts, image = model.config, weight_of(model).dtype, request.prompts, request.image
    rows, prefix = len(prompts.lengths), image_tokens(image)
    graphdef, params, buffers = parts
    heads = config.kv_heads if model.vlm_config is None else model.vlm_config.cached_kv_heads(config)
    shape = (rows, request.cache_length, heads, config.head_size)
    spare = max((size for _, size in request.chunks), default=1) - 1
    caches = _empty_caches(tuple(config.layer_windows), shape, dtype, spare)
    read, ends_B = _compiled_prefill(graphdef), jnp.asarray(prompts.lengths - 1 + request.image_tokens)
    stream = None
    if request.image_within:
        stream = _compiled_stream(graphdef)(params, buffers, prompts.tokens, image)
        stream = jax.tree.map(np.asarray, stream)
    if prefix and stream is None:
        caches = read(params, buffers, caches, prompts.tokens[:, :0], image, ends_B * 0 + prefix)
    for start, size in request.chunks:
        chunk, context = _chunk(prompts.tokens, start, size), request.image_in_every_step
        if stream is not None:
            chunk, context = None, jax.tree.map(functools.partial(_chunk, start=start, size=size), stream)
        if request.prefix_lengths is not None:
            context = replace(context or NO_LOGITS, prefix_lengths=request.prefix_lengths)
        caches = read(params, buffers, caches, chunk, context, ends_B)
    return caches.each(), jnp.asarray(prompts.tokens[np.arange(rows), prompts.lengths - 1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_caches(
    windows: tuple[int | None, ...], shape: tuple[int, int, int, int], dtype: np.dtype[Any], spare: int
) -> SharedCaches:
    """Those of all layers in one program, as to make an array takes the host longer than the device."""
    return SharedCaches.of(new_caches(windows, *shape, dtype, spare=spare))


def _chunk(values: np.ndarray, start: int, size: int) -> np.ndarray:
    """Of (B, S, ...), with zeros after the end."""
    after = [(0, 0), (0, max(0, start + size - values.shape[1])), *[(0, 0)] * (values.ndim - 2)]
    return np.pad(values, after)[:, start : start + size]


def advance(
    model: Transformer, tokens: Int[Array, "B"], caches: list[KVCache], image: ModalityContext | None
) -> tuple[Float[Array, "B V"], list[KVCache]]:
    """Read one token (B,) of each row, and the image if it is not in the caches.

    Returns:
        logits (B, V) of the next token; the new caches.
    """
    output = model.run(tokens[:, None], modality=image, kv_caches=caches)
    assert output.kv_caches is not None
    return output.logits[:, -1], output.kv_caches


def _numbers(model: Transformer, request: Request, max_steps: int) -> tuple[np.ndarray, _Options]:
    """Uniform numbers (B, ``max_steps``), zeros after the end, and the options."""
    uniforms_BN = np.zeros((len(request.prompts.lengths), max_steps))
    sampling, dtype = None, wide(weight_of(model).dtype)
    if request.uniforms is not None:
        uniforms_BN[:, : request.max_new_tokens] = request.uniforms
        requested = request.sampling
        values = (requested.temperature, requested.top_k or model.config.vocab_size, requested.top_p)
        sampling = tuple(jnp.asarray(v, d) for v, d in zip(values, (dtype, jnp.int32, dtype), strict=True))
    eos_ids, pad_token_id = request.sampling.eos_token_ids, request.sampling.pad_token_id
    eos_ids_E = np.full(bucket(len(eos_ids) + 1, MAX_ID), -1, np.int32)
    eos_ids_E[: len(eos_ids)] = eos_ids
    options = _Options(sampling, jnp.asarray(eos_ids_E), jnp.asarray(pad_token_id, jnp.int32))
    return uniforms_BN.astype(dtype), options


@functools.lru_cache(maxsize=8)
def _compiled_stream(graphdef: Any) -> Any:
    """Prompts (B, S) with the images within: the stream, and which of its positions are real."""

    def stream(params: State, buffers: State, tokens_BS: jax.Array, image: ModalityContext) -> ModalityContext:
        embed = merge(graphdef, params, buffers).token_embedding
        assert image.prefix_embeds is not None
        assert image.prefix_positions is not None
        text_BSD, real_BS = embed(tokens_BS), image.key_padding_mask
        if real_BS is not None:
            real_BS = placed(real_BS, jnp.ones(tokens_BS.shape, bool), image.prefix_positions)
        embeds_BSD = placed(image.prefix_embeds.astype(text_BSD.dtype), text_BSD, image.prefix_positions)
        return ModalityContext(inputs_embeds=embeds_BSD, key_padding_mask=real_BS)

    return jax.jit(stream)


@functools.lru_cache(maxsize=8)
def _compiled_prefill(graphdef: Any) -> Any:
    """The caches after more tokens (B, S), and an image if one is given, or after both as embeddings; rows end at
    ``lengths`` (B,).
    """

    def prefill(
        params: State,
        buffers: State,
        caches: SharedCaches,
        tokens_BS: jax.Array | None,
        image: ModalityContext | None,
        lengths_B: jax.Array,
    ) -> SharedCaches:
        model, (state, *_) = merge(graphdef, params, buffers), caches.states
        modality = NO_LOGITS if image is None else replace(image, output_slice=NO_LOGITS.output_slice)
        new_BS = modality.inputs_embeds if tokens_BS is None else tokens_BS
        real_BS = modality.key_padding_mask if tokens_BS is None else None
        assert new_BS is not None
        length, had_padding = new_BS.shape[1], state.valid is not None or real_BS is not None
        if model.config.is_moe and length:
            ends_B = lengths_B if modality.prefix_lengths is None else modality.prefix_lengths
            read_BS = state.positions(length) < ends_B[:, None]
            modality = replace(modality, key_padding_mask=read_BS if real_BS is None else read_BS & real_BS)
        output = model.run(tokens_BS, modality=modality, kv_caches=caches.each(), allow_image_inputs=True)
        assert output.kv_caches is not None
        states, layers = SharedCaches.of(output.kv_caches)
        states = [state.truncate(lengths_B) for state in states]
        if length and not had_padding:
            states = [state.without_padding() for state in states]
        return SharedCaches(states, layers)

    return jax.jit(prefill, donate_argnames="caches")


@functools.lru_cache(maxsize=8)
def _compiled_step(graphdef: Any) -> Any:
    return jax.jit(functools.partial(_step, graphdef), donate_argnames="caches")


@functools.lru_cache(maxsize=8)
def _compiled_loop(graphdef: Any) -> Any:
    """The decode steps as one program, which stops when every row has ended. Also returns the caches, so that their
    memory can be reused.
    """

    def loop(
        params: State,
        buffers: State,
        caches: SharedCaches,
        state: _State,
        image: ModalityContext | None,
        uniforms_BN: jax.Array,
        options: _Options,
        count: jax.Array,
    ) -> tuple[jax.Array, SharedCaches]:
        new_BN = jnp.full(uniforms_BN.shape, options.pad_token_id, jnp.int32)

        def body(carry: Any) -> Any:
            index, new_BN, state, caches = carry
            uniforms_B = jax.lax.dynamic_index_in_dim(uniforms_BN, index, 1, keepdims=False)
            output_B, state, caches = _step(graphdef, params, buffers, caches, state, image, uniforms_B, options)
            return index + 1, new_BN.at[:, index].set(output_B), state, caches

        def steps(together: int, carry: Any) -> Any:
            def condition(carry: Any) -> jax.Array:
                index, _, state, _ = carry
                return (index + together <= count) & ~state.done.all()

            several = body if together == 1 else functools.partial(jax.lax.fori_loop, 0, together, lambda _, c: body(c))
            return jax.lax.while_loop(condition, several, carry)

        carry = (jnp.zeros((), jnp.int32), new_BN, state, caches)
        for together in _strides():
            carry = steps(together, carry)
        _, new_BN, _, caches = carry
        return new_BN, caches

    return jax.jit(loop, donate_argnames="caches")


def _strides() -> tuple[int, ...]:
    """How many steps a loop takes at a time, and the one after it, until all are taken."""
    return (STEPS_TOGETHER, 1) if jax.default_backend() == "gpu" else (1,)


def _step(
    graphdef: Any,
    params: State,
    buffers: State,
    caches: SharedCaches,
    state: _State,
    image: ModalityContext | None,
    uniforms: jax.Array,
    options: _Options,
) -> tuple[jax.Array, _State, SharedCaches]:
    """The next tokens (B,), padding in rows that had ended; the new state and caches."""
    logits_BV, updated = advance(merge(graphdef, params, buffers), state.tokens, caches.each(), image)
    drawn_B = greedy(logits_BV) if options.sampling is None else draw(logits_BV, uniforms, *options.sampling)
    output_B = jnp.where(state.done, options.pad_token_id, drawn_B)
    return output_B, _State(drawn_B, state.done | jnp.isin(drawn_B, options.eos_token_ids)), SharedCaches.of(updated)
