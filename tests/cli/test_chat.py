"""`kempnerforge chat`, and `generate --chat`: the folder's template, its sampling, and what ends an answer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

import kempnerforge_torch.model.generate
from shared_config.cli import main
from shared_config.commands import chat
from shared_config.contract.parameters import parameter_table
from shared_config.data.template import ChatTemplate
from shared_config.interchange.huggingface import save_huggingface
from shared_config.loader import load_config
from shared_config.parity.validation import validation_weights
from tests.config.test_jsonl import CHATML, tokenizer_folder, turns

SIZES = ("dim=16", "n_layers=1", "n_heads=2", "n_kv_heads=1", "ffn_hidden_dim=24", "vocab_size=270", "max_seq_len=128")
CONFIG = load_config("debug", [*(f"--model.{size}" for size in SIZES), "--train.seq_len=16"])
DEVICE = ["--device", "cpu"]
ANSWER = "hello world"
TOKENIZER_END = 262


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder."""
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", CHATML)
    said = {"eos_token_id": [257, 259], "temperature": 0.5, "top_k": 3, "top_p": 0.75, "repetition_penalty": 1.1}
    (tokenizer / "generation_config.json").write_text(json.dumps(said))
    weights = validation_weights(parameter_table(CONFIG.model), 1)
    save_huggingface(tmp_path / "model", weights, CONFIG.model, tokenizer)
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    """What `stream` of PyTorch is asked for; it answers `ANSWER`."""
    calls: list[dict[str, Any]] = []
    template = ChatTemplate(folder)
    answer = template.encode(turns("x", ANSWER))
    ids = answer[0][answer[1]]

    def stream(model: object, prompts: list[list[int]], length: int, **options: Any) -> Iterator[np.ndarray]:
        calls.append({"prompt": prompts[0], "length": length, **options})
        return iter(np.array([[id] for id in ids[:-2]]))

    monkeypatch.setattr(kempnerforge_torch.model.generate, "stream", stream)
    return calls


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_goes_on(
    folder: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each prompt is all that was said, and a blank line is nothing."""
    typed(monkeypatch, "hi", "  ", "and you?")
    assert main(["chat", str(folder), "--backend=torch", *DEVICE, "--system=be brief", "--seed=5"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{ANSWER}\n{ANSWER}\n"
    assert "note: repetition_penalty = 1.1 of" in err
    template = ChatTemplate(folder)
    system = [{"role": "system", "content": "be brief"}]
    conversation = [*system, *turns("hi", ANSWER, "and you?")]
    assert [call["prompt"] for call in asked] == [template.encode_prompt(conversation[:n]) for n in (2, 4)]
    assert [call["seed"] for call in asked] == [5, 6]
    assert {(call["temperature"], call["top_k"], call["top_p"], call["eos_token_id"]) for call in asked} == {
        (0.5, 3, 0.75, (257, 259, TOKENIZER_END))
    }
    assert all(call["length"] <= 128 - len(call["prompt"]) for call in asked)


def test_a_conversation_that_is_too_long_begins_again(
    folder: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "a" * 70, "b" * 70, "c" * 199, "d")
    assert main(["chat", str(folder), "--backend=torch", *DEVICE, "--system=s", "--max-new-tokens=3"]) == 0
    assert capsys.readouterr().err.count("it begins again") == 2
    template = ChatTemplate(folder)
    assert [call["prompt"] for call in asked] == [
        template.encode_prompt([{"role": "system", "content": "s"}, *turns(text)]) for text in ("a" * 70, "b" * 70, "d")
    ]
    assert all(call["length"] == 3 for call in asked)


def test_what_the_command_line_says_wins(
    folder: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--temperature=0", "--top-k=7", "--top-p=1", "--stop= wor", "--stop=xyz", "--max-new-tokens=4"]
    assert main(["generate", str(folder), "--backend=torch", *DEVICE, "--chat", "--prompt=hi", *flags]) == 0
    assert capsys.readouterr().out == "hello\n"
    (call,) = asked
    assert (call["temperature"], call["top_k"], call["top_p"], call["length"]) == (0, 7, 1, 4)
    assert call["prompt"] == ChatTemplate(folder).encode_prompt(turns("hi"))


def test_an_answer_that_is_interrupted_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[str]:
        yield "well"
        raise KeyboardInterrupt

    assert chat.shown_text(pieces()) == "well"
    assert capsys.readouterr().out == "well\n"


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="compiles")
def test_both_backends_give_the_same_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for backend in ("torch", "jax"):
        line = ["generate", str(folder), f"--backend={backend}", *DEVICE, "--chat", "--prompt=hi", "--seed=3"]
        assert main([*line, "--max-new-tokens=8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


REFUSALS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "bytes": (
        lambda _: ["chat", "debug"],
        "data.tokenizer = 'bytes': has no chat template; must be a tokenizer folder",
    ),
    "stop": (lambda folder: ["chat", str(folder), "--stop="], "--stop = '': must not be empty"),
    "video": (
        lambda _: ["chat", "debug_vlm_mot", "--video.max_frames=4", "--video.frame_size=32"],
        "video: must be absent; chat shows pictures",
    ),
    "image": (
        lambda folder: ["chat", str(folder), "--image=a.png"],
        "a.png: can't be shown, as the config has no [vlm] section",
    ),
    "routers": (lambda _: ["chat", "debug_vlm_moma"], "vlm.arch = 'moma': its experts choose among all tokens"),
    "chat": (lambda _: ["generate", "debug", "--chat", "--prompt=a"], "data.tokenizer = 'bytes': has no chat template"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_can_not_talk_is_refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, said = REFUSALS[name]
    assert main([*line(folder), "--backend=torch"]) == 2
    assert capsys.readouterr().err.startswith(f"kempnerforge: {said}")
