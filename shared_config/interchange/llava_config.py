"""Hugging Face's config.json of a LLaVA (Liu et al. 2023, arXiv:2304.08485): a tower, a projector, a language model.

The image's tokens come from one of the tower's layers. They are placed where the prompt has the image token; here
they stand before the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shared_config.errors import ConfigError
from shared_config.interchange.huggingface_config import config_from_huggingface

MODEL_TYPE = "llava"
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": dict(zip(TEXT_SIZES, (32000, 4096, 11008, 32, 32), strict=True)),
    "mistral": dict(zip(TEXT_SIZES, (32000, 4096, 14336, 32, 32), strict=True)),
    "qwen2": dict(zip(TEXT_SIZES, (151936, 4096, 22016, 32, 32), strict=True)),
}
"""Sizes that transformers takes where ``text_config`` leaves them out, which LLaVAs do, by family."""

TOWER: Mapping[str, object] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower of a config.json without a ``vision_config``."""

TOWER_TYPES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip2"}
"""``model_type`` of ``vision_config`` -> type of our encoder."""

PROJECTOR_ACTIVATIONS = ("gelu", "relu", "silu")
FIXED: Mapping[str, object] = {"multimodal_projector_bias": True, "quantization_config": None}
IMAGE_TOKEN = "image_token_index"
FEATURE_LAYER, STRATEGY, ACTIVATION = "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"
DEFAULTS: Mapping[str, object] = {
    IMAGE_TOKEN: 32000,
    ACTIVATION: "gelu",
    STRATEGY: "default",
    FEATURE_LAYER: -2,
    **FIXED,
}
"""What transformers takes where config.json leaves a key out."""


def is_llava(content: object) -> bool:
    """Whether config.json is that of a LLaVA."""
    return isinstance(content, Mapping) and content.get("model_type") == MODEL_TYPE


def setting(content: Mapping[str, object], key: str) -> object:
    """A key's value, or what it means that it is left out."""
    return content.get(key, DEFAULTS[key])


def tower_content(content: Mapping[str, object]) -> Mapping[str, object]:
    """What describes the tower, with its ``model_type``."""
    own = content.get("vision_config")
    return {"model_type": TOWER["model_type"], **own} if isinstance(own, Mapping) else TOWER


def tower_kind(content: Mapping[str, object]) -> str:
    """The type of our encoder that has the tower of a config without `llava_problems`."""
    return TOWER_TYPES[str(tower_content(content)["model_type"])]


def text_fields(content: Mapping[str, object]) -> dict[str, object]:
    """Fields of `ModelConfig` of the language model.

    Raises:
        ConfigError: naming every key whose value can't be expressed.
    """
    own = _text(content)
    tied = bool(own.get("tie_word_embeddings", False)) or bool(content.get("tie_word_embeddings", False))
    sizes = TEXT_DEFAULTS[str(own["model_type"])]
    try:
        return config_from_huggingface({**sizes, **own, "tie_word_embeddings": tied})
    except ConfigError as error:
        raise ConfigError([f"text_config.{problem}" for problem in error.problems]) from error


def llava_problems(content: Mapping[str, object]) -> Iterator[str]:
    """What no model here has, apart from the sizes of the tower and the language model's own settings."""
    for key in ("text_config", "vision_config"):
        if not isinstance(content.get(key), Mapping | None):
            yield f"{key} = {content[key]!r}: must be an object"
    for key, kinds in (("text_config", tuple(TEXT_DEFAULTS)), ("vision_config", tuple(TOWER_TYPES))):
        own = (_text if key == "text_config" else tower_content)(content)
        if own["model_type"] not in kinds:
            yield f"{key}.model_type = {own['model_type']!r}: must be {' or '.join(kinds)}"
    if setting(content, ACTIVATION) not in PROJECTOR_ACTIVATIONS:
        yield f"{ACTIVATION} = {content[ACTIVATION]!r}: must be one of {', '.join(PROJECTOR_ACTIVATIONS)}"
    for key, needed in FIXED.items():
        if setting(content, key) != needed:
            yield f"{key} = {content[key]!r}: must be {needed!r}"
    yield from _image_token_problems(content)
    is_clip = tower_content(content)["model_type"] == TOWER["model_type"]
    strategies = ("default", "full") if is_clip else ("full",)
    if (strategy := setting(content, STRATEGY)) not in strategies:
        why = "" if is_clip else ", as the tower has no class token that the default could drop"
        yield f"{STRATEGY} = {strategy!r}: must be {' or '.join(map(repr, strategies))}{why}"


def feature_blocks(content: Mapping[str, object], n_layers: int) -> int:
    """Blocks of the tower that the features of ``vision_feature_layer`` have passed, from 1 to ``n_layers``.

    Raises:
        ConfigError: it is no index of a block's output: several layers, or what goes into the first.
    """
    index = setting(content, FEATURE_LAYER)
    if isinstance(index, int) and not isinstance(index, bool):
        blocks = index if index >= 0 else n_layers + 1 + index
        if 1 <= blocks <= n_layers:
            return blocks
    needed = f"one integer from 1 to {n_layers}, or from {-n_layers} to -1"
    raise ConfigError([f"{FEATURE_LAYER} = {index!r}: must be {needed}"])


def _text(content: Mapping[str, object]) -> Mapping[str, object]:
    own = content.get("text_config")
    return {"model_type": "llama", **own} if isinstance(own, Mapping) else {"model_type": "llama"}


def _image_token_problems(content: Mapping[str, object]) -> Iterator[str]:
    index = setting(content, IMAGE_TOKEN)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        yield f"{IMAGE_TOKEN} = {index!r}: must be an integer, 0 or more"
