"""The narrow operations of a JAX program, read off its jaxpr, those of all jaxprs within it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from tests.parity.precision import ACCUMULATION, ELEMENTWISE, INTEGER, PRODUCT, ROUNDING, SUM, Operation, site_of

NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
INTEGERS = (jnp.dtype(jnp.int8), jnp.dtype(jnp.int16), jnp.dtype(jnp.uint8), jnp.dtype(jnp.uint16))
MOVEMENT = {
    "reshape", "transpose", "broadcast_in_dim", "slice", "dynamic_slice", "dynamic_update_slice", "concatenate",
    "gather", "select_n", "pad", "squeeze", "expand_dims", "rev", "copy", "copy_p", "scatter", "split", "stack",
    "unstack", "empty2", "optimization_barrier", "stop_gradient", "device_put",
}  # fmt: skip
EXACT = {
    "eq", "ne", "lt", "gt", "le", "ge", "is_finite", "max", "min", "neg", "abs", "sign", "clamp", "reduce_max",
    "reduce_min", "argmax", "argmin", "sort", "cummax", "cummin", "and", "or", "not", "xor", "nextafter", "top_k",
}  # fmt: skip
SUMS = {
    "reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp", "reduce_window_sum", "reduce_window",
    "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "reduce",
}  # fmt: skip
ADDITIONS = {"add", "sub", "add_any", "reduce_sum"}
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
        if eqn.primitive.name in ("scan", "while") and _accumulates(eqn):
            yield _operation(ACCUMULATION, eqn, place)
        kind = None if inner else _kind(eqn)
        if kind is not None:
            yield _operation(kind, eqn, place)


def _operation(kind: str, eqn: Any, place: str) -> Operation:
    path, _, line = place.rpartition(":")
    types = ", ".join(str(variable.aval) for variable in (*eqn.invars, *eqn.outvars))
    return Operation(kind, eqn.primitive.name, site_of(path, int(line), "jax") if path else "", int(line or 0), types)


def _accumulates(eqn: Any) -> bool:
    """Whether a loop carries a narrow number to which every round adds something."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        body, (constants, carried) = params["jaxpr"].jaxpr, _inputs_of_scan(params)
    else:
        body, constants = params["body_jaxpr"].jaxpr, params["body_nconsts"]
        carried = len(body.outvars)
    before, after = body.invars[constants : constants + carried], body.outvars[:carried]
    return any(
        _dtype(start) in NARROW and _added(body, {start: False}).get(end, False)
        for start, end in zip(before, after, strict=True)
        if not isinstance(end, core.Literal)
    )


def _inputs_of_scan(params: Any) -> tuple[int, int]:
    """How many constants and carried values come first; JAX 0.11 keeps them in a tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)


def _added(jaxpr: Any, seen: dict[Any, bool]) -> dict[Any, bool]:
    """Which variables hold one of ``seen``, moved or cast: and whether something was added to it."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        given = [variable for variable in eqn.invars if not isinstance(variable, core.Literal) and variable in seen]
        if not given:
            continue
        inner = list(_jaxprs(eqn.params))
        if name in ("jit", "pjit"):
            (part,) = inner
            pairs = zip(part.invars, eqn.invars, strict=True)
            within = {own: seen[outer] for own, outer in pairs if outer in given}
            found = _added(part, within)
            results = zip(eqn.outvars, part.outvars, strict=True)
            seen.update(
                {outer: found[own] for outer, own in results if not isinstance(own, core.Literal) and own in found}
            )
        elif name in MOVEMENT or name in ADDITIONS or name == "convert_element_type":
            held = any(seen[variable] for variable in given) or name in ADDITIONS
            seen.update(dict.fromkeys(eqn.outvars, held))
    return seen


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
    if any(dtype in INTEGERS for dtype in after):
        return INTEGER
    if name == "reduce_precision":
        kept = jnp.finfo(after[0]).nmant
        return ROUNDING if eqn.params["mantissa_bits"] < kept else None
    if name == "dot_general" and after[0] == jnp.float32:
        return PRODUCT if set(before) == {jnp.dtype(jnp.float32)} and not _is_exact(eqn.params["precision"]) else None
    if not any(dtype in NARROW for dtype in after) or name in MOVEMENT or name in EXACT:
        return None
    if name == "convert_element_type":
        is_constant = eqn.invars[0].aval.weak_type and eqn.invars[0].aval.shape == ()
        return ROUNDING if before[0] not in (*NARROW, jnp.bool_) and not is_constant else None
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
