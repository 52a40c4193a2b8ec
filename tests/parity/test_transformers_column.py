"""`validate` shows the model of transformers beside both backends: what it computes, how far it may be off, and what is
said where it is another function, or not installed.

``HYPOTHESIS_PROFILE=nightly`` also runs the command.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import settings

from kempnerforge_torch import huggingface
from kempnerforge_torch.trace import record
from shared_config.cli import main
from shared_config.commands import backends
from shared_config.commands.common import fitting_weights
from shared_config.contract.initialise import state_hash
from shared_config.errors import UserError
from shared_config.interchange.toml import config_to_toml
from shared_config.loader import load_config
from shared_config.parity.checks import outcome
from shared_config.parity.images import images_of
from shared_config.parity.plan import BACKENDS, CHECKS, TRANSFORMERS, Plan
from shared_config.parity.traces import Trace, read_trace, write_trace
from shared_config.parity.transformers_check import rows
from tests.interchange.llavas import TOWERS
from tests.interchange.llavas import build as build_llava
from tests.interchange.paligemmas import paligemma_folder
from tests.interchange.theirs import build, saved

NIGHTLY = settings.get_current_profile_name() == "nightly"
DTYPES = ("float64", "float32", "bfloat16")
SIZES = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32}
WITHOUT_IDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small Llama, in float32."""
    config = transformers.LlamaConfig(**SIZES, **WITHOUT_IDS, num_key_value_heads=1, rms_norm_eps=1e-5)
    return saved(build(config, seed=1).float(), tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def plan(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """What the processes leave behind; those of JAX stand in for by PyTorch's."""
    return plan_of(folder, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module", params=["clip", *["siglip2"] * NIGHTLY])
def llava_plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of a small LLaVA, whose rows of text have two images."""
    folder = llava_folder(request.param, tmp_path_factory.mktemp("llava"))
    plan = plan_of(folder, tmp_path_factory.mktemp("results"), "--vlm.max_text_len=14")
    assert images_of(plan.config) == 2
    return plan


def llava_folder(tower: str, folder: Path) -> Path:
    """Weights of a small LLaVA, in float32, whose image token is an id of the vocabulary."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=TOWERS[tower][0](**sizes, image_size=12, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES, **WITHOUT_IDS, num_key_value_heads=1),
        image_token_index=5,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    return saved(build_llava(config, seed=1).float(), folder)


def plan_of(folder: Path, results: Path, *overrides: str) -> Plan:
    config = load_config(str(folder), overrides)
    weights = {name: np.asarray(value) for name, value in fitting_weights(folder, config, []).items()}
    plan = Plan(config, results, DTYPES, weights=folder, weights_hash=state_hash(weights), foreign=True)
    plan.config_file.write_text(config_to_toml(config))
    for dtype in DTYPES:
        trace = record(config, dtype=dtype, weights=weights, deltas=False, device="cpu")
        for backend in BACKENDS:
            meta = dataclasses.replace(trace.meta, backend=backend)
            write_trace(plan.trace_file(backend, dtype), Trace(trace.tensors, meta))
    for command in plan.jobs(TRANSFORMERS, 0):
        assert main(command) == 0
    return plan


def with_changed(plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> Plan:
    """The plan, where transformers has left other tensors behind."""
    changed = dataclasses.replace(plan)

    def trace(dtype: str) -> Trace:
        kept = read_trace(plan.trace_file(TRANSFORMERS, dtype))
        return Trace(change(dict(kept.tensors)), kept.meta)

    monkeypatch.setattr(changed, "foreign_trace", trace)
    return changed


def test_a_llava_is_the_same_function_to_rounding(llava_plan: Plan) -> None:
    found = rows(llava_plan)
    assert [(row.dtype, row.group) for row in found] == [
        (dtype, group) for dtype in DTYPES for group in ("forward", "loss", "gradient")
    ]
    assert all(row.ok for row in found), [row for row in found if not row.ok]
    of_all = llava_plan.trace("torch", "float64").tensors
    kept = set(llava_plan.foreign_trace("float64").tensors)
    names = {"adapter", "transformer.token_embedding", "transformer.layers.0", "transformer.norm"}
    assert {f"forward/{name}" for name in names | {"transformer.output_head"}} < kept
    assert {name for name in of_all if name.startswith("gradient/")} < kept


@pytest.mark.parametrize(
    "name", ["forward/adapter", "gradient/vision_encoder.patch_embedding.weight", "gradient/adapter.proj1.bias"]
)
def test_what_is_another_in_a_llava_is_seen(llava_plan: Plan, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, name: np.asarray(tensors[name]) + 1e-3 * np.abs(tensors[name]).max()}

    found = rows(with_changed(llava_plan, Path(), monkeypatch, change))
    assert [row.worst for row in found if row.dtype == "float64" and not row.ok] == [name]


def test_a_paligemma_is_the_same_function_and_one_with_another_prefix_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = paligemma_folder(tmp_path / "model")
    made = plan_of(folder, tmp_path)
    found = rows(made)
    assert len(found) == len(DTYPES) * len(("forward", "loss", "gradient"))
    assert all(row.ok for row in found), [row for row in found if not row.ok]
    weights = {name: np.asarray(value) for name, value in fitting_weights(folder, made.config, []).items()}
    types = huggingface._token_types

    def shorter(request: Any, ids: Any) -> Any:
        return types(dataclasses.replace(request, prompt_lengths=request.prompt_lengths - 1), ids)

    monkeypatch.setattr(huggingface, "_token_types", shorter)
    wrong = huggingface.record(made.config, folder, weights, dtype="float64", device="cpu")
    monkeypatch.setattr(type(made), "foreign_trace", lambda plan, dtype: wrong)
    assert [row.group for row in rows(made) if row.dtype == "float64" and not row.ok] == ["forward", "loss", "gradient"]


def test_it_is_the_same_function_to_rounding(plan: Plan) -> None:
    found = rows(plan)
    assert [(row.dtype, row.group) for row in found] == [
        (dtype, group) for dtype in DTYPES for group in ("forward", "loss", "gradient")
    ]
    assert all(row.ok for row in found), [row for row in found if not row.ok]
    assert {row.group: row.count for row in found} == {"forward": 4, "loss": 1, "gradient": 21}
    findings = list(CHECKS[TRANSFORMERS].judge(plan))
    assert outcome(findings) == "the backends agree; transformers agrees with them"


@pytest.mark.parametrize("name", ["forward/output_head", "gradient/layers.0.attention.q_proj.weight", "loss"])
@pytest.mark.parametrize("kind", ["moved", "missing", "not finite"])
def test_what_is_another_is_seen(
    plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        values = np.asarray(tensors[name], np.float64)
        moved = {"moved": values + 1e-3 * np.abs(values).max(), "not finite": values * np.nan}
        return {**tensors, name: np.asarray(moved.get(kind, np.zeros(0)))}

    found = rows(with_changed(plan, folder, monkeypatch, change))
    exact = [row for row in found if row.dtype == "float64" and not row.ok]
    assert [row.worst for row in exact] == [name]
    findings = list(CHECKS[TRANSFORMERS].judge(with_changed(plan, folder, monkeypatch, change)))
    assert "transformers DIFFERS FROM BOTH in " in outcome(findings)
    failed = [finding for finding in findings if not finding.ok]
    assert {finding.verdict for finding in failed} == {"DIFFERENT"}


def test_another_setting_of_theirs_is_seen(plan: Plan, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-3}))
    output = plan.trace_file(TRANSFORMERS, "float64")
    kept = output.read_bytes()
    assert main(["trace", str(tmp_path), "--backend", "transformers", "--output", str(output), "--device", "cpu"]) == 0
    with pytest.raises(UserError, match=r"model\.norm_eps = 0\.001: was to be 1e-05"):
        dataclasses.replace(plan).foreign_trace("float64")
    output.write_bytes(kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "transformers", "--layers", "0"], "--layers: is for the backends"),
        (["--backend", "transformers", "--weights", "init"], "needs the weights of a Hugging Face folder, not None"),
    ],
)
def test_what_it_can_not_do_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["trace", str(folder), "--output", str(tmp_path / "x.safetensors"), *options]) == 2
    assert said in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda package: package != TRANSFORMERS)
    assert main(["validate", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "the package transformers is not installed; pip install 'kempnerforge-twin[transformers]'" in message
    assert "--no-transformers" in message


@pytest.mark.skipif(not NIGHTLY, reason="two processes that start frameworks")
def test_the_command_shows_three_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(folder), "--steps", "0"]) == 0
    out = capsys.readouterr().out
    assert "transformers agrees with them" in out
    assert "against torch in float64" in out
