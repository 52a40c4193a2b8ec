"""What a trace should record."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from shared_config.contract.image_token import refuse_image_token
from shared_config.contract.initialise import initial_value, state_hash
from shared_config.contract.routing import by_router, router_ids
from shared_config.contract.vision import job_table
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import installed_versions
from shared_config.interchange.toml import config_to_toml
from shared_config.interchange.vision import tower_of
from shared_config.parity import traces
from shared_config.parity.dtypes import DTYPES, dtypes_of
from shared_config.parity.images import image_positions, image_token, pixels, prompt_lengths
from shared_config.parity.refeed import Refeed, Stats, refeed_from, routes_from
from shared_config.parity.selection import Selection
from shared_config.parity.traces import Trace, TraceMeta
from shared_config.parity.validation import (
    chunkings,
    validation_labels,
    validation_tokens,
    validation_weights,
)
from shared_config.schema.job import JobConfig

Arrays = dict[str, np.ndarray]
T = TypeVar("T")

BATCH, LENGTH, LONGEST, BEYOND_WINDOW = 2, 24, 128, 8
WHOLE = "whole"
"""All tokens at once, without a cache."""
WEIGHTS = ("validation", "init")


@dataclass(frozen=True)
class Request:
    """What to record.

    Attributes:
        weights: float32, or as they were given, by name of the parameter table.
        origin: "validation", "init" or "given".
        tokens, labels: int32 (B, S).
        pixels: float32 (B, 3, s, s), (B, N, 3, s, s) or (B, F, 3, s, s), of a vision-language model.
        image_positions: int32 (B,) or (B, N), how many tokens stand before an image, where a token of prompts says so.
        prompt_lengths: int32 (B,), how many are the prompt, where that has attention in both directions.
        selection: what to record.
        refeed: what the layers are given instead of their own inputs; None for a plain run.
    """

    config: JobConfig
    dtype: str
    seed: int
    weights: Arrays
    origin: str
    tokens: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None = None
    image_positions: np.ndarray | None = None
    prompt_lengths: np.ndarray | None = None
    selection: Selection = field(default_factory=Selection)
    refeed: Refeed | None = None
    routes: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """N, how many images a row has; a clip is one."""
        return 1 if self.pixels is None or self.pixels.ndim == 4 or self.config.video else self.pixels.shape[1]

    def modules(self, names: Iterable[str]) -> list[str]:
        """Those of all modules whose outputs are recorded."""
        wanted = self.selection.wants_any
        return [name for name in names if wanted(f"{traces.FORWARD}/{output}" for output in outputs(name, self.config))]

    def kept(self, group: str, arrays: Mapping[str, T]) -> dict[str, T]:
        """Those of all tensors of a group that are recorded."""
        return {name: array for name, array in arrays.items() if self.selection.wants(f"{group}/{name}")}

    def differentiated(self, trained: Iterable[str]) -> list[str]:
        """Those of all parameters whose gradients are needed: an update needs all of them, for their norm."""
        if self.refeed is not None:
            return []
        if self.updates(trained):
            return list(trained)
        return list(self.kept(traces.GRADIENT, dict.fromkeys(trained)))

    def updates(self, trained: Iterable[str]) -> bool:
        """Whether an optimiser step is recorded."""
        return self.refeed is None and bool(self.kept(traces.UPDATED, dict.fromkeys(trained)))

    @property
    def unlimited(self) -> bool:
        """Whether a forward without capacity limits is recorded, which cached decoding must equal."""
        name = decode_reference(self.config)
        return self.refeed is None and name != logits_name(self.config) and self.selection.wants(name)

    @property
    def decodes(self) -> bool:
        """Whether cached decoding is recorded."""
        return self.refeed is None and self.selection.wants_any(decode_names(self))


def make_request(
    config: JobConfig,
    *,
    dtype: str,
    seed: int,
    weights: str | Mapping[str, np.ndarray] = "validation",
    tokens: np.ndarray | None = None,
    layers: Sequence[int] | None = None,
    only: Sequence[str] = (),
    refeed: Trace | None = None,
    routes: Trace | None = None,
) -> Request:
    """Check what was asked for and draw what was not given.

    Args:
        weights: "validation" (`validation_weights`), "init" (the seeded initial weights), or values by name.
        tokens: int (B, S); by default drawn from the seed, long enough to cross a sliding window.
        layers, only: what to record; see `Selection`. With cached decoding come the logits, whose delta it has.
        refeed: a trace of the same run, whose recorded outputs take the place of the computed ones in what follows.
        routes: a trace of the same run, whose experts' choices of tokens are taken again.

    Raises:
        UserError: unknown dtype, tokens that the model can't take, or a trace that is of another run.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    if dtype not in dtypes_of(config):
        raise UserError(f"dtype = {dtype!r}: needs train.mixed_precision = 'fp8', not {config.train.mixed_precision!r}")
    if tokens is None:
        tokens = validation_tokens(config.model.vocab_size, BATCH, default_length(config), seed, image_token(config))
    check_tokens(tokens, config)
    tokens = tokens.astype(np.int32)
    request = Request(
        config,
        dtype,
        seed,
        _weights(config, weights, seed),
        weights if isinstance(weights, str) else "given",
        tokens,
        validation_labels(tokens),
        pixels(config, len(tokens), seed),
        image_positions(config, tokens.shape, seed),
        prompt_lengths(config, tokens.shape, seed),
        Selection(None if layers is None else tuple(layers), tuple(only)),
    )
    if only and request.decodes:
        selection = dataclasses.replace(request.selection, only=_with_logits(only, config))
        request = dataclasses.replace(request, selection=selection)
    if routes is not None:
        request = dataclasses.replace(request, routes=routes_from(routes, request_meta(request), config))
    if refeed is None:
        return request
    return dataclasses.replace(request, refeed=refeed_from(refeed, request_meta(request), config))


def logits_name(config: JobConfig) -> str:
    """The tensor of a trace that holds the logits."""
    return f"{traces.FORWARD}/{transformer_path(config)}output_head"


def outputs(module: str, config: JobConfig) -> list[str]:
    """Names that the output of a module may have: its own, or one per modality."""
    modalities = () if config.vlm is None else config.vlm.modalities
    return [module, *(f"{module}.{modality}" for modality in modalities)]


def decode_names(request: Request) -> list[str]:
    """The tensors of a trace that hold logits of cached decoding."""
    if not can_decode(request.config):
        return []
    reference = decode_reference(request.config)
    names = [f"{traces.DECODE}/{name}" for name in decode_chunks(request)]
    return names if reference == logits_name(request.config) else [reference, *names]


def decode_chunks(request: Request) -> dict[str, tuple[int, ...]]:
    """Ways to feed the tokens to a cache. An image in the stream comes with the first of them, which reach that far,
    and as far as prompts with attention in both directions.
    """
    ends = [int(given.max()) for given in (request.image_positions, request.prompt_lengths) if given is not None]
    return chunkings(request.tokens.shape[1], request.seed, max(ends, default=0))


def decode_reference(config: JobConfig) -> str:
    """The tensor of a trace that cached decoding must equal: the logits, or where experts have a capacity, those
    of a forward without it, as it depends on the tokens of a call.
    """
    limited = config.model.is_moe and config.model.moe_capacity_factor > 0 and can_decode(config)
    return f"{traces.DECODE}/{WHOLE}" if limited else logits_name(config)


def check_selection(request: Request, modules: Sequence[str], router_fields: Sequence[str]) -> None:
    """Refuse layers and patterns for which the model has nothing.

    Args:
        modules: paths of all modules of the model.
        router_fields: what a router's stats hold.

    Raises:
        UserError: naming what would be right.
    """
    names = [f"{traces.FORWARD}/{name}" for module in modules for name in outputs(module, request.config)]
    names += [f"{traces.ROUTING}/{name}" for name in routing_names(modules, router_fields)]
    names += [traces.LOSS]
    if request.refeed is None:
        table = job_table(request.config, tower_of(request.config))
        names += [f"{group}/{name}" for group in (traces.GRADIENT, traces.UPDATED) for name in table]
        names += decode_names(request)
    request.selection.check(names, request.config.model.n_layers)


def transformer_path(config: JobConfig) -> str:
    """What the names of the language model's modules start with."""
    return "" if config.vlm is None else "transformer."


def seeded_values(config: JobConfig, seed: int) -> Arrays:
    """The seeded initial weights of the model of a job, whose transformer draws those of a text model."""
    path = transformer_path(config)
    table = job_table(config, tower_of(config))
    return {name: initial_value(name.removeprefix(path), spec, seed) for name, spec in table.items()}


def cache_size(request: Request, num_image_tokens: int) -> tuple[int, int, int, int]:
    """Batch, slots, key/value heads and their size of the caches that decode a request.

    Args:
        num_image_tokens: of an image or a clip.
    """
    config = request.config
    heads = config.model.kv_heads if config.vlm is None else config.vlm.cached_kv_heads(config.model)
    batch, length = request.tokens.shape
    return batch, num_image_tokens * request.images + length, heads, config.model.head_size


def can_decode(config: JobConfig) -> bool:
    """Whether a model can take its tokens one after the other: not if experts choose among all of them."""
    return config.vlm is None or config.vlm.can_generate


def default_length(config: JobConfig) -> int:
    """Positions of a drawn sequence: past the sliding window if that is not too far."""
    window = config.model.sliding_window or 0
    longest = config.model.max_seq_len if config.vlm is None else config.vlm.max_text_len
    return min(longest, max(LENGTH, min(window + BEYOND_WINDOW, LONGEST)))


def check_tokens(tokens: np.ndarray, config: JobConfig) -> None:
    """Refuse anything but a (B, S) array of ids that fits the model.

    Raises:
        UserError: naming the first id outside the vocabulary, or the length that is too large.
    """
    model = config.model
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise UserError(f"tokens: {tokens.dtype} of shape {tokens.shape}: must be integers of shape (batch, sequence)")
    if tokens.shape[1] > model.max_seq_len:
        raise UserError(f"tokens: {tokens.shape[1]} positions; must be at most model.max_seq_len = {model.max_seq_len}")
    if config.vlm is not None and tokens.shape[1] > config.vlm.max_text_len:
        longest = config.vlm.max_text_len
        raise UserError(f"tokens: {tokens.shape[1]} positions; must be at most vlm.max_text_len = {longest}")
    outside = np.argwhere((tokens < 0) | (tokens >= model.vocab_size))
    if len(outside):
        row, position = (int(i) for i in outside[0])
        raise UserError(
            f"tokens: id {tokens[row, position]} in row {row}, position {position} is outside the vocabulary; "
            f"must be in [0, {model.vocab_size}), model.vocab_size"
        )
    refuse_image_token("tokens", tokens, image_token(config))


def _with_logits(only: Sequence[str], config: JobConfig) -> tuple[str, ...]:
    """Patterns that also match the logits of which cached decoding has its delta."""
    logits = decode_reference(config)
    return tuple(only) if Selection(only=tuple(only)).wants(logits) else (*only, logits)


def routing_names(modules: Iterable[str], fields: Sequence[str]) -> Iterator[str]:
    """Names of what the routers among the modules decide, in a trace."""
    for module in modules:
        for router_id in router_ids(module):
            yield f"{module}{traces.ROUTES}"
            yield from (router_id.named(name, module.partition("layers.")[0]) for name in fields)


def routing_values(stats: Mapping[int, Stats | dict[str, Stats]], config: JobConfig) -> dict[str, object]:
    """The numbers of routers' stats, nested by layer and maybe modality, by their names in a trace."""
    prefix = transformer_path(config)
    return {
        router_id.named(field, prefix): value
        for router_id, own in by_router(stats).items()
        for field, value in own._asdict().items()
    }


def _listed(layers: tuple[int, ...] | None) -> list[int] | None:
    return None if layers is None else list(layers)


def _weights(config: JobConfig, weights: str | Mapping[str, np.ndarray], seed: int) -> Arrays:
    table = job_table(config, tower_of(config))
    if weights == "validation":
        return validation_weights(table, seed)
    if weights == "init":
        return seeded_values(config, seed)
    if isinstance(weights, str):
        raise UserError(f"weights = {weights!r}: must be one of {', '.join(WEIGHTS)}")
    return {name: np.asarray(value) for name, value in weights.items()}


def request_meta(request: Request) -> TraceMeta:
    """What is known of where a trace will come from before anything was run."""
    images = {name: getattr(request, name) for name in ("pixels", "image_positions", "prompt_lengths")}
    inputs = {"tokens": request.tokens} | {name: array for name, array in images.items() if array is not None}
    selection, refeed = request.selection, request.refeed
    return TraceMeta(
        backend="",
        device="",
        dtype=request.dtype,
        seed=request.seed,
        config=config_to_toml(request.config),
        machine=platform.platform(),
        versions=installed_versions(),
        weights=request.origin,
        weights_hash=state_hash(request.weights),
        tokens_hash=state_hash(inputs),
        selection={} if selection == Selection() else {"layers": _listed(selection.layers), "only": [*selection.only]},
        refed={} if refeed is None else refeed.meta,
    )
