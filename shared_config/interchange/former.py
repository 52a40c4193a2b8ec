"""Files of former versions: what they hold, as it is called and meant now.

cross_attention_layers.0.attention, .attention_norm     .attn, .attn_norm
layers.0.mlp.image, .text, where vlm.arch = "moma"      layers.0.mlp.experts.image, .text
adapter.proj.weight, without a bias                     adapter.proj.bias = 0 beside it
vlm.cross_attention_n_kv_heads = 0                      as many as the text model has
heads of cross-attention, whatever their number         as wide as those of the text model
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import tomli_w

from shared_config.contract.moments import MOMENTS, UPDATES
from shared_config.errors import ConfigError
from shared_config.interchange.reading import parse_toml
from shared_config.interchange.toml import section_of
from shared_config.schema.base import from_fields
from shared_config.schema.model import ModelConfig

T = TypeVar("T")

NAMES = "names"
"""What files of weights say of the names in them, in their metadata; those of former versions don't."""
VERSION = "2"

CROSS_ATTENTION = re.compile(r"(cross_attention_layers\.[^./]+\.)attention(?=_norm\b|\b(?!_))")
MIXTURE = re.compile(r"(\blayers\.[^./]+\.mlp\.)(image|text)\b")
SHARED_ATTENTION = re.compile(r"(?<!vision_encoder\.)\blayers\.[^./]+\.attention(_norm)?\b")
"""Layers of a mixture of experts by modality have it; those of a mixture of transformers have ``attn``."""

BARE_ADAPTERS = (
    {"proj.weight"},
    {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "out_proj.weight", "out_proj.bias"},
)
WITH_BIASES_SINCE = ("linear", "avgpool", "attentional_pool")


@dataclass(frozen=True)
class Former:
    """How the tensors of a model of a former version are called now.

    Attributes:
        mixtures: experts are those of modalities.
        biases: weight -> the bias that it lacked.
    """

    mixtures: bool
    biases: Mapping[str, str] = field(default_factory=dict)

    def name(self, name: str) -> str:
        """A name, or a path or pattern that holds one."""
        name = CROSS_ATTENTION.sub(r"\1attn", name)
        return MIXTURE.sub(r"\1experts.\2", name) if self.mixtures else name

    def named(self, values: Mapping[str, T]) -> dict[str, T]:
        """The same under their names of now."""
        return {self.name(name): value for name, value in values.items()}

    def listed(self, lists: Mapping[str, object]) -> dict[str, object]:
        """Lists of names, under whatever keys, of their names of now; anything else is as it was."""
        return {key: self._listed(values) if isinstance(values, list) else values for key, values in lists.items()}

    def state(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Weights by their names of now, with biases of 0 where there were none."""
        result = {}
        for name, value in state.items():
            result[self.name(name)] = value
            if name in self.biases:
                result[self.biases[name]] = np.zeros(value.shape[:1], value.dtype)
        return result

    def moments(self, moments: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The state of an optimiser, in which biases that did not exist have taken no update."""
        result = self.named(moments)
        for weight, bias in self.biases.items():
            sources = {moment: moments[f"{moment}.{weight}"] for moment in MOMENTS if f"{moment}.{weight}" in moments}
            result |= {f"{moment}.{bias}": np.zeros(value.shape[:1], value.dtype) for moment, value in sources.items()}
            if sources:
                result[f"{UPDATES}.{bias}"] = np.zeros((), np.int32)
        return result

    def _listed(self, values: list[object]) -> list[object]:
        return [self.name(value) if isinstance(value, str) else value for value in values]


def former(names: Collection[str], config: Mapping[str, object] | None = None) -> Former:
    """What a model of a former version was.

    Args:
        names: of its weights.
        config: nested fields of its job; None or {}: not known, the names have to tell.
    """
    arch = section_of(config, "vlm").get("arch")
    mixtures = has_mixtures(names) if arch is None else arch == "moma"
    is_ours = not config or section_of(config, "adapter").get("type") in WITH_BIASES_SINCE
    return Former(mixtures, _lacking(names) if is_ours else {})


def has_mixtures(names: Collection[str]) -> bool:
    """Whether names are those of a mixture of experts by modality; a mixture of transformers has some like them."""
    return any(map(MIXTURE.search, names)) and any(map(SHARED_ATTENTION.search, names))


def is_former(names: Collection[str]) -> bool:
    """Whether names are such that the config beside them may mean something else now."""
    return any(map(CROSS_ATTENTION.search, names))


def current_fields(config: Mapping[str, object]) -> dict[str, object]:
    """Nested fields of the config of a former version, as they have to be to mean the same now."""
    config, vlm = dict(config), section_of(config, "vlm")
    if vlm.get("arch") != "cross_attention":
        return config
    try:
        model = from_fields(ModelConfig, section_of(config, "model"))
    except (ConfigError, TypeError):  # which whoever builds the config says
        return config
    own = vlm.get("cross_attention_n_heads", 0)
    meant = {"cross_attention_head_dim": 0}
    if not own and not vlm.get("cross_attention_n_kv_heads", 0) and model.kv_heads != model.n_heads:
        meant["cross_attention_n_kv_heads"] = model.kv_heads
    if isinstance(own, int) and own not in (0, model.n_heads) and own * model.head_size != model.dim:
        meant["cross_attention_head_dim"] = model.head_size
    return {**config, "vlm": {**vlm, **meant}}


def current_toml(text: str) -> str:
    """The same of TOML text, which stays as it was where there is nothing to change."""
    then = parse_toml(text)
    now = current_fields(then)
    return text if now == then else tomli_w.dumps(now)


def current_state(
    weights: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], config: Mapping[str, object]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights and the state of the optimiser of a run of a former version, as they are now."""
    then = former(weights, config)
    return then.state(weights), then.moments(moments)


def _lacking(names: Collection[str]) -> dict[str, str]:
    """Weight -> bias of an adapter that has none, within a model or on its own."""
    for prefix in ("adapter.", ""):
        own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if own in BARE_ADAPTERS:
            weights = sorted(name for name in own if name.replace(".weight", ".bias") not in own)
            return {prefix + name: prefix + name.replace(".weight", ".bias") for name in weights}
    return {}
