"""Hugging Face's config.json of a PaliGemma (Beyer et al. 2024, arXiv:2407.07726; with Gemma 2: Steiner et al. 2024,
arXiv:2412.03555): a SigLIP with the norm after its blocks, one linear map, a Gemma.

The image's tokens stand first. They and the prompt see each other in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shared_config.errors import ConfigError
from shared_config.interchange.huggingface_config import config_from_huggingface, config_to_huggingface
from shared_config.schema.model import ModelConfig

MODEL_TYPE = "paligemma"
PALIGEMMA_TEXTS = ("gemma", "gemma2")
TEXT: Mapping[str, object] = {
    "model_type": "gemma",
    "vocab_size": 257152,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
"""The language model of a config.json without a ``text_config``."""

TOWER: Mapping[str, object] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
"""The tower of a config.json without a ``vision_config``."""

IMAGE_TOKEN, PROJECTION, TIED, BOTH_WAYS = (
    "image_token_index",
    "projection_dim",
    "tie_word_embeddings",
    "use_bidirectional_attention",
)
DEFAULTS: Mapping[str, object] = {IMAGE_TOKEN: 256000, PROJECTION: 2048, TIED: True, "quantization_config": None}
"""What transformers takes where config.json leaves a key out."""


def is_paligemma(content: object) -> bool:
    """Whether config.json is that of a PaliGemma."""
    return isinstance(content, Mapping) and content.get("model_type") == MODEL_TYPE


def paligemma_image_token(content: Mapping[str, object]) -> object:
    """The id that stands for the image."""
    return _setting(content, IMAGE_TOKEN)


def paligemma_tower(content: Mapping[str, object]) -> Mapping[str, object]:
    """What describes the tower, with its ``model_type``."""
    return _part(content, "vision_config", TOWER)


def paligemma_text(content: Mapping[str, object]) -> dict[str, object]:
    """Fields of `ModelConfig` of the language model.

    Raises:
        ConfigError: naming every key whose value can't be expressed.
    """
    own = {key: value for key, value in _part(content, "text_config", TEXT).items() if key != BOTH_WAYS}
    try:
        return config_from_huggingface(own)
    except ConfigError as error:
        raise ConfigError([f"text_config.{problem}" for problem in error.problems]) from error


def paligemma_content(model: ModelConfig, tower: Mapping[str, object], image_token: object) -> dict[str, object]:
    """The content of config.json.

    Args:
        tower: what ``vision_config`` says of it.
        image_token: the id that stands for the image.

    Raises:
        ConfigError: as `config_to_huggingface`; an output head of its own.
    """
    if not model.tie_embeddings:
        raise ConfigError(["model.tie_embeddings = False: must be True, as a PaliGemma has no output head of its own"])
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        IMAGE_TOKEN: image_token,
        "hidden_size": model.dim,
        PROJECTION: model.dim,
        TIED: True,
        "text_config": {**config_to_huggingface(model), BOTH_WAYS: True},
        "vision_config": {**tower, PROJECTION: model.dim},
    }


def paligemma_problems(content: Mapping[str, object]) -> Iterator[str]:
    """What no model here has, apart from the sizes of the tower and the language model's own settings."""
    for key in ("text_config", "vision_config"):
        if not isinstance(content.get(key), Mapping | None):
            yield f"{key} = {content[key]!r}: must be an object"
    text, tower = _part(content, "text_config", TEXT), paligemma_tower(content)
    if text["model_type"] not in PALIGEMMA_TEXTS:
        yield f"text_config.model_type = {text['model_type']!r}: must be {' or '.join(PALIGEMMA_TEXTS)}"
    if tower["model_type"] != TOWER["model_type"]:
        yield f"vision_config.model_type = {tower['model_type']!r}: must be {TOWER['model_type']}"
    if text.get(BOTH_WAYS, True) not in (True, None):
        yield f"text_config.{BOTH_WAYS} = {text[BOTH_WAYS]!r}: must be True, as image and prompt see each other"
    for name, given in ((f"text_config.{TIED}", text.get(TIED, True)), (TIED, _setting(content, TIED))):
        if given is not True:
            yield f"{name} = {given!r}: must be True"
    if _setting(content, "quantization_config") is not None:
        yield f"quantization_config = {content['quantization_config']!r}: must be None"
    if (width := _setting(content, PROJECTION)) != text.get("hidden_size"):
        yield f"{PROJECTION} = {width!r}: must be text_config.hidden_size = {text.get('hidden_size')!r}"
    index = _setting(content, IMAGE_TOKEN)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        yield f"{IMAGE_TOKEN} = {index!r}: must be an integer, 0 or more"


def _setting(content: Mapping[str, object], key: str) -> object:
    """A key's value, or what it means that it is left out."""
    return content.get(key, DEFAULTS[key])


def _part(content: Mapping[str, object], key: str, absent: Mapping[str, object]) -> Mapping[str, object]:
    own = content.get(key)
    return {"model_type": absent["model_type"], **own} if isinstance(own, Mapping) else absent
