"""No text holds the id that stands for an image: it is refused wherever text comes in, and never drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract.decoding import read_prompts
from shared_config.contract.image_token import refuse_image_token
from shared_config.data import open_data
from shared_config.data.tokenizer import ByteTokenizer
from shared_config.errors import UserError
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


@pytest.mark.parametrize("part", ["prompt", "text"])
def test_rows_of_data_are_refused(part: str, tmp_path: Path) -> None:
    row = {"prompt": "what? ", "text": "a cat"}
    folder = folder_of(tmp_path, [*[row] * 40, {**row, part: "see # here"}, row])
    config = seeing(data={"path": str(folder)})
    place = 4 + 1 + (part == "text") * len(row["prompt"])
    assert ByteTokenizer().bos is not None
    named = f"{re.escape(str(folder))}.*see # here.* holds {TOKEN} at {place}: must not"
    with pytest.raises(UserError, match=named):
        open_data(config)
    open_data(job(data={"path": str(folder)}))


def test_a_command_refuses_a_prompt_before_it_loads_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shared_config.cli import main
    from shared_config.interchange.toml import config_to_toml

    (tmp_path / "config.toml").write_text(config_to_toml(seeing()))
    asked = ["generate", str(tmp_path / "config.toml"), "--backend", "torch", "--prompt", "a#"]
    assert main(asked) == 2
    assert f"--prompt holds {TOKEN} at 2: must not" in capsys.readouterr().err
