"""Pictures of every mode become the numbers that transformers' own processors make of them, as the folder asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from shared_config.data.media import UndecodableError, framed, read_image, to_rgb
from shared_config.errors import UserError
from shared_config.interchange.preprocessor import PixelRange, read_preprocessor
from shared_config.interchange.vision import picture_format
from shared_config.schema import VisionEncoderConfig

MODES = ("1", "L", "LA", "P", "P transparent", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "L transparent")
THEIRS: dict[str, Any] = {"clip": CLIPImageProcessorPil, "siglip2": SiglipImageProcessorPil}
ORIENTATION = 0x0112
NUMBERS = st.floats(0.05, 1.0, allow_nan=False).map(lambda value: round(value, 3))


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    name = mode.split()[0]
    if name == "P":
        image = rgba.convert("RGB").quantize(16)
    elif name == "PA":
        image = rgba.convert("LA").convert("PA")
    else:
        image = (rgba if name in ("RGBA", "LA") else rgba.convert("RGB")).convert(name)
    if mode == "P transparent":
        image.info["transparency"] = 3
    elif mode == "L transparent":
        image.info["transparency"] = int(np.asarray(image).flat[0])
    return image


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[str, int, dict[str, Any]]:
    """A kind, the side of its pictures, and a preprocessor_config.json that gives such."""
    kind, side = draw(st.sampled_from(["clip", "siglip2"])), draw(st.integers(4, 13))
    crops = draw(st.booleans())
    square = draw(st.sampled_from([{"height": side, "width": side}, [side, side]]))
    edge = draw(st.integers(max(side - 3, 1), side + 6))
    sizes: list[Any] = [square]
    fields: dict[str, Any] = {"do_center_crop": crops}
    if crops:
        sizes += [{"shortest_edge": edge}, *([edge] if kind == "clip" else [])]
        fields["crop_size"] = draw(st.sampled_from([side, {"height": side, "width": side}]))
        fields["do_resize"] = draw(st.booleans())
    fields["size"] = draw(st.sampled_from(sizes))
    fields["resample"] = draw(st.integers(0, 5))
    fields |= {name: draw(st.booleans()) for name in ("do_rescale", "do_normalize")}
    fields["rescale_factor"] = draw(st.sampled_from([1 / 255, 1 / 127.5, 0.5]))
    for name in ("image_mean", "image_std"):
        fields[name] = draw(st.lists(NUMBERS, min_size=3, max_size=3))
    optional = draw(
        st.sets(st.sampled_from(["do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std"]))
    )
    return kind, side, {name: value for name, value in fields.items() if name not in optional}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=settings_of(), mode=st.sampled_from(MODES), width=st.integers(1, 30), height=st.integers(1, 30),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pictures_of_every_mode_are_prepared_as_transformers_does(
    chosen: tuple[str, int, dict[str, Any]], mode: str, width: int, height: int, seed: int, tmp_path: Path
) -> None:
    kind, side, fields = chosen
    image = picture(mode, width, height, seed)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    theirs = THEIRS[kind](**fields)
    expected = theirs(image, return_tensors="np")["pixel_values"]
    assume(expected.shape == (1, 3, side, side))
    pixels = read_preprocessor(str(tmp_path), kind, side)
    ours = pixels.numbers(framed(to_rgb(image), pixels)[None])
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected.astype(np.float32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_as_their_orientation_says(orientation: int, tmp_path: Path) -> None:
    turns = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    stored = np.random.default_rng(orientation).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    shown = read_image(tmp_path / "a.png", PixelRange(6, (0, 0, 0), (1, 1, 1)))
    np.testing.assert_array_equal(shown, turns[orientation](stored))


HALVES = [int((k + 0.5) * (2**31 - 1) / 255) + side for k in range(3, 255, 15) for side in (0, 1)]
"""Integers on either side of what lies halfway between two bytes, where 2^31 - 1 becomes 255."""

WIDE = {
    "16-bit PNG": (np.linspace(0, 65535, 36).reshape(6, 6).astype(np.uint16), "a.png", 65535),
    "dark 16-bit PNG": (np.linspace(0, 2560, 36).reshape(6, 6).astype(np.uint16), "a.png", 65535),
    "16-bit TIFF": (np.linspace(0, 65535, 36).reshape(6, 6).astype(np.uint16), "a.tif", 65535),
    "int32 TIFF": (np.linspace(0, 2**31 - 1, 36).reshape(6, 6).astype(np.int32), "a.tif", 2**31 - 1),
    "int32 TIFF next to halves": (np.array([*HALVES, 0, 2**31 - 1], np.int32).reshape(6, 6), "a.tif", 2**31 - 1),
    "small int32 TIFF": (np.linspace(0, 1000, 36).reshape(6, 6).astype(np.int32), "a.tif", 1000),
    "int32 TIFF of bytes": (np.arange(36).reshape(6, 6).astype(np.int32), "a.tif", 255),
    "float TIFF to 1": (np.linspace(0, 0.8, 36).reshape(6, 6).astype(np.float32), "a.tif", 1),
    "float TIFF to 255": (np.linspace(0, 200, 36).reshape(6, 6).astype(np.float32), "a.tif", 255),
    "float TIFF to 5000": (np.linspace(0, 5000, 36).reshape(6, 6).astype(np.float32), "a.tif", 5000),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_pixels_are_scaled_and_not_cut_off(name: str, tmp_path: Path) -> None:
    values, file, top = WIDE[name]
    Image.fromarray(values).save(tmp_path / file)
    shown = read_image(tmp_path / file, PixelRange(6, (0, 0, 0), (1, 1, 1)))
    np.testing.assert_array_equal(shown, np.rint(values / top * 255)[..., None].repeat(3, axis=2))


def test_negative_pixels_are_scaled_and_those_that_are_no_numbers_refused(tmp_path: Path) -> None:
    pixels = PixelRange(2, (0, 0, 0), (1, 1, 1))
    Image.fromarray(np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", pixels)[..., 0].tolist() == [[0, 128], [191, 255]]
    Image.fromarray(np.array([[np.nan, 0.0], [0.5, 1.0]], np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(UndecodableError, match="not finite"):
        read_image(tmp_path / "b.tif", pixels)
    Image.fromarray(np.zeros((1, 60_000), np.uint8)).save(tmp_path / "thin.png")
    with pytest.raises(UndecodableError, match="once it is resized"):
        read_image(
            tmp_path / "thin.png", PixelRange(224, (0, 0, 0), (1, 1, 1), shortest_edge=224, stretch=False, crop=True)
        )


def clip_folder(path: Path, fields: dict[str, Any] | None, name: str = "preprocessor_config.json") -> PixelRange:
    config = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    (path / "config.json").write_text(json.dumps(config))
    if fields is not None:
        (path / name).write_text(json.dumps(fields))
    return picture_format(VisionEncoderConfig(type="clip", path=str(path)))


def test_a_clip_folder_without_settings_has_those_of_its_kind(tmp_path: Path) -> None:
    usual = clip_folder(tmp_path, None)
    assert (usual.shortest_edge, usual.crop, usual.stretch) == (28, True, False)
    nested = {"image_processor": {"do_center_crop": False, "size": {"height": 28, "width": 28}}}
    assert clip_folder(tmp_path, nested, "processor_config.json").stretch
    assert (
        clip_folder(tmp_path, {"do_normalize": False, "do_rescale": False})
        .numbers(np.full((1, 28, 28, 3), 7, np.uint8))
        .tolist()
        == np.full((1, 3, 28, 28), 7.0).tolist()
    )


def test_the_type_of_the_processor_counts_before_that_of_the_encoder(tmp_path: Path) -> None:
    kinds = {"CLIPImageProcessor": clip_folder(tmp_path, None)}
    kinds["SiglipImageProcessor"] = read_preprocessor("", "siglip", 28)
    assert len(set(kinds.values())) == 2
    for name, usual in kinds.items():
        assert clip_folder(tmp_path, {"image_processor_type": name}) == usual


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std = \[0\.5, 0\.0, 0\.5\]: must be positive"),
        ({"image_std": [0.5, -1, 0.5]}, "image_std .* must be positive"),
        ({"image_mean": None}, "image_mean = None: must be three numbers"),
        ({"image_mean": [0.5, 0.5]}, "image_mean .* three numbers"),
        ({"image_mean": [float("nan"), 0, 0]}, "image_mean .* three numbers"),
        ({"rescale_factor": 0}, "rescale_factor = 0"),
        ({"rescale_factor": "x"}, "rescale_factor = 'x'"),
        ({"do_rescale": "yes"}, "do_rescale = 'yes': must be true or false"),
        ({"size": {"longest_edge": 30}}, "size = "),
        ({"size": {"shortest_edge": 28}, "do_center_crop": False}, "needs do_center_crop = true"),
        ({"size": [28, 30]}, "must be the encoder's image size, 28"),
        ({"size": {"height": 30, "width": 30}}, "must be the encoder's image size, 28"),
        ({"size": True}, "size = True"),
        ({"crop_size": {"height": 20, "width": 28}}, "crop_size = .*image size, 28"),
        ({"do_resize": False, "do_center_crop": False}, "do_resize = false"),
        ({"resample": 9}, "resample = 9"),
        ({"resample": None}, "resample = None"),
        ({"resample": True}, "resample = True"),
        ({"resample": 1.0}, r"resample = 1\.0"),
        ({"rescale_factor": True}, "rescale_factor = True"),
        ({"rescale_factor": -1.0}, r"rescale_factor = -1\.0"),
        ({"image_mean": [True, 0, 0]}, "image_mean .* three numbers"),
        ({"do_pad": True}, "do_pad = True: is not supported"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order = True: is not supported"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViTImageProcessor'"),
        ({"max_num_patches": 256}, "max_num_patches = 256: is not supported"),
    ],
)
def test_settings_that_can_not_be_followed_are_refused_by_name(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        clip_folder(tmp_path, fields)
    assert str(tmp_path / "preprocessor_config.json") in str(caught.value)
