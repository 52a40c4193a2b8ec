"""LLaVAs and PaliGemmas in Hugging Face folders: config and weights of a `joint_decoder`, read and written. Which of
them a config is follows from ``vlm.prefix_lm``.

Names of tensors are those of transformers 5 or 4; written are the latter, which both read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Unpack

import numpy as np

from shared_config.contract.specs import ParameterTable
from shared_config.contract.vision import TowerConfig, adapter_table, job_table
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.files import PathLike, file_errors, written_aside
from shared_config.interchange.huggingface import CONFIG, from_huggingface, to_huggingface
from shared_config.interchange.huggingface_config import config_to_huggingface
from shared_config.interchange.huggingface_family import family_of
from shared_config.interchange.llava_config import (
    ACTIVATION,
    FEATURE_LAYER,
    IMAGE_TOKEN,
    MODEL_TYPE,
    PROJECTOR_ACTIVATIONS,
    STRATEGY,
    TEXT_DEFAULTS,
    TOWER_TYPES,
    is_llava,
    llava_problems,
    setting,
    text_fields,
    tower_kind,
)
from shared_config.interchange.paligemma_config import (
    PALIGEMMA_TEXTS,
    is_paligemma,
    paligemma_content,
    paligemma_image_token,
    paligemma_problems,
    paligemma_text,
)
from shared_config.interchange.preprocessor import FILES
from shared_config.interchange.reading import read_json
from shared_config.interchange.states import Key, host_array, plain_state
from shared_config.interchange.tokens import copy_tokenizer, special_ids
from shared_config.interchange.vision import TOWER_PREFIXES, hugging_face_name, read_tower, select_tower_weights
from shared_config.interchange.weights import SaveOptions, WeightsError, check_tensors, load_weights, save_weights
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.job import JobConfig
from shared_config.schema.vlm import JointDecoderConfig

TEXT = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
"""Start of a language model's name in the folder -> that of the same tensor in a folder of its own."""

PROJECTORS = ("multi_modal_projector.", "model.multi_modal_projector.")
LINEARS: Mapping[str, Mapping[str, str]] = {
    "mlp_2layer": {"linear_1": "proj1", "linear_2": "proj2"},
    "linear": {"linear": "proj"},
}
"""Names of a projector's maps there -> here, by type of adapter."""

PARTS = ("vision_encoder.", "adapter.", "transformer.")
TOWER = "vision_tower.vision_model."
UNUSED_NORM = "post_layernorm"


def is_image_folder(folder: PathLike) -> bool:
    """Whether a folder has the config.json of a LLaVA or a PaliGemma."""
    try:
        content = read_json(Path(folder) / CONFIG)
    except UserError:
        return False
    return is_llava(content) or is_paligemma(content)


def read_image_config(folder: PathLike) -> dict[str, dict[str, object]]:
    """The sections of a `JobConfig` that a folder's config.json describes.

    Raises:
        UserError: no such file, or not JSON.
        ConfigError: naming every key whose value can't be expressed.
    """
    path = Path(folder) / CONFIG
    content = read_json(path)
    has_prefix = is_paligemma(content)
    problems = list((paligemma_problems if has_prefix else llava_problems)(content))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    kind = "siglip2" if has_prefix else tower_kind(content)
    try:
        model = (paligemma_text if has_prefix else text_fields)(content)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from error
    tokens, positions = read_tower(Path(folder), kind).num_tokens, model["max_seq_len"]
    assert isinstance(positions, int)
    if tokens >= positions:
        needed = f"more than the {tokens} tokens of an image"
        raise ConfigError([f"{path}: text_config.max_position_embeddings = {positions}: must be {needed}"])
    text = min(JointDecoderConfig().max_text_len, positions - tokens)
    vlm: dict[str, object] = {"arch": "joint_decoder", "max_text_len": text, "image_token_id": _image_token(content)}
    adapter: dict[str, object] = {"type": "linear"}
    if not has_prefix:
        adapter = {"type": "mlp_2layer", "activation": setting(content, ACTIVATION)}
    return {
        "model": model,
        "vlm": {**vlm, "prefix_lm": True} if has_prefix else vlm,
        "vision_encoder": {"type": kind, "path": str(folder)},
        "adapter": adapter,
    }


def load_image_model(path: PathLike, config: JobConfig) -> dict[str, np.ndarray]:
    """The weights of a folder, by native names, in model order.

    Args:
        path: the folder, or its file of weights or their index.
        config: of the folder.

    Raises:
        UserError: a file that is missing or damaged.
        WeightsError: as `from_image_model`.
    """
    return from_image_model(load_weights(path), config, str(path))


def from_image_model(
    there: Mapping[str, np.ndarray], config: JobConfig, source: str = "weights"
) -> dict[str, np.ndarray]:
    """A state under native names, in model order. What the tower has behind the layer of the features is left there.

    Raises:
        WeightsError: listing every missing, extra or misshapen tensor by its name there.
    """
    known = (*TEXT, *PROJECTORS, *TOWER_PREFIXES)
    extra = [f"{name}: unexpected" for name in there if not name.startswith(known)]
    if extra:
        raise WeightsError(source, extra)
    tower, linears = _tower(config), LINEARS[_adapter(config).type]
    projector = {own: array for name, array in there.items() if (own := _projector_name(name))}
    check_tensors(projector, _projector_table(_adapter(config), tower.dim, config.model.dim), source)
    text = {own: array for name, array in there.items() if (own := _text_name(name))}
    parts: Mapping[str, Mapping[str, object]] = {
        PARTS[0]: select_tower_weights(there, tower, source),
        PARTS[1]: {_linear_name(name, linears): array for name, array in projector.items()},
        PARTS[2]: from_huggingface(text, config.model),
    }
    state = {part + name: host_array(name, array) for part, own in parts.items() for name, array in own.items()}
    return {name: state[name] for name in job_table(config, tower)}


def save_image_model(
    folder: PathLike,
    state: Mapping[Key, object],
    config: JobConfig,
    tokenizer: Path | None = None,
    **options: Unpack[SaveOptions],
) -> list[Path]:
    """Write config.json, weights, and how pictures are prepared. Returns the files.

    Args:
        tokenizer: a folder whose tokenizer and special ids go along.
        options: those of `save_weights`.

    Raises:
        ConfigError: as `image_model_content`.
    """
    content = image_model_content(config)
    ids = {} if tokenizer is None else special_ids(tokenizer)
    files = save_weights(folder, to_image_model(state, config), **options)
    files += [] if tokenizer is None else copy_tokenizer(tokenizer, Path(folder))
    files += _copy_preprocessor(Path(_encoder_path(config)), Path(folder))
    path = Path(folder) / CONFIG
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content | ids, indent=2) + "\n", encoding="utf-8")
    return [*files, path]


def image_model_content(config: JobConfig) -> dict[str, object]:
    """The content of config.json. The tower ends with the layer that features come from; without
    ``vlm.image_token_id`` the id of the image token is that of the folder that the tower is from.

    Raises:
        ConfigError: naming every field that no LLaVA or PaliGemma has.
    """
    if problems := list(_not_expressed(config)):
        raise ConfigError(problems)
    tower, encoder = _tower(config), config.vision_encoder
    assert encoder is not None
    assert config.vlm is not None
    texts = PALIGEMMA_TEXTS if config.vlm.has_prefix else tuple(TEXT_DEFAULTS)
    if (family := family_of(config.model)) not in texts:
        raise ConfigError([f"model.family = {family!r}: must be {' or '.join(texts)}"])
    own = config.vlm.image_token
    image_token = _image_token(read_json(Path(encoder.path) / CONFIG)) if own is None else own
    if config.vlm.has_prefix:
        return paligemma_content(config.model, _tower_content(config), image_token)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        IMAGE_TOKEN: image_token,
        "image_seq_length": tower.num_tokens,
        ACTIVATION: _adapter(config).activation,
        STRATEGY: "default" if tower.class_token and not tower.keep_class_token else "full",
        FEATURE_LAYER: -1,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.model.tie_embeddings,
        "text_config": config_to_huggingface(config.model),
        "vision_config": _tower_content(config),
    }


def _tower_content(config: JobConfig) -> dict[str, object]:
    tower, encoder = _tower(config), config.vision_encoder
    assert encoder is not None
    return {
        "model_type": next(name for name, kind in TOWER_TYPES.items() if kind == encoder.type),
        "hidden_size": tower.dim,
        "intermediate_size": tower.ffn_hidden_dim,
        "num_hidden_layers": tower.n_layers,
        "num_attention_heads": tower.n_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "num_channels": 3,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.norm_eps,
        **({} if tower.class_token else {"vision_use_head": False}),
    }


def to_image_model(state: Mapping[Key, object], config: JobConfig) -> dict[str, object]:
    """The state under Hugging Face's names, of a LLaVA with the norm after the tower that transformers has and does not
    use.

    Raises:
        WeightsError: if the state isn't exactly what the config needs.
    """
    tower, native = _tower(config), plain_state(state)
    check_tensors(native, job_table(config, tower), "native weights")
    vision, adapter, text = (
        {name.removeprefix(part): array for name, array in native.items() if name.startswith(part)} for part in PARTS
    )
    back = {ours: theirs for theirs, ours in LINEARS[_adapter(config).type].items()}
    found: dict[str, object] = {
        f"language_model.{name}": array for name, array in to_huggingface(text, config.model).items()
    }
    found |= {PROJECTORS[0] + _linear_name(name, back): array for name, array in adapter.items()}
    for name, array in vision.items():
        values = host_array(name, array)
        is_patch = name == "patch_embedding.weight"
        found[TOWER + hugging_face_name(name)] = (
            values.reshape(tower.dim, 3, tower.patch_size, tower.patch_size) if is_patch else values
        )
    assert config.vlm is not None
    if config.vlm.has_prefix:
        return found
    norm = {"weight": np.ones(tower.dim, np.float32), "bias": np.zeros(tower.dim, np.float32)}
    return found | {f"{TOWER}{UNUSED_NORM}.{name}": values for name, values in norm.items()}


def _not_expressed(config: JobConfig) -> Iterator[str]:
    encoder, adapter = config.vision_encoder, _adapter(config)
    if config.vlm is None or config.vlm.arch != "joint_decoder" or encoder is None:
        yield f"vlm.arch = {None if config.vlm is None else config.vlm.arch!r}: must be 'joint_decoder'"
        return
    has_prefix = config.vlm.has_prefix
    name, needed = ("PaliGemma", "linear") if has_prefix else ("LLaVA", "mlp_2layer")
    towers = ("siglip2",) if has_prefix else tuple(TOWER_TYPES.values())
    if config.video is not None:
        yield f"video: must be absent, as a {name} sees one picture"
    if adapter.type != needed:
        yield f"adapter.type = {adapter.type!r}: must be {needed!r}"
    elif has_prefix:
        pass
    elif adapter.hidden_dim not in (0, config.model.dim):
        yield f"adapter.hidden_dim = {adapter.hidden_dim}: must be 0 or model.dim = {config.model.dim}"
    elif adapter.activation not in PROJECTOR_ACTIVATIONS:
        yield f"adapter.activation = {adapter.activation!r}: must be one of {', '.join(PROJECTOR_ACTIVATIONS)}"
    if encoder.type not in towers:
        yield f"vision_encoder.type = {encoder.type!r}: must be {' or '.join(towers)}"
    elif not is_image_folder(encoder.path) or is_paligemma(read_json(Path(encoder.path) / CONFIG)) != has_prefix:
        yield f"vision_encoder.path = {encoder.path!r}: must be the folder of a {name}, which names the image token"


def _image_token(content: Mapping[str, object]) -> object:
    return paligemma_image_token(content) if is_paligemma(content) else setting(content, IMAGE_TOKEN)


def _tower(config: JobConfig) -> TowerConfig:
    assert config.vision_encoder is not None
    return read_tower(config.vision_encoder.path, config.vision_encoder.type)


def _adapter(config: JobConfig) -> AdapterConfig:
    return config.adapter or AdapterConfig()


def _encoder_path(config: JobConfig) -> str:
    assert config.vision_encoder is not None
    return config.vision_encoder.path


def _projector_table(adapter: AdapterConfig, in_dim: int, out_dim: int) -> ParameterTable:
    back = {ours: theirs for theirs, ours in LINEARS[adapter.type].items()}
    return {_linear_name(name, back): spec for name, spec in adapter_table(adapter, in_dim, out_dim).items()}


def _text_name(name: str) -> str:
    """The name in a folder of the language model alone; "" if the tensor is not of it."""
    return next((own + name.removeprefix(start) for start, own in TEXT.items() if name.startswith(start)), "")


def _projector_name(name: str) -> str:
    return next((name.removeprefix(start) for start in PROJECTORS if name.startswith(start)), "")


def _linear_name(name: str, names: Mapping[str, str]) -> str:
    linear, _, rest = name.partition(".")
    return f"{names.get(linear, linear)}.{rest}"


def _copy_preprocessor(source: Path, target: Path) -> list[Path]:
    present = [name for name in FILES if (source / name).is_file()]
    for name in present:
        with written_aside(target / name) as aside, file_errors(source / name, "can't be read"):
            shutil.copyfile(source / name, aside)
    return [target / name for name in present]
