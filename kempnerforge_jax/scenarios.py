"""What `shared_config.parity.scenarios` has this backend do.

Shapes: B rows, S positions, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kempnerforge_jax import trace
from kempnerforge_jax.device import find_device
from kempnerforge_jax.model.build import load_model
from kempnerforge_jax.model.decode import advance, prefill
from kempnerforge_jax.model.generate import generate, stream
from kempnerforge_jax.model.hooks import ActivationStore, activation_names, extract_representations
from kempnerforge_jax.model.request import Request, make_request
from kempnerforge_jax.model.state import merge, split, to_numpy
from kempnerforge_jax.model.vlm import inner_transformer
from kempnerforge_jax.training.train import Trainer
from shared_config.contract.decoding import SamplingConfig
from shared_config.interchange.checkpoint import TrainingState
from shared_config.parity.dtypes import PRECISIONS
from shared_config.parity.scenarios import Arrays, Batch
from shared_config.parity.work import Decoding, Trained
from shared_config.schema.job import JobConfig

NAME = "jax"


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
    with jax.enable_x64(dtype == "float64"), jax.default_device(find_device(device)):
        trainer = Trainer(config, device, dtype=jnp.float64 if dtype == "float64" else jnp.float32)
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
    with jax.enable_x64(True), jax.default_device(find_device(device)):
        model = _model(config, weights, device)
        pixels = None if decoding.pixels is None else jnp.asarray(decoding.pixels, jnp.float64)
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


def _cached(model: Any, decoding: Decoding, new_BN: np.ndarray, pixels: jax.Array | None) -> np.ndarray:
    """Logits (B, N, V) that static caches give, fed with tokens that are known."""
    transformer = inner_transformer(model)
    graphdef, params, buffers = split(transformer)
    request = _request(model, decoding, pixels)
    caches, tokens_B = prefill(transformer, request)
    logits = []

    @jax.jit
    def read(params: Any, buffers: Any, caches: Any, tokens_B: jax.Array, image: Any) -> tuple[jax.Array, Any]:
        return advance(merge(graphdef, params, buffers), tokens_B, caches, image)

    for index in range(decoding.new_tokens):
        logits_BV, caches = read(params, buffers, caches, tokens_B, request.image_in_every_step)
        logits.append(to_numpy(logits_BV))
        tokens_B = jnp.asarray(new_BN[:, index], tokens_B.dtype)
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


def _whole(model: Any, decoding: Decoding, new_BN: np.ndarray, pixels: jax.Array | None) -> np.ndarray:
    tokens_BS, positions_BN = decoding.followed_by(new_BN)
    graphdef, params, buffers = split(model)

    @jax.jit
    def run(params: Any, buffers: Any, inputs: tuple[Any, ...], placed: dict[str, Any]) -> jax.Array:
        return merge(graphdef, params, buffers).run(*inputs, **placed, limit_capacity=False).logits

    inputs = (tokens_BS,) if pixels is None else (pixels, tokens_BS)
    placed = {} if pixels is None else {**_prompts(model, decoding), **decoding.placed(tokens_BS.shape[1])}
    logits_BSV = run(params, buffers, inputs, placed)
    return np.take_along_axis(to_numpy(logits_BSV), positions_BN[..., None], axis=1)


def _prompts(model: Any, decoding: Decoding) -> dict[str, jax.Array]:
    """How much of the text is the prompt, if that has attention in both directions."""
    vlm = inner_transformer(model).vlm_config
    return {"prompt_lengths": jnp.asarray(decoding.prompt_lengths)} if vlm is not None and vlm.has_prefix else {}


def captured(
    config: JobConfig, weights: Arrays, tokens: np.ndarray, images: Mapping[str, np.ndarray], *, device: str | None
) -> tuple[Arrays, Arrays]:
    """The outputs of every module; see `shared_config.parity.work.Backend`."""
    with jax.enable_x64(True), jax.default_device(find_device(device)):
        model = _model(config, weights, device)
        store = ActivationStore(model)
        inputs: tuple[Any, ...] = (jnp.asarray(tokens),)
        placed = {name: jnp.asarray(array) for name, array in images.items() if name != "pixel_values"}
        if images:
            inputs = (jnp.asarray(images["pixel_values"], jnp.float64), *inputs)
        store.enable()
        model.run(*inputs, **placed)
        store.disable()
        stored = _flat({name: value for name, value in store.activations.items() if name != "transformer"})
        if images:
            return stored, {}
        extracted = extract_representations(model, list(tokens), activation_names(model))
        assert extracted is not None
        return stored, {name: np.asarray(value) for name, value in extracted.items()}


def device_name(device: str | None) -> str:
    """The model of an accelerator, or "cpu"."""
    return trace.device_name(find_device(device))


def _model(config: JobConfig, weights: Arrays, device: str | None) -> Any:
    """In float64."""
    return load_model(config, weights, device).to(jnp.float64)


def _flat(outputs: Mapping[str, Any]) -> Arrays:
    """Outputs by modality get their own names."""
    flat: Arrays = {}
    for name, value in outputs.items():
        if isinstance(value, Mapping):
            flat |= _flat({f"{name}.{key}": part for key, part in value.items()})
        elif value is not None:
            flat[name] = np.asarray(value)
    return flat
