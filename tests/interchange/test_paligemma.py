"""PaliGemmas, drawn and saved by transformers, are the same function here: logits of the text, gradients, greedy
decoding after an image and a prompt, which see each other; and go back there bit by bit.

By day one draw each, in PyTorch; ``HYPOTHESIS_PROFILE=nightly`` draws 25 and runs JAX as well.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kempnerforge_torch.model.generate import generate
from kempnerforge_torch.model.state import get_state, set_state
from kempnerforge_torch.model.vlm import VLMWrapper, build_vlm_wrapper
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.paligemma_config import DEFAULTS, TEXT, TOWER
from shared_config.interchange.source import read_config, read_model
from shared_config.interchange.with_images import (
    from_image_model,
    image_model_content,
    read_image_config,
    save_image_model,
)
from shared_config.loader import load_config
from shared_config.parity.validation import validation_tokens
from shared_config.schema.job import JobConfig
from tests.interchange.images_in_jax import check_jax
from tests.interchange.paligemmas import (
    GEMMAS,
    POSITIONS,
    VOCABULARY,
    build,
    continuations,
    drawn_paligemmas,
    image_tokens,
    logits_of_text,
)
from tests.interchange.test_family_models import ALLOWED, TOLD, assert_close

NIGHTLY = settings.get_current_profile_name() == "nightly"
EXAMPLES = 25 if NIGHTLY else 1
LENGTH, PROMPT, NEW_TOKENS = 11, 5, 7

Named = Mapping[str, np.ndarray]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("kind", GEMMAS)
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.reuse, Phase.generate], deadline=None)
@given(data=st.data())
def test_a_paligemma_of_theirs_is_the_same_function_here(kind: str, data: st.DataObject) -> None:
    model = build(data.draw(drawn_paligemmas(kind)), seed=1)
    prompts = data.draw(st.sampled_from([[3, 6], [LENGTH, 1], [0, 4]]))
    counts = data.draw(st.sampled_from([[3, 1], [1, 1], [2, 2], [0, 2]]))
    with tempfile.TemporaryDirectory() as folder:
        check(model, Path(folder), prompts, counts)


def check(model: Any, folder: Path, prompts: list[int], counts: list[int]) -> None:
    """
    Args:
        prompts: how many tokens of each row are its prompt.
        counts: how many images each row has.
    """
    model.save_pretrained(folder / "theirs")
    source = read_model(folder / "theirs")
    config, state = source.config, {name: np.asarray(array) for name, array in source.weights.items()}
    assert config.vlm is not None
    assert config.vlm.has_prefix
    tokens = validation_tokens(VOCABULARY - 1, 2, LENGTH, seed=1)
    side = model.config.vision_config.image_size
    shown = np.random.default_rng(3).standard_normal((2, max(counts), 3, side, side))
    pixels = [own[len(own) - count :] for own, count in zip(shown, counts, strict=True)]
    scales = np.random.default_rng(2).standard_normal((2, LENGTH, VOCABULARY))
    assert_back(model, config, state, folder / "back", pixels, tokens)
    decoded = continuations(model, pixels, tokens[:, :PROMPT], NEW_TOKENS)
    logits = logits_of_text(model, pixels, tokens, prompts)
    (logits * torch.from_numpy(scales)).sum().backward()
    there = {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    wanted = from_image_model(there, config)

    ours = wrapper(config).double()
    set_state(ours, state)
    assert ours.num_image_tokens == image_tokens(model.config)
    images = images_of(shown, counts)
    given: dict[str, Any] = {name: torch.from_numpy(array) for name, array in images.items()}
    found, _ = ours(input_ids=torch.from_numpy(tokens), prompt_lengths=torch.tensor(prompts), **given)
    assert_close({"logits": found.detach().numpy()}, {"logits": logits.detach().numpy()}, ALLOWED)
    (found * torch.from_numpy(scales)).sum().backward()
    own = {name: each.grad for name, each in ours.named_parameters() if each.grad is not None}
    assert_close({name: own[name].numpy() for name in get_state(ours) if name in own}, wanted, TOLD)
    options: dict[str, Any] = {"temperature": 0.0, "prefill_chunk": 4, **images}
    whole = generate(ours, tokens[:, :PROMPT], NEW_TOKENS, **options)
    assert whole[:, PROMPT:].tolist() == decoded.tolist()
    if NIGHTLY:
        in_text = {**images, "prompt_lengths": np.array(prompts)}
        found = logits.detach().numpy()
        check_jax(config, state, images, in_text, tokens, PROMPT, scales, found, wanted, np.asarray(decoded))


def images_of(shown: np.ndarray, counts: list[int]) -> dict[str, np.ndarray]:
    """What our models take for the last so many of (B, N, 3, h, w) in each row."""
    if counts == [1, 1]:
        return {"pixel_values": shown[:, 0]}
    exists = np.arange(shown.shape[1]) >= shown.shape[1] - np.array(counts)[:, None]
    return {"pixel_values": shown, **({} if exists.all() else {"frame_mask": exists})}


def wrapper(config: JobConfig) -> VLMWrapper:
    assert config.vision_encoder is not None
    assert config.vlm is not None
    return build_vlm_wrapper(config.model, config.vision_encoder, config.adapter, config.vlm)


def assert_back(
    model: Any, config: JobConfig, state: Named, folder: Path, pixels: list[np.ndarray], tokens: np.ndarray
) -> None:
    """Written here and read again: the same state here, and in transformers the same logits, to the bit."""
    save_image_model(folder, state, config)
    again = read_model(folder)
    assert (again.config.model, again.config.adapter) == (config.model, config.adapter)
    assert again.config.vlm == config.vlm
    assert again.weights.keys() == state.keys()
    assert all(np.array_equal(again.weights[name], values) for name, values in state.items())
    loaded: Any = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    there, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert there.config.image_token_index == model.config.image_token_index
    with torch.no_grad():
        there_and_here = [logits_of_text(one, pixels, tokens, [2, 3]) for one in (there.eval(), model)]
    torch.testing.assert_close(*there_and_here, rtol=1e-11, atol=1e-13)  # sums depend on where in memory weights begin


# Settings


def content(**changes: Any) -> dict[str, Any]:
    tower = {
        "model_type": "siglip_vision_model", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": 12, "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "gemma", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    own = {"model_type": "paligemma", "image_token_index": VOCABULARY - 1, "projection_dim": 32, "vision_config": tower}
    return {**own, "text_config": text, **changes}


def folder_with(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content(**changes)))
    return folder


SMALL = content()["text_config"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text_config": {**SMALL, "model_type": "llama"}}, "text_config.model_type = 'llama': must be gemma or gemma2"),
    ({"text_config": {**SMALL, "hidden_act": "relu"}}, "text_config.hidden_act = 'relu': must be"),
    (
        {"text_config": {**SMALL, "use_bidirectional_attention": False}},
        "use_bidirectional_attention = False: must be",
    ),
    ({"text_config": {**SMALL, "tie_word_embeddings": False}}, "text_config.tie_word_embeddings = False: must be True"),
    (
        {"text_config": {**SMALL, "max_position_embeddings": 9}},
        "max_position_embeddings = 9: must be more than the 9",
    ),
    ({"text_config": 3}, "text_config = 3: must be an object"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings = False: must be True"),
    ({"projection_dim": 24}, "projection_dim = 24: must be text_config.hidden_size = 32"),
    ({"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model': must be siglip_vision_model"),
    ({"vision_config": {"hidden_size": 0}}, "hidden_size = 0: must be a positive whole number"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: must be None"),
    ({"image_token_index": -1}, "image_token_index = -1: must be an integer, 0 or more"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_can_not_be_run_is_refused_by_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_config(folder_with(tmp_path, **changes))


def test_keys_left_out_mean_what_transformers_says(tmp_path: Path) -> None:
    theirs: Any = transformers.PaliGemmaConfig()
    assert {key: getattr(theirs, key, None) for key in DEFAULTS} == DEFAULTS
    assert {key: getattr(theirs.vision_config, key) for key in TOWER} == TOWER
    assert {key: getattr(theirs.text_config, key) for key in TEXT} == TEXT
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    config = load_config(str(tmp_path))
    said, head = config.model, theirs.text_config.head_dim
    assert (said.dim, said.n_layers, said.kv_heads, said.head_size, said.family) == (2048, 18, 1, head, "gemma")


def test_sections_follow_from_a_folder(tmp_path: Path) -> None:
    found = read_image_config(folder_with(tmp_path))
    assert found["vision_encoder"] == {"type": "siglip2", "path": str(tmp_path)}
    assert found["adapter"] == {"type": "linear"}
    vlm = {"arch": "joint_decoder", "max_text_len": POSITIONS - 9, "image_token_id": VOCABULARY - 1, "prefix_lm": True}
    assert found["vlm"] == vlm
    assert load_config(str(tmp_path)).train.seq_len == POSITIONS - 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--adapter.type", "mlp_2layer"], "adapter.type = 'mlp_2layer': must be 'linear'"),
        (["--vlm.prefix_lm", "false"], "vision_encoder.path = .*: must be the folder of a LLaVA"),
        (["--model.tie_embeddings", "false"], "model.tie_embeddings = False: must be True"),
        (["--model.family", "llama"], "model.family = 'llama'"),
    ],
)
def test_what_no_paligemma_is_is_not_written(overrides: list[str], message: str, tmp_path: Path) -> None:
    config = load_config(str(folder_with(tmp_path)), overrides)
    with pytest.raises(ConfigError, match=message):
        image_model_content(config)
