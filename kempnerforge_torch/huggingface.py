"""The model of transformers that a Hugging Face folder holds, run once: logits, hidden states, loss and gradients, by
the names that they have here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
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
from shared_config.interchange.llava import from_llava
from shared_config.interchange.vision import tower_of
from shared_config.parity.request import Request, image_token, logits_name, make_request, request_meta, transformer_path
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
    """What it computes, by the names of a trace: of the embedding and the head the part of the text."""
    config = request.config
    tokens, labels = (torch.from_numpy(np.int64(each)).to(device) for each in (request.tokens, request.labels))
    images = {} if request.pixels is None else {"pixel_values": from_numpy(request.pixels).to(device, model.dtype)}
    tower = tower_of(config)
    count = 0 if tower is None else tower.num_tokens
    places = torch.full((len(tokens), count), image_token(config) or 0, device=device)
    output = model(torch.cat([places, tokens], dim=1), **images, use_cache=False, output_hidden_states=True)
    path = transformer_path(config)
    layers = [f"{path}layers.{layer}" for layer in range(config.model.n_layers - 1)]
    embedded, *streams = output.hidden_states  # of the last layer it shows nothing
    logits = output.logits[:, count:]
    tensors = {f"{FORWARD}/adapter": embedded[:, :count]} if count else {}
    tensors[f"{FORWARD}/{path}token_embedding"] = embedded[:, count:]
    tensors |= {f"{FORWARD}/{name}": each for name, each in zip([*layers, f"{path}norm"], streams, strict=True)}
    tensors[logits_name(config)] = logits
    if _differentiates(config):
        tensors[LOSS] = mean_cross_entropy(logits, labels, **loss_terms(config.train))
    return tensors


def _gradients(model: Any, config: JobConfig) -> dict[str, np.ndarray]:
    """Those of what the loss depends on, by native names."""
    found = {name: to_numpy(each.grad) for name, each in model.named_parameters() if each.grad is not None}
    return from_huggingface(found, config.model) if config.vlm is None else from_llava(found, config)
