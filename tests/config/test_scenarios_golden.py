"""What scenarios of a full validation do, and what is found in what they leave, with a backend made of NumPy."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.parity import full_checks
from shared_config.parity import plan as planning
from shared_config.parity.checks import outcome
from shared_config.parity.images import pixels as pixels_of
from shared_config.parity.plan import Finding, Plan
from shared_config.parity.scenarios import applicable, record_scenario, scenario_config
from shared_config.parity.traces import Trace
from shared_config.parity.work import Decoding, Trained, Work, scenario_batch, unpadded
from shared_config.schema.job import JobConfig
from tests.config.test_validation_golden import CONFIGS, digest, digests, together
from tests.golden import check_golden


class Fake:
    """A backend whose training makes weights half as large again, and which notes what it is given.

    Args:
        wrong: what it gets wrong.
    """

    def __init__(self, name: str, wrong: str = ""):
        self.NAME, self.wrong = name, wrong
        self.noted: list[str] = []

    def note(self, *words: Any) -> None:
        self.noted.append(" ".join(map(str, words)))

    def off(self, what: str) -> float:
        return 1e-3 if self.wrong == what else 0.0

    def train(
        self,
        config: JobConfig,
        state: TrainingState,
        steps: Sequence[Any],
        held_out: Sequence[Any],
        *,
        dtype: str,
        device: str | None,
    ) -> Trained:
        given = [[digests(batch) for batch in micro_batches] for micro_batches in steps]
        said = hashlib.sha256(repr((given, [digests(batch) for batch in held_out])).encode()).hexdigest()[:10]
        self.note(
            "train", dtype, device, state.step, together(state.weights), list(map(len, given)), len(held_out), said
        )
        states, metrics = [], []
        weights = {name: np.asarray(array, np.float64) for name, array in state.weights.items()}
        for place in range(len(steps)):
            weights = {name: array * (1.5 + self.off("weights")) for name, array in weights.items()}
            moments = {f"m.{name}": array * (0.25 + self.off("gradient")) for name, array in weights.items()}
            moments |= {f"v.{name}": np.square(array) for name, array in weights.items()}
            states.append(TrainingState(state.step + place + 1, weights, moments))
            norm = next(array for name, array in weights.items() if name.endswith("norm.weight"))
            loss = 3.0 + self.off("loss") + float(norm[0])
            metrics.append({"loss": loss, "grad_norm": 2.0, "lr": 0.5 + place, "tokens": 7 + place, "dead_experts": 2})
        return Trained(metrics, states, np.array([3.0, 2.5]) + self.off("evaluation"))

    def decode(
        self, config: JobConfig, weights: Any, decoding: Decoding, *, device: str | None
    ) -> dict[str, np.ndarray]:
        pixels = None if decoding.pixels is None else digest(decoding.pixels)
        self.note("decode", together(weights), list(map(digest, decoding.prompts)), pixels, decoding.new_tokens)
        self.note(decoding.prefill_chunk, decoding.seed, decoding.sampling, device, config.model.sliding_window)
        tokens, logits = np.arange(6, dtype=np.int32).reshape(3, 2), np.linspace(-1, 1, 24).reshape(3, 2, 4)
        generated = tokens + np.int32(self.wrong == "generated")
        return {"streamed": tokens, "generated": generated, "cached": logits + self.off("cached"), "whole": logits}

    def captured(
        self, config: JobConfig, weights: Any, tokens: Any, images: Any, *, device: str | None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        pixels = digest(images["pixel_values"]) if images else None
        self.note("captured", together(weights), digest(tokens), pixels, device)
        stored = {name: array + self.off("captured") for name, array in FORWARD.items()}
        return stored | ({"own": np.ones(2)} if self.wrong == "own capture" else {}), {"norm": np.ones(3)}

    def device_name(self, device: str | None) -> str:
        return device or "cpu"


FORWARD = {"norm": np.linspace(0, 1, 6).reshape(2, 3), "output_head": np.ones((2, 3))}


def said_of(trace: Trace) -> str:
    """A trace of a scenario: its tensors to five digits, and what it says of itself."""
    about = lambda array: f"{array.dtype}{list(array.shape)} {float(np.sum(array)):.5g} {float(np.ptp(array)):.5g}"  # noqa: E731
    names = [name for name in trace.tensors if "/" in name and ("layers" not in name or "q_proj" in name)]
    tensors = "; ".join(f"{name} {about(np.asarray(trace.tensors[name]))}" for name in names)
    meta, kept = trace.meta, lambda name: "layers" not in name or "q_proj" in name
    deltas = {dtype: [f"{name} {x:.4g}" for name, x in own.items() if kept(name)] for dtype, own in meta.deltas.items()}
    parts = {
        dtype: [f"{name} {len(part)} {part.sum():.4g}" for name, part in own.items() if kept(name)]
        for dtype, own in meta.parts.items()
    }
    meta = dataclasses.replace(meta, deltas={}, parts={}, machine="", versions={}, config="")
    return f"{len(trace.tensors)} {meta}\n    {tensors}\n    {deltas}\n    {parts}"


def work(config: JobConfig) -> Work:
    return Work(config, "float64", 4, {}, deltas=False, device=None, runs=None)


DELTAS = {("text", "accumulation"), ("text", "padding")}


def test_scenarios(tmp_path: Path) -> None:
    lines = []
    for name, config in CONFIGS.items():
        for place, scenario in enumerate(applicable(config)):
            if name not in ("text", "joint") and scenario.startswith("resume"):
                continue
            backends, device = (Fake("torch"), Fake("jax")), (None, "cpu")[place % 2]
            given: dict[str, Any] = {"seed": place, "deltas": (name, scenario) in DELTAS, "device": device}
            first, _ = [record_scenario(each, config, scenario, runs=tmp_path / name, **given) for each in backends]
            assert backends[0].noted[:1] == backends[1].noted[:1] or scenario.startswith("resume")
            lines += [f"{name} {scenario}", f"    {said_of(first)}", *(f"    {noted}" for noted in backends[0].noted)]
        lines.append(f"{name} {together(scenario_batch(work(config), 'x', documents=True, padded=True))}")
        lines.append(digests(unpadded(scenario_batch(work(config), "x"))))
        padded = scenario_batch(work(config), "y", padded=True)
        assert all(array is padded[mask] for mask, array in unpadded(padded).items())
        lines.append(digests(padded))
        pixels = pixels_of(config, 3, work(config).seed)
        lines.append("none" if pixels is None else digest(pixels))
        lines.append(str(scenario_config(config, "ring").model.sliding_window))
    check_golden("scenarios.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "scenario", "others"),
    [
        ("window", "generate", "documents, padding, accumulation, ring, captures, resume-0, resume-1, resume-2"),
        ("moma", "documents", "padding, accumulation, captures, resume-0, resume-1, resume-2"),
        ("text", "x", "documents, padding, accumulation, generate, ring, captures, resume-0, resume-1, resume-2"),
    ],
)
def test_scenarios_that_a_config_has_not(name: str, scenario: str, others: str) -> None:
    with pytest.raises(UserError) as caught:
        record_scenario(Fake("torch"), CONFIGS[name], scenario)
    assert str(caught.value) == f"scenario = {scenario!r}: must be one of {others} for this config"


TRAINED = ("documents", "accumulation", "resume-0", "resume-1", "resume-2")
WRONG: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "weights": (TRAINED, TRAINED), "gradient": (TRAINED[:2], TRAINED[:2]), "loss": (TRAINED, TRAINED),
    "evaluation": (TRAINED[:1], TRAINED[:1]), "generated": (["generate"], ["generate"]), "cached": (["ring"], ["ring"]),
    "captured": (["captures"], ["captures"]), "own capture": (["captures"], ["captures"]),
    "decode": ([], ["cached-decoding"]), "nan": ([], ["cached-decoding"]), "state": ([], ["documents", "padding"]),
    "step": ([], ["resume-2"]), "late loss": ([], ["resume-2"]),
}  # fmt: skip
"""What the second backend gets wrong -> scenarios to be recorded anew, and checks to be judged."""


def recorded(plan: Plan, wrong: str, scenarios: Sequence[str]) -> dict[Path, Trace]:
    """What the processes of two backends would leave, of which the second gets something wrong."""
    found = {}
    for scenario in scenarios:
        for backend in (Fake("torch"), Fake("jax", wrong)):
            for dtype in ("float64", "bfloat16") if scenario == "accumulation" else ("float64",):
                deltas = (backend.NAME, dtype, scenario) == ("torch", "float64", "accumulation")
                trace = record_scenario(backend, plan.config, scenario, dtype=dtype, runs=plan.folder, deltas=deltas)
                found[plan.scenario_file(backend.NAME, scenario, dtype)] = trace
    decoded = {f"decode/{name}": np.ones((2, 3)) for name in ("single", "prefill", "drawn")}
    for backend in ("torch", "jax"):
        tensors = {f"forward/{name}": array for name, array in FORWARD.items()} | decoded
        if backend == "jax" and wrong in ("decode", "nan"):
            tensors["decode/drawn"] = np.full((2, 3), 1 + 1e-9 if wrong == "decode" else np.nan)
        meta = dataclasses.replace(plan.expected, backend=backend, device="cpu", initial_hash="ab")
        found[plan.trace_file(backend, "float64")] = Trace(tensors, meta)
    return found


def judged(plan: Plan, traces: Mapping[Path, Trace], names: Sequence[str]) -> list[Finding]:
    with (
        mock.patch.object(planning, "read_trace", traces.__getitem__),
        mock.patch.object(full_checks, "read_trace", traces.__getitem__),
    ):
        checks = [check for check in plan.checks if check.name.replace(" ", "-") in names]
        return [finding for check in checks for finding in check.judge(plan)]


def line(finding: Finding) -> str:
    """All of a finding, its numbers to five digits."""
    numbers = f"{finding.error:.5g} {finding.limit:.5g}"
    return f"  {dataclasses.replace(finding, error=0.0, limit=0.0)} {numbers} {finding.verdict}"


def without(trace: Trace, name: str) -> Trace:
    return dataclasses.replace(trace, tensors={key: array for key, array in trace.tensors.items() if key != name})


def test_findings(tmp_path: Path) -> None:
    first = Plan(CONFIGS["text"], tmp_path, full=True)
    right = recorded(first, "", applicable(first.config))
    everything = ["cached-decoding", *applicable(first.config)]
    lines = []
    for wrong, (scenarios, names) in {"": ([], everything), **WRONG}.items():
        plan = Plan(first.config, tmp_path, full=True)
        traces = right | recorded(plan, wrong, scenarios)
        if wrong == "state":
            file, other = (plan.scenario_file("jax", name) for name in ("padding", "documents"))
            traces[file] = without(traces[file], "state/norm.weight")
            reshaped = {"state/norm.weight": np.ones(3), "state/output_head.proj.weight": np.full((300, 16), np.nan)}
            traces[other] = dataclasses.replace(traces[other], tensors={**traces[other].tensors, **reshaped})
        last = plan.scenario_file("jax", "resume-2")
        if wrong == "step":
            meta = dataclasses.replace(traces[last].meta, extra={**traces[last].meta.extra, "step": 7})
            traces[last] = dataclasses.replace(traces[last], meta=meta)
        if wrong == "late loss":  # within the limit of losses, but not of logits
            losses = {"loss/loss": np.asarray(traces[last].tensors["loss/loss"]) * (1 + 1e-10)}
            traces[last] = dataclasses.replace(traces[last], tensors={**traces[last].tensors, **losses})
        found = judged(plan, traces, names)
        lines += [f"{wrong}: {len(found)} {sorted(plan.comparisons)} {outcome(found)}"]
        lines += [line(finding) for finding in found if not finding.ok or not wrong]
    check_golden("findings.txt", "\n".join(lines).replace(str(tmp_path), "") + "\n")
