"""What a validation run feeds to a model: weights, tokens and labels that hide nothing, the same in every process.

Small initial weights hide errors, so the ones drawn here have fan-in scale, norm weights away from 1 and biases away
from 0.
"""

from __future__ import annotations

import numpy as np

from shared_config.contract.initialise import stream
from shared_config.contract.labels import IGNORED
from shared_config.contract.moments import moment_names
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import ParameterSpec, ParameterTable
from shared_config.schema.optimizer import OptimizerConfig

BIAS_RANGE = 0.2
CHUNK_SIZES = (1, 7)
LATEST = 7
"""The most tokens before the image of a row, which come with it in the first call that decodes."""
MOMENT_STEPS = 7
"""Updates that the optimiser of a validation run seems to have made."""


def validation_weights(table: ParameterTable, seed: int) -> dict[str, np.ndarray]:
    """float32 values of every tensor of the table.

    Matrices are normal(0, 1/sqrt(fan-in)), also those that start silent; norm weights uniform(.5, 1.5); biases, of
    routers too, uniform(-.2, .2).
    """
    return {name: _value(name, spec, seed) for name, spec in table.items()}


ADAMW = OptimizerConfig()


def validation_moments(table: ParameterTable, seed: int, optimizer: OptimizerConfig = ADAMW) -> dict[str, np.ndarray]:
    """Moments of an optimiser, ``m.<parameter>`` for one, as after `MOMENT_STEPS` updates: float32.

    They are as large as those of gradients whose common norm is 1. A step that starts from them shows the decay rates
    and the bias corrections, and depends smoothly on the gradient, unlike the first of a run, which is about its sign.
    """
    trained = {name: spec for name, spec in table.items() if not spec.is_buffer}
    scale = sum(spec.size for spec in trained.values()) ** -0.5
    moments = {}
    for moment in moment_names(optimizer, table, trained):
        kind, _, name = moment.partition(".")
        draw, shape = stream(seed, f"validation/{moment}"), trained[name].shape
        if kind == "v":
            moments[moment] = (draw.uniform(0.5, 1.5, shape) * scale**2).astype(np.float32)
        else:
            moments[moment] = draw.standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return moments


def validation_rates(optimizer: OptimizerConfig) -> Rates:
    """The rates of the update: the peak; an average moves as in the middle of a short run."""
    return Rates(optimizer.lr, optimizer.weight_decay, 1 / (MOMENT_STEPS + 1))


def validation_tokens(
    vocab_size: int, batch_size: int, length: int, seed: int, image_token: int | None = None
) -> np.ndarray:
    """int32 (batch_size, length), as `drawn_tokens`."""
    return drawn_tokens(stream(seed, "validation/tokens"), vocab_size, (batch_size, length), image_token)


def drawn_tokens(
    draw: np.random.Generator, vocab_size: int, shape: int | tuple[int, ...], image_token: int | None = None
) -> np.ndarray:
    """int32 of the shape, uniform over the vocabulary without the id that stands for an image."""
    if image_token is None or image_token >= vocab_size:
        return draw.integers(0, vocab_size, shape, dtype=np.int32)
    ids = draw.integers(0, vocab_size - 1, shape, dtype=np.int32)
    return ids + (ids >= image_token)


def validation_pixels(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 images of the shape: bytes drawn independently, as numbers from -1 to 1."""
    drawn = stream(seed, "validation/pixels").integers(0, 256, shape, dtype=np.uint8)
    return (drawn / 127.5 - 1).astype(np.float32)


def validation_positions(batch_size: int, length: int, seed: int, images: int = 1) -> np.ndarray:
    """int32 (batch_size,), or (batch_size, images) of several: after how many of ``length`` tokens the images of each
    row stand, up to `LATEST`, in order, and others in neighbouring rows.
    """
    order = stream(seed, "validation/image positions").permutation(min(length, LATEST) + 1)
    places = np.sort(np.resize(order, (batch_size, images)), axis=1).astype(np.int32)
    return places if images > 1 else places[:, 0]


def validation_prompts(batch_size: int, length: int, seed: int) -> np.ndarray:
    """int32 (batch_size,): how many of ``length`` tokens are the prompt of each row, up to `LATEST`, others in
    neighbouring rows.
    """
    order = stream(seed, "validation/prompts").permutation(min(length, LATEST) + 1)
    return np.resize(order, batch_size).astype(np.int32)


def validation_labels(tokens: np.ndarray) -> np.ndarray:
    """The next token of each position; the last position, and the first two of every other row, are ignored."""
    labels = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], IGNORED)], axis=1)
    labels[1::2, :2] = IGNORED
    return labels


def chunkings(length: int, seed: int, first: int = 0) -> dict[str, tuple[int, ...]]:
    """Ways to feed ``length`` tokens to a cache: one token at a time, a long prefill and then steps, and drawn chunks.

    Chunk sizes are few, as every size is a shape that JAX compiles.

    Args:
        first: tokens that the first call has at least.
    """
    prefill = max(length - 3, 1)
    draw = stream(seed, "validation/chunks")
    drawn: list[int] = []
    while (left := length - sum(drawn)) > 0:
        drawn.append(int(draw.choice([size for size in CHUNK_SIZES if size <= left])))
    ways = {"single": (1,) * length, "prefill": (prefill, *(1,) * (length - prefill)), "drawn": tuple(drawn)}
    return {name: _beginning_with(first, sizes) for name, sizes in ways.items()}


def _beginning_with(first: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The first sizes joined until they are large enough."""
    while sizes[0] < first:
        sizes = (sizes[0] + sizes[1], *sizes[2:])
    return sizes


def _value(name: str, spec: ParameterSpec, seed: int) -> np.ndarray:
    if name.endswith("expert_ema"):
        return np.full(spec.shape, 1 / spec.shape[0], np.float32)
    draw = stream(seed, f"validation/{name}")
    if len(spec.shape) > 1:
        values = draw.standard_normal(spec.shape, dtype=np.float32)
        return values * np.float32(_fan_in(spec.shape) ** -0.5)
    low, high = (0.5, 1.5) if name.endswith("weight") else (-BIAS_RANGE, BIAS_RANGE)
    return draw.uniform(low, high, spec.shape).astype(np.float32)


def _fan_in(shape: tuple[int, ...]) -> int:
    """Inputs of a linear weight (out, in), or of packed experts (expert, in, out)."""
    return shape[-1] if len(shape) == 2 else shape[-2]
