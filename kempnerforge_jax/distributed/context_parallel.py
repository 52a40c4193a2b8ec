"""Context parallelism: each device along "cp" has a part of every sequence of a micro-batch. Its queries read the keys
and values of all parts; what is counted over a sequence or over a micro-batch is counted over all parts.

    sequence on 2 devices    0 has positions 0 1 2 3    queries 0 1 2 3 read keys 0 ... 7, as far as the mask allows
                             1 has positions 4 5 6 7    queries 4 5 6 7 read keys 0 ... 7

Parts are blocks, in the order of the devices. Each query is compared with all keys, so nothing would be gained by
dealing out a sequence in smaller pieces.

Shapes: B batch, S positions of a part, M positions of all, K key/value heads, h head_dim, T = B * S tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from kempnerforge_jax.distributed.mesh import Mesh
from kempnerforge_jax.model.kv_cache import KVCache
from kempnerforge_jax.model.mask import Mask
from kempnerforge_jax.model.router import TopKRouter
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.within_map import measuring, reading
from kempnerforge_jax.model.wrappers import plain_modules
from shared_config.errors import ConfigError

AXIS = "cp"


class OtherParts(KVCache):
    """In the place of a cache: what a forward reads besides its own keys and values are those of the other devices."""

    def __init__(self) -> None:
        """It holds nothing."""

    def positions(self, length: int) -> Int[Array, "S"]:
        """Of this device's part."""
        return jnp.arange(length, dtype=jnp.int32) + lax.axis_index(AXIS) * length

    def keys(self, length: int) -> int:
        return length * lax.axis_size(AXIS)

    def update(
        self,
        k_new: Float[Array, "B K S h"],
        v_new: Float[Array, "B K S h"],
        *,
        doc_ids: Integer[Array, "B S"] | None = None,
        key_padding_mask: Bool[Array, "B S"] | None = None,
    ) -> tuple[KVCache, Float[Array, "B K M h"], Float[Array, "B K M h"]]:
        """Those of all devices."""
        k, v = lax.all_gather(jnp.stack([k_new, v_new]), AXIS, axis=3, tiled=True)
        return self, k, v

    def mask(
        self,
        length: int,
        *,
        doc_ids: Integer[Array, "B S"] | None = None,
        key_padding_mask: Bool[Array, "B S"] | None = None,
        sliding_window: int | None = None,
        prefix_lengths: Int[Array, "B"] | None = None,
    ) -> Mask:
        """Who this device's part may see of all."""
        return Mask(
            causal=True,
            window=sliding_window,
            query_positions=self.positions(length),
            query_doc_ids=doc_ids,
            key_doc_ids=None if doc_ids is None else gathered_alike(doc_ids, 1),
            key_valid=None if key_padding_mask is None else gathered_alike(key_padding_mask, 1),
            prefix_lengths=prefix_lengths,
        )


@contextlib.contextmanager
def spreading(mesh: Mesh) -> Iterator[None]:
    """Within it and a map over devices, a model that is called with a device's part of every sequence does what it does
    with the whole.
    """
    if mesh.layout.cp == 1:
        yield
        return
    with reading(OtherParts()), measuring(_all_parts):
        yield


def check_spread(model: nnx.Module, mesh: Mesh | None) -> None:
    """
    Raises:
        ConfigError: sequences are in parts, and the model, or a router, is of a kind of which that is not known.
    """
    if mesh is None or mesh.layout.cp == 1:
        return
    if not isinstance(model, Transformer):
        raise ConfigError([f"distributed.cp = {mesh.layout.cp}: must be 1 for a model of type {type(model).__name__}"])
    for path, module in plain_modules(model).items():
        if path.endswith(".router") and not isinstance(module, TopKRouter):
            raise ConfigError([f"distributed.cp = {mesh.layout.cp}: must be 1 with {path}, a {type(module).__name__}"])


def of_all_parts(mesh: Mesh | None, total: Float[Array, ""]) -> Float[Array, ""]:
    """The sum of what is ``total`` of each part; the same on every device, of which each has its part's gradient."""
    return total if mesh is None or mesh.layout.cp == 1 else _summed_alike(total)


def gathered_alike(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """What the devices have, one after another along an axis. All use it in the same way: each has the whole gradient
    of its part.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.all_gather(x, AXIS, axis=axis, tiled=True)
    return _gathered_alike(axis, x)


def _all_parts(tokens: Shaped[Array, "T ..."], batch_size: int) -> Shaped[Array, "_ ..."]:
    """The tokens of whole sequences from those of this device's parts of them."""
    rows = tokens.reshape(batch_size, -1, *tokens.shape[1:])
    return gathered_alike(rows, 1).reshape(-1, *tokens.shape[1:])


@jax.custom_vjp
def _summed_alike(total: jax.Array) -> jax.Array:
    return lax.psum(total, AXIS)


_summed_alike.defvjp(lambda total: (_summed_alike(total), None), lambda _, gradient: (gradient,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered_alike(axis: int, x: jax.Array) -> jax.Array:
    return lax.all_gather(x, AXIS, axis=axis, tiled=True)


def _gathered_alike_backward(axis: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    size = gradient.shape[axis] // lax.axis_size(AXIS)
    return (lax.dynamic_slice_in_dim(gradient, lax.axis_index(AXIS) * size, size, axis),)


_gathered_alike.defvjp(lambda axis, x: (_gathered_alike(axis, x), None), _gathered_alike_backward)
