"""Recorded decode steps are kept between calls, and never tell: tokens are those of steps that are run, whatever was
generated before, and whatever became of the model meanwhile.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge_torch.model import kept_steps
from kempnerforge_torch.model.cuda_graph import CudaGraphStep
from kempnerforge_torch.model.generate import generate, stream
from tests.torch.kept_checks import (
    CONFIG,
    HAPPENINGS,
    PROMPTS,
    WINDOWS,
    Recorder,
    check_after,
    drawn_anew,
    new_model,
    same_tokens,
)
from tests.torch.test_generate import seeing


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    kept_steps._kept.clear()
    return Recorder(monkeypatch)


def test_a_second_call_replays_from_its_first_token_on(recorder: Recorder) -> None:
    model = new_model()
    for prompts in (PROMPTS, [[5], [6, 7]], PROMPTS):
        same_tokens(model, prompts, 6)
    assert (recorder.recorded, recorder.replayed) == (1, 5 + 6 + 6)
    same_tokens(model, prompts, 6, temperature=0.5)
    same_tokens(model, [[1]], 6)
    assert recorder.recorded == 3


def test_prompts_of_one_shape_are_recorded_once(recorder: Recorder) -> None:
    model = new_model()
    same_tokens(model, PROMPTS, 6)
    assert recorder.prompts == 0
    same_tokens(model, [[3, 1, 4], [1, 5]], 6)
    assert (recorder.prompts, recorder.read_again) == (1, 1)
    same_tokens(model, [[2, 7], [1, 8, 2]], 6, temperature=0.5)
    same_tokens(model, [[2, 7], [1, 8, 2]], 5, temperature=0.0)
    assert (recorder.prompts, recorder.read_again) == (1, 3)
    for change in ({"prompts": [[1, 2]] * 2}, {"new": 30}, {"prefill_chunk": 1}):
        same_tokens(**{"model": model, "prompts": PROMPTS, "new": 6, **change})
    assert (recorder.prompts, recorder.read_again) == (1, 3)


@pytest.mark.parametrize("why", ["a window", "an image", "a hook", "experts"])
def test_what_the_host_must_see_is_not_recorded(why: str, recorder: Recorder) -> None:
    torch.manual_seed(5)
    given: tuple[Any, dict[str, Any]] = seeing("joint_decoder") if why == "an image" else (new_model(), {})
    model, images = given
    if why == "a window":
        model = new_model(CONFIG.replace(**WINDOWS["one layer"]))
    if why == "experts":
        model = new_model(CONFIG.replace(num_experts=2, moe_top_k=1))
    if why == "a hook":
        model.norm.register_forward_hook(lambda *_: None)
    drawn_anew(model.double())
    for _ in range(3):
        same_tokens(model, PROMPTS, 5, **images)
    assert recorder.prompts == 0


def test_tokens_of_a_stream_are_the_callers_own() -> None:
    model, found = new_model(), []
    for tokens in stream(model, PROMPTS, 6, seed=1):
        found.append(tokens.tolist())
        tokens[:] = 0
    assert found == [each.tolist() for each in stream(model, PROMPTS, 6, seed=1)]


def test_the_last_few_steps_are_kept(recorder: Recorder) -> None:
    model = new_model()
    for rows in (*range(1, kept_steps.KEPT + 2), 2, 3, 1):
        same_tokens(model, [[1, 2]] * rows, 3)
    assert recorder.recorded == kept_steps.KEPT + 2
    assert len(kept_steps._kept[model].steps) == len(kept_steps._kept[model].prompts) == kept_steps.KEPT
    kept_steps.forget_steps(model)
    assert model not in kept_steps._kept


def test_streams_of_one_model_do_not_share_caches(recorder: Recorder) -> None:
    model = new_model()
    options: dict[str, Any] = {"seed": 1, "temperature": 0.9}
    same_tokens(model)
    streams = [stream(model, prompts, 6, compile=True, **options) for prompts in (PROMPTS, [[7, 8], [9]])]
    found = [[], []]
    for _ in range(6):
        for tokens, each in zip(found, streams, strict=True):
            tokens.append(next(each).tolist())
    for tokens, prompts in zip(found, (PROMPTS, [[7, 8], [9]]), strict=True):
        assert tokens == [each.tolist() for each in stream(model, prompts, 6, **options)]
    assert recorder.recorded == 2


def test_streams_that_share_a_shape_of_prompts_do_not_share_caches(recorder: Recorder) -> None:
    """Also where the first goes on in the caches that recorded prompts were read into."""
    model, options = new_model(), {"seed": 1, "temperature": 0.9}
    for _ in range(2):
        same_tokens(model, PROMPTS, temperature=0.0)
    both = (PROMPTS, [[7, 8, 9], [9]])
    streams = [stream(model, prompts, 6, compile=True, **options) for prompts in both]
    found = list(zip(*(map(np.ndarray.tolist, each) for each in zip(*streams, strict=True)), strict=True))
    for tokens, prompts in zip(found, both, strict=True):
        assert list(tokens) == [each.tolist() for each in stream(model, prompts, 6, **options)]
    assert recorder.prompts == 1


def test_steps_have_caches_of_their_own(recorder: Recorder) -> None:
    """A step that was first used after recorded prompts goes on from others, while those are read again."""
    model, options = new_model(), {"seed": 1, "temperature": 0.9}
    for temperature in (0.0, 0.0, 0.9):
        same_tokens(model, PROMPTS, temperature=temperature)
    longer = [[5, 6, 7, 8], [9]]
    expected = [each.tolist() for each in stream(model, longer, 6, **options)]
    going_on = stream(model, longer, 6, compile=True, **options)
    found = [next(going_on).tolist()]
    same_tokens(model, PROMPTS, temperature=0.0)
    assert found + [each.tolist() for each in going_on] == expected
    assert (recorder.recorded, recorder.prompts) == (2, 1)


def test_a_stream_that_is_left_gives_its_step_back(recorder: Recorder) -> None:
    model = new_model()
    same_tokens(model)
    left = stream(model, PROMPTS, 6, compile=True, seed=1, temperature=0.9)
    next(left)
    del left
    same_tokens(model)
    assert recorder.recorded == 1


def test_a_step_that_failed_is_not_kept(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    same_tokens(model)
    with monkeypatch.context() as patch:
        patch.setattr(CudaGraphStep, "__call__", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, PROMPTS, 6, compile=True, seed=1, temperature=0.9)
    same_tokens(model)
    assert recorder.recorded == 2


def test_steps_go_with_their_model(recorder: Recorder) -> None:
    model = new_model()
    same_tokens(model)
    other = copy.deepcopy(model)
    same_tokens(drawn_anew(other))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert list(kept_steps._kept) == [other]


@pytest.mark.parametrize("happening", HAPPENINGS)
def test_whatever_happened_tokens_are_those_of_steps_that_are_run(happening: str, recorder: Recorder) -> None:
    check_after([(happening, 2, 6, 0.9)] * 2)


@settings(max_examples=2)
@given(
    happenings=st.lists(
        st.tuples(
            st.sampled_from(sorted(HAPPENINGS)), st.integers(1, 2), st.integers(1, 12), st.sampled_from([0.0, 0.9])
        ),
        min_size=2,
        max_size=6,
    ),
    windows=st.sampled_from(sorted(WINDOWS)),
)
def test_whatever_happened_in_any_order(happenings: list[tuple[str, int, int, float]], windows: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Recorder(patch)
        check_after(happenings, windows)


@pytest.mark.parametrize("windows", WINDOWS)
def test_layers_may_have_windows(windows: str, recorder: Recorder) -> None:
    check_after([("values of NaN in kept caches", 2, 12, 0.9)] * 2, windows)
    assert recorder.recorded == 1


@pytest.mark.parametrize("arch", ["joint_decoder", "cross_attention", "mot"])
def test_each_call_reads_its_own_image(arch: str, recorder: Recorder) -> None:
    torch.manual_seed(5)
    model, images = seeing(arch)
    drawn_anew(model.double())
    for _ in range(2):
        images["pixel_values"] = torch.randn_like(images["pixel_values"])
        same_tokens(model, PROMPTS, 5, **images)
    assert recorder.recorded == 1
