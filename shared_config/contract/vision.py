"""What surrounds the language model of a vision-language model: towers, adapters, and the names of all their tensors.

A wrapper's tensors are `vision_encoder.*`, `adapter.*` and `transformer.*`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import Axes, Constant, Named, Normal, ParameterSpec, ParameterTable, given
from shared_config.errors import ConfigError
from shared_config.registry import declaration, declare
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import VLMConfig

VIT_FFN_MULTIPLE = 4
VIT_NORM_EPS = 1e-6
POSITION_STD = 0.02


@dataclass(frozen=True)
class TowerConfig:
    """A pre-norm vision transformer over square patches (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Attributes:
        activation: a name that transformers uses: gelu, gelu_pytorch_tanh, quick_gelu, relu or silu.
        class_token: a learned token stands before the patches; it is dropped at the end (CLIP).
        keep_class_token: it is the first output token instead (some LLaVAs).
        patch_bias: the patch embedding has a bias (SigLIP).
        pre_norm: a LayerNorm before the blocks (CLIP).
        final_norm: a LayerNorm after them (SigLIP).
    """

    image_size: int
    patch_size: int
    dim: int
    n_layers: int
    n_heads: int
    ffn_hidden_dim: int
    activation: str
    norm_eps: float
    class_token: bool = False
    keep_class_token: bool = False
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Output tokens per image: one per patch, and the class token where it is kept."""
        return self.num_patches + self.keep_class_token


def vit_tower(config: VisionEncoderConfig) -> TowerConfig:
    """The tower that an encoder of type ``vit`` describes."""
    return TowerConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        dim=config.feature_dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        ffn_hidden_dim=VIT_FFN_MULTIPLE * config.feature_dim,
        activation="gelu",
        norm_eps=VIT_NORM_EPS,
    )


def tower_table(tower: TowerConfig) -> ParameterTable:
    """Every tensor of a tower, in model order. Matrices start as normal(0, 1 / sqrt(fan_in))."""
    return dict(_tower(tower))


def encoder_table(encoder: TowerConfig | VisionEncoderConfig | None) -> ParameterTable:
    """Every tensor of an encoder: of a tower, or as declared of a config's type; {} where nothing is."""
    if isinstance(encoder, TowerConfig):
        return tower_table(encoder)
    own = None if encoder is None else declaration("vision_encoder", encoder.type).parameters
    return {} if own is None else dict(given(own(encoder)))


def adapter_table(config: AdapterConfig, in_dim: int, out_dim: int) -> ParameterTable:
    """Every tensor of an adapter, in model order; {} for a type that was registered without declaring any."""
    own = declaration("adapter", config.type).parameters
    return {} if own is None else dict(given(own(config, in_dim, out_dim)))


def wrapper_table(
    model: ModelConfig,
    vlm: VLMConfig,
    adapter: AdapterConfig,
    encoder: TowerConfig | VisionEncoderConfig | None,
    feature_dim: int,
) -> ParameterTable:
    """Every tensor of a `VLMWrapper`.

    Args:
        encoder: a tower, or the config of an encoder that is none; None for one without parameters.
        feature_dim: width of the encoder's features.
    """
    parts = {
        "vision_encoder": encoder_table(encoder),
        "adapter": adapter_table(adapter, feature_dim, model.dim),
        "transformer": parameter_table(model, vlm),
    }
    return {f"{part}.{name}": spec for part, table in parts.items() for name, spec in table.items()}


def job_table(
    config: JobConfig, tower: TowerConfig | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> ParameterTable:
    """Every tensor of the model of a job, text or vision-language.

    Args:
        tower: the vision tower of the job, if it has one.
        shapes: of the model as it was built; encoders and adapters that were registered without declaring their
            parameters get entries from them, with decay where there are two axes or more.

    Raises:
        ConfigError: the width of the features is not known.
    """
    if config.vlm is None or config.vision_encoder is None:
        table = parameter_table(config.model, config.vlm)
    else:
        feature_dim = tower.dim if tower is not None else config.vision_encoder.feature_dim
        if not feature_dim:
            kind = config.vision_encoder.type
            raise ConfigError([f"vision_encoder.feature_dim = 0: type {kind!r} does not say its width; give it here"])
        encoder = tower or config.vision_encoder
        table = wrapper_table(config.model, config.vlm, config.adapter or AdapterConfig(), encoder, feature_dim)
    unknown = {name: shape for name, shape in (shapes or {}).items() if name not in table}
    return table | {
        name: ParameterSpec(shape, Constant(0.0), (None,) * len(shape), decay=len(shape) > 1)
        for name, shape in unknown.items()
    }


def _tower(tower: TowerConfig) -> Named:
    dim, patch = tower.dim, tower.patch_size
    yield "patch_embedding.weight", _matrix((dim, 3 * patch * patch), ("embed", None))
    if tower.patch_bias:
        yield "patch_embedding.bias", _constant(dim, 0.0)
    if tower.class_token:
        yield "class_embedding", ParameterSpec((dim,), Normal(POSITION_STD), ("embed",))
    positions = tower.num_patches + tower.class_token
    yield "position_embedding.weight", ParameterSpec((positions, dim), Normal(POSITION_STD), (None, "embed"))
    if tower.pre_norm:
        yield from _layer_norm("pre_norm", dim)
    for layer in range(tower.n_layers):
        yield from _tower_block(f"layers.{layer}", tower)
    if tower.final_norm:
        yield from _layer_norm("norm", dim)


def _tower_block(path: str, tower: TowerConfig) -> Named:
    dim, hidden = tower.dim, tower.ffn_hidden_dim
    yield from _layer_norm(f"{path}.attention_norm", dim)
    for name in ("q_proj", "k_proj", "v_proj"):
        yield from _linear(f"{path}.attention.{name}", (dim, dim), ("heads", "embed"))
    yield from _linear(f"{path}.attention.o_proj", (dim, dim), ("embed", "heads"))
    yield from _layer_norm(f"{path}.mlp_norm", dim)
    yield from _linear(f"{path}.mlp.up_proj", (hidden, dim), ("mlp", "embed"))
    yield from _linear(f"{path}.mlp.down_proj", (dim, hidden), ("embed", "mlp"))


def _mlp_2layer(config: AdapterConfig, in_dim: int, out_dim: int) -> ParameterTable:
    hidden = config.hidden_dim or out_dim
    first = _linear("proj1", (hidden, in_dim), ("mlp", None))
    return dict((*first, *_linear("proj2", (out_dim, hidden), ("embed", "mlp"))))


def _projection(config: AdapterConfig, in_dim: int, out_dim: int) -> ParameterTable:
    return dict(_linear("proj", (out_dim, in_dim), ("embed", None)))


def _attentional_pool(config: AdapterConfig, in_dim: int, out_dim: int) -> ParameterTable:
    inner = (_linear(name, (in_dim, in_dim), (None, None)) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return dict((*itertools.chain.from_iterable(inner), *_linear("out_proj", (out_dim, in_dim), ("embed", None))))


def _linear(name: str, shape: tuple[int, int], axes: Axes) -> Iterator[tuple[str, ParameterSpec]]:
    yield f"{name}.weight", _matrix(shape, axes)
    yield f"{name}.bias", ParameterSpec(shape[:1], Constant(0.0), axes[:1])


def _layer_norm(name: str, dim: int) -> Iterator[tuple[str, ParameterSpec]]:
    yield f"{name}.weight", _constant(dim, 1.0)
    yield f"{name}.bias", _constant(dim, 0.0)


def _matrix(shape: tuple[int, int], axes: Axes) -> ParameterSpec:
    return ParameterSpec(shape, Normal(1 / math.sqrt(shape[1])), axes, decay=True)


def _constant(size: int, value: float) -> ParameterSpec:
    return ParameterSpec((size,), Constant(value), ("embed",))


declare("adapter", "mlp_2layer", parameters=_mlp_2layer)
declare("adapter", "linear", parameters=_projection)
declare("adapter", "avgpool", parameters=_projection)
declare("adapter", "attentional_pool", parameters=_attentional_pool)
