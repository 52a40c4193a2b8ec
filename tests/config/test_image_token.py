"""The id that stands for an image says where it is, once; no other text holds it: it is refused, and never drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.cli import main
from shared_config.commands.generate import placed_image
from shared_config.contract.decoding import read_prompts
from shared_config.contract.image_token import refuse_image_token, without_image_token
from shared_config.data import open_data
from shared_config.errors import UserError
from shared_config.interchange.toml import config_to_toml
from shared_config.parity.request import check_tokens, make_request
from shared_config.parity.validation import drawn_tokens
from tests.config.test_images import folder_of, job

TOKEN = ord("#")


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


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 5))
def test_an_id_says_where_the_image_is(row: list[int], token: int) -> None:
    ids, count = np.array(row, np.int64), row.count(token)
    if count > 1:
        places = ", ".join(str(place) for place, id in enumerate(row) if id == token)
        with pytest.raises(UserError, match=f"^a row holds {token} at {places}: must at most once, as vlm"):
            without_image_token("a row", ids, token)
        return
    text, place = without_image_token("a row", ids, token)
    assert (text.tolist(), place) == ([id for id in row if id != token], row.index(token) if count else 0)
    assert without_image_token("a row", ids, None)[0].tolist() == row


@pytest.mark.parametrize(
    ("prompt", "text"), [("see # it ", "a cat"), ("what? ", "a # cat"), ("#", "cat"), ("", "cat#")]
)
def test_rows_of_data_say_where_their_image_is(prompt: str, text: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{"prompt": prompt, "text": text}])
    data = {"path": str(folder), "heldout_fraction": 1e-9}
    found, plain = open_data(seeing(data=data)).batch(0), open_data(job(data=data)).batch(0)
    place = 1 + (prompt + text).index("#")
    assert found["image_positions"].tolist() == [place] * 4
    assert found["image_positions"].dtype == np.int32
    kept = np.delete(np.arange(plain["input_ids"].shape[1]), place)
    np.testing.assert_array_equal(found["input_ids"][:, :-1], plain["input_ids"][:, kept])
    np.testing.assert_array_equal(found["labels"][:, :-2], plain["labels"][:, kept[1:] - 1])
    assert "image_positions" not in plain


def test_rows_of_data_with_several_images_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [*[{"text": "a cat"}] * 4, {"prompt": "see #", "text": "and #"}])
    with pytest.raises(UserError, match=f"prompt 'see #' and text 'and #' holds {TOKEN} at 5, 10: must at most once"):
        open_data(seeing(data={"path": str(folder)}))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("#a#", f"--prompt holds {TOKEN} at 1, 3: must at most once"), ("a#", f"ends with the id of the image, {TOKEN}")],
)
def test_a_command_refuses_a_prompt_before_it_loads_a_model(
    prompt: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(config_to_toml(seeing()))
    asked = ["generate", str(tmp_path / "config.toml"), "--backend", "torch", "--prompt", prompt]
    assert main(asked) == 2
    assert said in capsys.readouterr().err


def test_a_prompt_says_where_its_image_is() -> None:
    assert placed_image([5, 6, TOKEN, 7], seeing()) == ([5, 6, 7], [2])
    assert placed_image([5, 6, 7], seeing()) == ([5, 6, 7], None)
    assert placed_image([TOKEN, 7], seeing()) == ([7], [0])
    assert placed_image([5, TOKEN, 7], job()) == ([5, TOKEN, 7], None)
