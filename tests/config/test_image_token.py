"""The id that stands for an image says where it is, once for each; no other text holds it: it is refused, and never
drawn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared_config.cli import main
from shared_config.commands.pictures import prompt_with, user_message
from shared_config.contract.decoding import read_prompts
from shared_config.contract.image_token import refuse_image_token, without_image_tokens
from shared_config.data import open_data
from shared_config.data.images import ImageTextData
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.toml import config_to_toml
from shared_config.interchange.vision import tokens_per_image
from shared_config.loader import load_config
from shared_config.parity.request import check_tokens, make_request
from shared_config.parity.validation import drawn_tokens
from tests.config.test_images import folder_of, job

TOKEN = ord("#")
PREFIX: dict[str, Any] = {"arch": "joint_decoder", "max_text_len": 48, "prefix_lm": True}


def seeing(**changes: Any) -> Any:
    return job(vlm={"arch": "joint_decoder", "max_text_len": 48, "image_token_id": TOKEN}, **changes)


@given(seed=st.integers(0, 2**32), token=st.none() | st.integers(0, 9))
def test_drawn_text_is_uniform_over_what_text_may_hold(seed: int, token: int | None) -> None:
    drawn = drawn_tokens(np.random.default_rng(seed), 7, (40, 30), token)
    counts = np.bincount(drawn.ravel(), minlength=7)
    allowed = [id for id in range(7) if id != token]
    assert drawn.dtype == np.int32
    assert counts[allowed].min() > 0.6 * drawn.size / len(allowed)
    assert counts[allowed].sum() == drawn.size


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 5))
def test_the_first_place_is_named(rows: list[list[int]], token: int) -> None:
    ids = np.array(rows)
    found = [(row, place) for row, own in enumerate(rows) for place, id in enumerate(own) if id == token]
    refuse_image_token("ids", ids, None)
    if not found:
        return refuse_image_token("ids", ids, token)
    with pytest.raises(
        UserError, match=f"^ids holds {token} at {found[0][0]}, {found[0][1]}: .*image_token_id = {token}"
    ):
        refuse_image_token("ids", ids, token)
    return None


def test_prompts_and_given_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=rf"^prompt_tokens\[1\] holds {TOKEN} at 2: must not"):
        read_prompts([[3, 4], [5, 6, TOKEN]], None, 260, TOKEN)
    assert read_prompts([[3, TOKEN]], None, 260).lengths.tolist() == [2]
    tokens = np.array([[1, 2, 3], [4, TOKEN, 5]])
    with pytest.raises(UserError, match=f"^tokens holds {TOKEN} at 1, 1: must not"):
        check_tokens(tokens, seeing())
    check_tokens(tokens, job())


def test_what_a_trace_draws_has_none() -> None:
    config = job(
        model={"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 8, "max_seq_len": 128},
        vlm={"arch": "joint_decoder", "max_text_len": 48, "image_token_id": 5},
    )
    assert set(make_request(config, dtype="float64", seed=1).tokens.ravel()) == set(range(8)) - {5}


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 5), st.integers(0, 3))
def test_ids_say_where_images_are(row: list[int], token: int, images: int) -> None:
    ids, found = np.array(row, np.int64), [place for place, id in enumerate(row) if id == token]
    if len(found) != images and (found or images > 1):
        held = f"holds {token} at {', '.join(map(str, found))}" if found else f"does not hold {token}"
        count = {0: "there are none", 1: "there is 1"}.get(images, f"there are {images}")
        with pytest.raises(UserError, match=f"^a row {held}: must once for each image, as vlm.*; {count}"):
            without_image_tokens("a row", ids, token, images)
        return
    text, places = without_image_tokens("a row", ids, token, images)
    assert text.tolist() == [id for id in row if id != token]
    assert places == ([len([id for id in row[:place] if id != token]) for place in found] if found else [0] * images)
    assert without_image_tokens("a row", ids, None, images)[0].tolist() == row


def pictured(folder: Path, rows: list[dict[str, Any]], pictures: int) -> Path:
    """A folder with rows of some of the pictures 0.png, 1.png and so on, of which number 1 is damaged."""
    for index in range(pictures):
        Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(folder / f"{index}.png")
    if pictures > 1:
        (folder / "1.png").write_bytes(b"no picture")
    return folder_of(folder, rows)


@pytest.mark.parametrize(
    ("prompt", "text"), [("see # it ", "a cat"), ("what? ", "a # cat"), ("#", "cat"), ("", "cat#")]
)
def test_rows_of_data_say_where_their_image_is(prompt: str, text: str, tmp_path: Path) -> None:
    folder = pictured(tmp_path, [{"file_name": "0.png", "prompt": prompt, "text": text}], 1)
    data = {"path": str(folder), "heldout_fraction": 1e-9}
    found, plain = open_data(seeing(data=data)).batch(0), open_data(job(data=data)).batch(0)
    place = 1 + (prompt + text).index("#")
    assert found["image_positions"].tolist() == [place] * 4
    assert found["image_positions"].dtype == np.int32
    assert found["frame_mask"].all()
    kept = np.delete(np.arange(plain["input_ids"].shape[1]), place)
    np.testing.assert_array_equal(found["input_ids"][:, :-1], plain["input_ids"][:, kept])
    np.testing.assert_array_equal(found["labels"][:, :-2], plain["labels"][:, kept[1:] - 1])
    assert "image_positions" not in plain


GREY = 128
"""Of pixels that are 0, where there is no picture."""


def brightness(pixels: np.ndarray) -> np.ndarray:
    """That of each picture of one colour, (B, N)."""
    return np.rint((pixels.mean(axis=(2, 3, 4)) + 1) * 127.5).astype(int)


ROWS = st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=3).filter(
    lambda rows: max(map(len, rows)) > 1
)


@settings(max_examples=10)
@given(rows=ROWS, spare=st.integers(0, 1))
def test_rows_have_as_many_images_as_they_name(
    rows: list[list[int]], spare: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each row is letters with a picture after some of them, which may be beyond what is trained on."""
    length = 24
    written = []
    for number, row in enumerate(rows):
        letters = [chr(97 + place % 26) + "#" * row.count(place) for place in range(40)]
        names = [f"{(number + index) % 4}.png" for index in range(len(row))]
        written.append({"file_name": names, "text": "#" * row.count(40) + "".join(letters)})
    folder = pictured(tmp_path_factory.mktemp("rows"), written, 4)
    most = max(map(len, rows)) + spare
    given = {"path": str(folder), "heldout_fraction": 1e-9, "max_images": most}
    batch = open_data(seeing(data=given, train={"seq_len": length, "batch_size": len(rows)})).batch(0)
    assert batch["pixel_values"].shape[:2] == batch["image_positions"].shape == (len(rows), most)
    wanted = []
    for number, row in enumerate(rows):
        places = sorted(1 if place == 40 else place + 2 for place in row)
        pictures = [(number + index) % 4 for index in range(len(row))]
        shown = [40 * picture if picture != 1 else GREY for picture in pictures]
        exists = [place <= length and picture != 1 for place, picture in zip(places, pictures, strict=True)]
        behind = [length] * (most - len(row))
        absent = [False] * len(behind), [GREY] * len(behind)
        wanted.append(([min(place, length) for place in places] + behind, exists + absent[0], shown + absent[1]))
    arrays = batch["image_positions"], batch["frame_mask"], brightness(batch["pixel_values"])
    assert sorted(zip(*(array.tolist() for array in arrays), strict=True)) == sorted(wanted)
    assert batch["input_ids"][0].tolist() == [256, *(97 + place % 26 for place in range(length - 1))]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": "0.png", "prompt": "see #", "text": "and #"}, "holds 35 at 5, 10: .*; there is 1"),
        ({"file_name": ["0.png", "2.png"], "text": "one #"}, "holds 35 at 5: .*; there are 2"),
        ({"file_name": ["0.png", "2.png"], "text": "a"}, "does not hold 35: .*; there are 2"),
        ({"text": "one #"}, "holds 35 at 5: must once for each image, .*; there are none"),
    ],
)
def test_rows_with_other_numbers_of_images_are_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = pictured(tmp_path, [*[{"text": "a cat"}] * 4, row], 3)
    with pytest.raises(UserError, match=said):
        open_data(seeing(data={"path": str(folder), "max_images": 2}))


def test_rows_with_more_images_than_the_config_says_are_listed(tmp_path: Path) -> None:
    rows = [{"file_name": [f"{index}.png" for index in range(count)], "text": "#" * count} for count in (1, 3, 2, 4)]
    folder = pictured(tmp_path, rows, 4)
    with pytest.raises(UserError) as refused:
        open_data(seeing(data={"path": str(folder), "max_images": 2}))
    said = [
        f"{folder}/metadata.jsonl:{line}: file_name = {rows[line - 1]['file_name']}: {count} pictures, must be at most "
        "data.max_images = 2"
        for line, count in ((2, 3), (4, 4))
    ]
    assert str(refused.value).splitlines() == said


def test_images_that_the_stream_has_no_room_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vlm\.max_text_len = 48: with 84 image tokens must fit in .* = 128"):
        seeing(data={"max_images": 21})
    config = seeing(data={"max_images": 20}, train={"seq_len": 49})
    said = r"train\.seq_len = 49: with 80 image tokens, of data\.max_images = 20, must fit in model\.max_seq_len = 128"
    with pytest.raises(UserError, match=said):
        open_data(config)
    open_data(config.replace(train=config.train.replace(seq_len=48)))
    video = {"max_frames": 20, "min_frames": 1, "frame_size": 16}
    with pytest.raises(UserError, match=r"train\.seq_len = 49: .* of video\.max_frames = 20, must fit"):
        open_data(job(video=video, train={"seq_len": 49}))


def test_drawn_pictures_leave_others_of_their_rows_out() -> None:
    one, three = (open_data(seeing(data={"max_images": most})).batch(2) for most in (1, 3))
    assert three["frame_mask"].tolist() == [[True, False, False]] * 4
    np.testing.assert_array_equal(three["pixel_values"][:, 0], one["pixel_values"])
    assert not three["pixel_values"][:, 1:].any()
    assert three["image_positions"].tolist() == [[0, 48, 48]] * 4


def test_several_images_are_refused_where_a_row_has_one() -> None:
    several = {"max_images": 2}
    for config, said in (
        ({"vlm": {"arch": "mot", "max_text_len": 48}}, "must be 1 without vlm.image_token_id, .*, or vlm.prefix_lm"),
        ({}, "must be 1 without vlm.image_token_id"),
        ({"vlm": None, "vision_encoder": None}, "must be 1 without vlm.image_token_id"),
        ({"vlm": PREFIX, "video": {"frame_size": 16}}, r"must be 1 with a \[video\] section, as a row has one clip"),
    ):
        with pytest.raises(ConfigError, match=f"^data.max_images = 2: {said}"):
            job(data=several, **config)
    for vlm in (PREFIX, {**PREFIX, "image_token_id": TOKEN}):
        assert job(data=several, vlm=vlm).frames_per_row == 2


@settings(max_examples=10)
@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=3), named=st.booleans())
def test_images_of_a_prefix_stand_next_to_its_text(
    counts: list[int], named: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In their order, after those that a row does not have; whether ids name them or not."""
    names = [[f"{2 * index}.png" for index in range(count)] for count in counts]
    rows = [{"file_name": own, "prompt": "#" * named * len(own) + "see", "text": f"{len(own)}"} for own in names]
    folder = pictured(tmp_path_factory.mktemp("rows"), rows, 5)
    data = {"path": str(folder), "heldout_fraction": 1e-9, "max_images": 3}
    config = job(vlm={**PREFIX, "image_token_id": TOKEN}, data=data, train={"seq_len": 8, "batch_size": len(rows)})
    opened = open_data(config)
    batch = opened.batch(0)
    shown = np.where(batch["frame_mask"], brightness(batch["pixel_values"]), -1).tolist()
    texts = [chr(row[5]) for row in batch["input_ids"]]
    wanted = [(str(count), [-1] * (3 - count) + [80 * index for index in range(count)]) for count in counts]
    assert sorted(zip(texts, shown, strict=True)) == sorted(wanted)
    assert batch["input_ids"][0, 1:5].tolist() == list(b"see\n")
    assert batch["prompt_lengths"].tolist() == [5] * len(rows)
    assert "image_positions" not in batch
    assert isinstance(opened, ImageTextData)
    assert opened.prompts == [5] * len(rows)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("#a#", f"--prompt holds {TOKEN} at 1, 3: must once for each image, .*; there is 1"),
        ("a#", f"ends with the id of the image, {TOKEN}"),
    ],
)
def test_a_command_refuses_a_prompt_before_it_loads_a_model(
    prompt: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(config_to_toml(seeing()))
    shown = ["--image", str(pictured(tmp_path, [], 1) / "0.png")]
    asked = ["generate", str(tmp_path / "config.toml"), "--backend", "torch", "--prompt", prompt, *shown]
    assert main(asked) == 2
    assert re.search(said, capsys.readouterr().err)


def test_messages_name_pictures_where_an_id_places_them() -> None:
    prefix = job(vlm={"arch": "joint_decoder", "max_text_len": 48, "image_token_id": TOKEN, "prefix_lm": True})
    for config in (prefix, job(), load_config("debug")):
        assert user_message("x", 1, config) == {"role": "user", "content": "x"}
    assert user_message("x", 0, seeing()) == {"role": "user", "content": "x"}
    parts = [{"type": "image"}] * 2
    assert user_message("x", 2, seeing()) == {"role": "user", "content": [*parts, {"type": "text", "text": "x"}]}


def test_a_prompt_says_where_its_images_are() -> None:
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    for ids, config, text, places in (
        ([5, 6, TOKEN, 7], seeing(), [5, 6, 7], [2]),
        ([5, 6, 7], seeing(), [5, 6, 7], None),
        ([TOKEN, 7], seeing(), [7], [0]),
        ([5, TOKEN, 7], job(), [5, TOKEN, 7], None),
    ):
        found = prompt_with("--prompt", ids, frames, config)
        assert (found.ids, found.image_positions) == (text, places)
        assert found.pixels is not None
        assert found.pixels.shape == (1, 3, 8, 8)
        assert found.length == len(text) + tokens_per_image(config)
    several = prompt_with("--prompt", [TOKEN, 5, TOKEN, TOKEN, 6], np.zeros((3, 8, 8, 3), np.uint8), seeing())
    assert (several.ids, several.image_positions) == ([5, 6], [[0, 1, 1]])
    assert several.pixels is not None
    assert several.pixels.shape == (1, 3, 3, 8, 8)
    assert several.length == 2 + 3 * tokens_per_image(seeing())
    assert prompt_with("--prompt", [5, 6], None, seeing()).pixels is None
