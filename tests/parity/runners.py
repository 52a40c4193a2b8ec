"""One config, one batch, three implementations: the NumPy oracle, torch and JAX, each giving everything that is
compared.

Backends are reached through the modules' names at call time, so that a mutated backend can stand in for the real one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import ParameterTable
from shared_config.parity.numerics import finite_gap, perturbation_delta, perturbation_maxima, rms, unit_roundoff
from shared_config.parity.parts import unpacked, worst_part
from shared_config.parity.recording import DELTA_RUNS, delta_and_parts
from shared_config.parity.tolerance import Cancellation, Scales
from shared_config.schema.model import ModelConfig
from tests.oracle.training import loss_and_gradients, training_loss
from tests.strategies import Inputs
from tests.tolerance import BFLOAT16_GRADIENT_K, BFLOAT16_K, FORWARD_K, GRADIENT_K, assert_same_function, assert_within

Arrays = dict[str, np.ndarray]
EMBEDS = ("inputs_embeds", "prefix_embeds")


@dataclass(frozen=True)
class Run:
    """What one forward and backward gave.

    Attributes:
        activations: by module path; "logits" and "loss" are the last two.
        gradients: of the loss, by parameter, and by name of the embeddings given.
        counts: layer -> assignments of each expert.
    """

    activations: Arrays
    gradients: Arrays
    counts: dict[int, np.ndarray]


def run_oracle(config: ModelConfig, weights: Mapping[str, np.ndarray], inputs: Inputs) -> Run:
    """The executable specification, in float64."""
    wide = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    extra: dict[str, Any] = dict(given_inputs(inputs))
    tokens, labels = extra.pop("tokens", None), extra.pop("labels")
    if inputs.output_slice is not None:
        extra["output_slice"] = slice(*inputs.output_slice)
    loss, out = training_loss(wide, config, tokens, labels, **extra)
    _, gradients = loss_and_gradients(wide, config, tokens, labels, **extra)
    activations = out.activations | {"logits": out.logits, "loss": np.asarray(loss)}
    return Run(activations, gradients, {layer: np.asarray(n) for layer, n in out.expert_counts.items()})


def oracle_deltas(
    config: ModelConfig, weights: Mapping[str, np.ndarray], inputs: Inputs, dtype: str
) -> dict[str, float]:
    """RMS change of every activation and gradient ("gradient/...") when the weights move by a rounding of ``dtype``."""
    return perturbation_delta(_oracle_outputs(config, inputs), weights, unit_roundoff(numpy_dtype(dtype)))


@dataclass(frozen=True)
class Movements:
    """How far rounding the weights moves activations and gradients ("gradient/..."): RMS, and parts, packed."""

    deltas: dict[str, float]
    parts: Arrays


def oracle_movements(config: ModelConfig, weights: Mapping[str, np.ndarray], inputs: Inputs, dtype: str) -> Movements:
    """`oracle_deltas`, and the same of rows and columns, of as many runs as a trace measures."""
    found = perturbation_maxima(
        _oracle_outputs(config, inputs), weights, unit_roundoff(numpy_dtype(dtype)), delta_and_parts, DELTA_RUNS
    )
    deltas = {name: float(numbers[0]) for name, numbers in found.items()}
    return Movements(deltas, {name: numbers[1:] for name, numbers in found.items() if numbers.size > 1})


def _oracle_outputs(config: ModelConfig, inputs: Inputs) -> Callable[[Mapping[str, np.ndarray]], Arrays]:
    def outputs(moved: Mapping[str, np.ndarray]) -> Arrays:
        run = run_oracle(config, moved, inputs)
        return run.activations | {f"gradient/{name}": value for name, value in run.gradients.items()}

    return outputs


def run_torch(config: ModelConfig, weights: Mapping[str, np.ndarray], inputs: Inputs, dtype: str = "float64") -> Run:
    """The torch backend, eagerly."""
    backend = _Backend("torch")
    kind = getattr(torch, dtype)
    model = backend.transformer.Transformer(config)
    _cast_torch(model, parameter_table(config), kind)
    backend.state.set_state(model, weights)
    arrays = {name: torch.from_numpy(value) for name, value in given_inputs(inputs).items()}
    embeds = {name: arrays[name].to(kind).requires_grad_() for name in EMBEDS if name in arrays}
    with backend.hooks.capture(model, detach=True) as activations:
        output = model.run(
            arrays.get("tokens"),
            modality=_modality(backend, arrays | embeds, inputs),
            doc_ids=arrays.get("doc_ids"),
        )
    loss = _loss(backend, config, output, arrays["labels"])
    loss.backward()
    parameters = {**dict(model.named_parameters()), **embeds}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    return _run(backend, dict(activations), output, loss, gradients)


def run_jax(
    config: ModelConfig, weights: Mapping[str, np.ndarray], inputs: Inputs, dtype: str = "float64", jit: bool = True
) -> Run:
    """The JAX backend, under jit unless told otherwise; 64 bits are on for float64 only."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        backend = _Backend("jax")
        compiled, params, buffers = _compiled(backend.identity, config, inputs.output_slice, dtype, jit)
        arrays = {name: jnp.asarray(value) for name, value in given_inputs(inputs).items()}
        trained = {name: jnp.asarray(weights[name], array.dtype) for name, array in params.items()}
        trained |= {name: arrays.pop(name).astype(dtype) for name in EMBEDS if name in arrays}
        held = {
            name: jnp.asarray(weights[name], array.dtype) if name in weights else array
            for name, array in buffers.items()
        }
        activations, output, loss, gradients = compiled(trained, held, arrays)
        return _run(backend, activations, output, loss, gradients)


def assert_same_runs(run: Run, truth: Run, context: Any = None) -> None:
    """Two float64 runs: every activation, the loss, every gradient and every count."""
    for name, value in truth.activations.items():
        assert_same_function(run.activations[name], value, name, context=context)
    assert set(run.gradients) == set(truth.gradients), context
    for name, value in truth.gradients.items():
        noise = cancellation_noise(value, truth, 2.0**-53) / FORWARD_K
        assert_same_function(run.gradients[name], value, f"gradient/{name}", delta=noise, context=context)
    assert_same_counts(run, truth, context)


def assert_run_within(run: Run, truth: Run, deltas: Mapping[str, float], dtype: str, context: Any = None) -> None:
    """A float32 or bfloat16 run against the float64 truth at K * delta."""
    roundoff = unit_roundoff(numpy_dtype(dtype))
    forward_K, gradient_K = (BFLOAT16_K, BFLOAT16_GRADIENT_K) if dtype == "bfloat16" else (FORWARD_K, GRADIENT_K)
    for name, value in truth.activations.items():
        assert_within(run.activations[name], value, deltas[name], forward_K, name, roundoff=roundoff, context=context)
    for name, value in truth.gradients.items():
        full = f"gradient/{name}"
        delta = max(deltas[full], cancellation_noise(value, truth, roundoff) / gradient_K)
        assert_within(run.gradients[name], value, delta, gradient_K, full, roundoff=roundoff, context=context)


def assert_parts_within(
    run: Run, truth: Run, moved: Movements, dtype: str, config: ModelConfig, context: Any = None
) -> None:
    """Rows, columns and elements of every activation and gradient, and their sizes, as in a comparison of traces."""
    truths, values = _named(truth), _named(run)
    scales = Scales(truths, {"model": {"activation": config.activation}})
    for name, value in truths.items():
        key = name.removeprefix("forward/")
        limits = scales.part_limits(name, dtype, rms(value))
        if key in moved.parts and limits is not None:
            deltas = unpacked(moved.parts[key], value.shape)
            part = worst_part(finite_gap(values[name], value), value, deltas, moved.deltas[key], limits)
            assert part.share <= 1, f"{part.label} of {name}: {part.share:.3g} times its limit: {part}\n{context}"


def _named(run: Run) -> Arrays:
    """Activations and gradients by their names in a trace."""
    return {
        f"{group}/{name}": value
        for group, values in (("forward", run.activations), ("gradient", run.gradients))
        for name, value in values.items()
    }


def cancellation_noise(gradient: np.ndarray, truth: Run, roundoff: float) -> float:
    """RMS of the noise that a gradient may carry that cancels, all of it or in part: the rule of the comparison."""
    largest = max(rms(value) for value in truth.gradients.values())
    return Cancellation(largest).noise(rms(gradient), roundoff)


def assert_same_counts(run: Run, truth: Run, context: Any = None) -> None:
    """Assignments of each expert, exactly."""
    assert set(run.counts) == set(truth.counts), context
    for layer, counts in truth.counts.items():
        np.testing.assert_array_equal(run.counts[layer], counts, err_msg=f"layer {layer}: {context}")


def given_inputs(inputs: Inputs) -> Arrays:
    """The arrays that are there, by name."""
    named = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """float64, float32 or bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class _Backend:
    """The modules of one backend as they are loaded now."""

    def __init__(self, name: str) -> None:
        package = f"kempnerforge_{name}"
        self.transformer = importlib.import_module(f"{package}.model.transformer")
        self.state = importlib.import_module(f"{package}.model.state")
        self.hooks = importlib.import_module(f"{package}.model.hooks")
        self.modality = importlib.import_module(f"{package}.model.modality")
        self.loss = importlib.import_module(f"{package}.training.loss")
        self.identity = (name, id(self.transformer.Transformer))


@lru_cache(maxsize=32)
def _compiled(
    identity: tuple[str, int], config: ModelConfig, output_slice: tuple[int, int] | None, dtype: str, jit: bool
) -> tuple[Callable[..., Any], Arrays, Arrays]:
    """The forward and backward, with a model's parameters and buffers to show shapes and dtypes."""
    backend = _Backend("jax")
    model = backend.transformer.Transformer(config, rngs=None)
    graphdef, params, buffers = backend.state.split(model)
    table = parameter_table(config)
    params = {name: array.astype(_held_in(table, name, dtype)) for name, array in params.items()}
    if dtype == "float64":
        buffers = {name: array.astype(dtype) for name, array in buffers.items()}

    def forward(trained: dict[str, Any], held: dict[str, Any], arrays: dict[str, Any]) -> Any:
        embeds = {name: trained[name] for name in EMBEDS if name in trained}
        own = {name: array for name, array in trained.items() if name not in EMBEDS}
        merged = backend.state.merge(graphdef, own, held)
        with backend.hooks.capture(merged) as activations:
            output = merged.run(
                arrays.get("tokens"),
                modality=_modality(backend, arrays | embeds, output_slice=output_slice),
                doc_ids=arrays.get("doc_ids"),
            )
        loss = _loss(backend, config, output, arrays["labels"])
        return loss, (dict(activations), output)

    def run(trained: dict[str, Any], held: dict[str, Any], arrays: dict[str, Any]) -> Any:
        (loss, (activations, output)), gradients = jax.value_and_grad(forward, has_aux=True)(trained, held, arrays)
        return activations, output, loss, gradients

    return jax.jit(run) if jit else run, params, buffers


def _modality(
    backend: _Backend, arrays: Mapping[str, Any], inputs: Inputs | None = None, output_slice: Any = None
) -> Any:
    cut = inputs.output_slice if inputs is not None else output_slice
    names = (*EMBEDS, "key_padding_mask")
    given = {name: arrays[name] for name in names if name in arrays}
    return backend.modality.ModalityContext(**given, output_slice=None if cut is None else slice(*cut))


def _loss(backend: _Backend, config: ModelConfig, output: Any, labels: Any) -> Any:
    loss = backend.loss.mean_cross_entropy(output.logits, labels)
    for stats in output.stats.values():
        loss = loss + config.moe_aux_loss_weight * stats.aux_loss + config.moe_router_z_loss_weight * stats.z_loss
    return loss


def _cast_torch(model: torch.nn.Module, table: ParameterTable, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(getattr(torch, _held_in(table, name, str(dtype).removeprefix("torch."))))
    if dtype == torch.float64:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)


def _held_in(table: ParameterTable, name: str, dtype: str) -> str:
    """The dtype of a parameter when the model computes in ``dtype``."""
    return "float32" if dtype == "bfloat16" and table[name].full_precision else dtype


def _run(backend: _Backend, activations: dict[str, Any], output: Any, loss: Any, gradients: dict[str, Any]) -> Run:
    to_numpy = backend.state.to_numpy
    named = {name: value for name, value in activations.items() if not isinstance(value, (tuple, dict))}
    everything = {**named, "logits": output.logits, "loss": loss}
    return Run(
        {name: to_numpy(value) for name, value in everything.items()},
        {name: to_numpy(value) for name, value in gradients.items()},
        {int(layer): to_numpy(stats.expert_counts) for layer, stats in output.stats.items()},
    )
