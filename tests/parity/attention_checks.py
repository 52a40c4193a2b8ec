"""Attention by kind of mask, on a machine without a GPU: what is computed in blocks, what kernels are told of a mask,
and which of them is chosen.

Shapes: B batch, S queries, M keys, N segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import settings
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.oracle.attention import attend as oracle_attend
from tests.oracle.attention import attend_backward as oracle_backward
from tests.parity.attention_cases import KINDS, ROWS, Kind, mask_of, seen_by
from tests.parity.backends import BACKENDS, Torch

KEYS = 45
NIGHTLY = settings.get_current_profile_name() == "nightly"
IN_SEGMENTS = (
    "padding at the left, all to all",
    "padding, in a window",
    "padded documents in a window",
    "padding inside",
    "interleaved documents",
    "many documents",
)
"""By day; all under HYPOTHESIS_PROFILE=nightly."""
IN_BLOCKS = (
    "documents in a window",
    "padding inside",
    "the last of documents, in a window",
    "the later part of documents",
    "a prefix, in a window",
)


def side_of(name: str) -> Torch:
    return next(backend for backend in BACKENDS if backend.name == name)


def drawn(kind: Kind, keys: int = KEYS) -> list[np.ndarray]:
    """Queries, keys, values, and a gradient of the output."""
    rng, queries = np.random.default_rng(3), kind.queries(keys)
    shapes = ((ROWS, 4, queries, 8), (ROWS, 2, keys, 8), (ROWS, 2, keys, 8), (ROWS, 4, queries, 8))
    return [rng.standard_normal(shape) for shape in shapes]


def differentiated(side: Torch, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The output, and the gradients of its inputs."""
    *inputs, gradient = (side.array(array) for array in arrays)
    if side.name == "jax":
        out, backward = jax.vjp(function, *inputs)
        return side.numpy([out, *backward(gradient)])
    out = function(*(each.requires_grad_() for each in inputs))
    return side.numpy([out, *torch.autograd.grad(out, inputs, gradient)])


def check_blocks(backend: str) -> None:
    """Blocks of queries, the last of which is short, give what the oracle does, with its gradients; with soft caps for
    every second kind.
    """
    side = side_of(backend)
    attention, blocks = side.module("model.attention"), side.module("model.blockwise")
    kinds = KINDS if backend == "torch" else IN_BLOCKS
    with (
        jax.enable_x64(True),
        mock.patch.object(attention, "DENSE_PAIRS", 0),
        mock.patch.object(blocks, "BLOCK_QUERIES", 7),
    ):
        for index, name in enumerate(kinds):
            kind, softcap = KINDS[name], 0.7 if index % 2 else None
            arrays, facts = drawn(kind), kind.facts(KEYS)
            mask = mask_of(side, facts)

            def attend(q: Any, k: Any, v: Any, mask: Any = mask, softcap: float | None = softcap) -> Any:
                return attention.attend(q, k, v, mask, softcap=softcap)

            found = differentiated(side, attend if backend == "torch" else jax.jit(attend), arrays)
            for value, exact in zip(found, truth_of(kind, arrays, softcap), strict=True):
                assert np.abs(value - exact).max() <= 1e-12 * np.abs(exact).max(), name


def truth_of(kind: Kind, arrays: list[np.ndarray], softcap: float | None = None) -> list[np.ndarray]:
    """Output and gradients, by the oracle."""
    q, k, v, gradient = arrays
    seen = seen_by(kind.facts(KEYS), kind.queries(KEYS), KEYS)
    out, probabilities = oracle_attend(q, k, v, seen, softcap=softcap)
    return [out, *oracle_backward(gradient, q, k, v, probabilities, softcap=softcap)]


# torch


def check_rules(backend: str) -> None:
    """What FlexAttention's kernel asks of each pair, by its indices, is what the mask says of it."""
    side, fused = side_of("torch"), side_of("torch").module("model.fused")
    for name, kind in KINDS.items():
        queries, facts = kind.queries(KEYS), kind.facts(KEYS)
        made: list[Any] = []

        def create(*given: Any, made: list[Any] = made) -> None:
            made.append(given)

        with mock.patch.object(fused, "_compiled", lambda _, create=create: create):
            fused.with_fused(mask_of(side, facts), queries, KEYS, torch.device("cpu"))
        ((rule, rows, heads, *lengths),) = made
        assert (heads, lengths) == (None, [queries, KEYS, torch.device("cpu")])
        by_row = any(np.ndim(value) == 2 for value in facts.values()) or "prefix_lengths" in facts
        assert rows == (ROWS if by_row else 1), name
        row, query, key = (torch.arange(size) for size in (ROWS, queries, KEYS))
        found = rule(row[:, None, None], torch.tensor(0), query[:, None], key)
        expected = seen_by(facts, queries, KEYS)
        np.testing.assert_array_equal(np.broadcast_to(found.numpy(), expected.shape), expected, err_msg=name)


def check_fused_call(backend: str) -> None:
    """FlexAttention is given queries, keys and values in order, the form of the mask, and told of groups of heads."""
    fused, masks = side_of("torch").module("model.fused"), side_of("torch").module("model.mask")
    q, k, v = (torch.zeros(1, heads, 3, 4) for heads in (4, 2, 2))
    form = object()
    with mock.patch.object(fused, "_compiled", lambda function: lambda *given, **options: (function, given, options)):
        assert fused.flex_attention.__name__ == "flex_attention"
        with mock.patch.object(fused, "Tensor", tuple):
            function, given, options = fused.fused_attention(q, k, v, masks.Mask(causal=True, fused=form))
            alike = fused.fused_attention(q, q, q, masks.Mask(causal=True, fused=form), scale=0.3)[2]
            capped = fused.fused_attention(q, q, q, masks.Mask(causal=True, fused=form), softcap=0.7)[2]
            again = fused.fused_attention(q, q, q, masks.Mask(causal=True, fused=form), softcap=0.7)[2]
    assert function is fused.flex_attention
    assert all(found is expected for found, expected in zip(given, (q, k, v), strict=True))
    assert options == {"block_mask": form, "scale": None, "enable_gqa": True, "score_mod": None}
    assert alike == {"block_mask": form, "scale": 0.3, "enable_gqa": False, "score_mod": None}
    change, scores, index = capped["score_mod"], torch.tensor([-3.0, 0.1, 2.0]).double(), torch.tensor(0)
    assert change is again["score_mod"], "another function is another program"
    expected = 0.7 * np.tanh(scores.numpy() / 0.7)
    np.testing.assert_allclose(change(scores, index, index, index, index).numpy(), expected, rtol=1e-14)


SHORT, LONG = 1024, 1025
PATHS: tuple[tuple[str, str, str, int, int, str], ...] = (
    # kind of mask, device, dtype, keys, h, path
    ("causal", "cuda", "bfloat16", LONG, 64, "argument"),
    ("causal", "cpu", "float32", LONG, 64, "argument"),
    ("all to all", "cuda", "bfloat16", LONG, 64, "argument"),
    ("documents", "cuda", "bfloat16", SHORT, 64, "dense"),
    ("documents", "cuda", "bfloat16", LONG, 64, "fused"),
    ("documents", "cuda", "float16", LONG, 128, "fused"),
    ("documents", "cuda", "float32", LONG, 16, "fused"),
    ("documents", "cuda", "float64", LONG, 64, "blocks"),
    ("documents", "cuda", "bfloat16", LONG, 8, "blocks"),
    ("documents", "cpu", "bfloat16", LONG, 64, "blocks"),
    ("documents", "cpu", "float32", SHORT, 64, "dense"),
    ("documents, all to all", "cuda", "bfloat16", LONG, 64, "fused"),
    ("interleaved documents", "cuda", "bfloat16", LONG, 64, "fused"),
    ("a window", "cuda", "bfloat16", LONG, 64, "fused"),
    ("a window", "cpu", "float64", LONG, 64, "blocks"),
    ("padding", "cuda", "bfloat16", LONG, 64, "fused"),
    ("padding, all to all", "cuda", "bfloat16", LONG, 64, "dense"),
    ("padded documents in a window", "cuda", "bfloat16", LONG, 64, "fused"),
    ("the later part of documents", "cuda", "bfloat16", 2 * SHORT, 64, "fused"),
    ("the later part of documents", "cpu", "float32", 2 * SHORT, 64, "blocks"),
    ("a prefix", "cuda", "bfloat16", SHORT, 64, "dense"),
    ("a prefix", "cuda", "bfloat16", LONG, 64, "fused"),
    ("a prefix, in a window", "cuda", "float32", LONG, 64, "fused"),
    ("a prefix", "cpu", "float32", LONG, 64, "blocks"),
)
"""Which path torch's attention takes: F.scaled_dot_product_attention told by an argument or by a dense mask,
FlexAttention, or blocks of queries.
"""


def check_paths(backend: str) -> None:
    """The path is that of the table, whether the mask comes prepared or not."""
    side = side_of("torch")
    attention, fused = side.module("model.attention"), side.module("model.fused")
    form = side.module("model.mask").Dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), None)
    taken: list[str] = []

    def dense(*_: Any, attn_mask: Any, **__: Any) -> Any:
        taken.append("argument" if attn_mask is None else "dense")
        return _[0]

    def noting(path: str) -> Callable[..., Any]:
        return lambda *given, **_: (taken.append(path), given[1 if path == "blocks" else 0])[1]

    with (
        mock.patch.object(attention.F, "scaled_dot_product_attention", dense),
        mock.patch.object(attention, "fused_attention", noting("fused")),
        mock.patch.object(attention, "blockwise_attention", noting("blocks")),
        mock.patch.object(attention, "_attend_plainly", noting("plain")),
        mock.patch.object(fused, "_compiled", return_value=lambda *_: object()),
        mock.patch.object(attention, "with_dense", lambda mask, *_: replace(mask, dense=form)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        for name, device, dtype, keys, width, path in PATHS:
            kind, kinds = KINDS[name], {"dtype": getattr(torch, dtype), "device": device}
            queries, facts = kind.queries(keys), kind.facts(keys)
            mask = mask_of(side, facts)
            if device == "cuda":
                mask = type(mask)(**{key: moved(value) for key, value in vars(mask).items()})
            q, k = torch.empty(ROWS, 4, queries, width, **kinds), torch.empty(ROWS, 2, keys, width, **kinds)
            prepared = attention.prepare_mask(mask, queries, keys, width, q.dtype, q.device)
            case = (name, device, dtype, keys, width)
            assert (prepared.dense is not None, prepared.fused is not None) == (path == "dense", path == "fused"), case
            for given in (mask, prepared):
                taken.clear()
                attention.attend(q, k, k, given)
                assert taken == [path], case
            has_kernel = device == "cuda" and dtype != "float64" and width >= 16
            otherwise = "plain" if queries * keys <= SHORT**2 or path == "dense" else "blocks"
            prepared = attention.prepare_mask(mask, queries, keys, width, q.dtype, q.device, 0.7)
            for given in (mask, prepared):
                taken.clear()
                attention.attend(q, k, k, given, softcap=0.7)
                assert taken == ["fused" if has_kernel else otherwise], case


def moved(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, torch.Tensor) else value


# JAX


def packed(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    mask_type: Any,
    sliding_window_length: int | None,
    q_seqlen: Any = None,
    kv_seqlen: Any = None,
    q_offsets: Any = None,
    kv_offsets: Any = None,
) -> Any:
    """cuDNN's attention as its documentation has it, by plain products: it leaves NaN in rows of no segment, and reads
    heads of keys at the strides of queries.
    """
    length, keys = q.shape[1], k.shape[1]
    assert length == keys
    assert length % 2 == 0
    query, key = jnp.arange(length)[:, None], jnp.arange(keys)
    seen = jnp.ones((len(q), length, keys), bool)
    if mask_type.name.endswith("CAUSAL"):
        seen &= key <= query
    if sliding_window_length is not None:
        assert mask_type.name.endswith("CAUSAL")
        seen &= key > query - sliding_window_length
    assert mask_type.name.startswith("PADDING") == (q_seqlen is not None)
    if q_seqlen is not None:
        assert k.shape[2] == q.shape[2], "offsets are in strides of the queries"
        assert q_offsets.shape[1] == kv_offsets.shape[1] == q_seqlen.shape[1] + 1 > 2
        of_query, of_key = (
            (place >= starts[:, :-1, None]) & (place < (starts[:, :-1] + counts)[..., None]) & (counts[..., None] > 0)
            for place, starts, counts in ((query[:, 0], q_offsets, q_seqlen), (key, kv_offsets, kv_seqlen))
        )
        seen &= (of_query[:, :, :, None] & of_key[:, :, None, :]).any(1)
    k, v = (jnp.repeat(heads, q.shape[2] // heads.shape[2], axis=2) for heads in (k, v))
    scores = jnp.where(seen[:, None], scale * jnp.einsum("bqhd,bkhd->bhqk", q, k), -1e30)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    return jnp.where(seen.any(-1)[:, :, None, None], out, jnp.nan)


def check_segments(backend: str) -> None:
    """By its segments, the kernel gives what the oracle does, and gradients; what they can't say is known."""
    side, fused = side_of("jax"), side_of("jax").module("model.fused")
    with jax.enable_x64(True), mock.patch.object(fused, "dot_product_attention", packed):
        for name in KINDS if NIGHTLY else IN_SEGMENTS:
            kind = KINDS[name]
            mask = mask_of(side, kind.facts(KEYS))
            if not kind.is_fused or not fused._suits(mask, KEYS):
                assert not kind.is_fused or name == "all to all", name
                continue
            arrays = drawn(kind)
            with mock.patch.object(fused, "SEGMENTS", (3, 10)):
                mask = fused.with_fused(mask, KEYS, KEYS)
                assert (mask.fused is None) == (kind.segments is None), name
                if mask.fused is not None:
                    known = int(mask.fused.way)
                    assert (known < 2) == bool(kind.segments), name
                    if known == 2:
                        continue
                    ids = kind.facts(KEYS).get("key_doc_ids", np.zeros((ROWS, 1)))
                    assert known == int(max(len(set(row)) for row in ids.tolist()) > 3), name
            scaled = functools.partial(
                fused._whole if mask.fused is None else functools.partial(fused._packed, 10), 8**-0.5
            )

            def attend(q: Any, k: Any, v: Any, way: Any = scaled, mask: Any = mask) -> Any:
                return way(mask, q, k, v)

            truth = truth_of(kind, arrays)
            if name == "padded documents in a window":
                found = differentiated(side, attend, arrays)
            else:
                found, truth = [side.numpy(attend(*(side.array(array) for array in arrays[:3])))], truth[:1]
            for value, exact in zip(found, truth, strict=True):
                assert np.abs(value - exact).max() <= 1e-12 * np.abs(exact).max(), name


def check_ways(backend: str) -> None:
    """Of a mask with segments the way that it names is taken, forward and backward."""
    side, fused = side_of("jax"), side_of("jax").module("model.fused")
    kind = KINDS["documents"]
    arrays = [array.astype(np.float32) for array in drawn(kind)]
    mask = fused.with_fused(mask_of(side, kind.facts(KEYS)), KEYS, KEYS)

    def scaled(factor: float) -> Callable[..., Any]:
        return lambda mask, q, k, v: factor * (q + k.sum() + v.sum())

    with mock.patch.object(fused, "_packed", lambda count, scale, *given: scaled(float(count))(*given)):
        for way, factor in enumerate((*fused.SEGMENTS, 1.0)):
            segments = type(mask.fused)(**{**vars(mask.fused), "way": jnp.int32(way)})
            chosen = type(mask)(**{**vars(mask), "fused": segments})
            out, dq, *_ = differentiated(
                side, lambda q, k, v, m=chosen: fused.fused_attention(q, k, v, m, scaled(1.0)), arrays
            )
            q, k, v, gradient = arrays
            np.testing.assert_allclose(out, factor * (q + k.sum() + v.sum()), rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(dq, factor * gradient, rtol=1e-5)


TOLD: tuple[tuple[str, int, str, tuple[str, int | None, tuple[int, ...]] | None], ...] = (
    # kind of mask, length, compute capability, what cuDNN is told: kind, window, segments that there are programs for
    ("causal", 96, "8.0", ("CAUSAL", None, ())),
    ("causal", 97, "9.0", ("CAUSAL", None, ())),
    ("all to all", 96, "8.0", ("NO_MASK", None, ())),
    ("all to all", 97, "9.0", None),
    ("a window", 96, "8.0", ("CAUSAL", 32, ())),
    ("a window of all that follow", 96, "9.0", None),
    ("documents", 96, "9.0", ("PADDING_CAUSAL", None, (16, 128))),
    ("documents", 97, "9.0", ("PADDING_CAUSAL", None, (16, 128))),
    ("documents", 96, "8.0", None),
    ("documents, all to all", 96, "9.0", ("PADDING", None, (16, 128))),
    ("documents in a window", 100, "9.0", ("PADDING_CAUSAL", 5, (16, 128))),
    ("padding", 96, "9.0", ("PADDING_CAUSAL", None, (16, 128))),
    ("padding", 96, "8.0", None),
    ("padded documents in a window", 99, "9.0", ("PADDING_CAUSAL", 11, (16, 128))),
    ("the later part of documents", 96, "9.0", None),
    ("a prefix", 96, "9.0", None),
    ("a padded prefix", 96, "9.0", None),
)
"""What JAX tells cuDNN of masks, and of which it is not asked."""


def check_told(backend: str) -> None:
    """The kernel is told what the mask says, whether the mask comes prepared, through a transformation, or not."""
    from tests.parity.kernel_checks import gpu, kernels_in

    side, attention = side_of("jax"), side_of("jax").module("model.attention")
    for name, keys, capability, told in TOLD:
        kind = KINDS[name]
        queries, mask = kind.queries(keys), mask_of(side, kind.facts(keys))
        q, k = (jax.ShapeDtypeStruct((ROWS, n, s, 64), jnp.bfloat16) for n, s in ((4, queries), (2, keys)))
        with gpu(("cuda 12080", capability)):

            def directly(q: Any, k: Any, v: Any, mask: Any = mask) -> Any:
                return attention.attend(q, k, v, mask)

            def through(q: Any, k: Any, v: Any, mask: Any = mask, sizes: Any = (queries, keys, 64)) -> Any:
                prepared = attention.prepare_mask(mask, *sizes, jnp.bfloat16)
                return jax.checkpoint(attention.attend)(q, k, v, prepared)

            functions = (directly, through) if (name, capability) == ("documents", "9.0") else (directly,)
            found = [kernels_in(jax.make_jaxpr(function)(q, k, k).jaxpr) for function in functions]
        for kernels in found:
            counts = (None,) if told is None or not told[2] else told[2]
            assert len(kernels) == (0 if told is None else len(counts)), (name, keys, capability)
            for kernel, count in zip(kernels, counts, strict=False):
                assert told is not None
                assert (kernel["mask_type"].name, kernel["sliding_window_length"]) == told[:2], name
                assert abs(kernel["scale"] * 8 - 1) < 1e-6, name
                sizes = [None, None] if count is None else [(ROWS, count), (ROWS, count + 1)]
                assert [kernel["shapes"][4], kernel["shapes"][6]] == [size or (0,) for size in sizes], name
