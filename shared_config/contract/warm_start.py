"""Where the weights of a mixture of transformers come from when it starts from a dense text model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from shared_config.contract.parameters import aliases, parameter_table
from shared_config.contract.specs import ParameterTable
from shared_config.errors import UserError
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

RENAMED = {"attn_norm": "attention_norm", "attn": "attention"}


TRANSFORMER = "transformer."
"""Prefix of the tensors of a text model inside a vision-language model."""
OTHER_PARTS = ("vision_encoder.", "adapter.")


def text_source(name: str, modalities: tuple[str, ...]) -> str:
    """The tensor of the text model that a tensor of the mixture starts as: the same for every modality."""
    one_of = "|".join(re.escape(modality) for modality in modalities)
    name = re.sub(rf"^mot_norms\.({one_of})\.", "norm.", name)
    found = re.fullmatch(rf"(layers\.\d+)\.(\w+)\.(?:(\w+_proj|q_norm|k_norm)\.)?({one_of})\.(.+)", name)
    if found is None:
        return name
    layer, part, projection, _, rest = found.groups()
    return ".".join(filter(None, (layer, RENAMED.get(part, part), projection, rest)))


def without_warm_start(config: JobConfig) -> JobConfig:
    """The config of a model whose weights are given, so that those it may have started from are not looked for."""
    return config if config.vlm is None else config.replace(vlm=config.vlm.without_warm_start())


Value = TypeVar("Value")


def warm_start_state(config: ModelConfig, vlm: VLMConfig, state: Mapping[str, Value]) -> dict[str, Value]:
    """The state of the mixture, each tensor that of its source.

    Args:
        state: of the dense (or mixture-of-experts) text model, by native names; or of a vision-language model, of which
            ``transformer.*`` counts.

    Raises:
        UserError: listing every source that is missing or misshapen, and every tensor that would go unused.
    """
    if any(name.startswith(TRANSFORMER) for name in state):
        state = {name.removeprefix(TRANSFORMER): state[name] for name in state if not name.startswith(OTHER_PARTS)}
    table: ParameterTable = parameter_table(config, vlm)
    sources = {name: text_source(name, vlm.modalities) for name in table}
    problems = [f"{source}: missing" for source in dict.fromkeys(sources.values()) if source not in state]
    problems += [
        f"{source}.shape = {_shape(state[source])}: {name} needs {table[name].shape}"
        for name, source in sources.items()
        if source in state and _shape(state[source]) != table[name].shape
    ]
    unused = set(state) - set(sources.values()) - set(aliases(config))
    problems += [f"{name}: has no place in the mixture" for name in sorted(unused)]
    if problems:
        raise UserError("the text model doesn't fit the mixture of transformers:\n" + "\n".join(problems))
    return {name: state[source] for name, source in sources.items()}


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape)
