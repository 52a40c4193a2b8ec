"""How images enter the language model: one config class per architecture, and what is frozen when.

A new architecture is a subclass of `VLMConfig` with its own ``arch``; the field ``vlm`` of a job then accepts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from shared_config.errors import ConfigError
from shared_config.registry import named_table
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.base import (
    KEEPS_FUNCTION,
    NESTED,
    Count,
    CountByName,
    Fraction,
    FrozenDict,
    Items,
    PositiveInt,
    Section,
    TextsByName,
    entry,
    section,
)
from shared_config.schema.model import ModelConfig

DEFAULT_PATTERNS = {"vision_encoder": "vision_encoder.*", "adapter": "adapter.*", "transformer": "transformer.*"}
PATTERN_CHARACTERS = "*?["


@entry
class FreezeSpec(Section):
    """Freeze (or, ``frozen=False``, thaw) the parameters of a module named in ``module_patterns``, or those whose names
    fit ``module``, a pattern itself (* and ? as in file names).
    """

    module: str
    frozen: bool = True


@entry
class FreezeStage(Section):
    """From optimiser step ``start_step`` on, ``specs`` replace what was frozen before."""

    start_step: Count
    specs: Items[Annotated[FreezeSpec, NESTED]] = ()


def is_pattern(module: str) -> bool:
    """Whether what names a module is a pattern of parameters' names."""
    return any(character in module for character in PATTERN_CHARACTERS)


def default_patterns(**own: str | tuple[str, ...]) -> Any:
    """The field ``module_patterns`` of an architecture, with the patterns of its own parts."""
    return Field(default_factory=lambda: FrozenDict({**DEFAULT_PATTERNS, **own}))


_ARCHITECTURES: dict[str, type[VLMConfig]] = named_table()


@section
class VLMConfig(Section):
    """What all architectures share. Build the right class with ``VLMConfig.for_arch``."""

    arch: str = ""
    max_text_len: Annotated[PositiveInt, KEEPS_FUNCTION] = 512
    freeze: Annotated[Items[Annotated[FreezeSpec, NESTED]], KEEPS_FUNCTION] = (FreezeSpec("vision_encoder"),)
    freeze_schedule: Annotated[Items[Annotated[FreezeStage, NESTED]], KEEPS_FUNCTION] = ()
    module_patterns: Annotated[TextsByName, KEEPS_FUNCTION] = default_patterns()

    image_tokens_in_stream: ClassVar[bool] = True
    uses_model_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the language model for experts that an architecture uses where ``num_experts`` is 0."""

    def __init_subclass__(cls, arch: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if arch:
            _ARCHITECTURES[arch] = cls

    @staticmethod
    def architectures() -> tuple[str, ...]:
        """Names of the architectures that exist."""
        return tuple(sorted(_ARCHITECTURES))

    @staticmethod
    def forget(arch: str) -> None:
        """Take an architecture off the list."""
        del _ARCHITECTURES[arch]

    @staticmethod
    def class_for(arch: Any) -> type[VLMConfig]:
        """The config class of an architecture.

        Raises:
            ConfigError: unknown name; lists what exists.
        """
        if not isinstance(arch, str) or arch not in _ARCHITECTURES:
            raise ConfigError([f"arch = {arch!r}: must be one of {', '.join(VLMConfig.architectures())}"])
        return _ARCHITECTURES[arch]

    @staticmethod
    def for_arch(arch: str, **fields: Any) -> VLMConfig:
        """The config of an architecture by name."""
        return VLMConfig.class_for(arch)(**fields)

    def residual_stream_image_tokens(self, num_tokens: int) -> int:
        """Positions of the residual stream that ``num_tokens`` image tokens take."""
        return num_tokens if self.image_tokens_in_stream else 0

    def cached_kv_heads(self, model: ModelConfig) -> int:
        """Key/value heads of a cache of the language model."""
        return model.kv_heads

    def resolved_with(self, model: ModelConfig) -> dict[str, Any]:
        """What fields mean beside a language model, where 0 stands for one of its numbers."""
        return {}

    def problems_with(self, model: ModelConfig) -> Iterator[str]:
        """What does not fit a language model."""
        return iter(())

    def image_problems(
        self, model: ModelConfig, adapter: AdapterConfig, num_tokens: int, feature_dim: int = 0, frames: int = 1
    ) -> Iterator[str]:
        """What does not fit an encoder, or the length of the sequence.

        Args:
            num_tokens: tokens that the encoder gives per image.
            feature_dim: their width; 0: not known yet.
            frames: images of a clip.
        """
        found = [f"adapter.{line}" for line in adapter.problems_with(num_tokens, feature_dim)]
        yield from found
        if found:
            return
        tokens = self.residual_stream_image_tokens(frames * adapter.output_num_tokens(num_tokens))
        if tokens + self.max_text_len > model.max_seq_len:
            yield (
                f"vlm.max_text_len = {self.max_text_len}: with {tokens} image tokens must fit in "
                f"model.max_seq_len = {model.max_seq_len}"
            )

    def problems(self) -> Iterator[str]:
        stages = [stage.start_step for stage in self.freeze_schedule]
        if stages != sorted(set(stages)):
            yield f"freeze_schedule = start steps {stages}: must be strictly increasing"
        specs = [*self.freeze, *(spec for stage in self.freeze_schedule for spec in stage.specs)]
        for module in sorted({spec.module for spec in specs} - set(self.module_patterns)):
            if not is_pattern(module):
                known = ", ".join(self.module_patterns)
                yield f"freeze = {module!r}: must be a key of module_patterns ({known}), or a pattern with a *"


@section
class JointDecoderConfig(VLMConfig, arch="joint_decoder"):
    """Image tokens stand before the text in one causal decoder."""

    arch: Literal["joint_decoder"] = "joint_decoder"


@section
class CrossAttentionConfig(VLMConfig, arch="cross_attention"):
    """Text attends to image features in extra blocks, one after every n-th layer."""

    arch: Literal["cross_attention"] = "cross_attention"
    module_patterns: Annotated[TextsByName, KEEPS_FUNCTION] = default_patterns(
        cross_attention="transformer.cross_attention_layers.*"
    )
    cross_attention_every_n_layers: PositiveInt = 4
    cross_attention_n_heads: Count = 0
    cross_attention_n_kv_heads: Count = 0
    cross_attention_head_dim: Count = 0

    image_tokens_in_stream: ClassVar[bool] = False

    def resolved_heads(self, n_heads: int) -> tuple[int, int]:
        """Query and key/value heads; 0 means the query heads of the text model, and as many keys as queries."""
        heads = self.cross_attention_n_heads or n_heads
        return heads, self.cross_attention_n_kv_heads or heads

    def resolved_head_dim(self, model: ModelConfig) -> int:
        """Width of a head; 0 means that of the text model, or ``dim // n_heads`` with another number of heads."""
        heads, _ = self.resolved_heads(model.n_heads)
        return self.cross_attention_head_dim or (model.head_size if heads == model.n_heads else model.dim // heads)

    def resolved_with(self, model: ModelConfig) -> dict[str, Any]:
        heads, kv_heads = self.resolved_heads(model.n_heads)
        return {
            "cross_attention_n_heads": heads,
            "cross_attention_n_kv_heads": kv_heads,
            "cross_attention_head_dim": self.resolved_head_dim(model),
        }

    def problems_with(self, model: ModelConfig) -> Iterator[str]:
        every = self.cross_attention_every_n_layers
        if every > model.n_layers:
            yield (
                f"vlm.cross_attention_every_n_layers = {every}: must be at most model.n_layers = {model.n_layers}, "
                "else no block sees the image"
            )
        heads, kv_heads = self.resolved_heads(model.n_heads)
        if not self.cross_attention_head_dim and heads != model.n_heads and model.dim % heads != 0:
            yield (
                f"vlm.cross_attention_n_heads = {heads}: must divide model.dim = {model.dim}, or "
                "vlm.cross_attention_head_dim be given"
            )
        if heads % kv_heads != 0:
            yield f"vlm.cross_attention_n_kv_heads = {kv_heads}: must divide the {heads} cross-attention heads"


@section
class MoTConfig(VLMConfig, arch="mot"):
    """Mixture of transformers (Liang et al. 2024, arXiv:2411.04996): own weights per modality, one joint attention."""

    arch: Literal["mot"] = "mot"
    module_patterns: Annotated[TextsByName, KEEPS_FUNCTION] = default_patterns(
        mot=("transformer.layers.*", "transformer.mot_norms.*")
    )
    mot_modalities: Items[str] = ("image", "text")
    mot_image_n_heads: Count = 0
    mot_image_n_kv_heads: Count = 0
    mot_warm_start_from_text: Annotated[bool, KEEPS_FUNCTION] = False
    mot_warm_start_path: Annotated[str, KEEPS_FUNCTION] = ""

    def resolved(self) -> dict[str, Any]:
        """Modalities are told apart by name, in whatever order."""
        return {"mot_modalities": tuple(sorted(self.mot_modalities))}

    def resolved_image_heads(self, n_heads: int, n_kv_heads: int) -> tuple[int, int]:
        """Query and key/value heads of the image projections; 0 means those of the text."""
        return self.mot_image_n_heads or n_heads, self.mot_image_n_kv_heads or n_kv_heads

    def cached_kv_heads(self, model: ModelConfig) -> int:
        """So many that the heads of both modalities divide them."""
        return math.lcm(model.kv_heads, self.resolved_image_heads(model.n_heads, model.kv_heads)[1])

    def resolved_with(self, model: ModelConfig) -> dict[str, Any]:
        heads, kv_heads = self.resolved_image_heads(model.n_heads, model.kv_heads)
        return {"mot_image_n_heads": heads, "mot_image_n_kv_heads": kv_heads}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from _modality_problems("mot_modalities", self.mot_modalities)
        if self.mot_warm_start_from_text and not self.mot_warm_start_path:
            yield "mot_warm_start_path = '': mot_warm_start_from_text needs the folder or file of the dense weights"

    def problems_with(self, model: ModelConfig) -> Iterator[str]:
        heads, kv_heads = self.resolved_image_heads(model.n_heads, model.kv_heads)
        if heads != model.n_heads:
            yield f"vlm.mot_image_n_heads = {heads}: must be 0 or model.n_heads = {model.n_heads} (joint attention)"
        if model.n_heads % kv_heads != 0:
            yield f"vlm.mot_image_n_kv_heads = {kv_heads}: must divide model.n_heads = {model.n_heads}"
        if self.mot_warm_start_from_text and kv_heads != model.kv_heads:
            yield (
                f"vlm.mot_image_n_kv_heads = {kv_heads}: must be 0 or model.n_kv_heads = {model.kv_heads} with "
                "mot_warm_start_from_text, which copies the text projections"
            )


@section
class MoMaConfig(VLMConfig, arch="moma"):
    """Mixture of modality-aware experts (Lin et al. 2024, arXiv:2407.21770): expert choice within each modality."""

    arch: Literal["moma"] = "moma"
    module_patterns: Annotated[TextsByName, KEEPS_FUNCTION] = default_patterns(
        moma="transformer.layers.*.mlp.experts.*"
    )
    moma_modalities: Items[str] = ("image", "text")
    moma_experts_per_modality: CountByName = Field(default_factory=lambda: FrozenDict({"image": 4, "text": 4}))
    moma_capacity_factor: Fraction = 0.0
    moma_gumbel_noise: Annotated[bool, KEEPS_FUNCTION] = True

    uses_model_fields: ClassVar[tuple[str, ...]] = ("moe_expert_ffn_multiplier",)

    def resolved(self) -> dict[str, Any]:
        """Modalities are told apart by name; 0 may be spelled as the number that it stands for."""
        factors = {self.effective_capacity_factor(modality) for modality in self.moma_modalities}
        return {
            "moma_modalities": tuple(sorted(self.moma_modalities)),
            "moma_capacity_factor": factors.pop() if len(factors) == 1 else self.moma_capacity_factor,
        }

    def effective_capacity_factor(self, modality: str) -> float:
        """Share of a modality's tokens that each of its experts takes; 0 stands for one over the number of experts."""
        return self.moma_capacity_factor or 1.0 / self.moma_experts_per_modality[modality]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from _modality_problems("moma_modalities", self.moma_modalities)
        if set(self.moma_experts_per_modality) != set(self.moma_modalities):
            yield (
                f"moma_experts_per_modality = {dict(self.moma_experts_per_modality)}: must have a number for each of "
                f"{', '.join(self.moma_modalities)}, and for no other"
            )
        if 0 < self.moma_capacity_factor < 1e-4:
            yield f"moma_capacity_factor = {self.moma_capacity_factor}: must be 0 or at least 0.0001"

    def problems_with(self, model: ModelConfig) -> Iterator[str]:
        if model.is_moe:
            yield f"model.num_experts = {model.num_experts}: must be 0 with vlm.arch 'moma' (it has its own experts)"


def _modality_problems(field: str, modalities: tuple[str, ...]) -> Iterator[str]:
    if sorted(modalities) != ["image", "text"]:
        yield f"{field} = {modalities}: must be 'image' and 'text', each once"


class _AnyArchitecture:
    """Annotation of a field that holds any registered `VLMConfig`, given as an instance or as a mapping with
    ``arch``.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._build)

    def _build(self, value: Any) -> VLMConfig:
        if isinstance(value, Mapping):
            fields = dict(value)
            if "arch" not in fields:
                raise ConfigError([f"arch: required, one of {', '.join(VLMConfig.architectures())}"])
            return VLMConfig.class_for(fields.pop("arch"))(**fields)
        if isinstance(value, VLMConfig) and value.arch:
            return value
        raise ValueError("Input should be a table with a key arch, or a config from VLMConfig.for_arch")

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"oneOf": [handler(TypeAdapter(_ARCHITECTURES[arch]).core_schema) for arch in VLMConfig.architectures()]}


AnyVLMConfig = Annotated[VLMConfig, _AnyArchitecture()]
