"""What holds of FP8 in either backend: codes and scales to the bit, products and gradients to rounding, and which
modules compute in it. Each check takes the name of a backend, whose modules may have been changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import torch

from shared_config.contract.fp8 import BACKWARD, FORWARD, Format
from shared_config.interchange.toml import config_from_dict
from shared_config.parity.numerics import UNIT_ROUNDOFF
from shared_config.schema.job import JobConfig
from tests.oracle import fp8 as oracle
from tests.parity.backends import Jax, Torch

SIDES: dict[str, Any] = {"torch": Torch(), "jax": Jax()}
GRIDS = {FORWARD: oracle.E4M3, BACKWARD: oracle.E5M2}
WIDE = UNIT_ROUNDOFF["float32"]
ROWS, INPUTS, OUTPUTS = 32, 48, 80
FACTORS = [["float8_e4m3fn"] * 2, *[["float8_e5m2", "float8_e4m3fn"]] * 2]
"""Of y, dx and dW."""

SMALL = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "vocab_size": 48,
         "ffn_hidden_dim": 48, "max_seq_len": 32}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_top_k": 2, "moe_shared_experts": 1}
IMAGES = {"vision_encoder": {"type": "vit", "image_size": 8, "patch_size": 2, "feature_dim": 16, "n_heads": 2,
                             "n_layers": 3}, "adapter": {"type": "mlp_2layer"}}  # fmt: skip
TEXT = {"max_text_len": 16}
ATTENTION = [f"attention.{name}_proj" for name in "qkvo"]
DENSE = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
SHARED = [*ATTENTION, *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))]
BY_MODALITY = [
    *(f"attn.{name}_proj.{modality}" for name in "qkvo" for modality in ("image", "text")),
    *(f"mlp.{modality}.{name}_proj" for modality in ("image", "text") for name in ("gate", "up", "down")),
]
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dense": ({"model": {"tie_embeddings": True}}, DENSE),
    "relu": ({"model": {"activation": "relu"}}, [*ATTENTION, "mlp.up_proj", "mlp.down_proj"]),
    "experts": ({"model": EXPERTS}, SHARED),
    "packed experts": ({"model": {**EXPERTS, "moe_packed_experts": True}}, SHARED),
    "joint_decoder": ({**IMAGES, "vlm": {"arch": "joint_decoder", **TEXT}}, DENSE),
    "cross_attention": (
        {**IMAGES, "vlm": {"arch": "cross_attention", "cross_attention_every_n_layers": 1, **TEXT}},
        DENSE,
    ),
    "mot": ({**IMAGES, "vlm": {"arch": "mot", **TEXT}}, BY_MODALITY),
    "moma": (
        {**IMAGES, "vlm": {"arch": "moma", "moma_experts_per_modality": {"image": 2, "text": 2}, **TEXT}},
        ATTENTION,
    ),
}
"""Configs, and which modules of a layer that is neither the first nor the last compute in FP8."""


def small_job(name: str = "dense", precision: str = "fp8", **train: Any) -> JobConfig:
    """A job with a model of `MODELS`."""
    sections = MODELS[name][0]
    options = {"batch_size": 2, "seq_len": 16, "max_steps": 8, "mixed_precision": precision, "compile_model": False}
    return config_from_dict(
        {**sections, "model": {**SMALL, **sections.get("model", {})}, "train": {**options, **train}}
    )


def drawn(seed: int, *shape: int) -> np.ndarray:
    """bfloat16 numbers, in rows and columns of very different sizes."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * np.exp2(rng.uniform(-9, 9, (shape[0], 1)))
    return (values * np.exp2(rng.uniform(-4, 4, (1, shape[1])))).astype(ml_dtypes.bfloat16)


def codes_of(backend: str, x: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """The codes, as numbers, and scales that a backend gives bfloat16 rows."""
    quantise = SIDES[backend].module("model.fp8").quantise
    if backend == "torch":
        codes, scales = quantise(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16), format)
        return codes.float().numpy(), scales.numpy()
    codes, scales = compiled(quantise, format)(x)
    return np.asarray(codes).astype(np.float32), np.asarray(scales)


@functools.lru_cache(maxsize=4)
def compiled(quantise: Any, format: Format) -> Any:
    return jax.jit(lambda x: quantise(x, format))


def check_codes(backend: str, x: np.ndarray | None = None) -> None:
    """Codes and scales are those of the oracle, to the bit; by default of rows of which one is zero."""
    rows = drawn(1, ROWS, INPUTS) * np.sign(np.arange(ROWS)[:, None]).astype(ml_dtypes.bfloat16) if x is None else x
    for format, grid in GRIDS.items():
        codes, scales = codes_of(backend, rows, format)
        expected, expected_scales = oracle.quantise(rows, grid)
        np.testing.assert_array_equal(codes, expected)
        known = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(codes)[known], np.signbit(expected)[known])
        np.testing.assert_array_equal(scales, expected_scales)


def check_saturation(backend: str) -> None:
    """A reciprocal that was rounded up takes no value out of the range: codes are finite where rows are."""
    largest = np.arange(0x3F80, 0x4000, dtype=np.int16).view(ml_dtypes.bfloat16)  # all from 1 to 2
    for format in GRIDS:
        codes, _ = codes_of(backend, np.repeat(largest[:, None], 16, axis=1), format)
        np.testing.assert_array_equal(codes, format.largest)


def products_of(backend: str, x: np.ndarray, weight: np.ndarray, dy: np.ndarray, side: Any = None) -> list[np.ndarray]:
    """y and the gradients of x and of the weight, as a backend computes them."""
    side = SIDES[backend] if side is None else side
    function = side.module("model.fp8").fp8_linear
    if backend == "torch":
        given, matrix = (side.array(array).requires_grad_() for array in (x, weight))
        y = function(given, matrix)
        return [side.numpy(array) for array in (y, *torch.autograd.grad(y, (given, matrix), side.array(dy)))]

    def both_ways(x: Any, weight: Any, dy: Any) -> Any:
        y, transposed = jax.vjp(function, x, weight)
        return y, *transposed(dy)

    return list(side.run(both_ways, x, weight, dy))


def check_products(backend: str) -> None:
    """Output and gradients are those of the oracle, but for rounding to bfloat16 and in float32 sums."""
    x, weight, dy = drawn(2, ROWS, INPUTS), drawn(3, OUTPUTS, INPUTS), drawn(4, ROWS, OUTPUTS)
    found = products_of(backend, x.reshape(2, -1, INPUTS), weight, dy.reshape(2, -1, OUTPUTS))
    y, dx, dweight = (array.reshape(-1, array.shape[-1]) for array in found)
    truths = (oracle.linear(x, weight), *oracle.linear_backward(dy, x, weight))
    sizes = (np.abs(x.astype(float)), np.abs(weight.astype(float)), np.abs(dy.astype(float)))
    terms = (sizes[0] @ sizes[1].T, sizes[2] @ sizes[1], sizes[2].T @ sizes[0])
    for value, truth, total in zip((y, dx, dweight), truths, terms, strict=True):
        assert value.dtype == ml_dtypes.bfloat16
        allowed = UNIT_ROUNDOFF["bfloat16"] * np.abs(truth) + 2 * OUTPUTS * WIDE * total
        assert (np.abs(value.astype(float) - truth) <= allowed).all()


def check_units(backend: str) -> None:
    """What FP8 units are given, on a machine without any: codes whose last axis is summed over, scales of rows and of
    columns, and the demand for sums of all digits.
    """
    x, weight, dy = drawn(2, ROWS, INPUTS), drawn(3, OUTPUTS, INPUTS), drawn(4, ROWS, OUTPUTS)
    module = SIDES[backend].module("model.fp8")
    if backend == "jax":
        program = jax.make_jaxpr(lambda x, w, dy: jax.vjp(module.fp8_linear, x, w)[1](dy))(x, weight, dy)
        found = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "dot_general"]
        assert [[str(each.aval.dtype) for each in eqn.invars] for eqn in found] == FACTORS
        for eqn in found:
            assert eqn.params["dimension_numbers"] == (((1,), (1,)), ((), ()))
            assert eqn.params["preferred_element_type"] == np.float32
            assert eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
        return
    given: list[list[str]] = []

    def kernel(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append([str(each.dtype).removeprefix("torch.") for each in (a, b)])
        scales = [options.pop(name) for name in ("scale_a", "scale_b")]
        assert options == {"out_dtype": torch.bfloat16, "use_fast_accum": False}
        assert [tuple(scale.shape) for scale in scales] == [(len(a), 1), (1, b.shape[1])]
        assert all(factor.is_contiguous() for factor in (a, b.t(), *scales))
        return (a.double() * scales[0] @ (b.double() * scales[1])).to(torch.bfloat16)

    with mock.patch.object(module, "has_units", return_value=True), mock.patch.object(torch, "_scaled_mm", kernel):
        found = products_of(backend, x, weight, dy)
    assert given == FACTORS
    for value, emulated in zip(found, products_of(backend, x, weight, dy), strict=True):
        np.testing.assert_allclose(value.astype(np.float32), emulated.astype(np.float32), rtol=2.0**-7)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program, those of inner ones too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def check_linear(backend: str) -> None:
    """A module computes in FP8 where it is to, its input is bfloat16 and its sizes fit, and as ever elsewhere; its bias
    is added to the rounded product.
    """
    side = SIDES[backend]
    modules = side.module("model.linear")
    for rows, inputs, outputs, dtype, fp8, expected in (
        (ROWS, INPUTS, OUTPUTS, "bfloat16", True, True),
        (ROWS, INPUTS, OUTPUTS, "bfloat16", False, False),
        (ROWS, INPUTS, OUTPUTS, "float32", True, False),
        (ROWS - 8, INPUTS, OUTPUTS, "bfloat16", True, False),
        (ROWS, INPUTS - 8, OUTPUTS, "bfloat16", True, False),
        (ROWS, INPUTS, OUTPUTS - 8, "bfloat16", True, False),
    ):
        x, weight, bias = drawn(2, rows, inputs), drawn(3, outputs, inputs), drawn(4, 1, outputs)[0]
        module = side.build(modules.Linear, inputs, outputs, bias=True, dtype=dtype)
        module.fp8 = fp8
        side.module("model.state").set_state(module, {"weight": weight, "bias": bias})
        given = [array.astype(np.float32) if dtype == "float32" else array for array in (x, weight, bias)]
        plain = side.run(modules.linear, *given)
        in_fp8 = side.run(lambda x, w, b: side.module("model.fp8").fp8_linear(x, w) + b, x, weight, bias)
        y = side.run(module, given[0])
        np.testing.assert_array_equal(y, in_fp8 if expected else plain)
        assert not np.array_equal(plain.astype(np.float32), in_fp8.astype(np.float32))


def check_modules(backend: str) -> None:
    """Trained models and traces compute in FP8 where the table says, if their config does."""
    side = SIDES[backend]
    named = side.module("model.module").named_modules if backend == "jax" else lambda model: model.named_modules()
    for name, (sections, expected) in MODELS.items():
        prefix = "transformer." if "vlm" in sections else ""
        trainer = side.module("training.train").Trainer(small_job(name), "cpu")
        found = [path for path, module in named(trainer.model) if getattr(module, "fp8", False)]
        assert sorted(found) == sorted(f"{prefix}layers.{layer}.{path}" for layer in (1, 2) for path in expected), name
    plain = side.module("training.train").Trainer(small_job(precision="bf16"), "cpu").model
    assert not any(getattr(module, "fp8", False) for _, module in named(plain))


FP8_CHECKS = {
    "model.fp8": (check_codes, check_saturation, check_products, check_units),
    "model.linear": (check_linear,),
    "training.mixed_precision": (check_modules,),
    "training.train": (check_modules,),
    "training.objective": (check_modules,),
}
