"""Vision towers in local Hugging Face folders (config.json, safetensors): SigLIP and CLIP, alone, with a text tower, or
within a LLaVA or a PaliGemma. SigLIP 2 of fixed resolution is a SigLIP.

Nothing is fetched: what is not in the folder is an error that says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, TypeGuard

import numpy as np

from shared_config.contract.vision import TowerConfig, tower_table, vit_tower
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.llava_config import (
    MODEL_TYPE,
    STRATEGY,
    feature_blocks,
    llava_problems,
    setting,
    tower_content,
)
from shared_config.interchange.paligemma_config import is_paligemma, paligemma_problems, paligemma_tower
from shared_config.interchange.preprocessor import PixelRange, read_preprocessor
from shared_config.interchange.reading import read_json
from shared_config.interchange.weights import WeightsError, check_tensors, load_weights
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.job import JobConfig
from shared_config.schema.video import VideoConfig
from shared_config.schema.vision import VisionEncoderConfig

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
MODEL_TYPES = {"siglip2": ("siglip", "siglip_vision_model"), "clip": ("clip", "clip_vision_model")}
NAFLEX = ("siglip2", "siglip2_vision_model")
TOWER_PREFIXES = (
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.vision_model.",
    "vision_tower.",
    "vision_model.",
)
"""Starts of the names of a tower's tensors, the longer ones first; alone it has none."""

SHARED_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
DEFAULTS: dict[str, dict[str, int | float | str]] = {
    "siglip2": {
        **SHARED_DEFAULTS,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "clip": {
        **SHARED_DEFAULTS,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
"""What transformers takes where config.json leaves a field out."""

SIZES = (*SHARED_DEFAULTS, "image_size", "patch_size", "num_channels")


class TowerFields(TypedDict):
    """What config.json says of a tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    hidden_act: str
    layer_norm_eps: float


NAMES = {
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "class_embedding": "embeddings.class_embedding",
    "pre_norm": "pre_layrnorm",
    "norm": "post_layernorm",
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "attention": "self_attn",
    "o_proj": "out_proj",
    "up_proj": "fc1",
    "down_proj": "fc2",
    "layers": "encoder.layers",
}
"""Parts of names that differ: here -> there."""


def picture_format(config: VisionEncoderConfig, video: VideoConfig | None = None) -> PixelRange:
    """What pictures an encoder takes: from its folder's preprocessor_config.json, else the usual values of its kind.

    Raises:
        UserError: a folder that can't be read, or settings that can't be followed.
        ConfigError: frames of another size than the encoder's.
    """
    tower = resolve_tower(config)
    side = tower.image_size if tower is not None else config.known_image_size
    if video is not None and (tower is not None or config.image_size):
        if video.frame_size != side:
            raise ConfigError([f"video.frame_size = {video.frame_size}: must be the encoder's image size, {side}"])
    elif video is not None:
        side = video.frame_size
    if not side:
        raise ConfigError([f"vision_encoder.image_size = 0: type {config.type!r} does not say the size of its images"])
    return read_preprocessor(config.path, config.type, side)


def tower_of(config: JobConfig) -> TowerConfig | None:
    """The vision tower of a job, as `resolve_tower` finds it; None where it has none."""
    return None if config.vlm is None or config.vision_encoder is None else resolve_tower(config.vision_encoder)


def tokens_per_image(config: JobConfig) -> int:
    """Tokens that the adapter gives for an image; 0 without images, and for an encoder that says it when it is built.

    Raises:
        UserError: as `resolve_tower`.
    """
    if config.vision_encoder is None:
        return 0
    tower = tower_of(config)
    tokens = config.vision_encoder.known_num_tokens if tower is None else tower.num_tokens
    return (config.adapter or AdapterConfig()).output_num_tokens(tokens) if tokens else 0


def resolve_tower(config: VisionEncoderConfig) -> TowerConfig | None:
    """The tower of an encoder's config; None for a type that has none.

    Raises:
        UserError: a folder that can't be read, or whose model is of another kind.
        ConfigError: the config contradicts the folder.
    """
    if config.type == "vit":
        return vit_tower(config)
    if config.type not in MODEL_TYPES:
        return None
    tower = read_tower(config.path, config.type)
    known = {"feature_dim": tower.dim, "num_tokens": tower.num_tokens, "image_size": tower.image_size}
    problems = [
        f"vision_encoder.{name} = {getattr(config, name)}: must be 0 or what {config.path} says, {value}"
        for name, value in known.items()
        if getattr(config, name) not in (0, value)
    ]
    if problems:
        raise ConfigError(problems)
    return tower


def read_tower(folder: str | Path, kind: str) -> TowerConfig:
    """The tower that a folder's config.json describes.

    Args:
        kind: siglip2 or clip.

    Raises:
        UserError: no such file, not JSON, or a model that can't be run: the message names it.
    """
    file = Path(folder) / "config.json"
    fields = read_json(file)
    model_type = fields.get("model_type")
    if model_type in NAFLEX:
        raise UserError(
            f"{file}: model_type = {model_type!r} is NaFlex, with patches of images of any shape, which can't be run; "
            f"must be a fixed-resolution model: {', '.join(MODEL_TYPES['siglip2'])}"
        )
    if model_type == MODEL_TYPE:
        return _tower_of_llava(file, fields, kind)
    if is_paligemma(fields):
        return _tower_of_paligemma(file, fields, kind)
    if model_type not in MODEL_TYPES[kind]:
        raise UserError(f"{file}: model_type = {model_type!r}: type {kind!r} needs {' or '.join(MODEL_TYPES[kind])}")
    own = fields if "vision_config" not in fields else fields["vision_config"] or {}
    if not isinstance(own, Mapping):
        raise UserError(f"{file}: vision_config = {own!r}: must be an object")
    return _tower_from(file, own, kind)


def _tower_of_llava(file: Path, fields: Mapping[str, object], kind: str) -> TowerConfig:
    """The blocks up to the layer that the features come from, without the norm after the last."""
    if problems := list(llava_problems(fields)):
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    own = tower_content(fields)
    if own["model_type"] not in MODEL_TYPES[kind]:
        needed = " or ".join(MODEL_TYPES[kind])
        raise UserError(f"{file}: vision_config.model_type = {own['model_type']!r}: type {kind!r} needs {needed}")
    tower = _tower_from(file, own, kind)
    try:
        blocks = feature_blocks(fields, tower.n_layers)
    except ConfigError as error:
        raise ConfigError([f"{file}: {problem}" for problem in error.problems]) from error
    keep = tower.class_token and setting(fields, STRATEGY) == "full"
    return dataclasses.replace(tower, n_layers=blocks, final_norm=False, keep_class_token=keep)


def _tower_of_paligemma(file: Path, fields: Mapping[str, object], kind: str) -> TowerConfig:
    """All blocks, and the norm after the last."""
    if problems := list(paligemma_problems(fields)):
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    if kind != "siglip2":
        raise UserError(f"{file}: vision_config.model_type = 'siglip_vision_model': type {kind!r} needs another tower")
    return _tower_from(file, paligemma_tower(fields), kind)


def _tower_from(file: Path, own: Mapping[str, object], kind: str) -> TowerConfig:
    given: Mapping[str, object] = {**DEFAULTS[kind], **own}
    if not _fits(given):
        raise UserError("\n".join(f"{file}: {problem}" for problem in _unfit(given)))
    is_clip = kind == "clip"
    return TowerConfig(
        image_size=given["image_size"],
        patch_size=given["patch_size"],
        dim=given["hidden_size"],
        n_layers=given["num_hidden_layers"],
        n_heads=given["num_attention_heads"],
        ffn_hidden_dim=given["intermediate_size"],
        activation=given["hidden_act"],
        norm_eps=given["layer_norm_eps"],
        class_token=is_clip,
        patch_bias=not is_clip,
        pre_norm=is_clip,
        final_norm=not is_clip,
    )


def load_tower_weights(folder: str | Path, tower: TowerConfig) -> dict[str, np.ndarray]:
    """The tower's tensors from a folder, by our names. Text towers, pooling heads and projections are left there.

    Raises:
        WeightsError: listing every missing or misshapen tensor.
        UserError: a file that is missing or damaged.
    """
    return select_tower_weights(load_weights(folder), tower, str(folder))


def select_tower_weights(
    there: Mapping[str, np.ndarray], tower: TowerConfig, source: str = "weights"
) -> dict[str, np.ndarray]:
    """The tower's tensors among those of a folder, by our names.

    Raises:
        WeightsError: listing every missing or misshapen tensor of ``source``.
    """
    prefix = next((one for one in TOWER_PREFIXES if any(name.startswith(one) for name in there)), "")
    table = tower_table(tower)
    state = {}
    for name in table:
        foreign = prefix + hugging_face_name(name)
        if foreign in there:
            state[name] = _reshaped(name, there[foreign])
    missing = [f"{prefix}{hugging_face_name(name)}: missing" for name in table if name not in state]
    if missing:
        raise WeightsError(source, missing)
    check_tensors(state, table, source=source)
    return state


def hugging_face_name(name: str) -> str:
    """The name that transformers gives a tensor of a tower."""
    return ".".join(NAMES.get(part, part) for part in name.split("."))


def _reshaped(name: str, value: np.ndarray) -> np.ndarray:
    """The patch embedding is a convolution (F, 3, p, p) there and a matrix (F, 3 * p * p) here."""
    return value.reshape(len(value), -1) if name == "patch_embedding.weight" else value


def _fits(fields: Mapping[str, object]) -> TypeGuard[TowerFields]:
    return not _unfit(fields)


def _unfit(fields: Mapping[str, object]) -> list[str]:
    sizes = {name: size for name in SIZES if isinstance(size := fields[name], int) and size >= 1}
    problems = [f"{name} = {fields[name]!r}: must be a positive whole number" for name in SIZES if name not in sizes]
    if (given := fields.get("num_patches")) is not None:
        problems.append(f"num_patches = {given!r}: is for images of any shape (NaFlex); must be left out")
    if problems:
        return problems
    if sizes["num_channels"] != 3:
        problems.append(f"num_channels = {sizes['num_channels']}: must be 3")
    if fields["hidden_act"] not in ACTIVATIONS:
        problems.append(f"hidden_act = {fields['hidden_act']!r}: must be one of {', '.join(ACTIVATIONS)}")
    if not isinstance(fields["layer_norm_eps"], int | float):
        problems.append(f"layer_norm_eps = {fields['layer_norm_eps']!r}: must be a number")
    if sizes["image_size"] < sizes["patch_size"]:
        problems.append(f"patch_size = {sizes['patch_size']}: must be at most image_size = {sizes['image_size']}")
    if sizes["hidden_size"] % sizes["num_attention_heads"] != 0:
        problems.append(
            f"num_attention_heads = {sizes['num_attention_heads']}: must divide hidden_size = {sizes['hidden_size']}"
        )
    return problems
