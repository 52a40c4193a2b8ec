"""What `validate --full` has each backend do beyond one step: inputs that are the same in every process, and a trace of
what came of them.

Shapes: B rows, S positions, N new tokens, F frames, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from shared_config.contract.initialise import stream
from shared_config.contract.lora import adapter_table
from shared_config.contract.moments import gradient_share
from shared_config.contract.vision import job_table
from shared_config.contract.warm_start import without_warm_start
from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.vision import tower_of
from shared_config.parity.dtypes import narrow_dtypes, roundoffs_of
from shared_config.parity.images import image_token, images_of, pixels
from shared_config.parity.numerics import difference, perturbation_maxima
from shared_config.parity.recording import DELTA_RUNS, delta_and_parts
from shared_config.parity.request import WHOLE, Arrays, can_decode, make_request, request_meta
from shared_config.parity.traces import DECODE, FORWARD, GRADIENT, LOSS, ROUTING, Trace, group_of
from shared_config.parity.validation import drawn_tokens
from shared_config.parity.work import Backend, Decoding, Trained, Work, scenario_batch, unpadded
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

MICRO_BATCHES = 4
PROMPTS, WINDOW = (13, 4, 9), 6
"""Of decoding: lengths of the prompts, of which the longest takes three chunks; a window that they pass often."""

EVALUATION, STATE = "evaluation", "state"
"""Groups of a trace: losses of evaluation, and weights after the last step."""

RESUMED_STEPS = 2
"""Of each of the three parts of a run that changes backends."""
PARTS = 3


def record_scenario(
    backend: Backend,
    config: JobConfig,
    name: str,
    *,
    dtype: str = "float64",
    seed: int = 0,
    weights: str | Mapping[str, np.ndarray] = "validation",
    deltas: bool = False,
    device: str | None = None,
    runs: Path | None = None,
) -> Trace:
    """Let a backend run a scenario, and keep the result.

    Args:
        name: one of `SCENARIOS` that `applicable` has.
        dtype: "float64", or "bfloat16" or "fp8" where something is trained.
        weights: as for a trace.
        deltas: also measure how far rounding the weights to bfloat16, and to FP8 where the config has it, moves what
            training gives.
        runs: folder of checkpoints, where the scenario needs one.

    Raises:
        UserError: a scenario that the config doesn't have.
    """
    if name not in applicable(config):
        raise UserError(f"scenario = {name!r}: must be one of {', '.join(applicable(config))} for this config")
    changed = scenario_config(config, name)
    request = make_request(changed, dtype=dtype, seed=seed, weights=weights)
    work = Work(changed, dtype, seed, request.weights, deltas, device, runs)
    tensors, extra = SCENARIOS[name](backend, work)
    meta = dataclasses.replace(
        request_meta(request),
        backend=backend.NAME,
        device=backend.device_name(device),
        deltas=extra.pop("deltas", {}),
        parts=extra.pop("parts", {}),
        extra={"scenario": name, **extra},
    )
    return Trace(tensors, meta)


def applicable(config: JobConfig) -> list[str]:
    """The scenarios that make sense for a config."""
    return [name for name in SCENARIOS if name not in left_out(config)]


def left_out(config: JobConfig) -> dict[str, str]:
    """The other scenarios, with the reason."""
    reasons = {}
    if config.vlm is not None:
        reasons["documents"] = f"vlm.arch = {config.vlm.arch!r}: rows with images are not packed from documents"
        if not can_decode(config):
            reasons |= dict.fromkeys(("generate", "ring"), f"vlm.arch = {config.vlm.arch!r}: can't generate")
    if config.model.sliding_window is not None and can_decode(config):
        reasons["generate"] = f"model.sliding_window = {config.model.sliding_window}: ring is what generates"
    return reasons


def scenario_config(config: JobConfig, name: str) -> JobConfig:
    """The config of a scenario: rings have a window that is passed several times."""
    config = without_warm_start(config)
    if name == "ring":
        window = min(config.model.sliding_window or WINDOW, WINDOW)
        return config.replace(model=config.model.with_window(window))
    return config


Outcome = tuple[Arrays, dict[str, object]]


def _documents(backend: Backend, work: Work) -> Outcome:
    return _training(backend, work, [[scenario_batch(work, "documents", documents=True)]])


def _padding(backend: Backend, work: Work) -> Outcome:
    return _training(backend, work, [[scenario_batch(work, "padding", padded=True)]])


def _accumulation(backend: Backend, work: Work) -> Outcome:
    """Micro-batches whose labels differ in number."""
    steps = [[scenario_batch(work, f"accumulation {i}", ignored=0.1 + 0.2 * i) for i in range(MICRO_BATCHES)]]
    return _training(backend, work, steps)


def _training(backend: Backend, work: Work, steps: Sequence[Sequence[Batch]]) -> Outcome:
    """Loss, gradients and weights of training steps, and evaluation before and after them."""
    held_out = [batch for micro_batches in steps for batch in micro_batches[:2]]

    def run(weights: Arrays, dtype: str) -> tuple[Trained, Arrays]:
        state = TrainingState(0, weights, {})
        trained = backend.train(work.config, state, steps, held_out, dtype=dtype, device=work.device)
        return trained, trained_tensors(trained, work.config)

    trained, tensors = run(work.weights, work.dtype)
    extra: dict[str, object] = {"lr": sum(float(metrics["lr"]) for metrics in trained.metrics)}
    if work.deltas:
        moved: Callable[[Arrays], Arrays] = lambda weights: _without_state(run(weights, "float64")[1])  # noqa: E731
        deltas, parts = {}, {}
        for dtype in narrow_dtypes(work.config):
            roundoff = roundoffs_of(work.config, dtype)
            found = perturbation_maxima(moved, work.weights, roundoff, _measured, DELTA_RUNS, seed=work.seed)
            deltas[dtype] = {name: float(one.flat[0]) for name, one in found.items()}
            parts[dtype] = {name: one[1:] for name, one in found.items() if one.size > 1}
        extra |= {"deltas": deltas, "parts": parts}
    return tensors, extra


def _without_state(tensors: Arrays) -> Arrays:
    return {name: array for name, array in tensors.items() if group_of(name) != STATE}


def _measured(name: str, moved: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How far rounding moved a tensor, and the rows and columns of a gradient."""
    if group_of(name) == GRADIENT:
        return delta_and_parts(name, moved, truth)
    return np.array([difference(moved, truth).rms_error])


def trained_tensors(trained: Trained, config: JobConfig) -> Arrays:
    """The gradient of the first step is in the first moments, which start at 0."""
    losses = [name for name in trained.metrics[0] if name not in ("lr", "tokens", "dead_experts")]
    tensors = {f"{LOSS}/{name}": np.array([float(metrics[name]) for metrics in trained.metrics]) for name in losses}
    tensors[f"{EVALUATION}/losses"] = trained.evaluations
    for name in ("tokens", "dead_experts"):
        if name in trained.metrics[0]:
            tensors[f"{ROUTING}/{name}"] = np.array([int(metrics[name]) for metrics in trained.metrics])
    table = job_table(config, tower_of(config)) | adapter_table(config)
    for name, moment in trained.states[0].optimizer.items():
        kind, _, parameter = name.partition(".")
        if kind == "m":
            share = gradient_share(config.optimizer, parameter, table[parameter])
            tensors[f"{GRADIENT}/{parameter}"] = np.asarray(moment) / share
    weights = trained.states[-1].weights
    return tensors | {f"{STATE}/{name}": np.asarray(weights[name]) for name in weights}


def _generate(backend: Backend, work: Work) -> Outcome:
    config = work.config
    draw = stream(work.seed, "scenario/prompts")
    prompts = [drawn_tokens(draw, config.model.vocab_size, length, image_token(config)) for length in PROMPTS]
    shown = pixels(config, len(prompts), work.seed)
    places = None
    if shown is not None and config.vlm is not None and config.vlm.places_image:
        counts = [max(images_of(config) - row, 1) for row in range(len(prompts))]
        rows = zip(prompts, counts, strict=True)
        places = [sorted(draw.integers(0, len(prompt), count).tolist()) for prompt, count in rows]
    decoding = Decoding(prompts, shown, places, seed=work.seed)
    found = backend.decode(config, work.weights, decoding, device=work.device)
    return {f"{DECODE}/{name}": array for name, array in found.items()}, {}


def _captures(backend: Backend, work: Work) -> Outcome:
    request = make_request(work.config, dtype="float64", seed=work.seed)
    images = {"pixel_values": request.pixels, "image_positions": request.image_positions}
    images["prompt_lengths"] = request.prompt_lengths
    given = {name: array for name, array in images.items() if array is not None}
    stored, extracted = backend.captured(work.config, work.weights, request.tokens, given, device=work.device)
    tensors = {f"{FORWARD}/{name}": array for name, array in stored.items()}
    return tensors | {f"extracted/{name}": array for name, array in extracted.items()}, {}


def _resumed(part: int) -> Callable[[Backend, Work], Outcome]:
    """A part of a run that changes backends after each: the first also does the whole run without a change."""

    def run(backend: Backend, work: Work) -> Outcome:
        assert work.runs is not None
        steps = [
            [scenario_batch(work, f"resume {step}", padded=bool(step % 2))] for step in range(PARTS * RESUMED_STEPS)
        ]
        steps = [[{**batch, **unpadded(batch)} for batch in micro_batches] for micro_batches in steps]
        whole = None
        if part == 0:
            state = work.state
            whole = backend.train(work.config, state, steps, [], dtype=work.dtype, device=work.device)
        else:
            other = "jax" if backend.NAME == "torch" else "torch"
            state = checkpoint.load(resume_folder(work.runs, other, part - 1)).state
        own = steps[part * RESUMED_STEPS : (part + 1) * RESUMED_STEPS]
        trained = backend.train(work.config, state, own, [], dtype=work.dtype, device=work.device)
        checkpoint.save(resume_folder(work.runs, backend.NAME, part), trained.states[-1], backend=backend.NAME)
        final = (whole or trained).states[-1]
        metrics = (whole or trained).metrics
        tensors = {f"{STATE}/{name}": np.asarray(array) for name, array in final.weights.items()}
        tensors |= {f"{LOSS}/loss": np.array([float(one["loss"]) for one in metrics[-RESUMED_STEPS:]])}
        return tensors, {"lr": sum(float(one["lr"]) for one in metrics), "step": final.step}

    return run


SCENARIOS: dict[str, Callable[[Backend, Work], Outcome]] = {
    "documents": _documents,
    "padding": _padding,
    "accumulation": _accumulation,
    "generate": _generate,
    "ring": _generate,
    "captures": _captures,
    **{f"resume-{part}": _resumed(part) for part in range(PARTS)},
}


def resume_folder(runs: Path, backend: str, part: int) -> Path:
    """Where a backend leaves a part of a run."""
    return runs / f"resume-{backend}-{part}"


def cached_and_whole(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Logits of static caches, and those that they must equal."""
    cached, whole = trace.tensors[f"{DECODE}/cached"], trace.tensors[f"{DECODE}/{WHOLE}"]
    return np.asarray(cached), np.asarray(whole)
