"""Kernels by kind, as their names tell, and the time that each kind takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Event = Mapping[str, object]
"""Of a trace, as profilers write them: name, ph, pid, tid, dur, args."""

OTHER = "other"
KINDS: Mapping[str, str] = {
    "collectives": r"nccl|rccl|gloo|all[-_]?reduce|all[-_]?gather|reduce[-_]scatter|all[-_]?to[-_]?all|collective[-_]",
    "attention": r"attention|attn|fmha|flash|sdpa|flex_",
    "matmul": r"gemm|gemv|nvjet|cublas|cutlass|xmma|matmul|\bmm\b|addmm|bmm|\blinear\b|grouped_mm|convolution|\bdot",
    "optimiser": r"adam|optimi[sz]er|multi_tensor|foreach|lerp",
    "copies and casts": r"memcpy|memset|copy|::to\b|\bcat\b|concat|convert|transpose|\bfill|zero|bitcast|broadcast"
    r"|slice|gather|scatter|index|embedding|\bpad|clone",
    "elementwise": r"elementwise|pointwise|fusion|triton|fused|reduce|softmax|norm|silu|gelu|sigmoid|\badd|\bmul|\bdiv"
    r"|\bsub|\bexp|\blog|\bsum|\bmean|\bpow|sqrt|\bneg|where|select|compare|maximum|minimum|clamp|vectorized|sort|iota",
}
"""The first whose pattern is found in the name counts; names are compared in lower case."""


class Kernel(NamedTuple):
    """Time of a kernel, by name."""

    name: str
    seconds: float


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), OTHER)


def shares_by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Kind -> its share of the time of all kernels, the largest first; they sum to 1. {} if no time passed."""
    seconds = dict.fromkeys((*KINDS, OTHER), 0.0)
    for name, taken in kernels:
        seconds[kind_of(name)] += taken
    total = sum(seconds.values())
    if not total:
        return {}
    return {kind: taken / total for kind, taken in sorted(seconds.items(), key=lambda item: -item[1]) if taken}
