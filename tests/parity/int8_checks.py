"""What holds of weights that are held as int8, in either backend: which are, what they stand for, and what a model
computes with them. Each check takes the name of a backend, whose modules may have been changed.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from hypothesis import settings

from shared_config.contract.vision import job_table
from shared_config.interchange.vision import tower_of
from shared_config.parity.numerics import difference
from shared_config.parity.request import make_request
from tests.outcomes import refused
from tests.parity.fp8_checks import MODELS, SIDES, small_job

EXACT, STORED = 1e-12, 1e-6
"""The largest relative errors that float64 leaves, and that rounding weights to float32 leaves; 2e-7 was seen."""
NIGHTLY = settings.get_current_profile_name() == "nightly"
KINDS = {"torch": tuple(MODELS), "jax": tuple(MODELS) if NIGHTLY else ("packed experts",)}
"""By day not all in JAX, which compiles each anew."""


def steps_of(weight: np.ndarray) -> np.ndarray:
    """A 127th of the largest weight of each output, of weights (out, in) or (expert, in, out)."""
    return np.max(np.abs(weight.astype(np.float64)), axis=1, keepdims=True) / 127


def held_names(names: list[str]) -> set[str]:
    """By what their names end with, and where they are."""
    products = re.compile(r"_proj\.weight$|_proj\.(image|text)\.weight$|\.(gate|up|down)_w$")
    return {name for name in names if products.search(name) and not re.match(r"vision_encoder|adapter|.*head", name)}


def logits_of(backend: str, kind: str, weights: dict[str, np.ndarray], *, int8: bool) -> np.ndarray:
    """In float64, of a model with these weights; ``int8``: held so."""
    side, job = SIDES[backend], small_job(kind, precision="fp32")
    request = make_request(job, dtype="float64", seed=0, weights=weights)
    inputs = [request.tokens] if request.pixels is None else [request.pixels.astype(np.float64), request.tokens]
    with jax.enable_x64(True):
        model = side.module("model.build").load_model(job, weights, "cpu", weights_dtype="int8" if int8 else "float32")
        model = model.double() if backend == "torch" else model.to("float64")
        return side.run(lambda *arrays: model.run(*arrays).logits, *inputs)


def weights_of(kind: str) -> dict[str, np.ndarray]:
    """Drawn, float32, the first output of each matrix far larger than the others."""
    weights = dict(make_request(small_job(kind, precision="fp32"), dtype="float64", seed=3).weights)
    for name in held_names(list(weights)):
        weights[name] = weights[name].copy()
        weights[name][..., :1, :] *= 3 if weights[name].ndim == 2 else 1
    return weights


def check_held(backend: str) -> None:
    """Codes and scales take the place of the weights of layers, and of no others; each stands for a number that is half
    a step from the weight at most; three quarters of the memory are free again.
    """
    side = SIDES[backend]
    for kind in ("dense", "packed experts", "mot", "cross_attention"):
        weights, job = weights_of(kind), small_job(kind, precision="fp32")
        model = side.module("model.build").load_model(job, weights, "cpu", weights_dtype="int8")
        state = side.numpy(dict(side.module("model.state").get_state(model)))
        held = held_names(list(weights))
        assert held == {name for name, array in state.items() if array.dtype == np.int8}
        assert {f"{name}_scale" for name in held} == set(state) - set(job_table(job, tower_of(job)))
        for name in held:
            codes, scales = state[name].astype(np.float64), state[f"{name}_scale"]
            assert scales.dtype == np.float32
            assert np.abs(codes).max(axis=1).min() == 127
            assert (np.abs(codes * scales - weights[name]) <= steps_of(weights[name]) * (0.5 + 1e-4)).all()
        for name in set(weights) - held:
            np.testing.assert_array_equal(state[name], weights[name])
        before, after = (
            sum(array.nbytes for name, array in tensors.items() if name.removesuffix("_scale") in held)
            for tensors in (weights, state)
        )
        assert 0.25 * before < after <= 0.25 * before + 4 * sum(steps_of(weights[name]).size for name in held)


def check_logits(backend: str, kinds: tuple[str, ...] = ()) -> None:
    """A model of int8 weights is the model of the numbers that they stand for, and the same in both backends."""
    for kind in kinds or KINDS[backend]:
        weights = weights_of(kind)
        found = logits_of(backend, kind, weights, int8=True)
        if backend == "jax":
            assert difference(found, logits_of("torch", kind, weights, int8=True)).relative_error <= EXACT, kind
        names = held_names(list(weights))
        exact = {name: stood_for(weight) if name in names else weight for name, weight in weights.items()}
        truth = logits_of(backend, kind, exact, int8=False)
        assert difference(found, truth).relative_error <= STORED, kind
        assert difference(logits_of(backend, kind, weights, int8=False), truth).relative_error > 1e-4, kind


def stood_for(weight: np.ndarray) -> np.ndarray:
    """What the codes of a float32 weight stand for, of float32 steps."""
    steps = np.max(np.abs(weight), axis=1, keepdims=True) / np.float32(127)
    return np.rint(weight / steps) * steps.astype(np.float64)


def check_refusals(backend: str) -> None:
    """Weights of another dtype, and weights that no scale can be made of."""
    load: Any = SIDES[backend].module("model.build").load_model
    job, weights = small_job(precision="fp32"), weights_of("dense")
    name = "layers.1.mlp.up_proj.weight"
    for options, given, said in (
        ({"weights_dtype": "int4"}, weights, "weights_dtype = 'int4': must be one of float32, int8"),
        ({"weights_dtype": "int8"}, {**weights, name: weights[name] * np.float32(np.inf)}, f"{name}: must be finite"),
    ):
        with refused(said):
            load(job, given, "cpu", **options)


INT8_CHECKS = {
    "model.int8": (check_held,),
    "model.linear": (check_held, lambda backend: check_logits(backend, ("dense",))),
    "model.moe": (lambda backend: check_logits(backend, ("experts", "packed experts")),),
    "model.build": (check_held, check_refusals),
}
