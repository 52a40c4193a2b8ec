"""LLaVAs, drawn and saved by transformers, are the same function here: logits of the text, gradients, greedy decoding
after images, which stand before the text or within, in one row more of them than in another; and go back there bit by
bit.

By day one draw each, in PyTorch; ``HYPOTHESIS_PROFILE=nightly`` draws 13 and runs JAX as well.
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
from shared_config.errors import UserError
from shared_config.interchange.llava_config import DEFAULTS, TEXT_DEFAULTS, TOWER, feature_blocks
from shared_config.interchange.source import read_config, read_model
from shared_config.interchange.weights import WeightsError, load_weights, save_weights
from shared_config.interchange.with_images import (
    from_image_model,
    is_image_folder,
    read_image_config,
    save_image_model,
)
from shared_config.loader import load_config
from shared_config.parity.validation import validation_tokens
from shared_config.schema.job import JobConfig
from tests.interchange.images_in_jax import check_jax
from tests.interchange.llavas import (
    POSITIONS,
    TEXTS,
    TOWERS,
    VOCABULARY,
    build,
    continuations,
    drawn_llavas,
    image_tokens,
    logits_of_text,
)
from tests.interchange.test_family_models import ALLOWED, TOLD, assert_close

NIGHTLY = settings.get_current_profile_name() == "nightly"
EXAMPLES = 13 if NIGHTLY else 1
LENGTH, PROMPT, NEW_TOKENS = 11, 5, 7

Named = Mapping[str, np.ndarray]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("within", [False, True], ids=["before the text", "within"])
@pytest.mark.parametrize("kind", TOWERS)
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_a_llava_of_theirs_is_the_same_function_here(kind: str, within: bool, data: st.DataObject) -> None:
    model = build(data.draw(drawn_llavas(kind)), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        check(model, Path(folder), data.draw(drawn_places()) if within else None)


@st.composite
def drawn_places(draw: st.DrawFn) -> list[list[int]]:
    """Of up to three images in each of two rows, some of them after all of the text."""
    place = st.integers(0, PROMPT - 1) | st.integers(LENGTH - 1, LENGTH)
    rows = draw(st.lists(st.lists(place, max_size=3).map(sorted), min_size=2, max_size=2).filter(any))
    return rows if any(place for row in rows for place in row) else [[*row, PROMPT - 1] for row in rows]


def check(model: Any, folder: Path, positions: list[list[int]] | None) -> None:
    """
    Args:
        positions: of the images in each row of the text; in a prompt at most as far as that goes. None: one, before it.
    """
    model.save_pretrained(folder / "theirs")
    source = read_model(folder / "theirs")
    config, state = source.config, {name: np.asarray(array) for name, array in source.weights.items()}
    tokens = validation_tokens(VOCABULARY - 2, 2, LENGTH, seed=1) + 1  # no image token
    side = model.config.vision_config.image_size
    places = positions or [[0], [0]]
    pixels = np.random.default_rng(3).standard_normal((2, max(map(len, places)), 3, side, side))
    scales = np.random.default_rng(2).standard_normal((2, LENGTH, VOCABULARY))
    in_prompt = [[min(place, PROMPT - 1) for place in row] for row in places]
    assert_back(model, config, state, folder / "back", pixels, tokens)
    decoded = continuations(model, pixels, tokens[:, :PROMPT], in_prompt, NEW_TOKENS)
    logits = logits_of_text(model, pixels, tokens, places)
    (logits * torch.from_numpy(scales)).sum().backward()
    wanted = from_image_model(gradients(model), config)

    ours = wrapper(config).double()
    set_state(ours, state)
    assert ours.num_image_tokens == image_tokens(model.config)
    given: dict[str, Any] = {name: torch.from_numpy(array) for name, array in images_of(pixels, positions).items()}
    found, _ = ours(input_ids=torch.from_numpy(tokens), **given)
    assert_close({"logits": found.detach().numpy()}, {"logits": logits.detach().numpy()}, ALLOWED)
    (found * torch.from_numpy(scales)).sum().backward()
    assert_close(own_gradients(ours), wanted, TOLD)
    images: dict[str, Any] = {"pixel_values": pixels if positions else pixels[:, 0]}
    images["image_positions"] = in_prompt if positions else None
    whole = generate(ours, tokens[:, :PROMPT], NEW_TOKENS, temperature=0.0, prefill_chunk=4, **images)
    assert whole[:, PROMPT:].tolist() == decoded.tolist()
    if NIGHTLY:
        check_jax(
            config,
            state,
            {**images, "prefill_chunk": 4},
            images_of(pixels, positions),
            tokens,
            PROMPT,
            scales,
            logits.detach().numpy(),
            wanted,
            decoded,
        )


def images_of(pixels: np.ndarray, positions: list[list[int]] | None) -> dict[str, np.ndarray]:
    """What our models take for them: images that a row does not have are behind all text, and don't exist."""
    if positions is None:
        return {"pixel_values": pixels[:, 0]}
    exists = np.arange(pixels.shape[1]) < np.array([len(row) for row in positions])[:, None]
    places = np.full(exists.shape, LENGTH)
    places[exists] = [place for row in positions for place in row]
    return {"pixel_values": pixels, "image_positions": places, **({} if exists.all() else {"frame_mask": exists})}


def wrapper(config: JobConfig) -> VLMWrapper:
    assert config.vision_encoder is not None
    assert config.vlm is not None
    return build_vlm_wrapper(config.model, config.vision_encoder, config.adapter, config.vlm)


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Those of what the logits depend on, by names in memory."""
    return {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}


def own_gradients(model: VLMWrapper) -> dict[str, np.ndarray]:
    own = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {name: own[name].numpy() for name in get_state(model) if name in own}


def assert_back(
    model: Any, config: JobConfig, state: Named, folder: Path, pixels: np.ndarray, tokens: np.ndarray
) -> None:
    """Written here and read again: the same state here, and in transformers the same logits, to the bit."""
    save_image_model(folder, state, config)
    again = read_model(folder)
    assert again.config.model == config.model
    assert again.weights.keys() == state.keys()
    assert all(np.array_equal(again.weights[name], values) for name, values in state.items())
    loaded: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    there, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert there.config.image_token_index == model.config.image_token_index
    assert there.config.image_seq_length == image_tokens(model.config)
    with torch.no_grad():
        there_and_here = [
            logits_of_text(one, pixels, tokens, [[0], [3]][: len(tokens)]) for one in (there.eval(), model)
        ]
        assert torch.equal(*there_and_here)


# Settings


def content(**changes: Any) -> dict[str, Any]:
    tower = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 18, "patch_size": 4}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
    return {"model_type": "llava", "vision_config": tower, "text_config": text, **changes}


def folder_with(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content(**changes)))
    return folder


SIGLIP = {"model_type": "siglip_vision_model", "num_hidden_layers": 3}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer = \[-2, -5\]: must be one integer from 1 to 3, or"),
    ({"vision_feature_layer": 0}, "vision_feature_layer = 0: must be one integer from 1 to 3, or from -3 to -1"),
    ({"vision_feature_layer": -4}, "vision_feature_layer = -4: must be"),
    ({"vision_feature_layer": 4}, "vision_feature_layer = 4: must be"),
    ({"vision_feature_layer": True}, "vision_feature_layer = True: must be"),
    ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy = 'cls': must be 'default' or 'full'"),
    ({"vision_config": SIGLIP}, "vision_feature_select_strategy = 'default': must be 'full', as the tower has no cla"),
    ({"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type = 'pixtral': must be clip_vision_model"),
    ({"vision_config": {"hidden_size": 0}}, "hidden_size = 0: must be a positive whole number"),
    ({"vision_config": {"num_patches": 9}}, "num_patches = 9: is for images of any shape"),
    ({"vision_config": 3}, "vision_config = 3: must be an object"),
    ({"text_config": {"model_type": "opt"}}, "text_config.model_type = 'opt': must be llama or mistral or qwen2"),
    ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act = 'relu': must be 'silu'"),
    ({"text_config": {"max_position_embeddings": 16}}, "max_position_embeddings = 16: must be more than the 16 tokens"),
    ({"projector_hidden_act": "gelu_new"}, "projector_hidden_act = 'gelu_new': must be one of gelu, relu, silu"),
    ({"multimodal_projector_bias": False}, "multimodal_projector_bias = False: must be True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: must be None"),
    ({"image_token_index": -1}, "image_token_index = -1: must be an integer, 0 or more"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_can_not_be_run_is_refused_by_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_config(folder_with(tmp_path, **changes))


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2, 3])
def test_a_feature_layer_counts_what_goes_into_the_first_block(layer: int) -> None:
    """As hidden_states of transformers, of which there is one more than blocks."""
    assert feature_blocks({"vision_feature_layer": layer}, 3) == range(3 + 1)[layer]


def test_keys_left_out_mean_what_transformers_says(tmp_path: Path) -> None:
    theirs: Any = transformers.LlavaConfig()
    assert {key: getattr(theirs, key, None) for key in DEFAULTS} == DEFAULTS
    assert {key: getattr(theirs.vision_config, key) for key in TOWER} == TOWER
    for family, (config_class, _) in TEXTS.items():
        default = config_class()
        assert {key: getattr(default, key) for key in TEXT_DEFAULTS[family]} == TEXT_DEFAULTS[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    config = load_config(str(tmp_path))
    text, said = theirs.text_config, config.model
    assert (said.dim, said.n_layers, said.computed_ffn_hidden_dim) == (text.hidden_size, 32, text.intermediate_size)
    assert (said.vocab_size, said.max_seq_len, said.family) == (text.vocab_size, 2048, "llama")


def test_sections_follow_from_a_folder(tmp_path: Path) -> None:
    found = read_image_config(folder_with(tmp_path, projector_hidden_act="relu"))
    assert found["vision_encoder"] == {"type": "clip", "path": str(tmp_path)}
    assert found["adapter"] == {"type": "mlp_2layer", "activation": "relu"}
    assert found["vlm"] == {"arch": "joint_decoder", "max_text_len": POSITIONS - 16, "image_token_id": 32000}
    config = load_config(str(tmp_path))
    assert config.train.seq_len == POSITIONS - 16


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    text: dict[str, Any] = {**content()["text_config"], "vocab_size": VOCABULARY, "intermediate_size": 24}
    llama, tower = transformers.LlamaConfig(**text), content()["vision_config"]
    config = transformers.LlavaConfig(text_config=llama, vision_config=tower)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    whole = load_weights(tmp_path)
    for name in ("multi_modal_projector.linear_2.bias", "vision_tower.embeddings.class_embedding"):
        save_weights(tmp_path, {key: value for key, value in whole.items() if key != name})
        with pytest.raises(WeightsError, match=f"{name.removeprefix('multi_modal_projector.')}: missing"):
            read_model(tmp_path)
    save_weights(tmp_path, {**whole, "image_newline": whole["multi_modal_projector.linear_2.bias"]})
    with pytest.raises(WeightsError, match="image_newline: unexpected"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "sees"),
    [(None, False), ("{", False), ("[]", False), ('{"model_type": "llama"}', False), ('{"model_type": "llava"}', True),
     ('{"model_type": "paligemma"}', True)],
)  # fmt: skip
def test_a_folder_is_told_by_its_config(content: str | None, sees: bool, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert is_image_folder(tmp_path) == sees
