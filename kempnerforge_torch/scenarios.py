"""What `shared_config.parity.scenarios` has this backend do.

Shapes: B rows, S positions, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kempnerforge_torch import trace
from kempnerforge_torch.device import find_device
from kempnerforge_torch.model.build import load_model
from kempnerforge_torch.model.decode import advance, prefill
from kempnerforge_torch.model.generate import generate, stream
from kempnerforge_torch.model.hooks import ActivationStore, activation_names, extract_representations
from kempnerforge_torch.model.request import Request, inference, make_request
from kempnerforge_torch.model.state import from_numpy, to_numpy
from kempnerforge_torch.model.vlm import inner_transformer
from kempnerforge_torch.training.train import Trainer
from shared_config.contract.decoding import SamplingConfig
from shared_config.interchange.checkpoint import TrainingState
from shared_config.parity.dtypes import PRECISIONS
from shared_config.parity.scenarios import Arrays, Batch
from shared_config.parity.work import Decoding, Trained
from shared_config.schema.job import JobConfig

NAME = "torch"


def train(
    config: JobConfig,
    state: TrainingState,
    steps: Sequence[Sequence[Batch]],
    held_out: Sequence[Batch],
    *,
    dtype: str,
    device: str | None,
) -> Trained:
    """Steps of micro-batches from a state on. "bfloat16" and "fp8" are mixed precision; see `work.Backend`."""
    config = config.replace(train=config.train.replace(mixed_precision=PRECISIONS[dtype], compile_model=False))
    trainer = Trainer(config, device, dtype=torch.float64 if dtype == "float64" else torch.float32)
    trainer.load_state(state)
    evaluations = [float(trainer.evaluate([batch])["loss"]) for batch in held_out]
    metrics, states = [], []
    for micro_batches in steps:
        metrics.append({name: float(value) for name, value in trainer.step(micro_batches).items()})
        states.append(trainer.state())
    evaluations += [float(trainer.evaluate([batch])["loss"]) for batch in held_out]
    return Trained(metrics, states, np.array(evaluations))


def decode(config: JobConfig, weights: Arrays, decoding: Decoding, *, device: str | None) -> Arrays:
    """Tokens, and logits of static caches and without caches; see `shared_config.parity.work.Backend`."""
    model = _model(config, weights, device)
    target = find_device(device)
    pixels = None if decoding.pixels is None else from_numpy(decoding.pixels).to(target, torch.float64)
    options: dict[str, Any] = {
        "seed": decoding.seed,
        "prefill_chunk": decoding.prefill_chunk,
        "pixel_values": pixels,
        "image_positions": decoding.places,
        **decoding.sampling,
    }
    steps = stream(model, decoding.prompts, decoding.new_tokens, **options)
    new_BN = np.stack(list(steps), axis=1)
    filled_BT = to_numpy(generate(model, decoding.prompts, decoding.new_tokens, **options))
    generated_BN = np.stack(
        [row[len(prompt) :][: decoding.new_tokens] for row, prompt in zip(filled_BT, decoding.prompts, strict=True)]
    )
    return {
        "streamed": new_BN,
        "generated": generated_BN,
        "cached": _cached(model, decoding, new_BN, pixels),
        "whole": _whole(model, decoding, new_BN, pixels),
    }


def _cached(model: Any, decoding: Decoding, new_BN: np.ndarray, pixels: torch.Tensor | None) -> np.ndarray:
    """Logits (B, N, V) that static caches give, fed with tokens that are known."""
    transformer = inner_transformer(model)
    request = _request(model, decoding, pixels)
    logits, image = [], request.image_in_every_step
    with inference(model):
        caches, tokens_B = prefill(transformer, request)
        for index in range(decoding.new_tokens):
            logits.append(to_numpy(advance(transformer, tokens_B, caches, image)))
            tokens_B = torch.from_numpy(new_BN[:, index]).to(tokens_B)
    return np.stack(logits, axis=1)


def _request(model: Any, decoding: Decoding, pixels: Any) -> Request:
    sampling = SamplingConfig(seed=decoding.seed, **decoding.sampling)
    return make_request(
        model,
        decoding.prompts,
        decoding.new_tokens,
        sampling,
        prefill_chunk=decoding.prefill_chunk,
        pixel_values=pixels,
        image_positions=decoding.places,
    )


def _whole(model: Any, decoding: Decoding, new_BN: np.ndarray, pixels: torch.Tensor | None) -> np.ndarray:
    tokens_BS, positions_BN = decoding.followed_by(new_BN)
    device = next(model.parameters()).device
    inputs: tuple[Any, ...] = (torch.from_numpy(tokens_BS).long().to(device),)
    placed = {name: torch.from_numpy(array).to(device) for name, array in decoding.placed(tokens_BS.shape[1]).items()}
    placed |= {} if pixels is None else _prompts(model, decoding, device)
    with inference(model):
        inputs = inputs if pixels is None else (pixels, *inputs)
        logits_BSV = model.run(*inputs, **placed, limit_capacity=False).logits
    return np.take_along_axis(to_numpy(logits_BSV), positions_BN[..., None], axis=1)


def _prompts(model: Any, decoding: Decoding, device: torch.device) -> dict[str, torch.Tensor]:
    """How much of the text is the prompt, if that has attention in both directions."""
    vlm = inner_transformer(model).vlm_config
    lengths_B = torch.from_numpy(decoding.prompt_lengths).to(device)
    return {"prompt_lengths": lengths_B} if vlm is not None and vlm.has_prefix else {}


def captured(
    config: JobConfig, weights: Arrays, tokens: np.ndarray, images: Mapping[str, np.ndarray], *, device: str | None
) -> tuple[Arrays, Arrays]:
    """The outputs of every module; see `shared_config.parity.work.Backend`."""
    model, target = _model(config, weights, device), find_device(device)
    store = ActivationStore(model)
    inputs: tuple[Any, ...] = (torch.from_numpy(tokens).long().to(target),)
    placed = {name: torch.from_numpy(array).to(target) for name, array in images.items() if name != "pixel_values"}
    if images:
        inputs = (from_numpy(images["pixel_values"]).to(target, torch.float64), *inputs)
    store.enable()
    with torch.no_grad():
        model.run(*inputs, **placed)
    store.disable()
    stored = _flat({name: value for name, value in store.activations.items() if name != "transformer"})
    if images:
        return stored, {}
    extracted = extract_representations(model, list(tokens), activation_names(model))
    assert extracted is not None
    return stored, {name: to_numpy(value) for name, value in extracted.items()}


def device_name(device: str | None) -> str:
    """The model of an accelerator, or "cpu"."""
    return trace.device_name(find_device(device))


def _model(config: JobConfig, weights: Arrays, device: str | None) -> Any:
    """In float64."""
    return load_model(config, weights, device).double()


def _flat(outputs: Mapping[str, Any]) -> Arrays:
    """Outputs by modality get their own names."""
    flat: Arrays = {}
    for name, value in outputs.items():
        if isinstance(value, Mapping):
            flat |= _flat({f"{name}.{key}": part for key, part in value.items()})
        elif value is not None:
            flat[name] = to_numpy(value)
    return flat
