"""What the scenarios of a full validation work with, apart from any backend."""

from __future__ import annotations

import collections
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from shared_config.contract.labels import IGNORED
from shared_config.loader import load_config
from shared_config.parity import checks, full_checks, recording
from shared_config.parity.plan import Plan
from shared_config.parity.request import make_request
from shared_config.parity.scenarios import SCENARIOS, record_scenario, resume_folder
from shared_config.parity.work import Decoding, Work, scenario_batch

CONFIG = load_config("debug")


def test_new_tokens_follow_their_prompts() -> None:
    prompts = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    new = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    tokens, places = Decoding(prompts, None).followed_by(new)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[5, 6, 7, 1, 2], [8, 4, 5, 0, 0]]
    assert places.tolist() == [[2, 3, 4], [0, 1, 2]]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_a_share_of_the_labels_does_not_count(share: float) -> None:
    work = Work(CONFIG, "float64", 0, {}, deltas=False, device=None, runs=None)
    labels = np.concatenate([scenario_batch(work, f"batch {i}", ignored=share)["labels"] for i in range(8)])
    assert np.mean(labels == IGNORED) == pytest.approx(share, abs=0.1)
    assert ((labels == IGNORED) | (labels >= 0)).all()


def test_documents_and_padding_are_where_they_are_said_to_be() -> None:
    work = Work(CONFIG, "float64", 0, {}, deltas=False, device=None, runs=None)
    batch = scenario_batch(work, "both", documents=True, padded=True)
    length = batch["tokens"].shape[1]
    assert batch["doc_ids"][0].tolist() == [int(place >= 9) for place in range(length)]
    assert batch["doc_ids"][1].tolist() == [(place >= 3) + (place >= 4) for place in range(length)]
    assert [row.nonzero()[0][[0, -1]].tolist() for row in batch["text_mask"]] == [[0, 19], [9, 23]]
    assert (batch["labels"][~batch["text_mask"]] == IGNORED).all()


def test_prompts_are_of_any_vocabulary_and_the_same_for_everyone() -> None:
    config = CONFIG.replace(model=CONFIG.model.replace(vocab_size=100_000))
    given: list[Decoding] = []

    class Noting:
        NAME = "torch"

        def decode(self, config: Any, weights: Any, decoding: Decoding, *, device: Any) -> dict[str, np.ndarray]:
            given.append(decoding)
            return {"streamed": np.zeros((3, 1))}

        def device_name(self, device: Any) -> str:
            return "cpu"

    for _ in range(2):
        record_scenario(Noting(), config, "generate")  # type: ignore[arg-type]
    for prompts in zip(*(decoding.prompts for decoding in given), strict=True):
        np.testing.assert_array_equal(*prompts)
    drawn = np.concatenate(given[0].prompts)
    assert 0 <= drawn.min() < 2**15 < drawn.max() < 100_000


@pytest.mark.parametrize("frames", [2, 4])
def test_frames_that_are_absent_are_those_of_the_second_row(frames: int) -> None:
    video = [
        "--video.frame_size=16",
        f"--video.max_frames={frames}",
        "--video.min_frames=1",
        "--vision_encoder.image_size=16",
    ]
    config = load_config("debug_vlm_joint_decoder", video)
    work = Work(config, "float64", 0, {}, deltas=False, device=None, runs=None)
    mask = scenario_batch(work, "frames", padded=True)["frame_mask"]
    np.testing.assert_array_equal(mask, [[True] * frames, [True] + [False] * (frames - 1)])


def test_a_plan_knows_the_files_of_every_scenario(tmp_path: Path) -> None:
    plan = Plan(CONFIG, tmp_path)
    parts = sorted(int(name.partition("-")[2]) for name in SCENARIOS if name.startswith("resume-"))
    assert parts == list(range(len(parts)))
    left = {resume_folder(tmp_path, backend, part).name for backend in ("torch", "jax") for part in parts}
    left |= {plan.scenario_file(backend, name).name for backend in ("torch", "jax") for name in SCENARIOS}
    left |= {plan.jobs_file(backend, part).name for backend in ("torch", "jax") for part in parts}
    assert left <= plan.files()


def test_narrow_steps_are_judged_by_the_truth_and_float64_by_itself() -> None:
    plan: Any = SimpleNamespace(
        dtypes=("float64", "float32", "bfloat16"), comparisons={}, trace=lambda backend, dtype: (backend, dtype)
    )
    with (
        mock.patch.object(checks, "compare_traces", side_effect=lambda *given: given),
        mock.patch.object(checks, "findings_of", return_value=[]),
        mock.patch.object(checks, "_not_shown", return_value=[]),
    ):
        assert list(checks._compare_steps(plan)) == []
    truth = plan.trace(*checks.TRUTH)
    assert checks.TRUTH[1] == "float64"
    assert plan.comparisons == {
        dtype: (("torch", dtype), ("jax", dtype), None if dtype == "float64" else truth) for dtype in plan.dtypes
    }


def test_a_full_validation_does_what_applies_to_the_config(tmp_path: Path) -> None:
    moma = load_config("debug_vlm_moma")
    ring = CONFIG.replace(model=CONFIG.model.replace(sliding_window=8))
    text = {"documents", "padding", "accumulation", "captures", *(f"resume-{part}" for part in range(3))}
    for config, expected in (
        (CONFIG, text | {"generate", "ring"}),
        (ring, text | {"ring"}),
        (moma, text - {"documents"}),
    ):
        plan = Plan(config, tmp_path, full=True)
        jobs = [job for check in plan.checks for job in check.jobs(plan, "torch") if "--scenario" in job]
        done = [(job[job.index("--scenario") + 1], job[job.index("--dtype") + 1]) for job in jobs]
        assert {name for name, dtype in done if dtype == "float64"} >= expected
        assert {name for name, _ in done} - expected <= {"long"}
        assert [name for name, dtype in done if dtype == "bfloat16"] == [full_checks.ACCUMULATION]


def test_weights_are_rounded_by_the_seed_of_the_request() -> None:
    request = make_request(CONFIG, dtype="float32", seed=5)
    found = collections.defaultdict(lambda: np.zeros(1))
    with mock.patch.object(recording, "perturbation_maxima", return_value=found) as measured:
        recording.perturbation_deltas(lambda weights: pytest.fail("not run"), request)
    assert [call.kwargs["seed"] for call in measured.call_args_list] == [5]
