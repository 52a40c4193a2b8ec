"""FP8 and int8 where only a GPU runs them: FP8 units give the products of the recipe, in both backends; steps of
training in it, compiled ones too, are near those of a CPU; int8 weights are the same function there. To be run there:

JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -n 0 -m gpu tests/parity/test_gpu_narrow.py
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest
import torch

from shared_config.parity.numerics import difference
from shared_config.parity.request import make_request
from tests.jobs import draw_batch
from tests.mutants import BACKENDS
from tests.oracle import fp8 as oracle
from tests.parity.fp8_checks import SIDES, drawn, products_of, small_job
from tests.parity.int8_checks import weights_of
from tests.parity.test_gpu import ON_GPU

FIRST_CAPABILITY = (8, 9)
ROWS, INPUTS, OUTPUTS = 256, 384, 512
ROUNDED = 2.0**-7
"""Relative error of products: rounding to bfloat16, sums of FP8 units, and the few codes that a reciprocal rounded the
other way brings. What the recipe itself loses is more than four times that.
"""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
with_units = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FIRST_CAPABILITY, reason="needs FP8 units"
)


@with_units
@pytest.mark.parametrize("backend", BACKENDS)
def test_units_give_the_products_of_the_recipe(backend: str) -> None:
    x, weight, dy = drawn(2, ROWS, INPUTS), drawn(3, OUTPUTS, INPUTS), drawn(4, ROWS, OUTPUTS)
    found = products_of(backend, x, weight, dy, ON_GPU[backend])
    wide = [array.astype(np.float64) for array in (x, weight, dy)]
    exact = (wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].T @ wide[0])
    for value, truth, unrounded in zip(
        found, (oracle.linear(x, weight), *oracle.linear_backward(dy, x, weight)), exact, strict=True
    ):
        assert difference(value, truth).relative_error < ROUNDED
        assert difference(value, unrounded).relative_error > 2 * ROUNDED


@with_units
def test_each_product_is_one_kernel_of_fp8() -> None:
    """Of torch's `_scaled_mm`, and of cuBLAS in what XLA compiles."""
    x, weight, dy = drawn(2, ROWS, INPUTS), drawn(3, OUTPUTS, INPUTS), drawn(4, ROWS, OUTPUTS)
    with torch.profiler.profile(acc_events=True) as profile:
        products_of("torch", x, weight, dy, ON_GPU["torch"])
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::_scaled_mm") == 3
    function = SIDES["jax"].module("model.fp8").fp8_linear
    program = jax.jit(lambda x, w, dy: (function(x, w), jax.vjp(function, x, w)[1](dy))).lower(x, weight, dy).compile()
    text = program.as_text() or ""
    found = len(re.findall(r"__cublas\$lt\$matmul\$f8|__triton\w*gemm|triton_gemm", text))
    assert found >= 3, text[:4000]


@with_units
@pytest.mark.parametrize(("backend", "options"), [
    ("torch", {}), ("torch", {"compile_model": True}), ("torch", {"activation_checkpointing": "selective"}),
    ("jax", {}), ("jax", {"scan_layers": True, "activation_checkpointing": "narrow"}),
])  # fmt: skip
def test_steps_are_near_those_of_a_cpu(backend: str, options: dict[str, Any]) -> None:
    job = small_job(**options)
    losses = {}
    for device in ("cpu", "cuda"):
        own = job if device == "cuda" else small_job()
        trainer = SIDES[backend].module("training.train").Trainer(own, device)
        losses[device] = [float(trainer.step([draw_batch(job, seed)])["loss"]) for seed in range(3)]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "packed experts"])
def test_int8_weights_are_the_same_function(backend: str, kind: str) -> None:
    weights, job = weights_of(kind), small_job(kind, precision="fp32")
    tokens = make_request(job, dtype="float32", seed=0, weights=weights).tokens
    found = {}
    for device in ("cpu", "cuda"):
        model = SIDES[backend].module("model.build").load_model(job, weights, device, weights_dtype="int8")
        if backend == "torch":
            with torch.no_grad():
                found[device] = model(torch.from_numpy(tokens).long().to(device)).cpu().numpy()
        else:
            with jax.default_device(jax.devices(device)[0]), jax.default_matmul_precision("highest"):
                found[device] = np.asarray(model(tokens))
    assert difference(found["cuda"], found["cpu"]).relative_error < 1e-4
