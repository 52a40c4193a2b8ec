"""`kempnerforge generate`: the same text from both backends, from weights of any kind, and what is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import pytest
import torch

import kempnerforge_jax.model.generate
import kempnerforge_torch.model.decode
import kempnerforge_torch.model.generate
from shared_config.cli import main
from shared_config.commands.generate import speed
from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import job_table
from shared_config.interchange.huggingface import save_huggingface
from shared_config.interchange.toml import config_to_toml
from shared_config.interchange.vision import tower_of
from shared_config.interchange.weights import save_weights
from shared_config.loader import load_config
from shared_config.parity.validation import validation_weights

TINY = (
    "--model.dim=16",
    "--model.n_layers=1",
    "--model.n_heads=2",
    "--model.n_kv_heads=1",
    "--model.ffn_hidden_dim=24",
    "--model.vocab_size=258",
    "--model.max_seq_len=32",
    "--train.seq_len=16",
)
CONFIG = load_config("debug", TINY)
WEIGHTS = validation_weights(parameter_table(CONFIG.model), 1)


def command(*arguments: str, backend: str = "torch", prompt: str = "né") -> list[str]:
    return ["generate", "debug", "--backend", backend, f"--prompt={prompt}", "--device", "cpu", *TINY, *arguments]


def said(capsys: pytest.CaptureFixture[str], *arguments: str, backend: str = "torch") -> str:
    """What the command writes, which begins with the prompt and reports the speed."""
    assert main(command("--max-new-tokens=8", *arguments, backend=backend)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("né")
    assert out.endswith("\n")
    assert re.search(r"8 tokens: the first after [\d.]+ s, then [\d.]+ tokens/s", err), err
    return out


@pytest.mark.parametrize("options", [("--temperature=0",), ("--seed=3", "--top-k=40", "--top-p=0.9")])
def test_both_backends_and_every_kind_of_weights_say_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    save_weights(tmp_path / "native", WEIGHTS)
    save_huggingface(tmp_path / "foreign", WEIGHTS, CONFIG.model)
    native, foreign = f"--weights={tmp_path / 'native'}", f"--weights={tmp_path / 'foreign'}"
    first = said(capsys, native, *options)
    assert said(capsys, native, *options, backend="jax") == first
    assert said(capsys, foreign, *options) == first


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_compiled_steps_say_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    compiled: list[Any] = []
    decode = kempnerforge_torch.model.decode
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setattr(decode, "compiled", functools.lru_cache(decode.compiled.__wrapped__))
    expected = said(capsys, "--seed=3")
    assert not compiled
    assert said(capsys, "--seed=3", "--compile", backend=backend) == expected
    assert len(compiled) == (backend == "torch")


@pytest.mark.parametrize("level", ["highest", "high"])
def test_products_are_as_precise_as_the_config_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """By itself JAX takes bfloat16 or TF32 for float32 on accelerators."""
    levels: list[str] = []

    def watched(stream: Any) -> Any:
        def watching(*arguments: Any, **options: Any) -> Any:
            for token in stream(*arguments, **options):
                levels.extend((precision_of_jax(), torch.get_float32_matmul_precision()))
                yield token

        return watching

    for module in (kempnerforge_torch.model.generate, kempnerforge_jax.model.generate):
        monkeypatch.setattr(module, "stream", watched(module.stream))
    said(capsys, "--seed=3", f"--train.matmul_precision={level}")
    assert set(levels[1::2]) == {level}
    levels.clear()
    said(capsys, "--seed=3", f"--train.matmul_precision={level}", backend="jax")
    assert set(levels[::2]) == {level}


def precision_of_jax() -> str:
    return jax.config.jax_default_matmul_precision or ""  # pyright: ignore[reportAttributeAccessIssue]


def test_without_weights_the_model_is_untrained_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--max-new-tokens=1")) == 0
    assert "no --weights are given: the model is untrained\n1 tokens in" in capsys.readouterr().err


SEES = (
    "--model.dim=16",
    "--model.n_layers=1",
    "--model.n_heads=2",
    "--model.n_kv_heads=1",
    "--model.ffn_hidden_dim=24",
    "--model.max_seq_len=64",
    "--vlm.max_text_len=24",
    "--vision_encoder.image_size=8",
    "--vision_encoder.patch_size=4",
    "--vision_encoder.feature_dim=12",
    "--vision_encoder.n_heads=3",
    "--vision_encoder.n_layers=1",
    "--train.seq_len=16",
)


def looking(*arguments: str, arch: str = "joint_decoder", backend: str = "torch") -> list[str]:
    options = ("--device=cpu", "--prompt=a ", "--temperature=0", "--max-new-tokens=8")
    return ["generate", f"debug_vlm_{arch}", "--backend", backend, *options, *SEES, *arguments]


def picture(folder: Path, colour: str) -> str:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (9, 7), colour).save(folder / f"{colour}.png")
    return str(folder / f"{colour}.png")


def test_an_image_is_looked_at(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With weights of a checkpoint's names; what is said depends on the picture and not on the backend."""
    config = load_config("debug_vlm_joint_decoder", SEES)
    save_weights(tmp_path / "weights", validation_weights(job_table(config, tower_of(config)), 1))
    (tmp_path / "weights" / "config.toml").write_text(config_to_toml(config))
    weights = f"--weights={tmp_path / 'weights'}"
    said = {}
    for colour, backend in (("red", "torch"), ("red", "jax"), ("blue", "torch")):
        assert main(looking(weights, "--image", picture(tmp_path, colour), backend=backend)) == 0
        said[colour, backend] = capsys.readouterr().out
    assert said["red", "torch"] == said["red", "jax"] != said["blue", "torch"]


def test_without_an_image_one_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    for arch in ("cross_attention", "mot"):
        own = ("--vlm.cross_attention_every_n_layers=1",) if arch == "cross_attention" else ()
        assert main(looking("--seed=3", *own, arch=arch)) == 0
        assert "no --image is given: the model sees a small yellow square at the bottom left" in capsys.readouterr().err


def test_several_pictures_are_the_frames_of_a_clip(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images = [f"--image={picture(tmp_path, colour)}" for colour in ("red", "blue", "green")]
    clips = ("--video.frame_size=8", "--video.max_frames=2", "--video.min_frames=1")
    assert main(looking(*images[:2], *clips)) == 0
    capsys.readouterr()
    assert main(looking(*images, *clips)) == 2
    assert "3 pictures, must be at most video.max_frames = 2" in capsys.readouterr().err
    assert main(looking(*images)) == 2
    assert (
        "3 pictures, must be at most one, as the config has neither a [video] section nor vlm.image_token_id"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (command("--image=x.png"), "--image = x.png: the config has no \\[vlm\\] section"),
        (looking("--image=/absent.png"), "/absent.png: can't be decoded: .*No such file"),
        (looking("--max-new-tokens=60"), "max_new_tokens = 60: must be at most 58, .* of which the image takes 4"),
        (looking(arch="moma"), "vlm.arch = 'moma': .* causal routers"),
    ],
)
def test_images_that_can_not_be_seen_are_one_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err), err
    assert len(err.splitlines()) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature = -1.0: must be at least 0"),
        (["--top-p=0"], r"top_p = 0.0: must be in \(0, 1\]"),
        (["--top-k=-2"], "--top-k: '-2': must be an integer of at least 0"),
        (["--max-new-tokens=-1"], "--max-new-tokens: '-1': must be an integer of at least 0"),
        (["--max-new-tokens=31"], "max_new_tokens = 31: must be at most 29, as the longest prompt has 4 tokens"),
        (["--temperature=nan"], "temperature = nan: must be at least 0 and finite"),
        (["--temperature=hot"], "--temperature: invalid float value: 'hot'"),
        (["--top-k=1.5"], "--top-k: '1.5': must be an integer of at least 0"),
        (["--top-p=1.01"], r"top_p = 1.01: must be in \(0, 1\]"),
        ([f"--prompt={'x' * 40}"], "prompt_tokens has a row of 41 tokens: must be at most max_seq_len = 32"),
        (["--seed=-1"], "--seed: '-1': must be an integer of at least 0"),
        (["--weights=/absent"], "/absent: no such file or folder"),
        (["--model.vocab_size=150"], r"prompt_tokens\[0\] holds 195: token ids must be in \[0, 150\)"),
    ],
)
def test_bad_values_are_one_message(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(command(*arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err), err
    assert len(err.splitlines()) <= 2


def test_weights_of_another_model_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_weights(tmp_path / "native", WEIGHTS)
    assert main(command(f"--weights={tmp_path / 'native'}", "--model.ffn_hidden_dim=32")) == 2
    assert "layers.0.mlp.gate_proj.weight" in capsys.readouterr().err


def test_a_prompt_may_be_empty_only_where_something_begins_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--max-new-tokens=0", prompt="")) == 0
    assert main(command("--model.vocab_size=256", prompt="")) == 2
    assert "--prompt = '': must not be empty" in capsys.readouterr().err


def test_speed_leaves_out_the_first_token() -> None:
    assert speed([0.0, 5.0, 5.5, 6.0]) == "3 tokens: the first after 5.00 s, then 2.0 tokens/s"
    assert speed([0.0]) == "0 tokens in 0.00 s"
