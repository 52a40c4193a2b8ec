"""Hugging Face folders (config.json and safetensors) of the families that `huggingface_families` describes.

The two sides name the same tensors differently; orientation (out, in) and the rotation of head halves are equal, so
values are never changed. Packed experts are the one exception: Hugging Face stores one (out, in) matrix per expert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np

from shared_config.contract.parameters import EMBEDDING, aliases, parameter_table
from shared_config.contract.specs import ParameterTable
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.files import PathLike, written_aside
from shared_config.interchange.huggingface_config import config_from_huggingface, config_to_huggingface
from shared_config.interchange.huggingface_description import MODULES, Family
from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.interchange.huggingface_family import families_of
from shared_config.interchange.parts import HostArray, Parts, stacked
from shared_config.interchange.reading import MAX_JSON_BYTES, parse_json, read_bytes
from shared_config.interchange.states import AnyArray, ArrayType, Key, check_tied, host_array, plain_state
from shared_config.interchange.tokens import copy_tokenizer, special_ids
from shared_config.interchange.weights import SaveOptions, WeightsError, check_tensors, load_weights, save_weights
from shared_config.schema.base import from_fields
from shared_config.schema.model import ModelConfig

CONFIG = "config.json"
HEAD = "lm_head.weight"
ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""Tables that old checkpoints carry along; they follow from the config."""

PACKED = {"gate_w": "gate_proj", "up_w": "up_proj", "down_w": "down_proj"}


def load_huggingface(folder: PathLike, **overrides: object) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and weights (native names, memory-mapped) of a Hugging Face folder.

    Args:
        overrides: fields of `ModelConfig` that config.json doesn't decide, ``moe_packed_experts`` for one.
    """
    config = from_fields(ModelConfig, read_huggingface_config(folder) | overrides)
    return config, from_huggingface(load_weights(folder), config)


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a text model of a family."""
    path = folder / CONFIG
    try:
        content = parse_json(read_bytes(path, MAX_JSON_BYTES))
    except (UserError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") in tuple(FAMILIES)


def read_huggingface_config(folder: PathLike) -> dict[str, object]:
    """Fields of `ModelConfig` from a folder's config.json.

    Raises:
        UserError: no such file, or not JSON.
        ConfigError: naming every key whose value a `ModelConfig` can't express.
    """
    path = Path(folder) / CONFIG
    text = read_bytes(path, MAX_JSON_BYTES)
    try:
        return config_from_huggingface(parse_json(text))
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}") from error


def save_huggingface(
    folder: PathLike,
    state: Mapping[Key, object],
    config: ModelConfig,
    tokenizer: Path | None = None,
    **options: Unpack[SaveOptions],
) -> list[Path]:
    """Write config.json and weights. Returns the files.

    Args:
        tokenizer: a folder whose tokenizer and special ids go along.
        options: those of `save_weights`.
    """
    ids = {} if tokenizer is None else special_ids(tokenizer)
    text = json.dumps(config_to_huggingface(config) | ids, indent=2) + "\n"
    files = save_weights(folder, to_huggingface(state, config), **options)
    files += [] if tokenizer is None else copy_tokenizer(tokenizer, Path(folder))
    path = Path(folder) / CONFIG
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return [*files, path]


# Weights


def from_huggingface(state: Mapping[str, ArrayType], config: ModelConfig) -> dict[str, ArrayType | np.ndarray]:
    """The state under native names, in model order. Arrays are shared, except packed experts; of tensors that are one
    there, each is a view of its rows.

    Raises:
        ConfigError: as `families_of`.
        WeightsError: listing every missing, extra, misshapen or non-floating tensor by its Hugging Face name.
    """
    found = views_from_huggingface(state, config)
    return {name: np.asarray(array) if isinstance(array, Parts) else array for name, array in found.items()}


def views_from_huggingface(state: Mapping[str, ArrayType], config: ModelConfig) -> dict[str, ArrayType | HostArray]:
    """What `from_huggingface` gives, without a copy: packed experts are in parts, a view of each expert's matrix.

    Raises:
        ConfigError, WeightsError: as `from_huggingface`.
    """
    names, specs = name_map(config), _unpacked_table(config)
    state = {name: array for name, array in plain_state(state).items() if not name.endswith(ROTARY_BUFFER)}
    if config.tie_embeddings and HEAD in state:
        head = state.pop(HEAD)
        _check_tied(head, state.setdefault(names[EMBEDDING], head))
    check_tensors(state, _foreign_table(config), source="Hugging Face weights")
    unpacked: dict[str, ArrayType | np.ndarray] = {}
    for foreign, parts in _together(names).items():
        unpacked |= _rows_of({name: specs[name].shape[0] for name in parts}, foreign, state[foreign])
    return {name: unpacked[name] if name in unpacked else _pack(unpacked, name) for name in parameter_table(config)}


@overload
def to_huggingface(state: Mapping[str, ArrayType], config: ModelConfig) -> dict[str, ArrayType]: ...
@overload
def to_huggingface(state: Mapping[Key, object], config: ModelConfig) -> dict[str, AnyArray]: ...
def to_huggingface(state: Mapping[Key, object], config: ModelConfig) -> Mapping[str, object]:
    """The state (what `plain_state` accepts) under Hugging Face's names. Arrays are shared; packed experts become
    transposed views, and tensors that are one there a new array.

    Raises:
        ConfigError: as `families_of`.
        WeightsError: if the state isn't exactly what the config needs.
    """
    names = name_map(config)
    native = plain_state(state)
    tied = {alias: name for alias, name in aliases(config).items() if alias in native}
    check_tied(native, tied)
    native = {name: array for name, array in native.items() if name not in tied}
    check_tensors(native, parameter_table(config), source="native weights")
    unpacked = {name: native[name] if name in native else _unpack(native, name) for name in names}
    return {foreign: _as_rows(unpacked, parts) for foreign, parts in _together(names).items()}


def name_map(config: ModelConfig) -> dict[str, str]:
    """Native name -> Hugging Face name of every tensor, in model order; experts stand one by one, packed or not. Where
    Hugging Face has one tensor of the rows of several, these have one name.
    """
    family = FAMILIES[families_of(config)[0]]
    return {name: _foreign_name(name, family) for name in _unpacked_table(config)}


def _together(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Hugging Face's name -> the native ones, whose rows follow each other there."""
    found: dict[str, list[str]] = {}
    for name, foreign in names.items():
        found.setdefault(foreign, []).append(name)
    return found


def _foreign_table(config: ModelConfig) -> ParameterTable:
    """Hugging Face's tensors."""
    specs, found = _unpacked_table(config), {}
    for foreign, (first, *others) in _together(name_map(config)).items():
        rows, *width = specs[first].shape
        shape = (rows + sum(specs[name].shape[0] for name in others), *width)
        found[foreign] = replace(specs[first], shape=shape)
    return found


def _rows_of(rows: Mapping[str, int], foreign: str, array: ArrayType) -> dict[str, ArrayType | np.ndarray]:
    """What each tensor, of so many rows, has of the one that they are there."""
    if len(rows) == 1:
        return dict.fromkeys(rows, array)
    ends = np.cumsum(list(rows.values()))[:-1]
    return dict(zip(rows, np.split(host_array(foreign, array), ends), strict=True))


def _as_rows(state: Mapping[str, Any], names: list[str]) -> Any:
    """One tensor, or the rows of several."""
    if len(names) == 1:
        return state[names[0]]
    return np.concatenate([host_array(name, state[name]) for name in names])


def _unpacked_table(config: ModelConfig) -> ParameterTable:
    return parameter_table(config.replace(moe_packed_experts=False))


def _foreign_name(name: str, family: Family) -> str:
    if not name.startswith("layers."):
        return _replaced(name, MODULES)
    _, layer, rest = name.split(".", 2)
    parts = _replaced(rest, family.modules).split(".")
    return ".".join(["model.layers", layer, *(family.renamed.get(part, part) for part in parts)])


def _replaced(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with the first matching prefix exchanged."""
    native = next(prefix for prefix in prefixes if name.startswith(prefix))
    return prefixes[native] + name.removeprefix(native)


def _pack(state: Mapping[str, object], name: str) -> Parts:
    """layers.0.mlp.gate_w (expert, in, out) from layers.0.mlp.experts.{e}.gate_proj.weight (out, in)."""
    module, _, packed = name.rpartition(".")
    experts = []
    while (expert := f"{module}.experts.{len(experts)}.{PACKED[packed]}.weight") in state:
        experts.append(host_array(expert, state[expert]).T)
    return stacked(experts)


def _unpack(state: Mapping[str, Any], name: str) -> AnyArray:
    """layers.0.mlp.experts.3.gate_proj.weight from layers.0.mlp.gate_w."""
    module, _, expert = name.partition(".experts.")
    number, projection, _ = expert.split(".")
    packed = next(packed for packed, unpacked in PACKED.items() if unpacked == projection)
    matrices = state[f"{module}.{packed}"]
    one = np.asarray(matrices.layer(int(number))) if isinstance(matrices, Parts) else matrices[int(number)]
    return one.T


def _check_tied(head: object, embedding: object) -> None:
    if not np.array_equal(host_array(HEAD, head), host_array(EMBEDDING, embedding)):
        problem = f"{HEAD}: differs from model.embed_tokens.weight, though tie_word_embeddings is true"
        raise WeightsError("Hugging Face weights", [problem])
