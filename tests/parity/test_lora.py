"""Low-rank adapters: both backends do what the formulas say, go on in each other, and what is exported holds them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.contract.lora import adapted_modules, adapter_table, trained_with, without_adapters
from shared_config.contract.specs import Constant, Normal
from shared_config.errors import ConfigError, UserError
from shared_config.interchange import checkpoint
from shared_config.interchange.source import read_model
from shared_config.loader import load_config
from shared_config.schema.lora import LoraConfig
from shared_config.training.metrics import read_metrics
from tests.parity.lora_checks import TARGETS, batches, check_adapters, check_start, drawn, job, merged

BACKENDS = ("torch", "jax")
NIGHTLY = settings.get_current_profile_name() == "nightly"


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_those_of_the_formulas(backend: str) -> None:
    check_adapters(backend)


@pytest.mark.parametrize("backend", BACKENDS if NIGHTLY else BACKENDS[:1])
def test_a_run_begins_with_the_function_of_its_weights(backend: str) -> None:
    check_start(backend)


# Merging


def test_merged_weights_have_these_bits() -> None:
    """In float64, term by term, rounded once: worked out by hand for numbers that tell the orders apart."""
    lora = LoraConfig(rank=3, alpha=1.5)
    a = np.array([[1.0, 2.0**30], [2.0**-30, -1.0], [1.0, 2.0**30]], np.float32)
    b = np.array([[1.0, 1.0, -1.0], [3.0, 0.0, 2.0**-20]], np.float32)
    w = np.array([[1.0, 2.0], [2.0**24, -1.0]], np.float32)
    weights = {"m.weight": w, "m.lora_a": a, "m.lora_b": b, "other": w}
    found = without_adapters(weights, lora)
    expected = np.array([[1.0 + 2.0**-31, 2.0 - 0.5], [2.0**24 + 1.5, 1.5 * 2.0**30 + 511.0]]).astype(np.float32)
    assert list(found) == ["m.weight", "other"]
    np.testing.assert_array_equal(found["m.weight"], expected)
    assert found["other"] is w
    assert w[0, 1] == 2.0, "in place of nothing"


@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3), alpha=st.floats(0.1, 64), seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16]),
)  # fmt: skip
def test_merging_adds_the_scaled_product(sizes: tuple[int, int, int], alpha: float, seed: int, dtype: Any) -> None:
    rank, outputs, inputs = sizes
    rng = np.random.default_rng(seed)
    shapes = {"x.weight": (outputs, inputs), "x.lora_a": (rank, inputs), "x.lora_b": (outputs, rank)}
    weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    w, a, b = (value.astype(np.float64) for value in weights.values())
    found = without_adapters(weights, LoraConfig(rank=rank, alpha=alpha))
    assert found.keys() == {"x.weight"}
    assert found["x.weight"].dtype == dtype
    near = 2e-2 if dtype is ml_dtypes.bfloat16 else 1e-5
    np.testing.assert_allclose(found["x.weight"].astype(np.float64), w + alpha / rank * (b @ a), rtol=near, atol=near)


# Runs


def run(backend: str, folder: Path, steps: int, *overrides: str) -> list[Any]:
    """Losses of a run in a folder, so far."""
    text = folder.parent / "text"
    if not text.exists():
        text.mkdir()
        (text / "ids.npy").write_bytes(b"")
        np.save(text / "ids.npy", np.random.default_rng(0).integers(0, 31, 2000).astype(np.uint16))
    fields = [f"--checkpoint.dir={folder}", f"--data.path={text}", f"--train.max_steps={steps}", "--eval.steps=1"]
    config = job(*fields, "--eval.interval=0", "--checkpoint.interval=2", *overrides)
    importlib.import_module(f"kempnerforge_{backend}.training.train").train(config, device="cpu")
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_what_is_exported_holds_the_adapters(tmp_path: Path) -> None:
    """Once, however often it is converted; training goes on from the adapters themselves, and only as they were."""
    run("torch", tmp_path / "run", 2)
    state = checkpoint.load(tmp_path / "run" / "step_00000002").state
    assert any(np.abs(value).max() > 0 for name, value in state.weights.items() if name.endswith("lora_b"))
    assert {name.partition(".")[2] for name in state.optimizer} == set(adapter_table(job()))
    wide = {name: np.asarray(value, np.float64) for name, value in state.weights.items()}
    expected = merged(wide, 2.5)
    for path in (tmp_path / "run", tmp_path / "run" / "step_00000002" / "weights.safetensors"):
        found = read_model(path)
        assert found.config.lora is None
        assert found.weights.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found.weights[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert main(["convert", str(tmp_path / "run"), "--to", "native", "--output", str(tmp_path / "native")]) == 0
    again = read_model(tmp_path / "native").weights
    assert {name: np.asarray(value).tobytes() for name, value in again.items()} == {
        name: np.asarray(value).tobytes() for name, value in read_model(tmp_path / "run").weights.items()
    }
    with pytest.raises(UserError, match=r"lora = .*alpha=7\.0.*: was .*alpha=5\.0.* when .*step_00000002 was written"):
        run("torch", tmp_path / "run", 4, "--lora.alpha=7.0")
    assert len(run("torch", tmp_path / "more", 2, f"--checkpoint.load_path={tmp_path / 'native'}")) == 2


@pytest.mark.skipif(not NIGHTLY, reason="compiles")
def test_a_run_goes_on_in_the_other_backend(tmp_path: Path) -> None:
    alone = run("torch", tmp_path / "alone", 6)
    for backend, steps in (("jax", 2), ("torch", 4)):
        run(backend, tmp_path / "both", steps)
    np.testing.assert_allclose(run("jax", tmp_path / "both", 6), alone, rtol=1e-5)


@pytest.mark.skipif(not NIGHTLY, reason="compiles")
@pytest.mark.parametrize(
    "overrides", [("--train.mixed_precision=bf16",), ("--train.scan_layers=true", "--lora.targets=['*.up_proj']")]
)
def test_other_ways_of_computing_train_adapters_too(overrides: tuple[str, ...]) -> None:
    config = job(*overrides)
    given, weights = batches(config), drawn(config)
    losses = []
    for backend in BACKENDS:
        trainer = importlib.import_module(f"kempnerforge_{backend}.training.train").Trainer(config, "cpu")
        trainer.load_state(checkpoint.TrainingState(0, {name: w.astype(np.float32) for name, w in weights.items()}, {}))
        losses.append([float(trainer.step(given)["loss"]) for _ in range(4)])
        for name, value in trainer.state().weights.items():
            assert np.array_equal(value, weights[name].astype(np.float32)) == ("lora" not in name), name
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2 if "bf16" in overrides[0] else 1e-5)
    assert losses[0][-1] < losses[0][0]


# Which matrices


def test_targets_name_maps_of_layers() -> None:
    assert adapted_modules(job()) == [
        "layers.0.attention.q_proj",
        "layers.0.attention.v_proj",
        "layers.1.attention.q_proj",
        "layers.1.attention.v_proj",
        "layers.1.mlp.down_proj",
    ]
    shapes = {name: spec.shape for name, spec in adapter_table(job()).items() if "layers.1.mlp" in name}
    assert shapes == {"layers.1.mlp.down_proj.lora_a": (2, 20), "layers.1.mlp.down_proj.lora_b": (12, 2)}
    assert adapted_modules(load_config("debug")) == []
    drawn_by = {name[-6:]: spec.initializer for name, spec in adapter_table(job()).items() if "layers.1.mlp" in name}
    assert drawn_by == {"lora_a": Normal(20**-0.5), "lora_b": Constant(0.0)}


def test_adapters_alone_are_trained() -> None:
    names = ["layers.0.attention.q_proj.weight", "layers.0.attention.q_proj.lora_a", "layers.0.attention.q_proj.lora_b"]
    assert list(trained_with(job().lora, dict.fromkeys(names))) == names[1:]
    assert list(trained_with(None, dict.fromkeys(names))) == names


@pytest.mark.parametrize("target", ["*.router", "output_head.proj", "token_embedding.embedding", "q_proj", "*.weight"])
def test_what_can_have_no_adapter_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets = .*: must fit the name of a map, as layers\.0\.attention"):
        adapted_modules(job(f"--lora.targets=['{TARGETS[0]}', '{target}']"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("--lora.targets=[]",), "lora.targets = (): must name a matrix at least"),
        (("--lora.rank=0",), "lora.rank = 0: must be greater than 0"),
        (("--train.mixed_precision=fp8", "--model.dim=48"), "train.mixed_precision = 'fp8': must be 'fp32' or 'bf16'"),
    ],
)  # fmt: skip
def test_a_section_that_means_nothing_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job(*overrides)
    assert any(line.startswith(said) for line in caught.value.problems), caught.value.problems


def test_adapters_are_for_layouts_that_leave_their_matrices_whole() -> None:
    for axis in ("dp_shard", "dp_replicate", "cp"):
        job(f"--distributed.{axis}=2").validate(2)
    for axis in ("tp", "pp"):
        with pytest.raises(ConfigError, match=rf"distributed\.{axis} = 2: must be 1 with a \[lora\] section, as "):
            job(f"--distributed.{axis}=2").validate(2)
