"""Every optimiser in both backends, in float64 against NumPy and against each other; with a schedule of rates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kempnerforge_jax.training.train as jax_training
import kempnerforge_torch.training.train as torch_training
from kempnerforge_jax.training.sampling import continued as jax_continued
from kempnerforge_torch.training.optimizer import get_optimizer_state
from kempnerforge_torch.training.sampling import continued as torch_continued
from shared_config.contract.counts import training_memory
from shared_config.contract.freeze import moments_under
from shared_config.contract.moments import moments_of
from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.data import open_text_data
from shared_config.errors import ConfigError
from shared_config.interchange import checkpoint
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.source import read_model
from shared_config.interchange.toml import config_to_dict
from shared_config.schema.job import JobConfig
from shared_config.schema.optimizer import OptimizerConfig
from tests.jobs import assert_same_bits, draw_batch, text_job, tiny_job
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.parity.optimizer_checks import SHAPES, Case, assert_is, check_averages, check_optimizers, steps_of, truth_of
from tests.tolerance import assert_all_same_function

IS_NIGHTLY = settings.get_current_profile_name() == "nightly"
MOST_STEPS = 50 if IS_NIGHTLY else 4
NAMES = ("adamw", "lion", "muon", "schedule_free_adamw")


@pytest.fixture
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


double_precision = pytest.mark.usefixtures("_double_precision")


@double_precision
@on_both
def test_a_few_steps_are_those_of_the_papers(backend: Torch) -> None:
    check_optimizers(backend.name)
    check_averages(backend.name)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name, beta = draw(st.sampled_from(NAMES)), st.floats(0.0, 0.999)
    fields: dict[str, Any] = {"name": name, "lr": draw(st.floats(1e-4, 0.1))}
    fields["betas"] = (draw(st.floats(0.1, 0.999)), draw(beta))
    if name != "lion":
        fields["eps"] = draw(st.sampled_from([1e-8, 1e-3]))
    if name == "muon":
        fields |= {"momentum": draw(beta), "nesterov": draw(st.booleans())}
        fields["newton_schulz_steps"] = draw(st.integers(1, 6))
    if name != "schedule_free_adamw":
        fields["ema_decay"] = draw(st.sampled_from([0.0, 0.9]))
    side = st.integers(1, 9)
    shapes = tuple((one, tuple(draw(side) for _ in shape)) for one, shape in SHAPES.items())
    steps = draw(st.sampled_from([1, MOST_STEPS]))
    frozen = [frozenset(draw(st.lists(st.sampled_from(list(SHAPES)), max_size=2))) for _ in range(min(steps, 4))]
    return Case(
        OptimizerConfig(**fields),
        frozen=[*frozen, *[frozenset[str]()] * (steps - len(frozen))],
        warmup=draw(st.integers(1, 6)),
        decays=draw(st.lists(st.floats(0, 1), min_size=1, max_size=3)),
        shapes=shapes,
        seed=draw(st.integers(0, 2**16)),
    )


@double_precision
@given(case=cases())
@settings(max_examples=200 if IS_NIGHTLY else 6)
def test_any_steps_are_the_same_in_both_backends_and_in_numpy(case: Case) -> None:
    truth = truth_of(case)
    for backend in BACKENDS:
        assert_is(steps_of(backend, case), truth)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3, "ema_decay": 0.9},
    "lion": {"name": "lion", "lr": 3e-3, "ema_decay": 0.5},
    "muon": {"name": "muon"},
    "schedule_free_adamw": {"name": "schedule_free_adamw"},
}
TRAINING = {"torch": torch_training, "jax": jax_training}
nightly = pytest.mark.skipif(not IS_NIGHTLY, reason="nightly: all optimisers, 50 steps")


def by_day(*names: str) -> list[Any]:
    """All optimisers, of which by day these."""
    return [name if name in names else pytest.param(name, marks=nightly) for name in OPTIMIZERS]


def sections(name: str, **changes: Any) -> dict[str, Any]:
    """A constant rate suits all; each step has two micro-batches and is clipped."""
    return {"optimizer": OPTIMIZERS[name], "scheduler": {"name": "constant"}, **changes}


@double_precision
@pytest.mark.parametrize("name", by_day())
def test_float64_trainers_take_the_same_steps(name: str) -> None:
    """Two updates of two micro-batches each, clipped, with experts in stacks and scanned layers. All labels count: Lion
    moves by the sign of a gradient, which is noise where the gradient is 0 but for rounding.
    """
    train = {"grad_accum_steps": 2, "grad_clip_norm": 0.1, "scan_layers": True}
    job = tiny_job({"num_experts": 2, "moe_packed_experts": True}, **sections(name, train=train))
    results = []
    for trainer in (
        torch_training.Trainer(job, "cpu", dtype=torch.float64),
        jax_training.Trainer(job, "cpu", dtype=jnp.float64),
    ):
        found = {}
        for step in range(2):
            metrics = trainer.step([draw_batch(job, 2 * step, 0.0), draw_batch(job, 2 * step + 1, 0.0)])
            found |= {f"{key} {step}": np.array(float(value)) for key, value in metrics.items()}
        state = trainer.state()
        results.append({**found, **state.weights, **state.optimizer})
    assert {key.partition(".")[0] for key in results[0]} >= {*_kinds(job), "t"}
    assert_all_same_function(*results, limit=1e-10)


def _kinds(job: JobConfig) -> set[str]:
    table = parameter_table(job.model)
    return {kind for name, spec in table.items() for kind in moments_of(job.optimizer, name, spec)}


@pytest.mark.parametrize("name", by_day("schedule_free_adamw"))
def test_a_run_goes_from_torch_to_jax_and_back(name: str, tmp_path: Path) -> None:
    """Losses of float32 runs, whole in either backend, and handed on twice, are the same."""
    steps = 50 if IS_NIGHTLY else 6
    job = text_job(tmp_path, **sections(name, train={"max_steps": steps, "grad_accum_steps": 2}))
    data = open_text_data(job)
    batches = [[data.batch(2 * step), data.batch(2 * step + 1)] for step in range(steps)]
    losses = {}
    for backend, training in TRAINING.items():
        trainer = training.Trainer(job)
        losses[backend] = [float(trainer.step(micro_batches)["loss"]) for micro_batches in batches]
    handed: list[float] = []
    for number, backend in enumerate(("torch", "jax", "torch")):
        trainer = TRAINING[backend].Trainer(job)
        if number:
            trainer.load_state(checkpoint.load(tmp_path / "handed").state)
        for micro_batches in batches[number * steps // 3 : (number + 1) * steps // 3]:
            handed.append(float(trainer.step(micro_batches)["loss"]))
        checkpoint.save(tmp_path / "handed", trainer.state())
    assert losses["torch"][-1] < losses["torch"][0] - (1 if IS_NIGHTLY else 0.02)
    for found in (losses["jax"], handed):
        np.testing.assert_allclose(found, losses["torch"], rtol=1e-5, atol=0)


@double_precision
@pytest.mark.parametrize("name", by_day("schedule_free_adamw"))
def test_the_average_is_evaluated_and_read_from_checkpoints(name: str, tmp_path: Path) -> None:
    options = {"optimizer": {"ema_decay": 0.9, **OPTIMIZERS[name]}, "eval": {"average": True}}
    if name == "schedule_free_adamw":
        options = {"optimizer": OPTIMIZERS[name]}
    job = tiny_job({}, **{**sections(name), **options})
    batch, found = draw_batch(job, 9), {}
    for backend, dtype in (("torch", torch.float64), ("jax", jnp.float64)):
        trainer = TRAINING[backend].Trainer(job, "cpu", dtype=dtype)
        for step in range(3):
            trainer.step([draw_batch(job, step)])
        before = trainer.state()
        found[backend] = float(trainer.evaluate([batch])["loss"])
        assert_same_bits(trainer.state(), before)
        folder = checkpoint.save(tmp_path / backend, before, config=config_to_dict(job), backend=backend)
        read = {key: np.asarray(value) for key, value in read_model(folder).weights.items()}
        moved = {key: before.weights[key] - read[key] for key in read}
        assert min(np.abs(value).max() for value in moved.values()) > 0
        plain = TRAINING[backend].Trainer(tiny_job(), "cpu", dtype=dtype)
        plain.load_state(TrainingState(0, read, {}))
        assert float(plain.evaluate([batch])["loss"]) == pytest.approx(found[backend], rel=1e-13)
        plain.load_state(TrainingState(0, before.weights, {}))
        assert abs(float(plain.evaluate([batch])["loss"]) - found[backend]) > 1e-6
    assert found["jax"] == pytest.approx(found["torch"], rel=1e-10)


def test_an_average_may_begin_and_end_in_the_middle_of_a_run() -> None:
    kept = {"m.a": np.ones(2), "t.a": np.array(3), "ema.a": np.ones(2)}
    table = {"a": ParameterSpec((2,), Constant(0.0), (None,))}
    without = moments_under(None, table, kept)
    assert set(without) == {"m.a", "t.a"}
    begun = moments_under(None, table, without, OptimizerConfig(ema_decay=0.5))
    assert {name: np.asarray(value).tolist() for name, value in begun.items() if name == "ema.a"} == {"ema.a": [0, 0]}
    assert moments_under(None, table, kept, OptimizerConfig(ema_decay=0.5)) == kept
    with pytest.raises(ConfigError, match=r"eval\.average = True: no average of the weights is kept"):
        tiny_job(eval={"average": True})


def test_fields_that_an_optimiser_does_not_read_are_refused() -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"name": "lion", "eps": 1e-6}, r"eps = 1e-06: name = 'lion' does not read it: must be 1e-08, or name one of"),
        ({"momentum": 0.5}, r"momentum = 0\.5: name = 'adamw' does not read it: .* one of muon"),
        ({"name": "schedule_free_adamw", "betas": (0.0, 0.9)}, r"betas = \(0\.0, 0\.9\): the first must be above 0"),
        ({"name": "schedule_free_adamw", "ema_decay": 0.9}, r"ema_decay = 0\.9: must be 0"),
        ({"name": "muon", "newton_schulz_steps": 0}, "newton_schulz_steps = 0: must be greater"),
    )
    for fields, said in refused:
        with pytest.raises(ConfigError, match=said):
            OptimizerConfig(**fields)
    with pytest.raises(ConfigError, match=r"scheduler\.name = 'cosine': must be 'constant' or 'none' with optimizer"):
        tiny_job(optimizer={"name": "schedule_free_adamw"})


@nightly
@double_precision
def test_samples_of_both_backends_are_one_text(tmp_path: Path) -> None:
    job = text_job(
        tmp_path, **sections("schedule_free_adamw"), eval={"sample_prompt": "the", "sample_tokens": 12, "steps": 1}
    )
    uniforms, found = np.random.default_rng(0).random((1, 12)), {}
    for backend, dtype, continued in (("torch", torch.float64, torch_continued), ("jax", jnp.float64, jax_continued)):
        trainer: Any = TRAINING[backend].Trainer(job, "cpu", dtype=dtype)
        for step in range(2):
            trainer.step([draw_batch(job, step)])
        found[backend] = continued(trainer, [256, *b"the"], uniforms)
        assert len(found[backend]) == 12
    assert found["torch"] == found["jax"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_a_gpu_are_those_on_the_host(name: str) -> None:
    """Also where each may be left out, which the device decides; the third is."""
    job = tiny_job({}, **sections(name, train={"on_nonfinite": "skip"}))
    states = []
    for device in ("cpu", "cuda"):
        trainer = torch_training.Trainer(job, device, dtype=torch.float64)
        for step in range(2):
            trainer.step([draw_batch(job, step, 0.0)])
        before = trainer.state()
        trainer.parameters["norm.weight"].register_hook(lambda gradient: gradient * torch.nan)
        trainer.step([draw_batch(job, 2, 0.0)])
        after = trainer.state()
        assert all(value.tobytes() == before.optimizer[key].tobytes() for key, value in after.optimizer.items())
        states.append({**after.weights, **after.optimizer})
    assert_all_same_function(*states, limit=1e-10)


def test_memory_counts_the_moments_of_each_parameter() -> None:
    for name, fields in OPTIMIZERS.items():
        job = tiny_job(**{**sections(name), "optimizer": fields})
        kept = sum(
            spec.size * len(moments_of(job.optimizer, own, spec)) for own, spec in parameter_table(job.model).items()
        )
        assert training_memory(job).optimizer == 4 * kept
        trainer = torch_training.Trainer(job, "cpu")
        held = get_optimizer_state(trainer.optimizer, trainer.parameters)
        assert sum(tensor.numel() for key, tensor in held.items() if not key.startswith("t.")) == kept
