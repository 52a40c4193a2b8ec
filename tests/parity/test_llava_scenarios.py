"""`validate --full` of a LLaVA's folder: rows with two images that have places of their own. By day what PyTorch
records of the scenarios in which images stand within the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge_torch import scenarios as torch_scenarios
from kempnerforge_torch.trace import record
from shared_config.loader import load_config
from shared_config.parity.images import image_positions, images_of, pixels
from shared_config.parity.scenarios import applicable, cached_and_whole, record_scenario
from shared_config.parity.traces import DECODE, FORWARD, group_of
from shared_config.parity.validation import LATEST, validation_positions, validation_prompts
from shared_config.parity.work import Decoding
from shared_config.schema.job import JobConfig
from tests.cli.processes import run_python
from tests.interchange.llavas import llava_folder
from tests.tolerance import assert_same_function

BACKEND: Any = torch_scenarios
ROOM = "--vlm.max_text_len=64"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return load_config(str(llava_folder(tmp_path_factory.mktemp("llava"), heads=4)), [ROOM])


@given(st.integers(1, 5), st.integers(0, 20), st.integers(1, 4), st.integers(0, 99))
def test_drawn_places_are_in_order_and_others_in_each_row(rows: int, length: int, images: int, seed: int) -> None:
    places = validation_positions(rows, length, seed, images)
    assert places.shape == ((rows,) if images == 1 else (rows, images))
    assert places.dtype == np.int32
    by_row = places.reshape(rows, images)
    assert (np.diff(by_row, axis=1) >= 0).all()
    assert by_row.min() >= 0
    assert by_row.max() <= min(length, LATEST)
    if rows * images <= min(length, LATEST) + 1:
        assert len(set(by_row.ravel().tolist())) == rows * images


@given(st.integers(1, 12), st.integers(0, 20), st.integers(0, 99))
def test_drawn_prompts_are_short_and_differ(rows: int, length: int, seed: int) -> None:
    prompts, most = validation_prompts(rows, length, seed), min(length, LATEST)
    assert prompts.shape == (rows,)
    assert prompts.dtype == np.int32
    assert set(prompts.tolist()) <= set(range(most + 1))
    assert len(set(prompts.tolist())) == min(rows, most + 1)


def test_rows_have_as_many_images_as_there_is_room_for(config: JobConfig) -> None:
    assert images_of(config) == 2
    shown, places = pixels(config, 3, 0), image_positions(config, (3, 9), 0)
    assert shown is not None
    assert places is not None
    assert (shown.shape, places.shape) == ((3, 2, 3, 12, 12), (3, 2))
    assert config.vlm is not None
    full = config.replace(vlm=config.vlm.replace(max_text_len=config.model.max_seq_len - 7))
    assert images_of(full) == 1
    assert images_of(load_config("debug_vlm_mot")) == images_of(load_config("debug")) == 1


def test_what_is_captured_is_what_a_trace_has(config: JobConfig) -> None:
    captured = record_scenario(BACKEND, config, "captures", device="cpu")
    step = record(config, dtype="float64", deltas=False, device="cpu")
    names = [name for name in captured.tensors if group_of(name) == FORWARD]
    assert set(names) == {name for name in step.tensors if group_of(name) == FORWARD}
    for name in names:
        assert_same_function(np.asarray(captured.tensors[name]), np.asarray(step.tensors[name]), name)


@pytest.mark.parametrize("scenario", ["generate", "ring"])
def test_caches_after_images_within_are_the_forward(config: JobConfig, scenario: str) -> None:
    trace = record_scenario(BACKEND, config, scenario, device="cpu")
    assert_same_function(*cached_and_whole(trace), scenario)
    streamed, generated = (np.asarray(trace.tensors[f"{DECODE}/{way}"]) for way in ("streamed", "generated"))
    np.testing.assert_array_equal(streamed, generated)


def test_images_that_a_row_lacks_are_behind_its_text() -> None:
    decoding = Decoding([np.zeros(4), np.zeros(3)], None, [[1], [0, 2]])
    placed = decoding.placed(9)
    assert placed["image_positions"].tolist() == [[1, 9], [0, 2]]
    assert placed["frame_mask"].tolist() == [[True, False], [True, True]]
    assert Decoding([np.zeros(4)], None).placed(9) == {}


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="compiles")
def test_a_full_validation(config: JobConfig) -> None:
    assert config.vision_encoder is not None
    folder = Path(config.vision_encoder.path)
    options = ("--full", "--dtypes=float64", "--steps=2", "--device=cpu", ROOM)
    result = run_python("-m", "shared_config.cli", "validate", str(folder), *options, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the backends agree; transformers agrees with them" in result.stdout
    for name in (*applicable(config), "dp_replicate 2, dp_shard 2", "dp_shard 2, tp 2"):
        assert f"│ {name.partition('-')[0]}" in result.stdout
    for name in ("documents", "dp_shard 2, ep 2", "cp 2", "pp 2"):
        assert f"left out: {name}, " in result.stdout
