"""What only a GPU shows of experts: what its kernels make of rows of no group, blocks of rows, and that no step waits.
To be run there:

JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -n 0 -m gpu tests/parity/test_gpu_experts.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kempnerforge_jax.model import experts as jax_experts
from kempnerforge_torch.model.grouped import grouped_matmul, grouped_outer
from kempnerforge_torch.training.train import Trainer
from tests.distributed.layouts import MODELS
from tests.jobs import tiny_job
from tests.torch.test_waits import padded_batches
from tests.torch.waits import none_on_a_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ENDS = ((0, 300, 300, 421), (128, 256, 256, 256), (1, 2, 3, 4), (0, 0, 0, 0), (511, 512, 513, 1000))
"""Of four groups within 1024 rows: in the middle of tiles, at their edges, and none."""


def spoil_free_memory() -> None:
    """Leave NaN in what PyTorch's allocator gives next."""
    taken = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 26) for _ in range(4)]
    torch.cuda.synchronize()
    del taken


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_rows_of_no_group_reach_no_product(ends: tuple[int, ...]) -> None:
    """NaN in them changes no bit of other rows, nor of sums over rows."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, y, w = (torch.randn(shape, **options) for shape in ((1024, 256), (1024, 384), (4, 256, 384)))
    ends_E = torch.tensor(ends, dtype=torch.int32, device="cuda")
    end = ends[-1]
    found = []
    for fill in (0.0, torch.nan):
        x[end:], y[end:] = fill, fill
        spoil_free_memory()
        found.append((grouped_matmul(x, w, ends_E, True)[:end], grouped_outer(x, y, ends_E)))
    for zero, nan in zip(*found, strict=True):
        assert torch.equal(zero, nan)
        assert bool(nan.isfinite().all())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", ["sigmoid", "limited", "apart"])
def test_a_step_waits_for_nothing(model: str, compiled: bool) -> None:
    """CUDA's own account of it; nor does what was in memory reach a step."""
    sizes = {"dim": 64, "ffn_hidden_dim": 96}
    train = {"grad_accum_steps": 2, "mixed_precision": "bf16", "compile_model": compiled}
    job = tiny_job({**MODELS[model], **sizes}, train=train)
    trainer = Trainer(job, "cuda")
    trainer.step(padded_batches(job, 0))
    spoil_free_memory()
    batches = padded_batches(job, 10)
    with none_on_a_gpu():
        metrics = trainer.step(batches)
    assert np.isfinite([float(metrics["loss"]), float(metrics["grad_norm"])]).all()


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_blocks_of_rows_are_all_rows(ends: tuple[int, ...]) -> None:
    """In JAX, by the kernels for Hopper: results to the bit, gradients of weights to the rounding of their sums."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"gate": (4, 256, 384), "up": (4, 256, 384), "down": (4, 384, 256)}
    weights = {
        name: 0.1 * jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    x, dy = (jax.random.normal(key, (1024, 256), jnp.bfloat16) for key in keys[3:])
    ends_E = jnp.array(ends, jnp.int32)

    def whole(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        return jax_experts.apply_packed(x, ends_E, w["up"], w["down"], w["gate"], jax.nn.silu)

    def blockwise(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        return jax_experts.apply_blockwise(jax.nn.silu, 256, x, ends_E, w)

    def both(function: Any) -> Any:
        out, backward = jax.vjp(function, x, weights)
        return out, *backward(dy)

    (out, dx, dw), (true_out, true_dx, true_dw) = (jax.jit(both, static_argnums=0)(each) for each in (blockwise, whole))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(true_out))
    np.testing.assert_array_equal(np.asarray(dx), np.asarray(true_dx))
    for name, gradient in dw.items():
        found, truth = (np.asarray(each, np.float32) for each in (gradient, true_dw[name]))
        assert np.abs(found - truth).max() <= 2.0**-7 * max(np.abs(truth).max(), 2.0**-20), name
