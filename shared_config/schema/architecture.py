"""How images enter the language model: what the config of every architecture says, and answers.

A new architecture is a subclass of `VLMConfig` with its own ``arch``; the field ``vlm`` of a job then accepts it. What
the rest of the system asks about an architecture is a member of its config class, which a subclass defines where its
answer is another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from shared_config.errors import ConfigError
from shared_config.registry import named_table
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.base import (
    KEEPS_FUNCTION,
    NESTED,
    Items,
    PositiveInt,
    Section,
    TextsByName,
    from_fields,
    section,
)
from shared_config.schema.freeze import FreezeSpec, FreezeStage, default_patterns, is_pattern
from shared_config.schema.model import ModelConfig

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
    experts_choose: ClassVar[bool] = False
    """Whether it has its own experts, which choose their tokens among all of a batch, later ones too."""
    plain_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the language model that its own kind of layer leaves at their defaults."""
    uses_model_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the language model for experts that an architecture uses where ``num_experts`` is 0."""

    def __init_subclass__(cls, arch: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if arch:
            _ARCHITECTURES[arch] = cls

    @staticmethod
    def architectures() -> tuple[str, ...]:
        """Names of the architectures that exist."""
        return tuple(sorted(_ARCHITECTURES))

    @staticmethod
    def forget(arch: str) -> None:
        """Unregister an architecture."""
        del _ARCHITECTURES[arch]

    @staticmethod
    def class_for(arch: object) -> type[VLMConfig]:
        """The config class of an architecture.

        Raises:
            ConfigError: unknown name; lists what exists.
        """
        if not isinstance(arch, str) or arch not in _ARCHITECTURES:
            raise ConfigError([f"arch = {arch!r}: must be one of {', '.join(VLMConfig.architectures())}"])
        return _ARCHITECTURES[arch]

    @staticmethod
    def for_arch(arch: str, **fields: object) -> VLMConfig:
        """The config of an architecture by name."""
        return from_fields(VLMConfig.class_for(arch), fields)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have their own weights; () if all share them."""
        return ()

    @property
    def image_token(self) -> int | None:
        """The id that stands for the image in a prompt, which no text holds; None if there is none."""
        return None

    @property
    def places_image(self) -> bool:
        """Whether that id says where the image stands."""
        return self.image_token is not None and not self.has_prefix

    @property
    def has_prefix(self) -> bool:
        """Whether image and prompt see each other in both directions."""
        return False

    @property
    def takes_several(self) -> bool:
        """Whether a row may have several images."""
        return self.places_image or self.has_prefix

    @property
    def can_generate(self) -> bool:
        """Whether a model can take its tokens one after the other."""
        return not self.experts_choose

    @property
    def routing_noise(self) -> bool:
        """Whether noise moves the choices of experts in training."""
        return False

    @property
    def warm_start_path(self) -> str:
        """The folder or file of a text model that a new model starts from; "" if there is none."""
        return ""

    def without_warm_start(self) -> VLMConfig:
        """The same for a model whose weights are given."""
        return self

    def residual_stream_image_tokens(self, num_tokens: int) -> int:
        """Positions of the residual stream that ``num_tokens`` image tokens take."""
        return num_tokens if self.image_tokens_in_stream else 0

    def cached_kv_heads(self, model: ModelConfig) -> int:
        """Key/value heads of a cache of the language model."""
        return model.kv_heads

    def own_heads(self, model: ModelConfig) -> dict[str, int]:
        """Numbers of heads that are not those of the language model, by field."""
        return {}

    def layer_period(self, model: ModelConfig) -> int:
        """Layers after which what stands between them repeats itself."""
        return 1

    def choosing_experts(self, modality: str) -> tuple[int, float] | None:
        """The experts that choose among tokens of a modality, and the capacity factor given; None without them."""
        return None

    def text_experts(self) -> tuple[int, float] | None:
        """Those that choose among tokens of text."""
        return self.choosing_experts("text")

    def shrunk(self, model: ModelConfig, *, head_dim: int, experts: int) -> Mapping[str, object]:
        """Changes of its own fields for validation with a small language model.

        Args:
            model: the small one.
            head_dim, experts: the most there may be: the width of a head, experts of a modality.
        """
        return {}

    def resolved_with(self, model: ModelConfig) -> Mapping[str, object]:
        """What fields mean beside a language model, where 0 stands for one of its numbers."""
        return {}

    def problems_with(self, model: ModelConfig) -> Iterator[str]:
        """What does not fit a language model."""
        plain = model.replace(**{name: vars(ModelConfig)[name] for name in self.plain_fields})
        for name in self.plain_fields:
            value, needed = getattr(model, name), getattr(plain, name)
            if value != needed:
                yield f"model.{name} = {value!r}: must be {needed!r} with vlm.arch {self.arch!r}"

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


class _AnyArchitecture:
    """Annotation of a field that holds any registered `VLMConfig`, given as an instance or as a mapping with
    ``arch``.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._build)

    def _build(self, value: object) -> VLMConfig:
        if isinstance(value, Mapping):
            fields = dict(value)
            if "arch" not in fields:
                raise ConfigError([f"arch: required, one of {', '.join(VLMConfig.architectures())}"])
            return from_fields(VLMConfig.class_for(fields.pop("arch")), fields)
        if isinstance(value, VLMConfig) and value.arch:
            return value
        raise ValueError("Input should be a table with a key arch, or a config from VLMConfig.for_arch")

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"oneOf": [handler(TypeAdapter(_ARCHITECTURES[arch]).core_schema) for arch in VLMConfig.architectures()]}


AnyVLMConfig = Annotated[VLMConfig, _AnyArchitecture()]
