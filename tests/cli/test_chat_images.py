"""`kempnerforge chat`, `generate` and `train` with a LLaVA's folder: pictures stand where its template or the id of its
token has them, from one question to the next.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import kempnerforge_torch.model.generate
from shared_config.cli import main
from shared_config.data.template import ChatTemplate
from shared_config.data.tokenizer import HuggingFaceTokenizer
from shared_config.loader import load_config
from tests.config.test_jsonl import CHATML
from tests.interchange.llavas import IMAGE_TEXT, PARTS, llava_folder

DEVICE = ["--device", "cpu"]
ANSWER = "hello"
TOKENS = 4
"""Of an image."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, value in {"dark": 40, "light pink": 220}.items():
        Image.fromarray(np.full((9, 14, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `stream` of PyTorch is asked for; it answers `ANSWER`."""
    calls: list[dict[str, Any]] = []

    def stream(model: object, prompts: list[list[int]], length: int, **options: Any) -> Iterator[np.ndarray]:
        calls.append({"prompt": prompts[0], "length": length, **options})
        return iter([np.array([259])])

    monkeypatch.setattr(kempnerforge_torch.model.generate, "stream", stream)
    return calls


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def image_token_of(folder: Path) -> int:
    vlm = load_config(str(folder)).vlm
    assert vlm is not None
    assert vlm.image_token is not None
    return vlm.image_token


def theirs(folder: Path, messages: list[tuple[str, int, str]], as_parts: bool) -> list[int]:
    """The ids of transformers for messages of a role, with so many pictures before a text."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    conversation: list[Any] = [
        {"role": role, "content": [*[{"type": "image"}] * count, {"type": "text", "text": text}]}
        if as_parts
        else {"role": role, "content": f"{IMAGE_TEXT}\n" * count + text}
        for role, count, text in messages
    ]
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)  # type: ignore[return-value]


@pytest.mark.parametrize("template", [PARTS, CHATML], ids=["parts", "text"])
def test_pictures_go_on_with_a_conversation(
    template: str,
    pictures: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = llava_folder(pictures / "model", template, positions=256)
    lines = ["/image", f"/image {pictures}/damaged.png", f" /image  {pictures}/light pink.png ", "and this?", "well?"]
    typed(monkeypatch, "what?", *lines)
    line = ["chat", str(folder), "--backend=torch", *DEVICE, "--system=be brief", f"--image={pictures}/dark.png"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert out == f"{ANSWER}\n" * 3
    assert "note: /image must be followed by the file of a picture" in err
    assert f"note: {pictures}/damaged.png: can't be decoded: " in err
    said = [("system", 0, "be brief"), ("user", 1, "what?"), ("assistant", 0, ANSWER), ("user", 1, "and this?")]
    said += [("assistant", 0, ANSWER), ("user", 0, "well?")]
    image_token = image_token_of(folder)
    for call, length, count in zip(asked, (2, 4, 6), (1, 2, 2), strict=True):
        ids = theirs(folder, said[:length], template == PARTS)
        places = [place for place, id in enumerate(ids) if id == image_token]
        assert len(places) == count
        assert call["prompt"] == [id for id in ids if id != image_token]
        moved = [place - index for index, place in enumerate(places)]
        assert call["image_positions"] == (moved if count == 1 else [moved])
        assert call["pixel_values"].shape == ((1, 3, 12, 12) if count == 1 else (1, 2, 3, 12, 12))
        assert call["length"] <= 256 - len(call["prompt"]) - count * TOKENS
    first, second = asked[1]["pixel_values"][0]
    np.testing.assert_array_equal(asked[0]["pixel_values"][0], first)
    assert (first < second).all()


@pytest.mark.parametrize("template", [PARTS, CHATML], ids=["parts", "text"])
def test_what_is_typed_is_text(template: str, pictures: Path) -> None:
    """The text of the token of an image, or of another one that is special, stands for none."""
    folder = llava_folder(pictures / "model", template)
    image_token = image_token_of(folder)
    content = [{"type": "image"}, {"type": "text", "text": f"no {IMAGE_TEXT} or <|im_end|>"}]
    ids = ChatTemplate(folder, image_token).encode_prompt([{"role": "user", "content": content}])
    plain = ChatTemplate(folder, image_token).encode_prompt([{"role": "user", "content": "x"}])
    end = transformers.PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    assert ids.count(image_token) == 1
    assert ids.count(end) == plain.count(end) == 1


def test_pictures_count_for_the_length(
    pictures: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, shown = llava_folder(pictures / "model"), [f"/image {pictures}/dark.png"] * 10
    typed(monkeypatch, *shown, "a" * 20, "b" * 20, *shown * 4, "c")
    assert main(["chat", str(folder), "--backend=torch", *DEVICE]) == 0
    err = capsys.readouterr().err
    assert err.count("it begins again") == 2
    assert "tokens are too many for model.max_seq_len = 128" in err
    assert [call["pixel_values"] is None for call in asked] == [False, True]


def test_generate_places_the_pictures_of_a_question(pictures: Path, asked: list[dict[str, Any]]) -> None:
    folder = llava_folder(pictures / "model")
    shown = [f"--image={pictures}/{name}.png" for name in ("dark", "light pink")]
    for own, prompt, count in ((["--chat"], "which?", 2), ([], f"{IMAGE_TEXT} or {IMAGE_TEXT}?", 2)):
        line = ["generate", str(folder), "--backend=torch", *DEVICE, "--prompt", prompt, *own, "--max-new-tokens=1"]
        assert main([*line, *shown]) == 0
        assert asked[-1]["pixel_values"].shape == (1, count, 3, 12, 12)
        (places,) = asked[-1]["image_positions"]
        assert len(places) == count
        assert max(places) < len(asked[-1]["prompt"])


def test_a_template_without_a_place_for_pictures_is_refused(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = PARTS.replace("<image>\\n", "")
    folder = llava_folder(pictures / "model", silent)
    line = ["generate", str(folder), "--backend=torch", "--chat", "--prompt=x"]
    line += [f"--image={pictures}/dark.png"] * 2
    image_token = image_token_of(folder)
    assert main(line) == 2
    assert f"--prompt does not hold {image_token}: must once for each image" in capsys.readouterr().err


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="compiles")
def test_both_backends_say_the_same(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = llava_folder(pictures / "model"), []
    for backend in ("torch", "jax"):
        typed(monkeypatch, "what?", f"/image {pictures}/light pink.png", "and?", "well?")
        line = ["chat", str(folder), f"--backend={backend}", *DEVICE, f"--image={pictures}/dark.png", "--seed=3"]
        assert main([*line, "--max-new-tokens=6"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@settings(max_examples=20)
@given(st.lists(st.sampled_from([IMAGE_TEXT, "a", " ", "hello", "\n", "é", "<ima"]), max_size=8))
def test_text_of_data_names_the_token_of_an_image_and_no_other(seeing_folder: Path, parts: list[str]) -> None:
    text, tokenizer = "".join(parts), HuggingFaceTokenizer(seeing_folder)
    image_token = image_token_of(seeing_folder)
    truth = transformers.PreTrainedTokenizerFast.from_pretrained(seeing_folder)
    assert tokenizer.encode_with_images(text, image_token).tolist() == truth.encode(text)
    plain = tokenizer.encode(f"{text}<|im_end|>").tolist()
    assert image_token not in plain
    assert truth.convert_tokens_to_ids("<|im_end|>") not in tokenizer.encode_with_images(
        f"{text}<|im_end|>", image_token
    )
    assert tokenizer.encode_with_images(text, None).tolist() == tokenizer.encode(text).tolist()


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("seeing"))


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="compiles")
def test_both_backends_train_on_rows_of_several_pictures(seeing_folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "file_name": [f"{(row + index) % 3}.png" for index in range(row % 4)],
            "prompt": f"{IMAGE_TEXT} and " * (row % 4) + "? ",
            "text": f"answer {row}",
        }
        for row in range(12)
    ]
    for index in range(3):
        Image.fromarray(np.full((12, 12, 3), 80 * index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"--data.path={tmp_path}", f"--data.tokenizer={seeing_folder}", "--train.max_steps=3", "--train.seq_len=48"]
    own += ["--train.batch_size=5", "--train.mixed_precision=fp32", "--optimizer.lr=1e-3", "--device=cpu"]
    losses = []
    for backend in ("torch", "jax"):
        run = tmp_path / backend
        assert main(["train", str(seeing_folder), "--backend", backend, "--output", str(run), *own]) == 0
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3
