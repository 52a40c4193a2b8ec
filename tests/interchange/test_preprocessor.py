"""Settings of pictures, one by one: what each makes of a picture, and all that is said of those that can't be
followed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared_config.contract.vision import TowerConfig, tower_table
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.preprocessor import PixelRange, read_preprocessor
from shared_config.interchange.vision import (
    hugging_face_name,
    load_tower_weights,
    picture_format,
    read_tower,
    resolve_tower,
    tower_of,
)
from shared_config.interchange.weights import WeightsError, save_weights
from shared_config.loader import load_config
from shared_config.schema.video import VideoConfig
from shared_config.schema.vision import VisionEncoderConfig

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STRETCHED = PixelRange(28, HALF, HALF, 1 / 255, shortest_edge=0, stretch=True, resample=3, crop=False)
CROPPED = PixelRange(28, CLIP_MEAN, CLIP_STD, 1 / 255, shortest_edge=28, stretch=False, resample=3, crop=True)


def with_fields(base: PixelRange, **changes: Any) -> PixelRange:
    return PixelRange(**{**vars(base), **changes})


def read(folder: Path, kind: str, fields: dict[str, Any], name: str = "preprocessor_config.json") -> PixelRange:
    (folder / name).write_text(json.dumps(fields))
    return read_preprocessor(str(folder), kind, 28)


FOLLOWED: list[tuple[str, dict[str, Any], PixelRange]] = [
    ("siglip2", {}, STRETCHED),
    ("clip", {}, CROPPED),
    ("clip", {"image_processor_type": "SiglipImageProcessorPil"}, STRETCHED),
    ("siglip2", {"feature_extractor_type": "CLIPFeatureExtractor"}, CROPPED),
    ("clip", {"image_processor_type": "SiglipImageProcessor", "feature_extractor_type": "CLIPFeatureExtractor"},
     STRETCHED),
    ("siglip2", {"do_resize": False, "do_center_crop": True}, with_fields(STRETCHED, stretch=False, crop=True)),
    ("clip", {"do_resize": False, "size": "x"}, with_fields(CROPPED, shortest_edge=0)),
    ("clip", {"do_rescale": False}, with_fields(CROPPED, scale=1.0)),
    ("clip", {"do_rescale": None, "rescale_factor": "x"}, with_fields(CROPPED, scale=1.0)),
    ("clip", {"rescale_factor": 1}, with_fields(CROPPED, scale=1.0)),
    ("clip", {"rescale_factor": 0.25}, with_fields(CROPPED, scale=0.25)),
    ("clip", {"do_normalize": False, "image_mean": "x"}, with_fields(CROPPED, mean=(0, 0, 0), std=(1, 1, 1))),
    ("clip", {"image_mean": [1, 2.5, -3], "image_std": [4, 5, 6.5]},
     with_fields(CROPPED, mean=(1.0, 2.5, -3.0), std=(4.0, 5.0, 6.5))),
    ("clip", {"resample": 0}, with_fields(CROPPED, resample=0)),
    ("clip", {"resample": 5}, with_fields(CROPPED, resample=5)),
    ("clip", {"size": 31}, with_fields(CROPPED, shortest_edge=31)),
    ("clip", {"size": {"shortest_edge": 1}}, with_fields(CROPPED, shortest_edge=1)),
    ("clip", {"size": 28, "default_to_square": True}, with_fields(CROPPED, shortest_edge=0, stretch=True)),
    ("clip", {"size": {"height": 28, "width": 28}}, with_fields(CROPPED, shortest_edge=0, stretch=True)),
    ("clip", {"size": [28, 28], "crop_size": [28, 28]}, with_fields(CROPPED, shortest_edge=0, stretch=True)),
    ("clip", {"crop_size": {"width": 28, "height": 28}}, CROPPED),
    ("siglip2", {"size": 28, "crop_size": 3}, STRETCHED),
    ("siglip2", {"size": 40, "default_to_square": False, "do_center_crop": True},
     with_fields(STRETCHED, shortest_edge=40, stretch=False, crop=True)),
    ("siglip2", {"do_convert_rgb": False, "do_pad": False, "data_format": "channels_first", "device": "cpu",
                 "max_num_patches": None, "disable_grouping": True, "return_tensors": "pt",
                 "input_data_format": "x", "processor_class": "y"}, STRETCHED),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "expected"), FOLLOWED)
def test_settings_are_followed(kind: str, fields: dict[str, Any], expected: PixelRange, tmp_path: Path) -> None:
    found = read(tmp_path, kind, fields)
    assert found == expected
    numbers = (found.scale, found.shortest_edge, found.stretch, found.crop, *found.mean, *found.std)
    assert [type(number) for number in numbers] == [float, int, bool, bool, *[float] * 6]


KNOWN = (
    "CLIPImageProcessor, CLIPImageProcessorFast, CLIPImageProcessorPil, CLIPFeatureExtractor, SiglipImageProcessor, "
    "SiglipImageProcessorFast, SiglipImageProcessorPil"
)
NEEDED_SIZE = "must be a positive number, 'height' and 'width', or 'shortest_edge'"
REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("clip", {"image_processor_type": "Other"}, [f"image_processor_type = 'Other': must be one of {KNOWN}"]),
    ("clip", {"do_resize": "no", "do_convert_rgb": 1, "do_pad": True, "max_num_patches": 0.5}, [
        "do_resize = 'no': must be true or false", "do_convert_rgb = 1: must be true or false",
        "do_pad = True: is not supported; must be left out",
        "max_num_patches = 0.5: is not supported; must be left out",
    ]),
    ("siglip2", {"do_resize": False}, [
        "do_resize = false: needs do_center_crop = true, as the encoder takes pictures of one size",
    ]),
    ("clip", {"crop_size": 27}, ["crop_size = 27: must be the encoder's image size, 28"]),
    ("clip", {"crop_size": {"height": 28, "width": 29}}, [
        "crop_size = {'height': 28, 'width': 29}: must be the encoder's image size, 28",
    ]),
    ("clip", {"crop_size": {"height": 28}}, ["crop_size = {'height': 28}: must be the encoder's image size, 28"]),
    ("clip", {"crop_size": [28]}, ["crop_size = [28]: must be the encoder's image size, 28"]),
    ("clip", {"crop_size": ["28", 28]}, ["crop_size = ['28', 28]: must be the encoder's image size, 28"]),
    ("clip", {"rescale_factor": 0}, ["rescale_factor = 0: must be a positive number"]),
    ("clip", {"rescale_factor": -0.5}, ["rescale_factor = -0.5: must be a positive number"]),
    ("clip", {"rescale_factor": float("inf")}, ["rescale_factor = inf: must be a positive number"]),
    ("clip", {"image_mean": [1, 2], "image_std": [1, 2, 3, 4]}, [
        "image_mean = [1, 2]: must be three numbers", "image_std = [1, 2, 3, 4]: must be three numbers",
    ]),
    ("clip", {"image_mean": [0, 0, 0], "image_std": [1, 0, 1]}, ["image_std = [1, 0, 1]: must be positive"]),
    ("clip", {"image_std": [1, 1, True]}, ["image_std = [1, 1, True]: must be three numbers"]),
    ("clip", {"resample": -1}, ["resample = -1: must be one of 0, 1, 2, 3, 4, 5"]),
    ("clip", {"resample": 6}, ["resample = 6: must be one of 0, 1, 2, 3, 4, 5"]),
    ("clip", {"resample": False}, ["resample = False: must be one of 0, 1, 2, 3, 4, 5"]),
    ("clip", {"size": 0}, [f"size = 0: {NEEDED_SIZE}"]),
    ("clip", {"size": None}, [f"size = None: {NEEDED_SIZE}"]),
    ("clip", {"size": {"shortest_edge": 0}}, [f"size = {{'shortest_edge': 0}}: {NEEDED_SIZE}"]),
    ("clip", {"size": {"shortest_edge": 28, "longest_edge": 30}}, [
        f"size = {{'shortest_edge': 28, 'longest_edge': 30}}: {NEEDED_SIZE}",
    ]),
    ("clip", {"size": {"height": 28, "width": 0}}, [f"size = {{'height': 28, 'width': 0}}: {NEEDED_SIZE}"]),
    ("clip", {"size": [28.0, 28]}, [f"size = [28.0, 28]: {NEEDED_SIZE}"]),
    ("clip", {"size": [28, 28, 28]}, [f"size = [28, 28, 28]: {NEEDED_SIZE}"]),
    ("clip", {"size": {"height": 28.0, "width": 28}}, [f"size = {{'height': 28.0, 'width': 28}}: {NEEDED_SIZE}"]),
    ("clip", {"crop_size": [28.0, 28]}, ["crop_size = [28.0, 28]: must be the encoder's image size, 28"]),
    ("clip", {"size": [28, 27]}, ["size = [28, 27]: must be the encoder's image size, 28"]),
    ("clip", {"size": 27, "default_to_square": True}, ["size = 27: must be the encoder's image size, 28"]),
    ("siglip2", {"size": {"shortest_edge": 28}}, [
        "size = {'shortest_edge': 28}: needs do_center_crop = true, as the encoder takes square pictures only",
    ]),
    ("siglip2", {"size": 27, "resample": "3"}, [
        "resample = '3': must be one of 0, 1, 2, 3, 4, 5", "size = 27: must be the encoder's image size, 28",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "said"), REFUSED)
def test_all_that_is_said_of_settings(kind: str, fields: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, kind, fields)
    file = tmp_path / "preprocessor_config.json"
    assert str(caught.value) == "\n".join(f"{file}: {problem}" for problem in said)


def test_the_own_file_counts_before_that_of_the_whole_processor(tmp_path: Path) -> None:
    both = {"image_processor": {"resample": 2}, "resample": 4}
    assert read(tmp_path, "clip", both, "processor_config.json").resample == 2
    assert read(tmp_path, "clip", {"image_processor": None, "resample": 4}, "processor_config.json") == CROPPED
    read(tmp_path, "clip", both, "processor_config.json")
    assert read(tmp_path, "clip", {"resample": 1}).resample == 1
    with pytest.raises(UserError, match=r"preprocessor_config\.json: resample = 7"):
        read(tmp_path, "clip", {"resample": 7})
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"/processor_config\.json: resample = 7"):
        read(tmp_path, "clip", {"image_processor": {"resample": 7}}, "processor_config.json")


def test_without_a_folder_no_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read(tmp_path, "clip", {"resample": 1})
    assert read_preprocessor("", "clip", 28) == CROPPED
    assert read_preprocessor(str(tmp_path), "clip", 28).resample == 1


@pytest.mark.parametrize("scale", [1 / 255, 0.1, 1.0])
def test_numbers_are_scaled_then_normalised_channel_by_channel(scale: float) -> None:
    """Every byte times the scale in float64, rounded once; then two operations in float32, as transformers does."""
    frames = np.random.default_rng(1).permutation(np.arange(768) % 256).astype(np.uint8).reshape(1, 16, 16, 3)
    frames = np.concatenate([frames, frames[:, ::-1]])
    pixels = PixelRange(16, (1.0, 2.0, 3.0), (0.5, 0.25, 2.0), scale=scale)
    found = pixels.numbers(frames)
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.float32, (2, 3, 16, 16), True)
    for channel, (mean, std) in enumerate(zip(pixels.mean, pixels.std, strict=True)):
        expected = [np.float32(int(byte) * scale) for byte in frames[..., channel].ravel()]
        expected = [(value - np.float32(mean)) / np.float32(std) for value in expected]
        assert found[:, channel].ravel().tolist() == expected


# Towers


def folder_with(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 6}
SIZES |= {"image_size": 28, "patch_size": 14}


def said_of_tower(folder: Path, kind: str, **fields: Any) -> list[str]:
    try:
        read_tower(folder_with(folder, **fields), kind)
    except UserError as error:
        prefix = f"{folder / 'config.json'}: "
        lines = str(error).split("\n")
        assert all(line.startswith(prefix) for line in lines)
        return [line.removeprefix(prefix) for line in lines]
    return []


ACTIVATIONS = "gelu, gelu_pytorch_tanh, quick_gelu, relu, silu"
TOWERS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("clip", {"model_type": "clip"}, []),
    ("siglip2", {"model_type": "siglip"}, []),
    ("clip", {"model_type": "siglip"}, ["model_type = 'siglip': type 'clip' needs clip or clip_vision_model"]),
    ("siglip2", {}, ["model_type = None: type 'siglip2' needs siglip or siglip_vision_model"]),
    *(("siglip2", {"model_type": name}, [
        f"model_type = '{name}' is NaFlex, with patches of images of any shape, which can't be run; must be a "
        "fixed-resolution model: siglip, siglip_vision_model",
    ]) for name in ("siglip2", "siglip2_vision_model")),
    ("clip", {"model_type": "clip", "hidden_size": 0, "patch_size": "16", "hidden_act": "tanh"}, [
        "hidden_size = 0: must be a positive whole number", "patch_size = '16': must be a positive whole number",
    ]),
    ("clip", {"model_type": "clip", "hidden_act": "tanh", "num_channels": 1, "patch_size": 29}, [
        "num_channels = 1: must be 3", f"hidden_act = 'tanh': must be one of {ACTIVATIONS}",
        "patch_size = 29: must be at most image_size = 28",
    ]),
    ("clip", {"model_type": "clip", "patch_size": 28, "num_attention_heads": 24}, []),
    ("clip", {"model_type": "clip", "num_attention_heads": 1, "num_channels": 3}, []),
    ("clip", {"model_type": "clip", "num_attention_heads": 7}, [
        "num_attention_heads = 7: must divide hidden_size = 24",
    ]),
    ("clip", {"model_type": "clip", "vision_config": {"num_attention_heads": 5, "hidden_size": 20, "image_size": 7}}, [
        "patch_size = 32: must be at most image_size = 7", "num_attention_heads = 5: must divide hidden_size = 20",
    ][:1]),
    ("clip", {"model_type": "clip", "vision_config": None}, []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "said"), TOWERS)
def test_all_that_is_said_of_a_tower(kind: str, fields: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    assert said_of_tower(tmp_path, kind, **{**SIZES, **fields}) == said


def test_the_part_of_a_tower_counts_alone(tmp_path: Path) -> None:
    nested = {"image_size": 56, "patch_size": 7, "hidden_size": 36}
    tower = read_tower(folder_with(tmp_path, **SIZES, model_type="clip", vision_config=nested), "clip")
    assert tower == TowerConfig(
        image_size=56, patch_size=7, dim=36, n_layers=12, n_heads=12, ffn_hidden_dim=3072, activation="quick_gelu",
        norm_eps=1e-5, class_token=True, patch_bias=False, pre_norm=True, final_norm=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["siglip2", "clip"])
def test_a_config_agrees_with_its_folder(kind: str, tmp_path: Path) -> None:
    model_type = {"siglip2": "siglip", "clip": "clip"}[kind]
    folder_with(tmp_path, **SIZES, model_type=model_type)
    encoder = VisionEncoderConfig(type=kind, path=str(tmp_path))
    tower = resolve_tower(encoder)
    assert tower is not None
    assert (tower.dim, tower.image_size) == (24, 28)
    tokens = tower.num_tokens
    full = encoder.replace(feature_dim=24, num_tokens=tokens, image_size=28)
    assert resolve_tower(full) == tower
    with pytest.raises(ConfigError) as caught:
        resolve_tower(encoder.replace(feature_dim=25, num_tokens=tokens + 1, image_size=29))
    needed = f"must be 0 or what {tmp_path} says, "
    assert caught.value.problems == (
        f"vision_encoder.feature_dim = 25: {needed}24",
        f"vision_encoder.num_tokens = {tokens + 1}: {needed}{tokens}",
        f"vision_encoder.image_size = 29: {needed}28",
    )
    assert picture_format(full) == (STRETCHED if kind == "siglip2" else CROPPED)
    assert resolve_tower(VisionEncoderConfig(type="random", feature_dim=8, num_tokens=4)) is None


def test_frames_of_a_video_have_the_size_of_the_encoder(tmp_path: Path) -> None:
    folder_with(tmp_path, **SIZES, model_type="clip")
    tower = VisionEncoderConfig(type="clip", path=str(tmp_path))
    bare = VisionEncoderConfig(type="random", feature_dim=8, num_tokens=4)
    assert picture_format(tower, VideoConfig(frame_size=28)).side == 28
    assert picture_format(bare, VideoConfig(frame_size=30)).side == 30
    assert picture_format(bare.replace(image_size=32), VideoConfig(frame_size=32)).side == 32
    assert picture_format(bare.replace(image_size=32)).side == 32
    for encoder, side in ((tower, 28), (bare.replace(image_size=32), 32)):
        with pytest.raises(ConfigError) as caught:
            picture_format(encoder, VideoConfig(frame_size=30))
        assert caught.value.problems == (f"video.frame_size = 30: must be the encoder's image size, {side}",)
    silent: Any = SimpleNamespace(type="own", path="", image_size=0, known_image_size=0)
    assert picture_format(silent, VideoConfig(frame_size=30)).side == 30
    with pytest.raises(ConfigError) as caught:
        picture_format(silent)
    said = "vision_encoder.image_size = 0: type 'own' does not say the size of its images"
    assert caught.value.problems == (said,)


def test_only_jobs_with_pictures_have_a_tower() -> None:
    assert tower_of(load_config("debug")) is None
    tower = tower_of(load_config("debug_vlm_joint_decoder"))
    assert tower is not None
    assert (tower.dim, tower.image_size, tower.num_tokens) == (64, 32, 16)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_tensors_of_a_tower_come_from_their_names(prefix: str, tmp_path: Path) -> None:
    folder_with(tmp_path, **SIZES, model_type="clip")
    tower = read_tower(tmp_path, "clip")
    table = tower_table(tower)
    rng = np.random.default_rng(1)
    state = {name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in table.items()}
    there = {prefix + hugging_face_name(name): value for name, value in state.items()}
    patches = f"{prefix}embeddings.patch_embedding.weight"
    there[patches] = there[patches].reshape(24, 3, 14, 14)
    there["text_model.final_layer_norm.weight"] = np.ones(3, np.float32)
    save_weights(tmp_path, there)
    found = load_tower_weights(tmp_path, tower)
    assert list(found) == list(table)
    assert all(np.array_equal(found[name], value) for name, value in state.items())
    fc1 = f"{prefix}encoder.layers.0.mlp.fc1.weight"
    save_weights(tmp_path, {name: value for name, value in there.items() if name not in (fc1, patches)})
    with pytest.raises(WeightsError) as caught:
        load_tower_weights(tmp_path, tower)
    assert caught.value.problems == (f"{patches}: missing", f"{fc1}: missing")
    save_weights(tmp_path, {**there, fc1: there[fc1].T})
    with pytest.raises(WeightsError) as caught:
        load_tower_weights(tmp_path, tower)
    said = "layers.0.mlp.up_proj.weight: shape (24, 40), the model needs (40, 24)"
    assert str(caught.value) == f"{tmp_path}: 1 tensors do not fit:\n  {said}"
