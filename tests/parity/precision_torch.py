"""The narrow operations of a torch program, as they are dispatched, and from whose forward a gradient comes."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.parity.precision import ELEMENTWISE, INTEGER, PRODUCT, ROUNDING, SUM, Operation, site_of

NARROW = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.uint8, torch.uint16)
MOVEMENT = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand", "slice", "select",
    "unbind", "split", "split_with_sizes", "cat", "stack", "clone", "detach", "alias", "index", "index_select",
    "gather", "masked_fill", "masked_fill_", "where", "fill_", "zero_", "zeros_like", "ones_like", "new_zeros",
    "new_empty", "empty_like", "new_empty_strided", "empty_strided", "empty", "full_like", "new_full",
    "slice_backward", "select_backward", "constant_pad_nd", "embedding", "unsqueeze", "squeeze", "as_strided",
    "as_strided_", "repeat", "scatter", "unfold", "lift_fresh", "view_as_real", "scalar_tensor",
    "_local_scalar_dense", "is_same_size", "resize_", "set_", "unsafe_split", "squeeze_", "chunk", "flatten",
    "unflatten", "masked_scatter", "copy_slices", "index_copy", "index_copy_", "slice_scatter", "select_scatter",
    "_foreach_zero_", "flip", "roll", "zeros", "ones", "full",
}  # fmt: skip
EXACT = {
    "eq", "ne", "lt", "gt", "le", "ge", "isfinite", "isnan", "relu", "relu_", "threshold_backward", "neg", "abs",
    "sign", "max", "min", "amax", "amin", "argmax", "argmin", "sort", "topk", "clamp", "clamp_", "clamp_min",
    "clamp_max", "maximum", "minimum", "logical_not", "any", "all", "equal", "isin",
}  # fmt: skip
SUMS = {
    "sum", "mean", "cumsum", "cumprod", "logcumsumexp", "logsumexp", "prod", "var", "std", "var_mean", "norm",
    "linalg_vector_norm", "_softmax", "_log_softmax", "softmax", "log_softmax", "native_layer_norm",
    "_fused_rms_norm", "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "index_reduce",
    "embedding_dense_backward", "_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm_backward",
    "avg_pool2d", "adaptive_avg_pool2d", "_foreach_norm",
}  # fmt: skip
PRODUCTS = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "addbmm", "matmul", "linear",
    "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_fused_attention_overrideable",
}  # fmt: skip
COPIES = ("_to_copy", "to", "copy_", "_foreach_copy_")
OPAQUE = "kempnerforge"
"""Operators of the backend itself, whose insides are looked at."""
STARTS_BACKWARD = "training/objective.py"


def narrow_operations(function: Callable[[], Any]) -> list[Operation]:
    """Of what a function dispatches, the backward passes in it too."""
    seeing = _Seeing()
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly(check_nan=False), seeing:
        function()
    return seeing.operations


class _Seeing(TorchDispatchMode):
    """Notes narrow operations, those of the operators that the backend defines itself too."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == OPAQUE:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        given = _dtypes((args, kwargs))
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        kind = _kind(name, given, _dtypes(result) or given[:1], args, kwargs)
        if any(dtype in INTEGERS for dtype in _dtypes(result, numbers=True)):
            kind = INTEGER
        if kind is not None:
            (path, line), is_gradient = _place()
            name = "add_any" if is_gradient and name.startswith("add") and kind == ELEMENTWISE else name
            site = site_of(path, line, "torch") if path else ""
            self.operations.append(Operation(kind, name, site, line, ", ".join(map(str, given))))
        return result


def _kind(name: str, given: list[Any], results: list[Any], args: Any, kwargs: Any) -> str | None:
    """What kind of narrow operation a call is; None if it rounds nothing to a narrow type."""
    if not any(dtype in NARROW for dtype in results) or name in MOVEMENT or name in EXACT:
        return None
    if name in COPIES:
        sources = _dtypes(args[1] if len(args) > 1 and name != "_to_copy" and name != "to" else args[0], numbers=True)
        return ROUNDING if any(dtype not in NARROW for dtype in sources) else None
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
        return SUM if accumulate else None
    if name in SUMS:
        return None if name == "sum" and _moves(args) else SUM
    return PRODUCT if name in PRODUCTS else ELEMENTWISE


def _moves(args: Any) -> bool:
    """Whether a sum is over axes of length 1."""
    axes = args[1] if len(args) > 1 else None
    return bool(axes) and all(args[0].shape[axis] == 1 for axis in axes)


def _dtypes(tree: Any, numbers: bool = False) -> list[torch.dtype]:
    """Of the floating-point tensors, or of all tensors that hold ``numbers``."""
    dtypes = [leaf.dtype for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [dtype for dtype in dtypes if dtype.is_floating_point or (numbers and dtype != torch.bool)]


def _place() -> tuple[tuple[str, int], bool]:
    """The innermost line of the backend that runs, or else that whose gradient is being computed; and whether it is a
    gradient.
    """
    place = _running(sys._getframe(2))
    node: Any = torch._C._current_autograd_node()
    if node is None or (place[0] and not place[0].endswith(STARTS_BACKWARD)):
        return place, False
    for text in reversed(node.metadata.get("traceback_", [])):
        found = re.search(r'File "([^"]*kempnerforge_torch/[^"]*)", line (\d+)', text)
        if found:
            return (found[1], int(found[2])), True
    return ("", 0), True


def _running(frame: FrameType | None) -> tuple[str, int]:
    while frame is not None and "kempnerforge_torch/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
