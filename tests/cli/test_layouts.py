"""`validate --distributed.*`: which layouts are compared, what is refused, and the verdict on what processes could have
left behind. (Those that `test_full` starts have a layout.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from shared_config.cli import main
from shared_config.commands import validate
from shared_config.commands.layouts import USUAL, layouts_left_out, layouts_to_compare
from shared_config.contract.initialise import state_hash
from shared_config.contract.sharding import MESH_AXES
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.toml import config_to_dict, config_to_toml
from shared_config.loader import load_config, preset_names
from shared_config.parity import plan as plan_module
from shared_config.parity.layout_checks import ALONE, config_of, most_held
from shared_config.parity.layouts import CLIP, LAYOUT, MOST, STEPS, Spread, described, record_layout
from shared_config.parity.plan import BACKENDS, CHECKS, LAYOUTS_STAGE, Plan
from shared_config.parity.provenance import expected_meta, initial_hash
from shared_config.parity.scenarios import SCENARIOS, applicable, left_out
from shared_config.parity.shrink import shrink
from shared_config.parity.traces import Trace, write_trace
from shared_config.parity.work import Trained
from shared_config.schema.architecture import VLMConfig
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig
from tests.interchange.llavas import llava_folder

NIGHTLY = settings.get_current_profile_name() == "nightly"
TINY = (
    "--model.dim=16", "--model.n_layers=1", "--model.ffn_hidden_dim=24", "--model.max_seq_len=32", "--train.seq_len=16",
)  # fmt: skip
CONFIG = load_config("debug", TINY)
BOTH = DistributedConfig(dp_shard=2, tp=2)
TITLE = "dp_shard 2, tp 2"

REFUSED = {
    "heads": (["debug", "--distributed.tp=3"], "distributed.tp = 3: must divide model.n_heads = 4"),
    "no experts": (["debug", "--distributed.ep=2"], "distributed.ep = 2: must divide model.num_experts = 0"),
    "experts and ranks": (
        ["debug_moe", "--distributed.dp_shard=3", "--distributed.ep=2"],
        "distributed.ep = 2: must divide dp_shard = 3",
    ),
    "stages of experts": (
        ["debug_moe", "--distributed.pp=2"],
        "distributed.pp = 2: must be 1 for model.num_experts = ",
    ),
    "more stages than layers": (["debug", "--distributed.pp=5"], "distributed.pp = 5: must be at most model.n_layers"),
    "heads of a tower": (
        ["debug_vlm_mot", "--distributed.tp=2", "--vision_encoder.n_heads=3", "--vision_encoder.feature_dim=48"],
        "distributed.tp = 2: must divide vision_encoder.n_heads = 3 for backend torch",
    ),
    "one device": (["debug", "--distributed.dp_shard=1"], "distributed.dp_shard = 1: is a layout of one device"),
    "a GPU": (["debug", "--distributed.tp=2", "--device=cuda"], "--device cuda: must be cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_is_refused_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate, "run_processes", lambda *_: pytest.fail("a process was started"))
    arguments, said = REFUSED[name]
    assert main(["validate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_heads_of_a_tower_in_a_folder_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate, "run_processes", lambda *_: pytest.fail("a process was started"))
    folder = str(llava_folder(tmp_path))
    said = "distributed.tp = 2: must divide vision_encoder.n_heads = 3 for backend torch"
    assert main(["validate", folder, "--distributed.tp=2"]) == 2
    assert said in capsys.readouterr().err
    assert main(["launch", folder, "--backend=torch", "--slurm", "--gpus-per-node=2", "--distributed.tp=2"]) == 2
    assert said in capsys.readouterr().err
    assert not any(layout.tp > 1 for layout in usual(folder))
    assert layouts_left_out(load_config(folder), "cpu")[TITLE] == said


@pytest.mark.parametrize("name", ["debug", "debug_moe", *(f"debug_vlm_{arch}" for arch in VLMConfig.architectures())])
def test_a_full_validation_compares_a_thing_or_says_why_not(name: str) -> None:
    config = load_config(name)
    against = layouts_left_out(config, "cpu")
    assert set(map(described, usual(name))).isdisjoint(against)
    assert {*map(described, usual(name)), *against} == set(map(described, USUAL))
    assert set(applicable(config)).isdisjoint(left_out(config))
    assert {*applicable(config), *left_out(config)} == set(SCENARIOS)
    plan = Plan(config, Path(), full=True, layouts=usual(name))
    assert validate.not_compared(plan) == left_out(config) | against
    assert all(reason for reason in validate.not_compared(plan).values())
    assert validate.not_compared(dataclasses.replace(plan, full=False)) == {}
    assert layouts_left_out(config, "cuda").keys() == {"layouts"}


def test_the_usual_layouts_are_those_that_a_model_allows() -> None:
    hybrid, split, experts, context, staged = USUAL
    assert usual("debug") == (hybrid, split, context, staged)
    assert usual("debug_moe") == (hybrid, split, experts, context)
    assert usual("debug_vlm_mot") == (hybrid, split)
    assert usual("debug", "--model.n_kv_heads=1") == (hybrid, context, staged)
    assert usual("debug", "--model.tie_embeddings=true") == (hybrid, split, context)
    assert usual("debug", device="cuda") == ()
    assert usual("debug", full=False) == ()
    assert len(USUAL) <= MOST
    assert all(layout.fewest_devices <= 4 for layout in USUAL)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("debug")])
def test_models_of_all_kinds_are_the_same_in_the_usual_layouts(tmp_path: Path, name: str) -> None:
    """What they are; that they are the same under HYPOTHESIS_PROFILE=nightly."""
    config = shrink(load_config(name))
    plan = Plan(config, tmp_path, layouts=layouts_to_compare(config, ALONE, (), full=True, device="cpu"))
    assert {"dp_replicate 2, dp_shard 2", "dp_shard 2, tp 2"} <= {described(layout) for layout in plan.layouts}
    if NIGHTLY:
        validate.run_processes(plan, LAYOUTS_STAGE)
        findings = list(CHECKS["layouts"].judge(plan))
        assert {finding.check for finding in findings} == {described(layout) for layout in plan.layouts}
        assert [finding for finding in findings if not finding.ok] == []


def test_adapters_are_trained_alike_in_the_usual_layouts(tmp_path: Path) -> None:
    """Which they are; that they are trained alike under HYPOTHESIS_PROFILE=nightly."""
    config = shrink(load_config("debug", ["--lora.rank=2"]))
    plan = Plan(config, tmp_path, layouts=layouts_to_compare(config, ALONE, (), full=True, device="cpu"))
    assert [described(layout) for layout in plan.layouts] == ["dp_replicate 2, dp_shard 2", "cp 2"]
    if NIGHTLY:
        validate.run_processes(plan, LAYOUTS_STAGE)
        assert [finding for finding in CHECKS["layouts"].judge(plan) if not finding.ok] == []


def usual(name: str, *overrides: str, full: bool = True, device: str = "cpu") -> tuple[DistributedConfig, ...]:
    config = load_config(name, overrides)
    return layouts_to_compare(config, config.distributed, overrides, full=full, device=device)


def test_a_shrunk_model_has_the_layout_of_the_command_line_alone() -> None:
    overrides = ("--distributed.tp=2",)
    loaded = load_config("llama3_8b", ["--distributed.dp_replicate=4", *overrides])
    found = layouts_to_compare(shrink(loaded), loaded.distributed, overrides, full=False, device="cpu")
    assert [described(layout) for layout in found] == ["tp 2"]
    assert layouts_to_compare(shrink(loaded), loaded.distributed, (), full=False, device="cpu") == ()


Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def changed(name: str, factor: float = 1 + 1e-9) -> Change:
    def change(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        tensors[name] = tensors[name] * factor

    return change


def one_device_has_other_bits(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    tensors["replicas/b"] = tensors["replicas/b"] + np.eye(4, 2, dtype=np.int64)[:, ::-1]


def nothing_is_split(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    meta["extra"]["held"] = [2 * held for held in meta["extra"]["held"]]


def hardly_a_gradient(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    tensors["loss/grad_norm"] = tensors["loss/grad_norm"] * [1, 0.01, 1]


DIFFERENT: dict[str, tuple[Change, str]] = {
    "loss": (changed("loss/loss"), "losses"),
    "norm": (changed("loss/grad_norm"), "losses"),
    "counts": (changed("routing/tokens", 2), "counts"),
    "gradient": (changed("gradient/a"), "gradients"),
    "noise": (changed("gradient/b", 1e4), "gradients"),
    "weight": (changed("state/a"), "weights"),
    "weight of a gradient that is 0": (changed("state/b", 1 + 1e-3), "weights"),
    "initial weights": (lambda tensors, meta: meta.update(initial_hash="0"), "initial weights"),
    "not finite": (changed("state/a", np.nan), "weights"),
    "bits": (one_device_has_other_bits, "replicas"),
    "parts": (nothing_is_split, "parts"),
    "clipping": (hardly_a_gradient, "clipping"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named(tmp_path: Path, name: str) -> None:
    plan, (change, subject) = made_up(tmp_path), DIFFERENT[name]
    leave(plan, "jax", BOTH, 1, change)
    failed = {finding.subject: finding for finding in CHECKS["layouts"].judge(plan) if not finding.ok}
    assert any(named.startswith("jax") and named.endswith(f": {subject}") for named in failed)
    assert all(finding.check == TITLE and finding.detail for finding in failed.values())
    assert not any(named.startswith("torch") for named in failed)


def test_what_is_the_same_passes_and_noise_of_a_gradient_that_is_0_as_well(tmp_path: Path) -> None:
    plan = made_up(tmp_path)
    findings = list(CHECKS["layouts"].judge(plan))
    assert [finding for finding in findings if not finding.ok] == []
    leave(plan, "jax", BOTH, 1, changed("gradient/b", -3.0))
    leave(plan, "torch", BOTH, 1, changed("state/b", 1 + 1e-8))
    assert all(finding.ok for finding in CHECKS["layouts"].judge(plan))


def test_both_backends_drawing_the_same_wrong_weights_do_not_agree(tmp_path: Path) -> None:
    plan = made_up(tmp_path)
    for backend in BACKENDS:
        for place, layout in enumerate((ALONE, BOTH)):
            leave(plan, backend, layout, place, lambda tensors, meta: meta.update(initial_hash="the same wrong ones"))
    failed = [finding.subject for finding in CHECKS["layouts"].judge(plan) if not finding.ok]
    assert failed == ["torch: initial weights", "jax: initial weights"]


def on_one_device(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    meta["extra"].update(sizes={}, held=[1])


def no_gradients(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    del tensors["gradient/a"], tensors["gradient/b"]


NOT_ASKED: dict[str, tuple[Change, str]] = {
    "backend": (lambda tensors, meta: meta.update(backend="torch"), "backend = 'torch': was to be 'jax'"),
    "dtype": (lambda tensors, meta: meta.update(dtype="float32"), "dtype = 'float32': was to be 'float64'"),
    "device": (lambda tensors, meta: meta.update(device="NVIDIA H100"), "device = 'NVIDIA H100': was to be 'cpu'"),
    "layout": (
        lambda tensors, meta: meta.update(config=meta["config"].replace("tp = 2", "tp = 1")),
        "distributed.tp = 1: was to be 2",
    ),
    "one device": (on_one_device, "mesh = {}: was to be {'pp': 1, "),
    "devices": (lambda tensors, meta: meta["extra"].update(held=[1, 1]), "devices = 2: was to be 4"),
    "steps": (
        lambda tensors, meta: tensors.update({"loss/loss": np.ones(2)}),
        "loss/loss is of shape (2,): was to be (3,)",
    ),
    "no gradients": (no_gradients, "gradient: nothing is recorded"),
    "scenario": (lambda tensors, meta: meta["extra"].update(scenario="padding"), "scenario = 'padding'"),
}


@pytest.mark.parametrize("name", NOT_ASKED)
def test_what_was_not_asked_for_is_refused(tmp_path: Path, name: str) -> None:
    plan, (change, said) = made_up(tmp_path), NOT_ASKED[name]
    leave(plan, "jax", BOTH, 1, change)
    with pytest.raises(UserError) as refusal:
        list(CHECKS["layouts"].judge(plan))
    assert str(plan.layout_file("jax", 1)) in str(refusal.value)
    assert said in str(refusal.value)


@pytest.mark.parametrize(("change", "status"), [(None, 0), (changed("state/a"), 1)])
def test_the_exit_status_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Change | None, status: int
) -> None:
    def run_processes(plan: Plan, stage: int) -> None:
        assert stage == LAYOUTS_STAGE
        fill(plan)
        leave(plan, "jax", plan.layouts[0], 1, change)

    monkeypatch.setattr(plan_module, "CHECKS", {"layouts": CHECKS["layouts"]})
    monkeypatch.setattr(validate, "run_processes", run_processes)
    assert main(["validate", "debug", *TINY, "--distributed.dp_shard=2", "--distributed.tp", "2"]) == status
    printed = capsys.readouterr().out
    assert (f"{TITLE}: jax = 1 device: weights: a differs by" in printed) == bool(status)
    assert ("the backends agree (" in printed) == (not status)


def made_up(folder: Path) -> Plan:
    """A plan, and what both backends leave behind where they agree."""
    plan = Plan(CONFIG, folder, layouts=(BOTH,))
    assert LAYOUTS_STAGE in plan.stages
    fill(plan)
    return plan


def fill(plan: Plan) -> None:
    plan.config_file.write_text(config_to_toml(plan.config), encoding="utf-8")
    for backend in BACKENDS:
        for place, layout in enumerate((ALONE, BOTH)):
            leave(plan, backend, layout, place)


def leave(plan: Plan, backend: str, layout: DistributedConfig, place: int, change: Change | None = None) -> None:
    """The trace of a layout: "a" has a gradient, that of "b" is 0 by mathematics."""
    config, devices = config_of(plan, layout), layout.fewest_devices
    tensors: dict[str, np.ndarray] = {
        "loss/loss": np.array([3.0, 2.5, 2.0]),
        "loss/grad_norm": np.array([2.0, 1.5, 1.2]),
        "routing/tokens": np.array([70, 60, 65]),
        "gradient/a": np.linspace(-1, 1, 12).reshape(3, 4) * CLIP,
        "gradient/b": np.full(4, 1e-18),
        "state/a": np.linspace(0.5, 1, 12).reshape(3, 4),
        "state/b": np.full(4, 1e-2),
        **{f"replicas/{name}": np.array([[part % 2, part % 2] for part in range(devices)]) for name in "ab"},
    }
    sizes = {**dict.fromkeys(MESH_AXES, 1), "dp_shard": 2, "tp": 2} if devices > 1 else {}
    extra = {"scenario": LAYOUT, "lr": 6e-3, "sizes": sizes, "held": [most_held(config)] * devices}
    expected = expected_meta(config, plan.seed)
    meta: dict[str, Any] = {
        "backend": backend,
        "device": "cpu",
        "dtype": "float64",
        "config": expected.config,
        "initial_hash": initial_hash(config, config.train.seed),
        "extra": extra,
    }
    if change is not None:
        change(tensors, meta)
    write_trace(plan.layout_file(backend, place), Trace(tensors, dataclasses.replace(expected, **meta)))


@pytest.mark.parametrize("name", ["text", "past a window", "images", "prefix"])
def test_a_layout_counts_the_positions_of_what_is_drawn(name: str, tmp_path: Path) -> None:
    """A backend divides rows as long, and with as many images, as its config says; it starts from float32."""
    given = {
        "text": ("debug", TINY),
        "past a window": ("debug", (*TINY, "--model.sliding_window=25", "--model.max_seq_len=64")),
        "images": (str(llava_folder(tmp_path)), ("--vlm.max_text_len=63",)),
        "prefix": ("debug_vlm_joint_decoder", ("--vlm.prefix_lm=true",)),
    }
    config, seen = load_config(given[name][0], given[name][1]), []

    class Backend:
        NAME: str = "torch"

        def train(self, config: JobConfig, state: TrainingState, steps: Any) -> Spread:
            seen.extend((config, batch) for step in steps for batch in step)
            numbers, held_out = [{"loss": 0.0, "lr": 0.0}] * STEPS, np.zeros((2, 0))
            initial = {"w": np.array([1 / 3])}
            return Spread(Trained(numbers, [state, state], held_out), initial, "cpu", {}, [], {})

    trace = record_layout(Backend(), config)
    assert trace.meta.initial_hash == state_hash({"w": np.array([1 / 3], np.float32)})
    assert trace.meta.config_fields == config_to_dict(config)
    for told, batch in seen:
        assert told.train.seq_len == batch["labels"].shape[1]
        pixels = batch.get("pixel_values")
        assert told.data.max_images == (pixels.shape[1] if pixels is not None and pixels.ndim == 5 else 1)
    assert {told.data.max_images for told, _ in seen} == {2 if name in ("images", "prefix") else 1}
