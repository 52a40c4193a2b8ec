"""Texts that end what is generated, and how a folder wants its model to be sampled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared_config.data.stops import until_stop
from shared_config.data.template import ChatTemplate
from shared_config.errors import UserError
from shared_config.interchange.tokens import SamplingDefaults, sampling_defaults
from tests.config.test_jsonl import TEMPLATES, tokenizer_folder, turns


def expected(text: str, stops: list[str]) -> str:
    """What stands before the first stop that is complete as the text grows; of several the longest."""
    for end in range(1, len(text) + 1):
        if lengths := [len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(lengths)]
    return text


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=8), stops=STOPS)
@example(pieces=["ba", "b"], stops=["ab", "bab"])
def test_a_text_ends_before_its_first_stop(pieces: list[str], stops: list[str]) -> None:
    assert "".join(until_stop(pieces, stops)) == expected("".join(pieces), stops)


@given(
    pieces=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8),
    stop=st.text("ab", min_size=1, max_size=3),
)
def test_nothing_is_asked_for_after_the_end_nor_held_back_without_need(pieces: list[str], stop: str) -> None:
    asked = 0

    def asking() -> Iterator[str]:
        nonlocal asked
        for piece in pieces:
            asked += 1
            yield piece

    shown = ""
    for text in until_stop(asking(), [stop]):
        shown += text
        so_far = "".join(pieces[:asked])
        rest = so_far.removeprefix(shown)
        assert stop in so_far or asked == len(pieces) or stop.startswith(rest)
    texts = ["".join(pieces[:count]) for count in range(len(pieces) + 1)]
    assert asked == next((count for count, text in enumerate(texts) if stop in text), len(pieces))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_stands_before_the_answer_in_training(name: str, tmp_path: Path) -> None:
    """Of templates that show a turn the same way wherever it stands."""
    template = ChatTemplate(tokenizer_folder(tmp_path, TEMPLATES[name]))
    ids, learned = template.encode(turns("hello <|im_end|>", "well hello"))
    prompt = template.encode_prompt(turns("hello <|im_end|>"))
    if name in ("chatml", "instruct"):
        assert prompt == ids[: int(learned.argmax())].tolist()
        assert learned[len(prompt) :].any()
    assert prompt == ids[: len(prompt)].tolist()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, SamplingDefaults()),
        ({"eos_token_id": 3, "temperature": None}, SamplingDefaults()),
        ({"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.75}, SamplingDefaults(0.5, 3, 0.75)),
        ({"do_sample": False, "temperature": 0.5, "top_k": 3}, SamplingDefaults(0.0, 3)),
        ({"stop_strings": "END"}, SamplingDefaults(stop_strings=("END",))),
        ({"stop_strings": ["a", "b"], "min_p": 0.0}, SamplingDefaults(stop_strings=("a", "b"))),
        (
            {"repetition_penalty": 1.1, "num_beams": 4, "typical_p": 1},
            SamplingDefaults(ignored=("repetition_penalty = 1.1", "num_beams = 4")),
        ),
    ],
)
def test_a_folder_says_how_it_is_sampled(fields: dict[str, Any], said: SamplingDefaults, tmp_path: Path) -> None:
    assert sampling_defaults(None) == sampling_defaults(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert sampling_defaults(tmp_path) == said


@pytest.mark.parametrize(
    "fields", [{"top_k": 0.5}, {"temperature": "1"}, {"top_p": True}, {"stop_strings": [""]}, {"stop_strings": 3}]
)
def test_a_folder_that_says_nonsense_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"generation_config.json: {next(iter(fields))} = .*: must be"):
        sampling_defaults(tmp_path)
