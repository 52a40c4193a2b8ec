"""Prompts of a PaliGemma's folder: as its processor in transformers has them, in `kempnerforge generate` and in rows of
data, of which what follows is learned.
"""

from __future__ import annotations

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
from shared_config.data.image_sources import Example
from shared_config.data.images import collate
from shared_config.data.tokenizer import HuggingFaceTokenizer
from shared_config.interchange.preprocessor import read_preprocessor
from shared_config.loader import load_config
from tests.interchange.paligemmas import IMAGE_TEXT, paligemma_folder, processor_of

NIGHTLY = settings.get_current_profile_name() == "nightly"
TOKENS, LENGTH = 9, 24
"""Of an image, and of the text of a row."""
LETTERS = st.text(st.sampled_from("helo wrd,\né "), max_size=12)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", params=[False, True], ids=["named", "put before a text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that names the id that begins a text, or also puts it there."""
    made = paligemma_folder(tmp_path_factory.mktemp("paligemma"), request.param)
    Image.fromarray(np.full((9, 14, 3), 40, np.uint8)).save(made / "dark.png")
    return made


def theirs(
    processor: Any, folder: Path, prompt: str, suffix: str | None = None, count: int = 1
) -> dict[str, list[int]]:
    """What the processor of transformers makes of pictures, a prompt and maybe what follows it, without padding."""
    pictures = [Image.open(folder / "dark.png")] * count
    out = processor(images=[pictures], text=[IMAGE_TEXT * count + prompt], suffix=suffix, return_tensors="np")
    return {name: out[name][0].tolist() for name in ("input_ids", "token_type_ids", "labels")}


@settings(max_examples=25 if NIGHTLY else 5, deadline=None)
@given(prompt=LETTERS)
def test_a_prompt_is_that_of_the_processor(folder: Path, prompt: str) -> None:
    ids = theirs(processor_of(folder), folder, prompt)["input_ids"]
    assert HuggingFaceTokenizer(folder).encode_prefix(prompt) == ids[TOKENS:]


@settings(max_examples=25 if NIGHTLY else 3, deadline=None)
@given(prompt=LETTERS, text=LETTERS, is_said=st.booleans(), count=st.integers(1, 3))
def test_a_row_is_that_of_the_processor(folder: Path, prompt: str, text: str, is_said: bool, count: int) -> None:
    """Ids, length of the prompt, labels; whether the prompt begins with the ids of images or says nothing of them."""
    vlm, frames = load_config(str(folder)).vlm, np.zeros((count, 12, 12, 3), np.uint8)
    assert vlm is not None
    example = Example(frames, text, f"{IMAGE_TEXT * is_said * count}{prompt}")
    pixels, options = read_preprocessor("", "siglip2", 12), {"image_token": vlm.image_token, "has_prefix": True}
    batch = collate([example], HuggingFaceTokenizer(folder), pixels, LENGTH, images=3, **options)
    assert "image_positions" not in batch
    assert batch["frame_mask"].tolist() == [[False] * (3 - count) + [True] * count]
    row = theirs(processor_of(folder), folder, prompt, text, count)
    ids, types, labels = (row[name][count * TOKENS :] for name in ("input_ids", "token_type_ids", "labels"))
    length, short = min(len(ids) - 1, LENGTH), max(LENGTH - len(ids) + 1, 0)
    assert batch["input_ids"][0].tolist() == [*ids[:length], *[0] * short]
    assert batch["labels"][0].tolist() == [*labels[1 : length + 1], *[-100] * short]
    assert batch["prompt_lengths"].tolist() == [min(types.count(0), length)]


def test_an_image_within_a_prompt_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["generate", str(folder), "--backend=torch", "--device=cpu", f"--image={folder}/dark.png"]
    assert main([*line, f"--prompt=hello{IMAGE_TEXT}world"]) == 2
    assert "--prompt holds the image at 2: must begin with it with vlm.prefix_lm = true" in capsys.readouterr().err
    Image.open(folder / "dark.png").save(tmp_path / "1.png")
    row = {"file_name": "1.png", "prompt": f"hello{IMAGE_TEXT}", "text": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["train", str(folder), "--backend=torch", f"--data.path={tmp_path}", f"--output={tmp_path}/run"]) == 2
    assert "holds the image at 2: must begin with it with vlm.prefix_lm = true" in capsys.readouterr().err


@pytest.mark.parametrize(("prompt", "count"), [("hello", 1), (f"{IMAGE_TEXT}hello", 1), ("hello", 2),
                                               (f"{IMAGE_TEXT * 2}hello", 2)])  # fmt: skip
def test_generate_asks_as_the_processor_does(
    folder: Path, prompt: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def stream(model: object, prompts: list[list[int]], length: int, **options: Any) -> Iterator[np.ndarray]:
        calls.append({"prompt": prompts[0], **options})
        return iter([np.array([269])])

    monkeypatch.setattr(kempnerforge_torch.model.generate, "stream", stream)
    line = ["generate", str(folder), "--backend=torch", "--device=cpu", *[f"--image={folder}/dark.png"] * count]
    assert main([*line, f"--prompt={prompt}"]) == 0
    ids = theirs(processor_of(folder), folder, "hello", count=count)["input_ids"]
    assert calls[0]["prompt"] == ids[count * TOKENS :]
    assert calls[0]["image_positions"] is None
    assert calls[0]["pixel_values"].shape == ((1, 3, 12, 12) if count == 1 else (1, count, 3, 12, 12))


@pytest.mark.skipif(not NIGHTLY, reason="compiles")
def test_both_backends_train_and_what_they_learn_goes_back(folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"file_name": ["1.png"] * (row % 3), "prompt": f"what is {row}?", "text": f"answer {row}"} for row in range(12)
    ]
    Image.open(folder / "dark.png").save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = [f"--data.path={tmp_path}", "--train.max_steps=3", "--train.seq_len=32", "--train.batch_size=5"]
    own += ["--train.mixed_precision=fp32", "--data.max_images=2", "--optimizer.lr=1e-3", "--device=cpu"]
    losses = []
    for backend in ("torch", "jax"):
        run = tmp_path / backend
        assert main(["train", str(folder), "--backend", backend, "--output", str(run), *own]) == 0
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3
    assert main(["convert", str(tmp_path / "jax"), "--output", str(tmp_path / "back")]) == 0
    back: Any = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "back")
    there: Any = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder)
    names = ("vision_tower.post_layernorm.weight", "multi_modal_projector.linear.weight")
    frozen, trained = ([dict(model.model.named_parameters())[name] for model in (back, there)] for name in names)
    assert frozen[0].equal(frozen[1])
    assert not trained[0].equal(trained[1])
