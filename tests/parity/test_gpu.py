"""What only a GPU runs: its kernels against float64 on the CPU, and the bugs that this must show. To be run there:

JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -n 0 -m gpu tests
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only

from shared_config.contract.schedule import Rates
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.parity import summaries
from shared_config.parity.summaries import PIECE
from shared_config.schema.model import ModelConfig
from shared_config.schema.optimizer import OptimizerConfig
from tests.mutants import BACKENDS, in_a_process, mutants_in, not_killed
from tests.mutants_gpu import GPU_MUTANTS
from tests.oracle.loss import cross_entropy_backward
from tests.parity.attention_cases import KINDS, mask_of
from tests.parity.backends import Torch
from tests.parity.head_checks import chunks_of, drawn
from tests.parity.kernel_checks import module
from tests.parity.rounding_checks import PARTS, SIDES, WIDE_ROUNDINGS, Part, differentiated, worst_row
from tests.tolerance import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # in a thread where it is the first
]
GPU_PARTS = tuple(name for name in PARTS if not name.startswith("looped"))
DEVICE = "cuda"
ROUNDINGS = 8.0
"""Of bfloat16: fused kernels round in between, gradients of 600 keys 5 times on a CPU."""
CAPPED_ROUNDINGS = 16.0
"""Of scores that are capped: that a kernel takes the gradient by the rounded output alone makes 11, in float64."""
LONG = ((1, 4, 600, 64), (1, 2, 600, 64), (1, 2, 600, 64))
ENDS = np.array([0, 300, 300, 421, 650], np.int32)
VOCAB = 19
TRUTHS: dict[tuple[str, str], list[Any]] = {}
"""What parts of a backend compute, kept from the first time, before a bug is planted."""


class TorchOnGPU(Torch):
    """The torch backend with its arrays and modules on the GPU."""

    def array(self, value: Any, dtype: str | None = None) -> Any:
        return super().array(value, dtype).to(DEVICE)

    def numpy(self, value: Any) -> Any:
        return super().numpy(tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), value))

    def build(self, builder: Any, *args: Any, dtype: str = "float64", **options: Any) -> Any:
        return super().build(builder, *args, dtype=dtype, **options).to(DEVICE)


ON_GPU = {"torch": TorchOnGPU(), "jax": SIDES["jax"]}


def check_parts(backend: str, parts: Sequence[str] = GPU_PARTS) -> None:
    """Rows of narrow parts and their gradients, a few roundings from float64."""
    for name in parts:
        compare(backend, name, PARTS[name], PARTS[name].inputs())


def compare(backend: str, name: str, part: Part, inputs: list[np.ndarray], roundings: float = ROUNDINGS) -> None:
    """A part in bfloat16 on the GPU against itself in float64 on the CPU."""
    if (backend, name) not in TRUTHS:
        TRUTHS[backend, name] = evaluate(SIDES[backend], part, inputs, "float64", "cpu")
    truth = TRUTHS[backend, name]
    found = evaluate(ON_GPU[backend], part, inputs, "bfloat16", DEVICE)
    for place, (value, exact) in enumerate(zip(found, truth, strict=True)):
        allowed = roundings if value.dtype == ml_dtypes.bfloat16 else WIDE_ROUNDINGS
        error = worst_row(value, exact, is_gradient=place > 0)
        assert error <= allowed, f"{name}, {place}: {error:.2f} roundings of {value.dtype}, {allowed} allowed"


def evaluate(side: Any, part: Part, inputs: list[np.ndarray], dtype: str, device: str) -> list[Any]:
    """Output and gradients."""
    if side.name == "torch":
        given = [side.array(array, dtype) for array in inputs]
        return side.numpy(differentiated(side, part, part.build(side, dtype), given))
    with jax.enable_x64(dtype == "float64"), jax.default_device(jax.devices(device)[0]):
        function = part.build(side, dtype)
        given = [side.array(array, dtype) for array in inputs]
        return side.numpy(jax.jit(lambda *arrays: differentiated(side, part, function, arrays))(*given))


def check_long_attention(backend: str) -> None:
    """600 positions, causal or not, with a mask or without."""
    seen = np.tril(np.ones((600, 600), bool)) & (np.arange(600) % 7 != 3)
    for causal, mask in ((True, None), (False, None), (True, seen[None, None])):

        def build(side: Any, dtype: str, causal: bool = causal, mask: Any = mask) -> Callable[..., Any]:
            attend, masks = side.module("model.attention").attend, side.module("model.mask")
            plain = masks.CAUSAL if causal else masks.FULL
            given = plain if mask is None else side.array(mask)
            return lambda q, k, v: attend(q, k, v, given)

        part = Part(build, LONG, 2.0)
        compare(backend, f"causal {causal}, mask {mask is not None}", part, part.inputs())


def check_masks(
    backend: str,
    kinds: Collection[str] = tuple(KINDS),
    keys: int = 1153,
    head_dims: Sequence[int] = (64, 128),
    softcap: float | None = None,
) -> None:
    """Every kind of mask, at a length that no tile divides, against dense masks; scores as they are, or capped."""
    for name, head_dim in itertools.product(kinds, head_dims):
        kind, facts = KINDS[name], KINDS[name].facts(keys)
        queries = kind.queries(keys)

        def build(side: Any, dtype: str, facts: Any = facts, queries: int = queries) -> Callable[..., Any]:
            masks, attend = side.module("model.mask"), side.module("model.attention").attend
            mask = mask_of(side, facts)
            mask = masks.with_dense(mask, queries, keys) if dtype == "float64" else mask
            return lambda q, k, v: attend(q, k, v, mask, softcap=softcap)

        kv_shape = (2, 2, keys, head_dim)
        part = Part(build, ((2, 4, queries, head_dim), kv_shape, kv_shape), 2.0)
        allowed = ROUNDINGS if softcap is None else CAPPED_ROUNDINGS
        compare(backend, f"{name}, heads of {head_dim}, soft cap {softcap}", part, part.inputs(), allowed)


def check_fused(backend: str) -> None:
    """Masks that any bug of what kernels are told would change."""
    check_masks(backend, ("documents in a window", "padded documents", "interleaved documents"), head_dims=(64,))
    check_masks(backend, ("documents in a window", "causal"), head_dims=(64,), softcap=2.0)


def check_groups(backend: str) -> None:
    """Products over groups: by the kernel, by tiles, of widths that no kernel takes, with rows of no group."""
    side, grouped = ON_GPU[backend], module(backend, "model.grouped")
    rng = np.random.default_rng(2)
    for inputs, width in ((72, 64), (72, 60), (128, 128), (192, 384)):
        x, w, y = (rng.standard_normal(shape) for shape in ((704, inputs), (5, inputs, width), (704, width)))
        x, w, y = (array.astype(ml_dtypes.bfloat16).astype(np.float64) for array in (x, w, y))
        product, outer, back = np.zeros((704, width)), np.zeros((5, inputs, width)), np.zeros((704, inputs))
        for e, (start, end) in enumerate(zip([0, *ENDS[:-1]], ENDS, strict=True)):
            product[start:end], outer[e] = x[start:end] @ w[e], x[start:end].T @ y[start:end]
            back[start:end] = y[start:end] @ w[e].T
        x[ENDS[-1] :] = y[ENDS[-1] :] = np.nan
        for dtype in ("bfloat16", "float32"):
            narrow = [side.array(array, dtype) for array in (x, w, y)]
            ends = side.array(ENDS)
            for name, args, truth in (
                ("grouped_matmul", narrow[:2], product),
                ("grouped_outer", narrow[::2], outer),
                ("tiled_matmul", narrow[:2], product),
                ("tiled_outer", narrow[::2], outer),
                ("gradient", narrow, back),
            ):
                function = gradient_of(backend, grouped) if name == "gradient" else getattr(grouped, name)
                found = side.numpy(function(*args, ends) if backend == "torch" else jax.jit(function)(*args, ends))
                rows, exact = (array.reshape(-1, truth.shape[-1]) for array in (found, truth))
                error = worst_row(rows, exact, is_gradient=True)
                assert error <= (1.0 if dtype == "bfloat16" else WIDE_ROUNDINGS), (name, inputs, width, dtype, error)


def gradient_of(backend: str, grouped: Any) -> Callable[..., Any]:
    """(x, w, dy, ends) -> dx of a product over groups."""
    if backend == "jax":
        return lambda x, w, dy, ends: jax.vjp(lambda x: grouped.grouped_matmul(x, w, ends), x)[1](dy)[0]

    def gradient(x: Any, w: Any, dy: Any, ends: Any) -> Any:
        x = x.detach().requires_grad_()
        grouped.grouped_matmul(x, w, ends).backward(dy)
        return x.grad

    return gradient


def check_decoding(backend: str) -> None:
    """Tokens of recorded steps, and prompts, are those of eager ones, each step drawn with its own numbers."""
    if backend == "jax":
        return
    transformer, generate = module(backend, "model.transformer"), module(backend, "model.generate")
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=VOCAB, ffn_hidden_dim=24, max_seq_len=64)
    torch.manual_seed(5)
    model = transformer.Transformer(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 7, "seed": 1}
    calls = ([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], [[10, 11, 12], [13, 14]])  # of one shape: run, recorded, replayed
    expected = [np.stack(list(generate.stream(model, prompts, 9, **options))) for prompts in calls]
    model = model.to(DEVICE)
    for prompts, tokens in zip(calls, expected, strict=True):
        found = list(generate.stream(model, prompts, 9, compile=True, **options))
        np.testing.assert_array_equal(np.stack(found), tokens)


def check_loss(backend: str) -> None:
    """Of narrow logits, some labels ignored: compiled and not."""
    side, loss = ON_GPU[backend], module(backend, "training.loss")
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((2, 300, 1000))).astype(ml_dtypes.bfloat16).astype(np.float64)
    labels = np.where(rng.random((2, 300)) < 0.2, -100, rng.integers(0, 1000, (2, 300)))
    top = logits.max(axis=-1)
    chosen = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    truth = ((np.log(np.exp(logits - top[..., None]).sum(axis=-1)) + top - chosen) * (labels != -100)).sum()
    given, targets = side.array(logits, "bfloat16"), side.array(labels.astype(np.int32))
    if backend == "torch":
        found = [loss.cross_entropy(given, targets, fused=fused)[0].item() for fused in (False, True)]
    else:
        found = [float(jax.jit(loss.cross_entropy)(given, targets)[0])]
    np.testing.assert_allclose(found, truth, rtol=1e-5)


def head_loss(backend: str, labels: np.ndarray, **options: bool) -> Callable[[Any, Any], Any]:
    """The loss of narrow logits as a function of their factors."""
    loss, factors = module(backend, "training.loss"), module(backend, "model.embedding").FactoredLogits
    return lambda x, weight: loss.cross_entropy(factors(x, weight), ON_GPU[backend].array(labels), **options)[0]


def check_head_gradients(backend: str) -> None:
    """In four chunks of tokens, eager and compiled."""
    x, weight, labels = drawn(batch=2, length=1024, dim=256, vocabulary=4104, ignored=0.2, seed=0)
    narrow = [each.astype(ml_dtypes.bfloat16) for each in (x / 4, weight / 4)]
    wide = [each.astype(np.float64) for each in narrow]
    dlogits = cross_entropy_backward((labels != -100).sum(), wide[0] @ wide[1].T, labels)
    truths = dlogits @ wide[1], np.einsum("bsv,bsd->vd", dlogits, wide[0])
    for options in ({"fused": False}, {"fused": True}) if backend == "torch" else ({},):
        with chunks_of(512, 4104, 2):
            found = ON_GPU[backend].gradients(head_loss(backend, labels, **options), *narrow)
        for value, truth in zip(found, truths, strict=True):
            assert relative_error(value.astype(np.float64), truth) < 2.0**-7


def check_head_memory(backend: str) -> None:
    """Of 4 x 4096 tokens a vocabulary of 128,256 takes at most 1 GB more than one of 1,000, gradients aside."""
    taken = {vocabulary: head_bytes(backend, vocabulary) for vocabulary in (1000, 128_256)}
    assert taken[128_256] - taken[1000] < 1e9, taken


def head_bytes(backend: str, vocabulary: int) -> int:
    """At the peak of loss and gradients, but for the weight and its gradient: the sum, and what it is rounded to."""
    batch, length, dim = 4, 4096, 512
    labels = np.zeros((batch, length), np.int32)
    if backend == "torch":
        factors = [torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
                   for shape in ((batch, length, dim), (vocabulary, dim))]  # fmt: skip
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(head_loss(backend, labels)(*factors), factors)
        return torch.cuda.max_memory_allocated() - before - 6 * vocabulary * dim
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((batch, length, dim), (vocabulary, dim))]
    compiled = jax.jit(jax.grad(head_loss(backend, labels), argnums=(0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes - 4 * vocabulary * dim


def check_update(backend: str) -> None:
    """An update whose verdict is on the device is taken or left out there."""
    if backend == "jax":
        return
    optimizer = module(backend, "training.optimizer")
    table = {"a": ParameterSpec((3,), Constant(1.0), (None,))}
    for finite in (True, False):
        parameter = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        built = optimizer.build_optimizer({"a": parameter}, table, OptimizerConfig())
        parameter.grad = torch.ones(3, device=DEVICE)
        optimizer.update(built, Rates(0.1, 0.1), torch.tensor(finite, device=DEVICE))
        assert bool((parameter != 1).all()) == finite


def check_moments(backend: str) -> None:
    """The kernel gives what the host does, of several rows and pieces, small and large, with and without gaps."""
    kernel, rng = module(backend, "moments_kernel"), np.random.default_rng(0)
    for size, factor in ((5000, 1.0), (3 * PIECE + 500, 1.0), (3000, 1e30)):
        values = (factor * rng.standard_normal(size)).astype(np.float32)
        for gaps in ((), (np.nan, np.inf, -np.inf)):
            values[[1, 1500, size - 1][: len(gaps)]] = gaps
            expected = summaries.moments(values)
            if backend == "torch":
                given = (values, summaries.signs(np.int8), *summaries.starts(-(-size // PIECE)))
                found = kernel.run_moments(*(torch.from_numpy(each).to(DEVICE) for each in given)).cpu().numpy()
            else:
                with kernel.quietly(), jax.enable_x64(True):
                    found = np.asarray(kernel.run_moments(jax.numpy.asarray(values)))
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * expected[3])


CHECKS: dict[str, tuple[Callable[[str], None], ...]] = {
    "model.grouped": (check_groups,),
    "model.mosaic": (check_groups,),
    "model.attention": (check_long_attention, lambda backend: check_parts(backend, ["attend", "attend to some"])),
    "model.fused": (check_long_attention, check_fused),
    "model.cuda_graph": (check_decoding,),
    "moments_kernel": (check_moments,),
    "training.loss": (check_loss,),
    "training.head": (check_head_gradients, check_head_memory),
    "training.optimizer": (check_update,),
    "model.linear": (lambda backend: check_parts(backend, ["look-up", "bias"]),),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", GPU_PARTS)
def test_parts_are_a_few_roundings_from_float64(part: str, backend: str) -> None:
    check_parts(backend, [part])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_agree_with_dense_ones(kind: str, softcap: float | None, backend: str) -> None:
    check_masks(backend, [kind], softcap=softcap)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("component", CHECKS)
def test_kernels_agree_with_the_truth(component: str, backend: str) -> None:
    for check in CHECKS[component]:
        check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_planted_is_found(backend: str, record_property: Callable[[str, object], None]) -> None:
    count, left = len(mutants_in(GPU_MUTANTS, backend)), in_a_process(survey, backend)
    record_property("figure", f"GPU mutants of {backend}: {count - len(left)}/{count} killed")
    assert not left


def survey(backend: str) -> dict[str, str]:
    """Once all checks have passed without a bug, which keeps their truths."""
    for component in CHECKS:
        test_kernels_agree_with_the_truth(component, backend)
    return not_killed(GPU_MUTANTS, backend, CHECKS)
