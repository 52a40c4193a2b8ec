"""Sampling and generation with key/value caches.

An image goes into the caches first, or is read once where cross-attention looks at it. A prompt follows in chunks, all
but its last token and without the head; from there on every step reads one token of each row and draws the next, at
static shapes, so that one program serves all positions.

Shapes: B rows, S tokens of the longest prompt, N new tokens, V vocabulary, E ids that end a row.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.state import set_state, to_numpy
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import VLMWrapper, inner_transformer
from kempnerforge_torch.model.wrappers import unwrap, unwrapped
from shared_config.contract.decoding import (
    PREFILL_CHUNK,
    Prompts,
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

Step = Callable[[Tensor, Tensor | None], Tensor]
"""The tokens (B,) to read, and of a draw the uniform numbers (B,), to the next tokens."""

PROGRAMS = 128
"""Decode steps that a process may compile; one more is an error of torch, which by itself would refuse the ninth."""

NO_LOGITS = ModalityContext(output_slice=slice(0, 0))


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
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
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    if uniforms is None:
        uniforms = torch.rand(logits.shape[:-1], generator=generator, dtype=_wide(logits.dtype), device=logits.device)
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
    request = _request(
        model, prompt_tokens, max_new_tokens, temperature, top_k, top_p, eos_token_id, pad_token_id, prompt_lengths,
        seed, uniforms, prefill_chunk, pixel_values, frame_mask,
    )  # fmt: skip
    transformer = inner_transformer(model)
    steps = list(_steps(transformer, request, compile))
    rows, device = len(request.prompts.lengths), _weight(transformer).device
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
    request = _request(
        model, prompt_tokens, max_new_tokens, temperature, top_k, top_p, eos_token_id, pad_token_id, prompt_lengths,
        seed, uniforms, prefill_chunk, pixel_values, frame_mask,
    )  # fmt: skip
    return (to_numpy(tokens_B) for tokens_B in _steps(inner_transformer(model), request, compile))


def load_model(
    config: ModelConfig | JobConfig, weights: Mapping[str, Any] | None, device: Any = None, *, seed: int = 0
) -> Any:
    """A model with these weights, float32, for generation: of a job, one that sees images if the job's does.

    Args:
        weights: by name; None: the initial ones of ``seed``.

    Raises:
        ValueError: lists every missing, unknown and misshapen name.
    """
    from kempnerforge_torch.training.device import find_device

    place = find_device(device)
    with torch.device("meta"):
        model = _new_model(config)
    model.to_empty(device=place)
    model.init_weights_and_freqs(seed)
    if weights is not None:
        set_state(model, weights)
    return model.eval()


def _new_model(config: ModelConfig | JobConfig) -> Any:
    if isinstance(config, ModelConfig):
        return Transformer(config)
    from kempnerforge_torch.training.train import build_model

    return build_model(config)


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
    seed: int | torch.Generator | None,
    uniforms: np.ndarray | None,
    prefill_chunk: int,
    pixel_values: Any,
    frame_mask: Any,
) -> Request:
    model = unwrap(model)
    transformer = _checked(model)
    check_sampling(temperature, top_k, top_p)
    config = transformer.config
    prompts = read_prompts(_on_host(prompt_tokens), _on_host(prompt_lengths), config.vocab_size)
    rows = len(prompts.lengths)
    image = _read_image(model, pixel_values, frame_mask, rows)
    taken, stops = _image_tokens(image), read_stops(_on_host(eos_token_id))
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
    transformer = inner_transformer(model)
    device = _weight(transformer).device
    pixels = torch.as_tensor(pixel_values, device=device)
    frames = None if frame_mask is None else torch.as_tensor(frame_mask, device=device)
    with inference(model):
        context = model.context(pixels, torch.zeros((rows, 0), dtype=torch.int64, device=device), frames)
        assert context is not None
        if context.prefix_embeds is not None:
            return context
        return transformer.architecture.read_once(transformer, context)


def _image_tokens(image: ModalityContext | None) -> int:
    """Positions of the residual stream that the image takes."""
    return 0 if image is None or image.prefix_embeds is None else image.prefix_embeds.shape[1]


def _on_host(given: Any) -> Any:
    return to_numpy(given) if isinstance(given, Tensor) else given


def _uniforms(seed: int | torch.Generator | None, uniforms: np.ndarray | None, rows: int, count: int) -> np.ndarray:
    if uniforms is not None:
        return check_uniforms(_on_host(uniforms), rows, count)
    if isinstance(seed, torch.Generator):
        return to_numpy(torch.rand((rows, count), generator=seed, device=seed.device)).astype(np.float64)
    return draw_uniforms(seed, rows, count)


def _steps(model: Transformer, request: Request, compile: bool) -> Iterator[Tensor]:
    """The new tokens (B,), on the model's device, as they are drawn."""
    if request.max_new_tokens == 0:
        return
    weight = _weight(model)
    uniforms_BN = None
    if request.uniforms is not None:
        uniforms_BN = torch.from_numpy(request.uniforms).to(weight.device, _wide(weight.dtype))
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
    config, weight, prompts, image = model.config, _weight(model), request.prompts, request.image
    rows, taken = len(prompts.lengths), _image_tokens(image)
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
    seen = None if _image_tokens(request.image) else request.image

    def step(tokens_B: Tensor, uniforms_B: Tensor | None) -> Tensor:
        with inference(model):
            logits_BV = advance(model, tokens_B, caches, seen)
            if uniforms_B is None:
                return logits_BV.argmax(dim=-1)
            return _draw(logits_BV, uniforms_B, request.temperature, request.top_k, request.top_p)

    return Recorded(step) if compile and _weight(model).is_cuda else step


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


def _draw(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """`sample` at a temperature above 0: (..., V) -> (...)."""
    dtype = _wide(logits.dtype)
    sorted_V, order_V = logits.to(dtype).sort(dim=-1, descending=True, stable=True)
    scaled_V = (sorted_V - sorted_V[..., :1]) / max(temperature, torch.finfo(dtype).tiny)
    beyond_k = torch.arange(logits.shape[-1], device=logits.device) >= top_k
    probabilities_V = scaled_V.masked_fill(beyond_k, -torch.inf).softmax(dim=-1)
    before_V = F.pad(probabilities_V.cumsum(dim=-1)[..., :-1], (1, 0))
    kept_V = torch.where(before_V < top_p, probabilities_V, 0)
    cumulative_V = (kept_V / kept_V.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    place = (cumulative_V <= uniforms.to(dtype)[..., None]).sum(dim=-1)
    last = ((kept_V > 0).sum(dim=-1) - 1).clamp(min=0)
    return order_V.gather(-1, torch.minimum(place, last)[..., None])[..., 0]


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode, no wrappers; all as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), unwrapped(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _weight(model: Transformer) -> Tensor:
    assert model.token_embedding is not None
    return unwrap(unwrap(model.token_embedding).embedding).weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
