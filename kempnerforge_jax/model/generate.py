"""Sampling and generation with key/value caches.

An image goes into the caches first, or is read once where cross-attention looks at it. A prompt follows in chunks, all
but its last token and without the head; from there on every step reads one token of each row and draws the next, at
static shapes, so that one program serves all positions.

Shapes: B rows, S tokens of the longest prompt, N new tokens, V vocabulary, E ids that end a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kempnerforge_jax.model.kv_cache import KVCache
from kempnerforge_jax.model.linear import UNDRAWN
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.state import State, merge, set_state, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.vlm import VLMWrapper, inner_transformer
from kempnerforge_jax.model.wrappers import unwrapped
from shared_config.contract.decoding import (
    PREFILL_CHUNK,
    Prompts,
    bucket,
    cache_length,
    check_architecture,
    check_images,
    check_request,
    check_sampling,
    check_uniforms,
    draw_uniforms,
    prefill_chunks,
    read_prompts,
    read_stops,
)
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig

NO_LOGITS = ModalityContext(output_slice=slice(0, 0))


def sample(
    logits: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    uniforms: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
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
        key: what they are drawn with.

    Returns:
        int32 (...).

    Raises:
        ValueError: temperature < 0, top_k < 0, top_p outside (0, 1]; neither ``uniforms`` nor ``key``.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return _greedy(logits)
    if uniforms is None:
        if key is None:
            raise ValueError("uniforms = None, key = None: one of them must be given at a temperature above 0")
        uniforms = jax.random.uniform(key, logits.shape[:-1], _wide(logits.dtype))
    return _draw(logits, uniforms, temperature, top_k or logits.shape[-1], top_p)


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
    seed: int | jax.Array | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Any = None,
    frame_mask: Any = None,
) -> jax.Array:
    """Continue prompts. A wrapped model, or one with wrapped parts, generates as the plain one does.

    A row does not depend on its neighbours: attention and random numbers are its own, and mixtures of experts run
    without capacity limits. Programs are compiled for a number of rows and a few lengths (powers of two).

    Args:
        prompt_tokens: int (B, S), or a sequence of B rows of any lengths.
        temperature, top_k, top_p: as for `sample`.
        eos_token_id: one id or several; a row that has produced one of them is padding from then on.
        pad_token_id: any number of 32 bits.
        prompt_lengths: int (B,), how many tokens of each row of ``prompt_tokens`` count; all if None.
        seed: of the random numbers, the same in both backends; or a JAX key; None: another one each time.
        uniforms: (B, N) numbers in [0, 1), in place of a seed.
        prefill_chunk: at most so many tokens of a prompt are read at a time.
        pixel_values: (B, 3, h, w) or (B, F, 3, h, w), what a `VLMWrapper` sees before each prompt; None: text alone.
        frame_mask: bool (B, F), False for frames that don't exist.

    Returns:
        int32 (B, W): prompt, the tokens made, and padding up to the longest row; W is S + N, unless every row has ended
            before.

    Raises:
        ValueError: prompts that are empty, too long or hold ids outside the vocabulary; values without meaning;
            images that don't fit the model or the prompts; a model whose routers are not causal.
    """
    model = unwrapped(model)
    request = _request(
        model, prompt_tokens, max_new_tokens, temperature, top_k, top_p, eos_token_id, pad_token_id, prompt_lengths,
        seed, uniforms, prefill_chunk, pixel_values, frame_mask,
    )  # fmt: skip
    new_BN = _decode_all(inner_transformer(model), request)
    return jnp.asarray(request.prompts.followed_by(np.asarray(new_BN), pad_token_id, request.eos_token_ids))


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
    seed: int | jax.Array | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Any = None,
    frame_mask: Any = None,
) -> Iterator[np.ndarray]:
    """The new tokens of `generate`, int (B,) at a time, as they are drawn; ends early when every row has ended.

    Arguments and errors, which are raised here and not at the first token, are those of `generate`.
    """
    model = unwrapped(model)
    request = _request(
        model, prompt_tokens, max_new_tokens, temperature, top_k, top_p, eos_token_id, pad_token_id, prompt_lengths,
        seed, uniforms, prefill_chunk, pixel_values, frame_mask,
    )  # fmt: skip
    return (np.asarray(tokens_B) for tokens_B in _steps(inner_transformer(model), request))


def load_model(
    config: ModelConfig | JobConfig, weights: Mapping[str, Any] | None, device: Any = None, *, seed: int = 0
) -> Any:
    """A model with these weights, float32, for generation: of a job, one that sees images if the job's does.

    Args:
        weights: by name; None: the initial ones of ``seed``.

    Raises:
        ValueError: lists every missing, unknown and misshapen name.
    """
    from kempnerforge_jax.training.device import find_device

    with jax.default_device(find_device(device)):
        model = nnx.eval_shape(lambda: _new_model(config))
        model.init_weights_and_freqs(seed)
        if weights is not None:
            set_state(model, weights)
    return model


def _new_model(config: ModelConfig | JobConfig) -> Any:
    if isinstance(config, ModelConfig):
        return Transformer(config, rngs=UNDRAWN)
    from kempnerforge_jax.training.train import build_model

    return build_model(config, rngs=UNDRAWN)


@dataclass(frozen=True)
class Request:
    """What is to be generated, checked.

    Attributes:
        image: its place in the stream, or what is read of it at every step; None: text alone.
        uniforms: float64 (B, N); None: greedy.
        cache_length: positions of the caches.
        chunks: (start, size) of the parts in which the prompts are read.
    """

    prompts: Prompts
    image: ModalityContext | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    uniforms: np.ndarray | None
    cache_length: int
    chunks: Sequence[tuple[int, int]]


def _request(
    model: Transformer | VLMWrapper,
    prompt_tokens: Any,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    prompt_lengths: Any,
    seed: int | jax.Array | None,
    uniforms: np.ndarray | None,
    prefill_chunk: int,
    pixel_values: Any,
    frame_mask: Any,
) -> Request:
    transformer = _checked(model)
    check_sampling(temperature, top_k, top_p)
    config = transformer.config
    prompts = read_prompts(prompt_tokens, prompt_lengths, config.vocab_size)
    rows = len(prompts.lengths)
    image = _read_image(model, pixel_values, frame_mask, rows)
    taken, stops = _image_tokens(image), read_stops(eos_token_id)
    check_request(
        prompts,
        max_new_tokens,
        config.max_seq_len,
        config.vocab_size,
        stops,
        prefill_chunk,
        taken,
        pad_token_id,
    )
    slots = cache_length(prompts, max_new_tokens, config.max_seq_len, taken)
    return Request(
        prompts,
        image,
        max_new_tokens,
        temperature,
        top_k or config.vocab_size,
        top_p,
        stops,
        pad_token_id,
        None if temperature == 0 else _uniforms(seed, uniforms, rows, max_new_tokens),
        slots,
        prefill_chunks(prompts.tokens.shape[1] - 1, prefill_chunk, slots - taken),
    )


def _checked(model: Transformer | VLMWrapper) -> Transformer:
    """The transformer of a model that can generate."""
    transformer = inner_transformer(model)
    check_architecture(transformer.vlm_config)
    if transformer.token_embedding is None or transformer.output_head is None:
        raise ValueError("model is a pipeline stage: generate needs the embedding and the head in one model")
    return transformer


def _read_image(
    model: Transformer | VLMWrapper, pixel_values: Any, frame_mask: Any, rows: int
) -> ModalityContext | None:
    """What the transformer is called with for the image of each row."""
    if pixel_values is None and frame_mask is not None:
        raise ValueError("frame_mask is given, pixel_values = None: the mask needs the images that it masks")
    if pixel_values is None:
        return None
    if not isinstance(model, VLMWrapper):
        raise ValueError(f"pixel_values is given: model = {type(model).__name__} has no encoder for images")
    check_images(pixel_values.shape, rows)
    graphdef, params, buffers = split(model)
    frames = None if frame_mask is None else jnp.asarray(frame_mask)
    return _compiled_reading(graphdef)(params, buffers, jnp.asarray(pixel_values), frames)


def _image_tokens(image: ModalityContext | None) -> int:
    """Positions of the residual stream that the image takes."""
    return 0 if image is None or image.prefix_embeds is None else image.prefix_embeds.shape[1]


def _uniforms(seed: int | jax.Array | None, uniforms: Any, rows: int, count: int) -> np.ndarray:
    if uniforms is not None:
        return check_uniforms(uniforms, rows, count)
    if isinstance(seed, jax.Array):
        return np.asarray(jax.random.uniform(seed, (rows, count)), np.float64)
    return draw_uniforms(seed, rows, count)


class _State(NamedTuple):
    """What one step hands to the next: the tokens (B,) to read, and which rows have ended (B,)."""

    tokens: jax.Array
    done: jax.Array


class _Options(NamedTuple):
    """Numbers that a compiled step is given: none of them is compiled in.

    Attributes:
        sampling: temperature, top_k and top_p; None: greedy.
        eos_token_ids: int32 (E,); -1 if there is none.
    """

    sampling: tuple[jax.Array, ...] | None
    eos_token_ids: jax.Array
    pad_token_id: jax.Array


def _steps(model: Transformer, request: Request) -> Iterator[jax.Array]:
    """The new tokens (B,) as they are drawn."""
    if request.max_new_tokens == 0:
        return
    parts = graphdef, params, buffers = split(model)
    caches, state = _prefill(model, request, parts)
    uniforms_BN, options = _numbers(model, request, request.max_new_tokens)
    step, seen = _compiled_step(graphdef), _seen(request)
    for place in range(request.max_new_tokens):
        shown_B, state, caches = step(params, buffers, caches, state, seen, uniforms_BN[:, place], options)
        yield shown_B
        if request.eos_token_ids and bool(state.done.all()):
            return


def _decode_all(model: Transformer, request: Request) -> jax.Array:
    """All new tokens (B, N), in one program."""
    rows, count = len(request.prompts.lengths), request.max_new_tokens
    if count == 0:
        return jnp.zeros((rows, 0), jnp.int32)
    parts = graphdef, params, buffers = split(model)
    caches, state = _prefill(model, request, parts)
    room = bucket(count, model.config.max_seq_len + 1)
    uniforms_BN, options = _numbers(model, request, room)
    loop = _compiled_loop(graphdef)
    new_BN, _ = loop(params, buffers, caches, state, _seen(request), uniforms_BN, options, np.int32(count))
    return new_BN[:, :count]


def _numbers(model: Transformer, request: Request, room: int) -> tuple[jax.Array, _Options]:
    """Uniform numbers (B, ``room``), zeros after the end, and the options."""
    uniforms_BN = np.zeros((len(request.prompts.lengths), room))
    sampling, dtype = None, _wide(_weight(model).dtype)
    if request.uniforms is not None:
        uniforms_BN[:, : request.max_new_tokens] = request.uniforms
        values = (request.temperature, request.top_k, request.top_p)
        sampling = tuple(jnp.asarray(v, d) for v, d in zip(values, (dtype, jnp.int32, dtype), strict=True))
    stops = jnp.asarray(request.eos_token_ids or (-1,), jnp.int32)
    options = _Options(sampling, stops, jnp.asarray(request.pad_token_id, jnp.int32))
    return jnp.asarray(uniforms_BN.astype(dtype)), options


def _prefill(model: Transformer, request: Request, parts: tuple[Any, State, State]) -> tuple[list[KVCache], _State]:
    """Caches that hold every prompt but for its last token, and the state that these last tokens are."""
    config, dtype, prompts, image = model.config, _weight(model).dtype, request.prompts, request.image
    (rows, width), taken = prompts.tokens.shape, _image_tokens(image)
    graphdef, params, buffers = parts
    heads = config.kv_heads if model.vlm_config is None else model.vlm_config.cached_kv_heads(config)
    shape = (rows, request.cache_length, heads, config.head_size)
    ring = {"sliding_window": config.sliding_window, "spare": max((size for _, size in request.chunks), default=1) - 1}
    caches = [KVCache(*shape, dtype, **ring) for _ in range(config.n_layers)]
    read, lengths_B = _compiled_prefill(graphdef), jnp.asarray(prompts.lengths)
    if taken:
        caches = read(params, buffers, caches, prompts.tokens[:, :0], image, lengths_B * 0 + taken)
    for start, size in request.chunks:
        chunk = np.pad(prompts.tokens, ((0, 0), (0, max(0, start + size - width))))[:, start : start + size]
        caches = read(params, buffers, caches, chunk, _seen(request), lengths_B - 1 + taken)
    tokens_B = prompts.tokens[np.arange(rows), prompts.lengths - 1]
    return caches, _State(jnp.asarray(tokens_B), jnp.zeros(rows, jnp.bool_))


def _seen(request: Request) -> ModalityContext | None:
    """What text reads of the image at every step, where the image is not in the caches."""
    return None if _image_tokens(request.image) else request.image


@functools.lru_cache(maxsize=8)
def _compiled_reading(graphdef: Any) -> Any:
    """The context of images (B, [F,] 3, h, w)."""

    def read(params: State, buffers: State, pixel_values: jax.Array, frame_mask: jax.Array | None) -> Any:
        model: Any = merge(graphdef, params, buffers)
        context = model.context(pixel_values, jnp.zeros((len(pixel_values), 0), jnp.int32), frame_mask)
        if context.prefix_embeds is not None:
            return context
        return model.transformer.architecture.read_once(model.transformer, context)

    return jax.jit(read)


@functools.lru_cache(maxsize=8)
def _compiled_prefill(graphdef: Any) -> Any:
    """The caches after more tokens (B, S), and an image if one is given; rows end at ``lengths`` (B,)."""

    def prefill(
        params: State,
        buffers: State,
        caches: list[KVCache],
        tokens_BS: jax.Array,
        image: ModalityContext | None,
        lengths_B: jax.Array,
    ) -> list[KVCache]:
        model = merge(graphdef, params, buffers)
        modality = NO_LOGITS if image is None else replace(image, output_slice=NO_LOGITS.output_slice)
        length, noted = tokens_BS.shape[1], caches[0].valid is not None
        if model.config.is_moe and length:
            modality = replace(modality, key_padding_mask=caches[0].positions(length) < lengths_B[:, None])
        output = model.run(tokens_BS, modality=modality, kv_caches=caches, allow_image_inputs=True)
        updated = [cache.cut(lengths_B) for cache in output.kv_caches or ()]
        return updated if noted or not length else [cache.without_padding() for cache in updated]

    return jax.jit(prefill, donate_argnames="caches")


@functools.lru_cache(maxsize=8)
def _compiled_step(graphdef: Any) -> Any:
    return jax.jit(functools.partial(_step, graphdef), donate_argnames="caches")


@functools.lru_cache(maxsize=8)
def _compiled_loop(graphdef: Any) -> Any:
    """The decode steps as one program, which stops when every row has ended. Also gives the caches, so that their
    memory can be reused.
    """

    def loop(
        params: State,
        buffers: State,
        caches: list[KVCache],
        state: _State,
        image: ModalityContext | None,
        uniforms_BN: jax.Array,
        options: _Options,
        count: jax.Array,
    ) -> tuple[jax.Array, list[KVCache]]:
        new_BN = jnp.full(uniforms_BN.shape, options.pad_token_id, jnp.int32)

        def advance(carry: Any) -> Any:
            place, new_BN, state, caches = carry
            uniforms_B = jax.lax.dynamic_index_in_dim(uniforms_BN, place, 1, keepdims=False)
            shown_B, state, caches = _step(graphdef, params, buffers, caches, state, image, uniforms_B, options)
            return place + 1, new_BN.at[:, place].set(shown_B), state, caches

        def goes_on(carry: Any) -> jax.Array:
            place, _, state, _ = carry
            return (place < count) & ~state.done.all()

        carry = (jnp.zeros((), jnp.int32), new_BN, state, caches)
        _, new_BN, _, caches = jax.lax.while_loop(goes_on, advance, carry)
        return new_BN, caches

    return jax.jit(loop, donate_argnames="caches")


def _step(
    graphdef: Any,
    params: State,
    buffers: State,
    caches: list[KVCache],
    state: _State,
    image: ModalityContext | None,
    uniforms: jax.Array,
    options: _Options,
) -> tuple[jax.Array, _State, Any]:
    """Read one token of each row, and the image if it is not in the caches; the next (B,), padding in rows that had
    ended; the new state and caches.
    """
    model = merge(graphdef, params, buffers)
    output = model.run(state.tokens[:, None], modality=image, kv_caches=caches)
    logits_BV = output.logits[:, -1]
    drawn_B = _greedy(logits_BV) if options.sampling is None else _draw(logits_BV, uniforms, *options.sampling)
    shown_B = jnp.where(state.done, options.pad_token_id, drawn_B)
    return shown_B, _State(drawn_B, state.done | jnp.isin(drawn_B, options.eos_token_ids)), output.kv_caches


def _greedy(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _draw(logits: jax.Array, uniforms: jax.Array, temperature: Any, top_k: Any, top_p: Any) -> jax.Array:
    """`sample` at a temperature above 0: (..., V) -> (...)."""
    dtype = _wide(logits.dtype)
    order_V = jnp.argsort(logits, axis=-1, descending=True, stable=True).astype(jnp.int32)
    sorted_V = jnp.take_along_axis(logits, order_V, axis=-1).astype(dtype)
    scaled_V = (sorted_V - sorted_V[..., :1]) / jnp.maximum(temperature, jnp.finfo(dtype).tiny)
    beyond_k = jnp.arange(logits.shape[-1]) >= top_k
    probabilities_V = jax.nn.softmax(jnp.where(beyond_k, -jnp.inf, scaled_V), axis=-1)
    before_V = jnp.roll(probabilities_V.cumsum(axis=-1), 1, axis=-1).at[..., 0].set(0)
    kept_V = jnp.where(before_V < top_p, probabilities_V, 0)
    cumulative_V = (kept_V / kept_V.sum(axis=-1, keepdims=True)).cumsum(axis=-1)
    place = (cumulative_V <= uniforms.astype(dtype)[..., None]).sum(axis=-1)
    last = jnp.maximum((kept_V > 0).sum(axis=-1) - 1, 0)
    return jnp.take_along_axis(order_V, jnp.minimum(place, last)[..., None], axis=-1)[..., 0]


def _weight(model: Transformer) -> jax.Array:
    assert model.token_embedding is not None
    return model.token_embedding.embedding.weight.get_value()


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
