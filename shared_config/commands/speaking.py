"""What commands that let a model speak share: options, sampling as its folder wants it, and text as it comes."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_config.commands.backends import backend_module
from shared_config.commands.common import fitting_weights, folder_of
from shared_config.commands.pictures import Prompt
from shared_config.contract.warm_start import without_warm_start
from shared_config.data.stops import until_stop
from shared_config.data.template import ChatTemplate, TemplateError, has_template
from shared_config.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from shared_config.errors import UserError
from shared_config.interchange.parts import HostArray
from shared_config.interchange.source import to_stderr
from shared_config.interchange.tokens import beside, has_tokenizer, sampling_defaults, stop_ids
from shared_config.schema.job import JobConfig


@dataclass(frozen=True)
class Manner:
    """How a model speaks: the values of `shared_config.contract.decoding.SamplingConfig`, and what ends a text."""

    temperature: float
    top_k: int
    top_p: float
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...]


def manner_of(options: argparse.Namespace, config: JobConfig, tokenizer: Tokenizer) -> Manner:
    """What the command line says, and otherwise the folder of the weights or the tokenizer.

    Raises:
        UserError: a generation_config.json that can't be read, or an empty ``--stop``.
    """
    if "" in options.stop:
        raise UserError("--stop = '': must not be empty")
    path = weights_of(options)
    known = None if path is None else beside(path)
    folder = known or (tokenizer.folder if isinstance(tokenizer, HuggingFaceTokenizer) else None)
    said = sampling_defaults(folder)
    for line in said.ignored:
        to_stderr(f"note: {line} of {folder}/generation_config.json is not applied")
    ends = {*tokenizer.stops, *(() if known is None else stop_ids(known))}
    return Manner(
        temperature=first_given(options.temperature, said.temperature, 1.0),
        top_k=int(first_given(options.top_k, said.top_k, 0)),
        top_p=first_given(options.top_p, said.top_p, 1.0),
        stop_ids=tuple(sorted(id for id in ends if id < config.model.vocab_size)),
        stop_texts=(*options.stop, *said.stop_strings),
    )


def first_given(*values: float | None) -> float:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def weights_of(options: argparse.Namespace) -> Path | None:
    """Where the weights lie: ``--weights``, or the folder that CONFIG is."""
    return folder_of(options.config) if options.weights is None else Path(options.weights)


def tokenizer_name(options: argparse.Namespace, config: JobConfig, overrides: Sequence[str]) -> str:
    """``data.tokenizer``; where nobody has set it, the tokenizer next to the weights."""
    path = weights_of(options)
    known = None if path is None else beside(path)
    chosen = config.data.tokenizer != "bytes" or any(flag.startswith("--data.tokenizer") for flag in overrides)
    return config.data.tokenizer if chosen or known is None or not has_tokenizer(known) else str(known)


def template_of(tokenizer: Tokenizer, image_token: int | None = None) -> ChatTemplate:
    """The chat template of a tokenizer's folder.

    Args:
        image_token: the id that stands for an image, if one does.

    Raises:
        UserError: there is none.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not has_template(tokenizer.folder):
        where = tokenizer.folder if isinstance(tokenizer, HuggingFaceTokenizer) else "data.tokenizer = 'bytes'"
        raise UserError(f"{where}: has no chat template; must be a tokenizer folder with one")
    return ChatTemplate(tokenizer.folder, image_token)


def conversation_ids(template: ChatTemplate, messages: Sequence[Mapping[str, object]]) -> list[int]:
    """The ids of a conversation up to where the assistant is to write.

    Raises:
        UserError: the template refuses it.
    """
    try:
        return template.encode_prompt(messages)
    except TemplateError as error:
        raise UserError(str(error)) from None


def load_speaker(options: argparse.Namespace, config: JobConfig, overrides: Sequence[str]) -> object:
    """The model of a backend, with the weights that the options name or initial ones."""
    load_model = backend_module(options.backend, "model.build").load_model
    weights = read_weights(options, config, overrides)
    built = config if weights is None else without_warm_start(config)
    return load_model(
        built, weights, options.device, seed=options.seed or 0, dtype=options.dtype, weights_dtype=options.weights_dtype
    )


def read_weights(
    options: argparse.Namespace, config: JobConfig, overrides: Sequence[str]
) -> Mapping[str, HostArray] | None:
    """The weights of ``--weights``, or of the folder that CONFIG is; None if there are none.

    Raises:
        UserError: nothing there, settings beside them that differ, or tensors that don't fit the config.
    """
    path = weights_of(options)
    if path is None:
        to_stderr("no --weights are given: the model is untrained")
        return None
    return fitting_weights(path, config, overrides)


def spoken(
    model: object,
    prompt: Prompt,
    manner: Manner,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    *,
    length: int,
    seed: int | None,
    times: list[float],
) -> Iterator[str]:
    """What a model adds to a prompt, piece by piece, up to ``length`` tokens or where it ends.

    Args:
        times: gets the time of the start, and of each token.
    """
    own = {"compile": options.compile} if options.backend == "torch" else {}
    tokens = backend_module(options.backend, "model.generate").stream(
        model,
        [prompt.ids],
        length,
        temperature=manner.temperature,
        top_k=manner.top_k,
        top_p=manner.top_p,
        eos_token_id=manner.stop_ids,
        seed=seed,
        pixel_values=prompt.pixels,
        image_positions=prompt.image_positions,
        **own,
    )
    times.append(time.perf_counter())
    return until_stop(tokenizer.decode_stream(timed(tokens, times), after=prompt.ids), manner.stop_texts)


@contextlib.contextmanager
def precision(options: argparse.Namespace, config: JobConfig) -> Iterator[None]:
    """In which a model is loaded, and speaks, in ``--dtype`` and in the precision of ``train.matmul_precision``."""
    own = backend_module(options.backend, "training.mixed_precision")
    with own.arithmetic(options.dtype), own.matmul_precision(config.train.matmul_precision):
        yield


def timed(tokens: Iterable[np.ndarray], times: list[float]) -> Iterator[int]:
    """The ids of the one row, each noting when it came."""
    for token_B in tokens:
        times.append(time.perf_counter())
        yield int(token_B[0])
