"""What the comparison says of drawn pairs near their limits, in every number: see `tests.golden`.

Each limit is held to a formula of its own elsewhere; this holds them, and what is measured, all together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from shared_config.parity.compare import Row, compare_traces
from shared_config.parity.numerics import rms
from shared_config.parity.recording import delta_and_parts
from shared_config.parity.traces import Trace, TraceMeta
from tests.golden import check_golden

OPTIMIZER = "[optimizer]\nlr = 0.01\nbetas = [0.8, 0.95]\n[train]\ngrad_clip_norm = 0.5\n"
CONFIGS = {
    "plain": f"[model]\ndim = 20\n{OPTIMIZER}",
    "relu": f"[model]\ndim = 20\nactivation = 'relu'\n{OPTIMIZER}",
    "routed": f"[model]\ndim = 20\nnum_experts = 4\n{OPTIMIZER}",
    "moma": f"[model]\ndim = 20\n[vlm]\nmoma_experts_per_modality = 2\n{OPTIMIZER}",
}
RATES = {"float64": 1e-14, "float32": 3e-7, "bfloat16": 1e-2}
"""What rounding does, relative to a tensor."""
SHAPES = {
    "forward/token_embedding": (2, 6, 5),
    "forward/layers.0.attention.q_proj": (2, 6, 5),
    "forward/layers.0.zero": (4, 5),
    "routing/layers.0.mlp.router.indices": (12, 2),
    "routing/layers.0.expert_counts": (4,),
    "routing/layers.0.aux_loss": (),
    "forward/layers.0.mlp.experts.1": (7, 5),
    "forward/layers.0.mlp": (2, 6, 5),
    "forward/output_head": (2, 6, 7),
    "loss": (),
    "decode/1,5": (2, 6, 7),
    "gradient/output_head.proj.weight": (7, 5),
    "gradient/layers.0.mlp.experts.1.up_proj.weight": (3, 4, 5),
    "gradient/layers.0.norm.weight": (5,),
    "gradient/layers.0.zero.weight": (4, 5),
    "updated/output_head.proj.weight": (7, 5),
    "updated/layers.0.norm.weight": (5,),
    "updated/layers.0.zero.weight": (4, 5),
    "losses": (9,),
}
ZERO = 1e-14
WAYS = ("all", "row", "column", "element", "scale", "same")
K = {"float64": 20, "float32": 20, "bfloat16": 8}


def drawn(rng: np.random.Generator, name: str) -> np.ndarray:
    if name.endswith("indices"):
        return np.stack([rng.permutation(4)[:2] for _ in range(12)])
    if name.endswith("counts"):
        return rng.integers(3, 9, 4)
    size = ZERO if ".zero" in name and not name.startswith("updated") else rng.choice([0.1, 1.0, 3.0])
    return np.asarray(size * (rng.standard_normal(SHAPES[name]) + 0.3))


def moved(rng: np.random.Generator, tensor: np.ndarray, way: str, amount: float) -> np.ndarray:
    """The tensor, off by about this much in one way."""
    if tensor.dtype.kind == "i":
        other = tensor.copy()
        rows = rng.integers(0, len(tensor), 2)
        other[rows] = other[rows][..., ::-1] if tensor.ndim == 2 else other[rows] + rng.integers(-2, 3, 2)
        return tensor.copy() if way == "same" else other
    noise, error = rng.standard_normal(tensor.shape), np.zeros(tensor.shape)
    place: Any = {"row": np.s_[..., 1, :], "column": np.s_[..., 2]}.get(way, ...) if tensor.ndim > 1 else ...
    if way == "element" and tensor.ndim:
        place = tuple(rng.integers(0, size) for size in tensor.shape)
    if way == "scale":
        return np.asarray(tensor * (1 + amount / max(rms(tensor), 1e-300)))
    if way != "same":
        error[place] = amount * noise[place]
    return np.asarray(tensor + error)


def case(seed: int) -> tuple[str, Trace, Trace, Trace | None]:
    """Two traces, and maybe the truth, with deltas and parts; some with summaries, gaps and what is not finite."""
    rng = np.random.default_rng(seed)
    config = list(CONFIGS)[seed % 4]
    dtypes = [list(RATES)[seed % 3], list(RATES)[seed % 3 if seed % 5 else (seed + 1) % 3]]
    truth = {name: drawn(rng, name) for name in SHAPES}
    sides: list[dict[str, np.ndarray]] = [{}, {}]
    for name, tensor in truth.items():
        for side, dtype in zip(sides, dtypes, strict=True):
            way = WAYS[rng.integers(len(WAYS))] if seed else "same"
            share = rng.choice([0.1, 0.5, 0.9, 1.5, 3.0])
            scale = 0.01 if name.startswith("updated") else max(rms(tensor), ZERO)
            side[name] = moved(rng, tensor, way, share * K[dtype] * RATES[dtype] * scale)
    deltas: dict[str, dict[str, float]] = {dtype: {} for dtype in RATES}
    parts: dict[str, dict[str, np.ndarray]] = {dtype: {} for dtype in RATES}
    for dtype, rate in RATES.items():
        for name, tensor in truth.items():
            if tensor.dtype.kind == "i":
                deltas[dtype][name] = float(rng.integers(0, 2)) if dtype == "bfloat16" else 0.0
            elif not name.startswith(("decode", "losses")):
                scale = 0.01 if name.startswith("updated") else rms(tensor)
                noise = rate * scale * rng.choice([-1.0, 1.0], tensor.shape) * rng.uniform(0.5, 1.5, tensor.shape)
                numbers = delta_and_parts(name, tensor + noise, tensor)
                deltas[dtype][name] = float(numbers[0])
                if name.startswith(("forward", "gradient", "updated")):
                    parts[dtype][name] = numbers[1:]
    if seed % 7 == 3:
        for side, value in ((0, np.nan), (1, np.nan), (1, np.inf)):
            sides[side]["forward/layers.0.mlp"][1, 2 * side, 3] = value
        sides[0]["gradient/layers.0.norm.weight"][:] = sides[1]["gradient/layers.0.norm.weight"][:] = -np.inf
        del sides[1]["loss"], sides[0]["losses"]
        sides[1]["forward/token_embedding"] = np.zeros((2, 6, 4))
        sides[1]["routing/layers.0.aux_loss"] = np.array(3)
    meta = TraceMeta("torch", "cpu", dtypes[0], 3, CONFIGS[config], initial_hash="ab")
    other = dataclasses.replace(meta, backend="jax", dtype=dtypes[1], initial_hash="ab" if seed % 6 else "cd")
    known = {"deltas": deltas, "parts": parts}
    right = Trace(truth, dataclasses.replace(meta, dtype="float64", **known))
    a, b = Trace(sides[0], dataclasses.replace(meta, **(known if seed % 2 else {}))), Trace(sides[1], other)
    if seed % 7 == 5:
        a, b = a.summarized(100 if seed % 3 else 300), b.summarized(200)
    return f"{seed} {config} {'/'.join(dtypes)}", a, b, None if seed % 2 else right


def said_of(row: Row) -> str:
    """A row in one line: all its numbers to five digits."""
    short = lambda value: "-" if value is None else f"{value:.5g}"  # noqa: E731
    numbers = (row.error, row.limit, row.delta, row.scale, row.share, row.multiple, row.relative, *row.nearest)
    values = (row.value_a, row.value_b, row.value_truth)
    part = "" if row.part is None else f"{row.part} {row.part.share:.5g}"
    part = "".join(f"{float(text):.5g}" if "." in text else text for text in split_numbers(part))
    return " ".join([row.full_label, row.status, row.worse, row.against, "x".join(map(str, row.shape)), row.dtype_a,
                     row.dtype_b, *map(short, numbers), str(row.mismatched), str(row.nonfinite), str(row.position),
                     *map(short, values), str(row.estimated), part])  # fmt: skip


def split_numbers(text: str) -> Iterator[str]:
    """A text in pieces, of which those with a dot are numbers."""
    for number, piece in itertools.groupby(text, lambda letter: letter in "0123456789.e-+"):
        joined = "".join(piece)
        yield joined if number or "." not in joined else joined.replace(".", "")


CASES = 24


def test_verdicts_of_drawn_pairs_are_what_they_were() -> None:
    lines: list[str] = []
    for seed in range(CASES):
        title, a, b, truth = case(seed)
        found = compare_traces(a, b, truth)
        heat = {name: (heat.shape, f"{np.nansum(np.array(heat.values)):.5g}") for name, heat in found.heatmaps.items()}
        lines += ["", f"{title} {found.equal} {found.label_a} {found.label_b} {found.notes} {heat}"]
        lines += map(said_of, found.rows)
    check_golden("verdicts.txt", "\n".join(lines) + "\n")
