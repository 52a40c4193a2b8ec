"""The narrow operations of a JAX program, read off its jaxpr, those of all jaxprs within it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from tests.parity.precision import ELEMENTWISE, PRODUCT, ROUNDING, SUM, Operation, site_of

NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
MOVEMENT = {
    "reshape", "transpose", "broadcast_in_dim", "slice", "dynamic_slice", "dynamic_update_slice", "concatenate",
    "gather", "select_n", "pad", "squeeze", "expand_dims", "rev", "copy", "copy_p", "scatter", "split", "stack",
    "unstack", "iota", "empty2", "optimization_barrier", "stop_gradient", "device_put",
}  # fmt: skip
EXACT = {
    "eq", "ne", "lt", "gt", "le", "ge", "is_finite", "max", "min", "neg", "abs", "sign", "clamp", "reduce_max",
    "reduce_min", "argmax", "argmin", "sort", "cummax", "cummin", "and", "or", "not", "xor", "nextafter", "top_k",
}  # fmt: skip
SUMS = {
    "reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp", "reduce_window_sum", "reduce_window",
    "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "reduce",
}  # fmt: skip
PRODUCTS = {
    "dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated",
}  # fmt: skip


def narrow_operations(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Operation]:
    """Of the program that a function of arrays is."""
    traced = jax.make_jaxpr(function)(*arguments, **options)
    return list(_narrow(traced.jaxpr, ""))


def _narrow(jaxpr: Any, outer: str) -> Iterator[Operation]:
    """
    Args:
        outer: the place that called this jaxpr, "file:line", of a function of JAX that is traced once and then kept:
            it is the place of all that is in it.
    """
    for eqn in jaxpr.eqns:
        place = outer or _place(eqn)
        inner = [] if eqn.primitive.name in SUMS else list(_jaxprs(eqn.params))
        for part in inner:
            yield from _narrow(part, place if eqn.primitive.name in ("jit", "pjit") else "")
        kind = None if inner else _kind(eqn)
        if kind is not None:
            path, _, line = place.rpartition(":")
            site = site_of(path, int(line), "jax") if path else ""
            types = ", ".join(str(variable.aval) for variable in (*eqn.invars, *eqn.outvars))
            yield Operation(kind, eqn.primitive.name, site, int(line or 0), types)


def _jaxprs(params: Any) -> Iterator[Any]:
    """Of loops, branches, checkpoints, derivatives of one's own, jitted and mapped functions."""
    for value in params.values() if isinstance(params, dict) else params:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def _place(eqn: Any) -> str:
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if "kempnerforge_jax/" in frame.file_name:
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def _kind(eqn: Any) -> str | None:
    """What kind of narrow operation an equation is; None if it rounds nothing to a narrow type."""
    name = eqn.primitive.name
    before, after = ([_dtype(variable) for variable in variables] for variables in (eqn.invars, eqn.outvars))
    if name == "reduce_precision":
        kept = jnp.finfo(after[0]).nmant
        return ROUNDING if eqn.params["mantissa_bits"] < kept else None
    if name == "dot_general" and after[0] == jnp.float32:
        return PRODUCT if set(before) == {jnp.dtype(jnp.float32)} and not _is_exact(eqn.params["precision"]) else None
    if not any(dtype in NARROW for dtype in after) or name in MOVEMENT or name in EXACT:
        return None
    if name == "convert_element_type":
        is_constant = eqn.invars[0].aval.weak_type and eqn.invars[0].aval.shape == ()
        wide = jnp.issubdtype(before[0], jnp.floating) and before[0] not in NARROW
        return ROUNDING if wide and not is_constant else None
    if name in SUMS:
        return None if _moves(eqn) else SUM
    return PRODUCT if name in PRODUCTS else ELEMENTWISE


def _moves(eqn: Any) -> bool:
    """Whether a sum has one term: over axes of length 1, or into places that occur once."""
    if eqn.primitive.name.startswith("scatter"):
        return eqn.params["unique_indices"]
    shape, axes = eqn.invars[0].aval.shape, eqn.params.get("axes", ())
    return bool(axes) and all(shape[axis] == 1 for axis in axes)


def _is_exact(precision: Any) -> bool:
    levels = precision if isinstance(precision, tuple) else (precision,)
    return all(level == jax.lax.Precision.HIGHEST for level in levels)


def _dtype(variable: Any) -> Any:
    return getattr(variable.aval, "dtype", None)
