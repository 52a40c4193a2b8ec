"""Every text preset's forward and gradient export for CPU, CUDA and TPU, at full size and without a weight.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from kempnerforge_jax.model.init import init_weights
from kempnerforge_jax.model.state import merge, split, unstack_shapes
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.registry import registry
from kempnerforge_jax.training.loss import mean_cross_entropy, router_losses
from shared_config.contract.parameters import parameter_table
from shared_config.loader import load_config, preset_names
from shared_config.schema.job import JobConfig

PLATFORMS = ("cpu", "cuda", "tpu")
PRESETS = (
    "debug", "debug_moe", "llama_125m", "llama_1b", "llama3_8b", "llama3_70b", "qwen3_0_6b", "moe_small",
)  # fmt: skip
BATCH, LENGTH = 1, 64
MOST_BYTES = 2**20
"""Of a program: one that held a weight would be larger."""


def test_no_text_preset_is_left_out() -> None:
    assert {name for name in preset_names() if load_config(name).vlm is None} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_forward_and_gradient_export_for_every_platform(preset: str) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("next to a GPU, attention has a kernel that other platforms can't lower")
    job = load_config(preset)
    graphdef, params, buffers = abstract_model(job)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def forward(params: Any, buffers: Any, tokens: Any) -> Any:
        return merge(graphdef, params, buffers).run(tokens).logits

    def loss(params: Any, buffers: Any, tokens: Any) -> Any:
        output = merge(graphdef, params, buffers).run(tokens, remat=True)
        return mean_cross_entropy(output.logits, tokens) + sum(router_losses(output.stats))

    logits = exported(forward, params, buffers, tokens)
    assert [(aval.shape, aval.dtype) for aval in logits.out_avals] == [
        ((BATCH, LENGTH, job.model.vocab_size), dtype_of(job))
    ]
    gradients = exported(jax.grad(loss), params, buffers, tokens)
    shaped = dict(
        zip(sorted(params), gradients.out_avals, strict=True)
    )  # a dict's leaves come in the order of its keys
    assert {name: (aval.shape, aval.dtype) for name, aval in shaped.items()} == {
        name: (array.shape, array.dtype) for name, array in params.items()
    }


def test_an_exported_program_computes_what_the_model_does() -> None:
    job = load_config("debug")
    graphdef, params, buffers = abstract_model(job)
    program = exported(
        lambda p, b, t: merge(graphdef, p, b).run(t).logits,
        params,
        buffers,
        jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32),
    )
    model = Transformer(job.model, rngs=nnx.Rngs(0))
    init_weights(model, job.model, seed=1)
    tokens = np.arange(LENGTH, dtype=np.int32)[None] * 3 % job.model.vocab_size
    _, real_params, real_buffers = split(model, scan_layers=True)
    again = program.call(real_params, real_buffers, tokens)
    np.testing.assert_allclose(again, jax.jit(model.run)(tokens).logits, rtol=1e-4, atol=1e-5)


def abstract_model(job: JobConfig) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Graph, parameters and buffers as shapes, layers of one structure stacked."""
    builder = registry.get("model", job.model.model_type)
    model = nnx.eval_shape(lambda: builder(job.model, rngs=nnx.Rngs(0))).to(dtype_of(job))
    graphdef, params, buffers = split(model, scan_layers=True)
    arrays = {**params, **buffers}
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in arrays.values())
    table = parameter_table(job.model)
    shapes = {name: array.shape for name, array in unstack_shapes(arrays).items() if not name.startswith("rope.")}
    assert shapes == {name: spec.shape for name, spec in table.items()}
    return graphdef, params, buffers


def dtype_of(job: JobConfig) -> Any:
    """What the preset computes in."""
    return jnp.dtype(jnp.bfloat16 if job.train.mixed_precision == "bf16" else jnp.float32)


def exported(function: Callable[..., Any], *arguments: Any) -> export.Exported:
    """The function as a program for all platforms, and small."""
    program = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert program.platforms == PLATFORMS
    assert len(program.mlir_module_serialized) < MOST_BYTES
    return program
