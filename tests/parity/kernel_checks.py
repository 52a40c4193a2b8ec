"""Which kernel an accelerator is given, read off programs and calls on a machine that has none.

The truth is written out, case by case. What the kernels compute is for the tests marked ``gpu``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge_torch.training.optimizer import Step
from shared_config.contract.schedule import Rates
from tests.jobs import draw_batch, tiny_job
from tests.parity.attention_checks import (
    check_blocks,
    check_fused_call,
    check_paths,
    check_rules,
    check_segments,
    check_told,
    check_ways,
)
from tests.parity.precision_cases import job_of
from tests.parity.precision_jax import _jaxprs
from tests.torch import adamw_checks, kept_checks

BF16, F16, F32, F64 = "bfloat16", "float16", "float32", "float64"
HOPPER, AMPERE, TURING = ("cuda 12080", "9.0"), ("cuda 12080", "8.0"), ("cuda 12080", "7.5")
ROCM = ("rocm 60300", "9.0")
FUSED: tuple[tuple[str, str, int, int, int, bool, tuple[str, str] | None, bool], ...] = (
    # queries, keys, S, M, h, mask, GPU, whether cuDNN's kernel takes it
    (BF16, BF16, 96, 96, 64, False, HOPPER, True),
    (F16, F16, 96, 96, 64, False, HOPPER, True),
    (BF16, BF16, 2, 2, 8, False, AMPERE, True),
    (BF16, BF16, 96, 96, 128, False, HOPPER, True),
    (BF16, BF16, 96, 96, 64, True, HOPPER, False),
    (BF16, BF16, 96, 97, 64, False, HOPPER, False),
    (BF16, BF16, 96, 95, 64, False, HOPPER, False),
    (BF16, BF16, 1, 1, 64, False, HOPPER, False),
    (BF16, BF16, 1, 96, 64, False, HOPPER, False),
    (BF16, BF16, 96, 96, 136, False, HOPPER, False),
    (BF16, BF16, 96, 96, 60, False, HOPPER, False),
    (BF16, BF16, 96, 96, 68, False, HOPPER, False),
    (F32, F32, 96, 96, 64, False, HOPPER, False),
    (BF16, F32, 96, 96, 64, False, HOPPER, False),
    (BF16, F16, 96, 96, 64, False, HOPPER, False),
    (BF16, BF16, 96, 96, 64, False, TURING, False),
    (BF16, BF16, 96, 96, 64, False, ROCM, False),
    (BF16, BF16, 96, 96, 64, False, None, False),
)
"""cuDNN's fused attention: narrow, whole sequences, no mask, heads of multiples of 8 up to 128, from Ampere on."""
GROUPED = {
    "cpu": ("looped_matmul", "looped_outer"),
    "cuda": ("tiled_matmul", "tiled_outer"),
    "rocm": ("tiled_matmul", "tiled_outer"),
    "tpu": ("ragged_matmul", "ragged_outer"),
}
"""What JAX lowers products over groups to, by platform."""
MOSAIC: tuple[tuple[str, int, int, int, tuple[str, str] | None, bool, bool, bool], ...] = (
    # dtype, rows, D, F, GPU, whether kernels take the product, that of its gradient, and the outer product
    (BF16, 128, 128, 256, HOPPER, True, True, True),
    (F16, 136, 128, 128, HOPPER, True, True, True),
    (BF16, 132, 128, 128, HOPPER, False, False, False),
    (BF16, 128, 64, 128, HOPPER, True, False, False),
    (BF16, 128, 128, 64, HOPPER, False, True, False),
    (BF16, 128, 128, 192, HOPPER, False, True, False),
    (BF16, 128, 96, 128, HOPPER, False, False, False),
    (BF16, 120, 128, 128, HOPPER, False, False, False),
    (F32, 128, 128, 128, HOPPER, False, False, False),
    (BF16, 128, 128, 128, AMPERE, False, False, False),
    (BF16, 128, 128, 128, ("cuda 12080", "10.0"), False, False, False),
    (BF16, 128, 128, 128, ROCM, False, False, False),
    (BF16, 128, 128, 128, None, False, False, False),
)
"""The kernels for Hopper: narrow, tiles of 128 x 128 and sums of 64 terms."""
MARK = 2176.0
"""A number that all dtypes hold, to be found in programs."""
OFFSETS: tuple[tuple[str, str, int, int, int, int, bool], ...] = (
    # device, dtype, compute capability, rows, D, F, whether torch's grouped_mm takes it
    ("cuda", BF16, 9, 40, 32, 16, True),
    ("cuda", BF16, 10, 40, 8, 8, True),
    ("cuda", BF16, 8, 40, 32, 16, False),
    ("cuda", F16, 9, 40, 32, 16, False),
    ("cuda", F32, 9, 40, 32, 16, False),
    ("cuda", BF16, 9, 40, 32, 12, False),
    ("cuda", BF16, 9, 40, 20, 16, False),
    ("cuda", BF16, 9, 0, 32, 16, False),
    ("cpu", BF16, 9, 40, 32, 16, False),
)
DISPATCHED: tuple[tuple[str, int, int, bool, bool, int, bool, bool], ...] = (
    # device, S, M, mask, causal, key/value heads, whether a mask is handed on, whether the call is causal
    ("meta", 20, 20, False, True, 4, False, True),
    ("meta", 20, 20, False, True, 2, False, True),
    ("meta", 20, 20, False, False, 4, False, False),
    ("meta", 20, 24, False, True, 4, True, False),
    ("meta", 24, 20, False, False, 4, False, False),
    ("meta", 1, 20, False, True, 4, False, False),
    ("meta", 20, 20, True, True, 4, True, False),
    ("meta", 20, 20, True, False, 4, True, False),
    ("meta", 8, 8, False, True, 4, False, True),
    ("cpu", 20, 20, False, True, 4, False, True),
    ("cpu", 8, 8, False, True, 4, False, True),
)


def module(backend: str, path: str) -> Any:
    return importlib.import_module(f"kempnerforge_{backend}.{path}")


# JAX


@contextlib.contextmanager
def gpu(kind: tuple[str, str] | None) -> Iterator[None]:
    """JAX sees a GPU, whose cuDNN is a recent one."""
    if kind is None:
        yield
        return
    device = SimpleNamespace(client=SimpleNamespace(platform_version=kind[0]), compute_capability=kind[1])
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    with (
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch.object(jax, "local_devices", return_value=[device]),
        mock.patch(f"{cudnn}.check_cudnn_version", return_value=91000),
        mock.patch(f"{cudnn}.check_compute_capability", return_value=True),
    ):
        yield


def kernels_in(jaxpr: Any) -> list[Mapping[str, Any]]:
    """The parameters of each call of cuDNN's attention."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("dot_product_attention"):
            found.append({**eqn.params, "shapes": [variable.aval.shape for variable in eqn.invars]})
        for inner in _jaxprs(eqn.params):
            found += kernels_in(inner)
    return found


def check_fused_attention(backend: str) -> None:
    """The kernel is chosen where it fits, and told the scale, causality and lengths."""
    attend = module("jax", "model.attention").attend
    for q_dtype, k_dtype, length, keys, width, masked, kind, chosen in FUSED:
        for causal in (True, False):
            q = jax.ShapeDtypeStruct((2, 4, length, width), q_dtype)
            k = jax.ShapeDtypeStruct((2, 2, keys, width), k_dtype)
            masks = module("jax", "model.mask")
            plain = masks.CAUSAL if causal else masks.FULL
            mask = jnp.ones((2, 1, length, keys), bool) if masked else plain
            case = (q_dtype, k_dtype, length, keys, width, masked, kind, causal)
            with gpu(kind):
                program = jax.jit(lambda q, k, v, m=mask: attend(q, k, v, m))
                try:
                    traced = program.trace(q, k, k)
                    lowered = traced.lower(lowering_platforms=("cpu", "tpu")).as_text()
                except (NotImplementedError, ValueError) as error:
                    raise AssertionError(f"{case}: the kernel refuses it: {error}") from error
                found = kernels_in(traced.jaxpr.jaxpr)
            assert len(found) == chosen, case
            assert "fmha" not in lowered, case
            for kernel in found:
                assert kernel["mask_type"].name == ("CAUSAL" if causal else "NO_MASK"), case
                assert abs(kernel["scale"] * width**0.5 - 1) < 1e-6, case
                assert kernel["sliding_window_length"] is None, case
                assert kernel["dropout_rate"] == 0, case
                heads_last = [(2, length, 4, width), (2, keys, 2, width), (2, keys, 2, width)]
                assert kernel["shapes"][:3] == heads_last, case


def check_platforms(backend: str) -> None:
    """Products over groups, and their gradients, are those of the platform that a program is lowered for."""
    grouped = module("jax", "model.grouped")
    names = sorted({name for pair in GROUPED.values() for name in pair})
    marks = {name: f"{1111 * (i + 2):e}" for i, name in enumerate(names)}
    x, w, y, ends = (
        jax.ShapeDtypeStruct(s, d) for s, d in (((9, 8), F32), ((3, 8, 16), F32), ((9, 16), F32), ((3,), "int32"))
    )

    def marked(name: str) -> Callable[..., Any]:
        def product(a: Any, b: Any, ends: Any) -> Any:
            shape = (a.shape[0], b.shape[2]) if name.endswith("matmul") else (ends.shape[0], a.shape[1], b.shape[1])
            return jnp.full(shape, float(marks[name]))

        return product

    def product_gradient(x: Any, w: Any, ends: Any) -> Any:
        return jax.grad(lambda x, w: grouped.grouped_matmul(x, w, ends).sum(), argnums=(0, 1))(x, w)

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(grouped, name, marked(name)))
        for platform, (matmul, outer) in GROUPED.items():
            programs = {
                frozenset({matmul}): jax.jit(grouped.grouped_matmul).trace(x, w, ends),
                frozenset({outer}): jax.jit(grouped.grouped_outer).trace(x, y, ends),
                frozenset({matmul, outer}): jax.jit(product_gradient).trace(x, w, ends),
            }
            for expected, program in programs.items():
                text = program.lower(lowering_platforms=(platform,)).as_text()
                found = {name for name, mark in marks.items() if mark in text}
                assert found == expected, (platform, found)


def check_mosaic(backend: str) -> None:
    """The kernels are chosen where they fit, for CUDA alone, and told the sizes of groups and how matrices lie."""
    grouped = module("jax", "model.grouped")
    told: list[tuple[str, tuple[int, ...]]] = []

    def matmul(x: Any, w: Any, sizes: Any, is_transposed: bool) -> Any:
        told.append(("transposed" if is_transposed else "matmul", sizes.shape))
        return jnp.full((x.shape[0], w.shape[1 if is_transposed else 2]), MARK, x.dtype)

    def outer(x: Any, y: Any, sizes: Any) -> Any:
        told.append(("outer", sizes.shape))
        return jnp.full((sizes.shape[0], x.shape[1], y.shape[1]), MARK, x.dtype)

    def gradient(x: Any, w: Any, y: Any, ends: Any) -> Any:
        product, back = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, ends), x, w)
        return product, back(y)

    patched = mock.patch.multiple(grouped, mosaic_matmul=matmul, mosaic_outer=outer)
    wide = (*MOSAIC[0][:5], False, False, False)
    for number, (dtype, rows, inputs, outputs, kind, *chosen) in enumerate((*MOSAIC, wide)):
        shapes = ((rows, inputs), (3, inputs, outputs), (rows, outputs))
        x, w, y = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        kernels = zip(("matmul", "transposed", "outer"), chosen, strict=True)
        told.clear()
        with jax.enable_x64(number == len(MOSAIC)), gpu(kind), patched:
            traced = jax.jit(gradient).trace(x, w, y, jax.ShapeDtypeStruct((3,), "int32"))
            assert set(told) == {(name, (3,)) for name, is_chosen in kernels if is_chosen}, MOSAIC[number : number + 1]
            for platform in ("cuda", "cpu", "rocm", "tpu") if number == 0 else ():
                text = traced.lower(lowering_platforms=(platform,)).as_text()
                assert text.count(f"{MARK:e}") == (3 if platform == "cuda" else 0), platform


def check_tiles_told(backend: str) -> None:
    """Hopper's products are told their tiles, which they would else choose by themselves."""
    mosaic, told = module("jax", "model.mosaic"), []

    def product(*operands: Any, **options: Any) -> Any:
        told.append(({name: value for name, value in options.items() if name != "group_sizes"}, options["group_sizes"]))
        return operands[0]

    library = "jax.experimental.pallas.ops.gpu"
    stand_ins = {
        f"{library}.{name}_mgpu": SimpleNamespace(**{name: product}) for name in ("ragged_dot", "transposed_ragged_dot")
    }
    x, w, sizes = np.zeros((256, 128)), np.zeros((3, 128, 768)), np.zeros(3)
    with mock.patch.dict(sys.modules, stand_ins):
        for factor, is_transposed in ((w, False), (w.swapaxes(1, 2), True), (np.zeros((3, 128, 512)), False)):
            assert mosaic.mosaic_matmul.__wrapped__(x, factor, sizes, is_transposed) is x
        mosaic.mosaic_outer.__wrapped__(x, np.zeros((256, 768)), sizes)
    tiles = {"block_m": 128, "block_n": 128, "block_k": 64}
    products = {**tiles, "max_concurrent_steps": 6}
    assert [options for options, _ in told] == [
        {**products, "grid_block_n": 2, "transpose_rhs": False},
        {**products, "grid_block_n": 2, "transpose_rhs": True},
        {**products, "grid_block_n": 4, "transpose_rhs": False},
        {**tiles, "max_concurrent_steps": 4, "grid_block_n": 1},
    ]
    assert all(given is sizes for _, given in told)


def check_ragged_precision(backend: str) -> None:
    """TPU's kernel takes bfloat16 at the default precision alone; float32 is computed as precisely as is asked for."""
    grouped = module("jax", "model.grouped")
    highest, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
    for dtype, expected in ((F32, (highest, highest)), (BF16, (default, default)), (F16, (default, default))):
        x, w, y = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((9, 8), (3, 8, 16), (9, 16)))
        ends = jax.ShapeDtypeStruct((3,), "int32")
        for product, other in ((grouped.ragged_matmul, w), (grouped.ragged_outer, y)):
            with jax.default_matmul_precision("highest"):
                traced = jax.make_jaxpr(product)(x, other, ends)
            (told,) = precisions_in(traced.jaxpr)
            assert (told if isinstance(told, tuple) else (told, told)) == expected, (product, dtype, told)


def precisions_in(jaxpr: Any) -> list[Any]:
    """What each ragged product is told."""
    found = [eqn.params["precision"] for eqn in jaxpr.eqns if eqn.primitive.name.startswith("ragged_dot")]
    return found + [told for eqn in jaxpr.eqns for inner in _jaxprs(eqn.params) for told in precisions_in(inner)]


# torch


@contextlib.contextmanager
def capability(major: int) -> Iterator[None]:
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(major, 0)):
        yield


class Products(TorchDispatchMode):
    """Notes what products are added to, None if to nothing, and the dtypes of their factors; adds none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[torch.dtype, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, ops = kwargs or {}, torch.ops.aten
        is_added = func.overloadpacket in (ops.addmm, ops.addmm_)
        if is_added or func.overloadpacket is ops.bmm:
            place = args[0] if func.overloadpacket is ops.addmm_ else kwargs.get("out")
            self.calls.append((place, tuple(factor.dtype for factor in args[1 if is_added else 0 :][:2])))
        return args[0] if is_added else func(*args, **kwargs)


def check_offsets(backend: str) -> None:
    """torch's product over groups reads offsets on the device for aligned bfloat16 on Hopper; else tiles, or a loop.

    A loop takes the matrices of groups where they are; the others need them in one tensor.
    """
    grouped = module("torch", "model.grouped")
    calls: list[str] = []

    def marking(name: str) -> Callable[..., str]:
        return lambda *_, **__: calls.append(name) or name

    names = ("tiled_matmul", "tiled_outer", "looped_matmul", "looped_outer")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(grouped, name, marking(name)))
        kernel = stack.enter_context(mock.patch.object(grouped.F, "grouped_mm", side_effect=marking("kernel")))
        stack.enter_context(FakeTensorMode())
        for device, dtype, major, rows, width, hidden, fits in OFFSETS:
            kind = {"device": "cuda:0" if device == "cuda" else "cpu", "dtype": getattr(torch, dtype)}
            x, w, y = (torch.empty(shape, **kind) for shape in ((rows, width), (3, width, hidden), (rows, hidden)))
            ends = torch.empty(3, dtype=torch.int32, device=kind["device"])
            plain = "looped" if device == "cpu" else "tiled"
            with capability(major):
                calls.clear()
                kernel.reset_mock()
                grouped._grouped_matmul._init_fn(x, [w], ends, True)
                grouped.grouped_outer._init_fn(x, y, ends)
            expected = ["kernel"] * 2 if fits else [f"{plain}_matmul", f"{plain}_outer"]
            assert calls == expected, (device, dtype, major, rows, width, hidden)
            taken = [tuple(tuple(factor.shape) for factor in call.args) for call in kernel.call_args_list]
            factors = [((rows, width), (3, width, hidden)), ((width, rows), (rows, hidden))]
            assert taken == (factors if fits else [])
            assert all(call.kwargs.keys() == {"offs"} for call in kernel.call_args_list)
        for device, hip, kept in (("cpu", None, F32), ("cuda:0", None, BF16), ("cuda:0", "6.3", F32)):
            x, y = (torch.empty(shape, device=device, dtype=torch.bfloat16) for shape in ((2, 3, 4), (2, 4, 5)))
            with mock.patch.object(torch.version, "hip", hip), Products() as seen:
                assert grouped._wide_product(x, y, torch.float32).dtype == torch.float32
            assert seen.calls == [(None, (getattr(torch, kept),) * 2)], (device, hip)
            assert all(call.kwargs["offs"] is ends for call in kernel.call_args_list)
            with mock.patch.object(grouped, "_grouped_matmul") as operator:
                grouped.grouped_matmul(x, w.unbind(), ends)
            given = [tuple(part.shape) for part in operator.call_args.args[1]]
            assert given == ([(width, hidden)] * 3 if device == "cpu" else [(3, width, hidden)])


def check_dispatched_attention(backend: str) -> None:
    """What torch's attention is called with: a mask only where one is needed, causality only for equal lengths."""
    attention, masks = module("torch", "model.attention"), module("torch", "model.mask")
    seen: list[tuple[Any, dict[str, Any], dict[str, bool]]] = []

    def noting(q: Any, k: Any, v: Any, **options: Any) -> Any:
        flags = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        seen.append(((q.shape, k.shape), options, flags))
        return q.new_empty(*q.shape[:3], v.shape[3])

    with mock.patch.object(attention.F, "scaled_dot_product_attention", noting):
        for device, length, keys, masked, causal, kv_heads, handed_on, is_causal in DISPATCHED:
            q = torch.empty(2, 4, length, 8, device=device)
            k = torch.empty(2, kv_heads, keys, 8, device=device)
            plain = masks.CAUSAL if causal else masks.FULL
            mask = torch.ones(2, 1, length, keys, dtype=torch.bool, device=device) if masked else plain
            for name in ("auto", "flash", "efficient", "cudnn", "math"):
                seen.clear()
                attention.attend(q, k, k, mask, sdpa_backend=name)
                ((shapes, options, flags),) = seen
                case = (device, length, keys, masked, causal, kv_heads, name)
                assert shapes == ((2, 4, length, 8), (2, kv_heads, keys, 8)), case
                assert (options["attn_mask"] is not None) == handed_on, case
                assert options["is_causal"] is is_causal, case
                assert options["enable_gqa"] == (kv_heads != 4), case
                assert not options.get("dropout_p"), case
                assert options.get("scale") is None, case
                small = device == "cpu" and keys < 16
                allowed = set(flags) if name == "auto" and not small else {"math"} if small else {name, "math"}
                assert {kernel for kernel, enabled in flags.items() if enabled} == allowed, case


def check_masks_of_caches(backend: str) -> None:
    """A dense mask is built only where no kernel knows the pattern: a whole prompt and a single token have none."""
    attention = module("torch", "model.attention")
    one, real = torch.zeros((2, 1), dtype=torch.int64), torch.ones((2, 1), dtype=torch.bool)

    def filled(length: int, **options: Any) -> Any:
        cache, new = attention.KVCache(2, 8, 1, 4, **options), torch.zeros(2, 1, length, 4)
        cache.update(new, new)
        return cache

    ragged = filled(3)
    ragged.truncate(torch.tensor([3, 2]))
    for cache, length, options, dense in (
        (filled(0), 4, {}, False),
        (filled(3), 1, {}, False),
        (filled(3), 2, {}, True),
        (filled(3), 1, {"sliding_window": 4}, False),
        (filled(3), 1, {"sliding_window": 3}, True),
        (filled(3), 1, {"doc_ids": one}, True),
        (filled(3), 1, {"key_padding_mask": real}, True),
        (ragged, 1, {}, True),
        (filled(3, static=True), 1, {}, True),
        (filled(5, sliding_window=4), 1, {"sliding_window": 4}, False),
        (filled(5, sliding_window=4), 1, {"sliding_window": 3}, True),
        (filled(5, sliding_window=4, spare=1), 2, {"sliding_window": 4}, True),
    ):
        facts = cache.mask(length, **options)
        assert facts.causal
        found = attention.prepare_mask(facts, length, cache.keys(length), 4, torch.float32)
        assert (found.dense is not None) == dense, (length, options, dense)


def check_shared_states(backend: str) -> None:
    """Of caches that share a state the owner, the last one, advances and reorders it; each keeps its own keys."""
    cache = module("torch", "model.attention").KVCache
    last = cache(2, 8, 1, 4)
    first = cache(2, 8, 1, 4, state=last.state)
    for step in range(2):
        for factor, one in ((1.0, first), (10.0, last)):
            new = torch.full((2, 1, 2, 4), factor * (step + 1))
            new[1] += 0.5
            assert one.lengths.tolist() == [2 * step] * 2, "all write at the places of the same tokens"
            one.update(new, new + 0.25)
    last.truncate(torch.tensor([4, 3]))
    for one in (first, last):
        one.reorder(torch.tensor([1, 0]))
    assert first.lengths.tolist() == last.lengths.tolist() == [3, 4]
    for factor, one in ((1.0, first), (10.0, last)):
        expected = [factor, factor, 2 * factor, 2 * factor]
        assert one.k[1, 0, :4, 0].tolist() == expected, "keys of a layer"
        assert one.v[0, 0, :3, 0].tolist() == [place + 0.75 for place in expected[:3]], "values of a layer"


def check_slots_of_tokens(backend: str) -> None:
    """Each token takes the slot after those before it, also where the next ones were looked at before some went."""
    cache, real = module("torch", "model.attention").KVCache(2, 8, 1, 4, static=True), torch.ones(2, 1).bool()
    for number in range(1, 6):
        cache.mask(1, key_padding_mask=real)
        if number == 3:
            cache.truncate(torch.tensor([2, 1]))
        if number == 4:
            cache.reorder(torch.tensor([1, 0]))
        new = torch.full((2, 1, 1, 4), float(number))
        cache.update(new, new, key_padding_mask=real)
    assert cache.k[:, 0, :6, 0].tolist() == [[1, 3, 4, 5, 0, 0], [1, 2, 3, 4, 5, 0]]


def check_optimizer_by_device(backend: str) -> None:
    """One kernel per step on an accelerator, which leaves it out by itself; lists of tensors on the CPU."""
    optimizer = module("torch", "training.optimizer")
    config, table = job_of("relu").optimizer, {"a": SimpleNamespace(decay=True), "b": SimpleNamespace(decay=False)}
    built: list[dict[str, Any]] = []

    class Noting(torch.optim.AdamW):
        def __init__(self, groups: Any, **options: Any):
            built.append(options)
            super().__init__(groups, **{**options, "fused": False, "foreach": True})

    with mock.patch.object(optimizer, "AdamW", Noting):
        for device, fused in (("cpu", False), ("meta", True)):
            optimizer.build_optimizer({name: torch.empty(3, device=device) for name in table}, table, config)
            assert (built[-1]["fused"], built[-1]["foreach"], built[-1]["capturable"]) == (fused, not fused, False)
    steps: list[Any] = []
    for finite in (torch.tensor(True), torch.tensor(False), torch.empty((), dtype=torch.bool, device="meta"), None):
        fake = optimizer.torch.optim.AdamW([torch.zeros(1)])
        fake.param_groups[0] |= {"params": [], "decays": False}
        fake.step = lambda fake=fake: steps.append(getattr(fake, optimizer.FOUND_INF, None))
        optimizer.update(fake, Rates(0.1, 0.0), finite)
        assert [group["lr"] for group in fake.param_groups] == [0.1]
        assert not hasattr(fake, optimizer.FOUND_INF)
    assert [None if step is None else step.dtype for step in steps] == [None, torch.float32, None]


def check_loss_by_device(backend: str) -> None:
    """The compiled sum where it is asked for; else some rows at a time where the logits are many: the same number."""
    loss = module("torch", "training.loss")
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((2, 9, 7))).requires_grad_()
    labels = torch.from_numpy(np.where(rng.random((2, 9)) < 0.2, -100, rng.integers(0, 7, (2, 9))))
    truth, count = loss.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(truth, logits)
    rows: list[int] = []
    summed = loss._summed

    def noting(logits: Any, labels: Any, *others: Any) -> Any:
        rows.append(len(labels))
        return summed(logits, labels, *others)

    with mock.patch.object(loss, "_compiled_sum", return_value=noting), mock.patch.object(loss, "CHUNK_ELEMENTS", 7):
        fused, fused_count = loss.cross_entropy(logits, labels, fused=True)
    assert rows == [18]
    rows.clear()
    with mock.patch.object(loss, "CHUNK_ELEMENTS", 35), mock.patch.object(loss, "_summed", noting):
        parts, parts_count = loss.cross_entropy(logits, labels)
        (parts_gradient,) = torch.autograd.grad(parts, logits)
    assert rows == [5, 5, 5, 3, 3, 5, 5, 5]  # the backward pass computes them again
    torch.testing.assert_close(torch.stack([fused, parts]), torch.stack([truth, truth]))
    torch.testing.assert_close(parts_gradient, gradient)
    assert count == fused_count == parts_count == int((labels != -100).sum())


class Graph:
    """A CUDA graph without a GPU: what is run while it records runs again at each replay, on the same tensors."""

    latest: Graph

    def __init__(self) -> None:
        self.replays = 0
        Graph.latest = self

    def replay(self) -> None:
        self.replays += 1
        self.again()

    again: Callable[[], None]


def check_recorded_steps(backend: str) -> None:
    """The first call runs, the second records, all others replay, each on its own tokens and numbers."""
    graphs = module("torch", "model.cuda_graph")
    runs: list[int] = []

    def step(tokens: Any, uniforms: Any) -> Any:
        runs.append(len(runs))
        return tokens * 10 + (0 if uniforms is None else (uniforms * 10).round().long())

    for sampled in (True, False):
        runs.clear()
        recorded = graphs.CudaGraphStep(step)
        patched = {
            "CUDAGraph": Graph,
            "graph": lambda graph, **_: contextlib.nullcontext(),
            "device": lambda _: contextlib.nullcontext(),
        }
        with contextlib.ExitStack() as stack:
            for name, value in patched.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(
                mock.patch.object(
                    Graph,
                    "again",
                    lambda _, r=recorded, s=sampled: r.drawn.copy_(step(r.tokens, r.uniforms if s else None)),
                    create=True,
                )
            )
            given = [(torch.tensor([i, i + 1]), torch.tensor([i / 10, 0.5]) if sampled else None) for i in range(5)]
            results = [recorded(*inputs) for inputs in given]
        for (tokens, uniforms), result in zip(given, results, strict=True):
            extra = 0 if uniforms is None else (uniforms * 10).round().long()
            assert torch.equal(result, tokens * 10 + extra)
        assert len(runs) == 2 + 4
        assert Graph.latest.replays == 4


def check_decoding_by_device(backend: str) -> None:
    """Steps are recorded where they are compiled and the weights are on a GPU."""
    decode = module("torch", "model.decode")
    sampling = SimpleNamespace(eos_token_ids=(), pad_token_id=0)
    request = SimpleNamespace(max_new_tokens=1, uniforms=None, sampling=sampling)
    for on_gpu in (True, False):
        for compiled in (True, False):
            weight, given = SimpleNamespace(is_cuda=on_gpu, device="cpu"), []
            filled = contextlib.nullcontext(([], torch.zeros(1)))
            step = contextlib.nullcontext(lambda tokens, uniforms: tokens)
            with (
                mock.patch.object(decode, "weight_of", lambda _, weight=weight: weight),
                mock.patch.object(decode, "kept_of", return_value="kept"),
                mock.patch.object(decode, "_filled", lambda *about, g=given, f=filled: g.append(about[-1]) or f),
                mock.patch.object(decode, "_stepping", lambda *about, g=given, s=step: g.append(about[-1]) or s),
            ):
                list(decode._drawn(None, request, compiled))
            assert given == ["kept" if on_gpu and compiled else None] * 2, (on_gpu, compiled)


def check_kept_steps(backend: str) -> None:
    """Tokens of kept steps are those of steps that are run, whatever happened between two generations."""
    for happening in kept_checks.HAPPENINGS:
        with pytest.MonkeyPatch.context() as patch:
            kept_checks.Recorder(patch)
            kept_checks.check_after([(happening, 2, 6, 0.9)])


def check_copies(backend: str) -> None:
    """Copies in bfloat16 have the values of the masters of now, frozen ones too; gradients are of all micro-batches."""
    job = tiny_job(train={"mixed_precision": "bf16"})
    trainer = module("torch", "training.train").Trainer(job, "cpu")
    master, batches = trainer.masters["norm.weight"], [draw_batch(job, seed) for seed in range(3)]
    master.requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():
            master.mul_(1.5)
        copy = trainer.copies.current()["norm.weight"]
        assert torch.equal(copy, master.bfloat16())
        assert not copy.requires_grad
    gradients: list[dict[str, torch.Tensor]] = []
    for some in ([batch] for batch in batches):
        trainer._differentiate(some, 30, 3)
        gradients.append(trainer._take_gradients())
    trainer._differentiate(batches, 30, 3)
    for name, total in trainer._take_gradients().items():
        added = torch.stack([each[name].float() for each in gradients]).sum(0)
        torch.testing.assert_close(total, added, rtol=1e-5, atol=1e-8, msg=name)


def check_fused_step(backend: str) -> None:
    """But for its kernel: what that is told, of updates that are taken and left out."""
    fused = module("torch", "training.fused_adamw")
    for finite in (None, torch.tensor(True), torch.tensor(False)):
        one, other = (adamw_checks.drawn([(5, 3), (7,)], [True, False], [False, True], [0, 9], seed=1) for _ in "ab")
        rates, factor = Rates(0.1, 0.3), torch.tensor(0.25)
        with mock.patch.object(fused, "run_adamw", adamw_checks.plain_kernel):
            step = fused.FusedStep(one.optimizer, one.gradients, rates, factor, one.copies)
            assert step.stays_finite()
            step.take(finite)
        Step(other.optimizer, other.gradients, rates, factor).take(finite)
        for name, value in other.state().items():
            expected = one.state()[name[5:]].bfloat16() if name.startswith("copy.") else value
            torch.testing.assert_close(one.state()[name], expected, rtol=1e-6, atol=1e-6, msg=name)


def check_added_products(backend: str) -> None:
    """NVIDIA's products of narrow factors add to wide sums where these are; elsewhere the factors are cast."""
    head = module("torch", "training.head")
    with FakeTensorMode():
        for device, hip, kept in (("cpu", None, F32), ("cuda:0", None, BF16), ("cuda:0", "6.3", F32)):
            a, b = (torch.empty(shape, device=device, dtype=torch.bfloat16) for shape in ((3, 4), (4, 5)))
            total = torch.empty(3, 5, device=device)
            with mock.patch.object(torch.version, "hip", hip), Products() as seen:
                head._add_product(total, a, b)
            ((place, dtypes),) = seen.calls
            assert place is total, (device, hip)
            assert dtypes == (getattr(torch, kept),) * 2, (device, hip)


KERNEL_CHECKS: dict[str, dict[str, tuple[Callable[[str], None], ...]]] = {
    "jax": {
        "model.attention": (check_fused_attention, check_told),
        "model.blockwise": (check_blocks,),
        "model.fused": (check_fused_attention, check_told, check_segments, check_ways),
        "model.mask": (check_blocks,),
        "model.grouped": (check_platforms, check_mosaic, check_ragged_precision),
        "model.mosaic": (check_mosaic, check_tiles_told),
    },
    "torch": {
        "model.attention": (check_dispatched_attention, check_paths),
        "model.blockwise": (check_blocks,),
        "model.fused": (check_rules, check_fused_call, check_paths),
        "model.mask": (check_blocks, check_rules),
        "model.decode_state": (check_masks_of_caches, check_slots_of_tokens),
        "model.kv_cache": (check_shared_states,),
        "model.grouped": (check_offsets,),
        "model.decode": (check_decoding_by_device,),
        "model.cuda_graph": (check_recorded_steps,),
        "model.kept_steps": (check_kept_steps,),
        "training.loss": (check_loss_by_device,),
        "training.head": (check_added_products,),
        "training.optimizer": (check_optimizer_by_device,),
        "training.mixed_precision": (check_copies,),
        "training.fused_adamw": (check_fused_step,),
    },
}
