"""What a recording keeps of arrays, and their moments, computed where they are.

Shapes: K arrays, G pieces, R rows of a piece, C columns of the sketch, N halves of moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Shaped

from kempnerforge_jax.moments_kernel import DTYPES as KERNEL_DTYPES
from kempnerforge_jax.moments_kernel import HAS_TRITON, quietly, run_moments
from kempnerforge_jax.taps import is_floating
from shared_config.parity import summaries
from shared_config.parity.foreign.recorder import Store
from shared_config.parity.summaries import MOMENTS, NAN, NEGATIVE, PIECE, POSITIVE, ROWS, SKETCH_SIZE, Summary


@dataclass(frozen=True)
class Description:
    """Of an array that is recorded.

    Attributes:
        summarized: whether only its moments leave the program.
    """

    shape: tuple[int, ...]
    dtype: str
    summarized: bool


def described(array: Shaped[Array, "..."], store: Store) -> Description:
    """What has to be known of an array to tell what a program has put out."""
    summarized = is_floating(array) and store.summarizes(array.size * array.dtype.itemsize)
    return Description(array.shape, array.dtype.name, summarized)


class PutOut(NamedTuple):
    """What leaves a program of arrays that are recorded: of some the `moments`, in one array; others as they are."""

    moments: Shaped[Array, "K N"] | None
    whole: list[Shaped[Array, "..."]]


def put_out(arrays: Sequence[Shaped[Array, "..."]], descriptions: Sequence[Description]) -> PutOut:
    """Of arrays, by their descriptions."""
    pairs = [*zip(arrays, descriptions, strict=True)]
    rows = [moments(array) for array, about in pairs if about.summarized]
    return PutOut(jnp.stack(rows) if rows else None, [array for array, about in pairs if not about.summarized])


def kept(found: PutOut, descriptions: Iterable[Description], store: Store) -> list[np.ndarray | Summary]:
    """What a recording keeps of what a program has put out, in the order of the descriptions."""
    halves, whole = jax.device_get(found)
    rows, arrays = iter(() if halves is None else halves.view(np.float64)), iter(whole)
    return [
        summaries.summary_of_moments(next(rows), about.shape, about.dtype)
        if about.summarized
        else store(np.asarray(next(arrays)))
        for about in descriptions
    ]


def moments(array: Shaped[Array, "..."]) -> Shaped[Array, "N"]:
    """What `shared_config.parity.summaries.moments` gives, as the halves of its numbers, inside a program.

    On a CPU the host's own function sees the array where it is: XLA's reductions are several times as slow.
    """
    if not array.size:
        return jnp.asarray(summaries.moments(np.empty(0)).view(np.uint32))
    if jax.default_backend() == "cpu":
        halves = jax.ShapeDtypeStruct((2 * MOMENTS,), jnp.uint32)
        return buffer_callback(_on_host, halves)(array)
    return reduced(array)


def _on_host(_context: object, halves: Any, array: Any) -> None:
    np.asarray(halves)[...] = summaries.moments(np.asarray(array)).view(np.uint32)


def reduced(array: Shaped[Array, "..."]) -> Shaped[Array, "N"]:
    """`moments` of an array that is not empty, in operations of the device; on an NVIDIA GPU in a kernel."""
    with jax.enable_x64(True):
        flat = array.reshape(-1)
        if array.dtype.name in KERNEL_DTYPES and _has_kernel():
            found = run_moments(flat)
        else:
            found = _reduced(flat, jnp.asarray(summaries.signs(np.int8)))
        return jax.lax.bitcast_convert_type(found, jnp.uint32).reshape(-1)


def compiling() -> contextlib.AbstractContextManager[None]:
    """Context for compiling programs that put out moments."""
    return quietly() if _has_kernel() else contextlib.nullcontext()


def _has_kernel() -> bool:
    """Whether this process has an NVIDIA GPU, and JAX the compiler."""
    on_gpu = jax.default_backend() == "gpu" and "cuda" in jax.local_devices()[0].client.platform_version
    return on_gpu and HAS_TRITON


def _reduced(flat: Array, signs: Array) -> Array:
    first, times = (jnp.asarray(part) for part in summaries.starts(-(-flat.size // PIECE)))
    pieces = first.shape[0]
    shape = (pieces, ROWS, SKETCH_SIZE)
    x_GRC = jnp.pad(flat, (0, pieces * PIECE - flat.size)).reshape(shape)
    wide_GRC, finite_GRC = x_GRC.astype(jnp.float64), jnp.isfinite(x_GRC)
    counted_GRC = finite_GRC & (jnp.arange(pieces * PIECE).reshape(shape) < flat.size)
    known_GRC = jnp.where(finite_GRC, wide_GRC, 0.0)
    low = jnp.where(counted_GRC, wide_GRC, jnp.inf).min()
    high = jnp.where(counted_GRC, wide_GRC, -jnp.inf).max()
    largest = jnp.maximum(high, -low).clip(jnp.finfo(jnp.float64).tiny, jnp.finfo(jnp.float64).max)
    norm = largest * jnp.sqrt(jnp.square(known_GRC / largest).sum())
    windows = jax.vmap(lambda start: jax.lax.dynamic_slice(signs, (start,), (PIECE,)))(first)
    signed_GRC = windows.reshape(shape) * times[:, None, None]
    columns_C = (known_GRC * signed_GRC).sum((0, 1))
    key_GR = jnp.arange(pieces * ROWS, dtype=jnp.uint32).reshape(pieces, ROWS) * jnp.uint32(NAN)
    key_GR = (key_GR ^ (key_GR >> 15)) | 1
    nan, positive, negative = (jnp.uint32(kind) for kind in (NAN, POSITIVE, NEGATIVE))
    kinds_GRC = jnp.where(jnp.isnan(x_GRC), nan, jnp.where(x_GRC > 0, positive, negative))
    gaps_C = jnp.where(finite_GRC, jnp.uint32(0), kinds_GRC * key_GR[..., None]).sum((0, 1), dtype=jnp.uint32)
    scalars = jnp.stack([low, high, known_GRC.sum(), norm, counted_GRC.sum().astype(jnp.float64)])
    return jnp.concatenate([scalars, columns_C, gaps_C.astype(jnp.float64)])
