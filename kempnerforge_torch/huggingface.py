"""The model of transformers that a Hugging Face folder holds, run once: logits, hidden states, loss and gradients, by
the names that they have here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kempnerforge_torch.device import find_device
from kempnerforge_torch.model.state import from_numpy, to_numpy
from kempnerforge_torch.trace import device_name
from kempnerforge_torch.training.loss import mean_cross_entropy
from shared_config.contract.labels import loss_terms
from shared_config.interchange.huggingface import from_huggingface
from shared_config.interchange.vision import tower_of
from shared_config.interchange.with_images import from_image_model
from shared_config.parity.images import image_token
from shared_config.parity.request import Request, logits_name, make_request, request_meta, transformer_path
from shared_config.parity.traces import FORWARD, GRADIENT, LOSS, Trace
from shared_config.schema.job import JobConfig

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def record(
    config: JobConfig,
    folder: Path,
    weights: Mapping[str, np.ndarray],
    *,
    dtype: str,
    seed: int = 0,
    device: str | None = None,
) -> Trace:
    """A trace of the scenario "transformers": the image tokens, if the model sees an image, the stream after the
    embedding, each layer but the last and the final norm, the logits, and of a model without experts the loss and the
    gradients of all parameters.

    Args:
        folder: with config.json and weights.
        weights: the same by native names, by which traces are told apart.
        dtype: of weights and arithmetic. (Softmax and rotary tables of transformers are float32 whatever it is.)
        seed: of the tokens and pixels.

    Raises:
        KeyError: a dtype that it has no model for.
    """
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    request, target = make_request(config, dtype=dtype, seed=seed, weights=weights), find_device(device)
    options = {"dtype": DTYPES[dtype], "attn_implementation": "eager", "local_files_only": True}
    kind = AutoModelForCausalLM if config.vlm is None else AutoModelForImageTextToText
    model: Any = kind.from_pretrained(folder, **options)
    model.to(target).eval()
    if config.model.is_moe:
        model.set_experts_implementation("eager")  # its products over groups have no float64
    with contextlib.nullcontext() if _differentiates(config) else torch.no_grad():
        tensors = _forward(model, request, target)
    arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    if _differentiates(config):
        tensors[LOSS].backward()
        arrays |= {f"{GRADIENT}/{name}": value for name, value in _gradients(model, config).items()}
    meta = dataclasses.replace(
        request_meta(request),
        backend="transformers",
        device=device_name(target),
        extra={"scenario": "transformers"},
    )
    return Trace(arrays, meta)


def _differentiates(config: JobConfig) -> bool:
    """Losses of routers are part of the objective here, of which transformers has its own."""
    return not config.model.is_moe


def _forward(model: Any, request: Request, device: torch.device) -> dict[str, Tensor]:
    """What it computes, by the names of a trace. Of the embedding this is the part of the text, of the logits for each
    token those that the next one is predicted from.
    """
    config = request.config
    ids, labels = _ids(request).to(device), torch.from_numpy(np.int64(request.labels)).to(device)
    images = {} if request.pixels is None else {"pixel_values": _pixels(request).to(device, model.dtype)}
    if request.prompt_lengths is not None:
        images["token_type_ids"] = _token_types(request, ids)
    output = model(ids, **images, use_cache=False, output_hidden_states=True)
    is_text = ids != image_token(config) if images else torch.ones_like(ids, dtype=torch.bool)
    texts = [row.nonzero()[:, 0] for row in is_text]
    path = transformer_path(config)
    layers = [f"{path}layers.{layer}" for layer in range(config.model.n_layers - 1)]
    embedded, *streams = output.hidden_states  # of the last layer it shows nothing
    logits = _rows(output.logits, [_before_next(places, ids.shape[1]) for places in texts])
    tensors = {f"{FORWARD}/adapter": _of_images(embedded, is_text, request)} if images else {}
    tensors[f"{FORWARD}/{path}token_embedding"] = _rows(embedded, texts)
    tensors |= {f"{FORWARD}/{name}": each for name, each in zip([*layers, f"{path}norm"], streams, strict=True)}
    tensors[logits_name(config)] = logits
    if _differentiates(config):
        tensors[LOSS] = mean_cross_entropy(logits, labels, **loss_terms(config.train))
    return tensors


def _ids(request: Request) -> Tensor:
    """The tokens (B, T), and the id of an image as many times as that has tokens, where each stands in a row: before a
    prompt with attention in both directions.
    """
    tokens, tower = torch.from_numpy(np.int64(request.tokens)), tower_of(request.config)
    places = request.image_positions
    if request.prompt_lengths is not None:
        places = np.zeros((len(request.tokens), request.images), np.int32)
    if places is None or tower is None:
        return tokens
    image, rows = image_token(request.config) or 0, zip(request.tokens, places, strict=True)
    placed = [np.insert(text, np.repeat(own, tower.num_tokens), image) for text, own in rows]
    return torch.from_numpy(np.int64(np.stack(placed)))


def _pixels(request: Request) -> Tensor:
    """Of all images, one after the other."""
    assert request.pixels is not None
    return from_numpy(request.pixels).flatten(0, -4)


def _of_images(stream: Tensor, is_text: Tensor, request: Request) -> Tensor:
    """Of (B, S, D) the positions of images, (B * N, n, D)."""
    own = _rows(stream, [(~row).nonzero()[:, 0] for row in is_text])
    return own.reshape(len(own) * request.images, -1, own.shape[-1])


def _token_types(request: Request, ids: Tensor) -> Tensor:
    """int (B, S): 0 of the image and the prompt, which see each other, 1 of what follows."""
    assert request.prompt_lengths is not None
    lengths_B = torch.from_numpy(np.int64(request.prompt_lengths)).to(ids.device)
    prefix_B1 = ids.shape[1] - request.tokens.shape[1] + lengths_B[:, None]
    return (torch.arange(ids.shape[1], device=ids.device) >= prefix_B1).long()


def _before_next(places: Tensor, length: int) -> Tensor:
    """Of the places (T,) of text in a row those just before the next, and the last of the row."""
    return torch.cat([places[1:] - 1, places.new_tensor([length - 1])])


def _rows(stream: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Of each row of (B, S, D) some positions."""
    return torch.stack([own[chosen] for own, chosen in zip(stream, places, strict=True)])


def _gradients(model: Any, config: JobConfig) -> dict[str, np.ndarray]:
    """Those of what the loss depends on, by native names."""
    found = {name: to_numpy(each.grad) for name, each in model.named_parameters() if each.grad is not None}
    return from_huggingface(found, config.model) if config.vlm is None else from_image_model(found, config)
