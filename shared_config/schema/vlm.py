"""The architectures: one config class for each way in which images enter the language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shared_config.schema.architecture import VLMConfig
from shared_config.schema.base import (
    KEEPS_FUNCTION,
    Count,
    CountByName,
    Fraction,
    FrozenDict,
    Items,
    PositiveInt,
    TextsByName,
    section,
)
from shared_config.schema.freeze import default_patterns
from shared_config.schema.model import ModelConfig


@section
class JointDecoderConfig(VLMConfig, arch="joint_decoder"):
    """Image tokens stand before the text in one causal decoder, or where ``image_token_id`` stands for them in prompts
    and rows of data, as those of Hugging Face's LLaVAs have it.

    With ``prefix_lm`` the image, which then stands first, and the prompt see each other in both directions, and only
    what is learned or generated after them is causal (PaliGemma, Beyer et al. 2024, arXiv:2407.07726).
    """

    arch: Literal["joint_decoder"] = "joint_decoder"
    image_token_id: Annotated[Count | None, KEEPS_FUNCTION] = None
    prefix_lm: bool = False

    @property
    def image_token(self) -> int | None:
        return self.image_token_id

    @property
    def has_prefix(self) -> bool:
        return self.prefix_lm


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

    def resolved_with(self, model: ModelConfig) -> Mapping[str, object]:
        heads, kv_heads = self.resolved_heads(model.n_heads)
        return {
            "cross_attention_n_heads": heads,
            "cross_attention_n_kv_heads": kv_heads,
            "cross_attention_head_dim": self.resolved_head_dim(model),
        }

    def own_heads(self, model: ModelConfig) -> dict[str, int]:
        heads, kv_heads = self.resolved_heads(model.n_heads)
        return {"cross_attention_n_heads": heads, "cross_attention_n_kv_heads": kv_heads}

    def layer_period(self, model: ModelConfig) -> int:
        return self.cross_attention_every_n_layers

    def shrunk(self, model: ModelConfig, *, head_dim: int, experts: int) -> Mapping[str, object]:
        return {
            "cross_attention_n_heads": model.n_heads if self.cross_attention_n_heads else 0,
            "cross_attention_n_kv_heads": model.kv_heads if self.cross_attention_n_kv_heads else 0,
            "cross_attention_head_dim": min(self.cross_attention_head_dim, head_dim),
        }

    def problems_with(self, model: ModelConfig) -> Iterator[str]:
        yield from super().problems_with(model)
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

    plain_fields: ClassVar[tuple[str, ...]] = (
        "norm_placement", "residual_scale", "mlp_bias", "attention_output_bias", "attention_scale", "qk_norm_over",
        "attention_pattern", "window_rope_theta", "window_rope_scaled", "attention_softcap",
    )  # fmt: skip

    def resolved(self) -> Mapping[str, object]:
        """Modalities are identified by name, in any order."""
        return {"mot_modalities": tuple(sorted(self.mot_modalities))}

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.mot_modalities

    @property
    def warm_start_path(self) -> str:
        return self.mot_warm_start_path if self.mot_warm_start_from_text else ""

    def without_warm_start(self) -> VLMConfig:
        return self.replace(mot_warm_start_from_text=False)

    def resolved_image_heads(self, n_heads: int, n_kv_heads: int) -> tuple[int, int]:
        """Query and key/value heads of the image projections; 0 means those of the text."""
        return self.mot_image_n_heads or n_heads, self.mot_image_n_kv_heads or n_kv_heads

    def cached_kv_heads(self, model: ModelConfig) -> int:
        """A number that the heads of both modalities divide."""
        return math.lcm(model.kv_heads, self.resolved_image_heads(model.n_heads, model.kv_heads)[1])

    def resolved_with(self, model: ModelConfig) -> Mapping[str, object]:
        heads, kv_heads = self.resolved_image_heads(model.n_heads, model.kv_heads)
        return {"mot_image_n_heads": heads, "mot_image_n_kv_heads": kv_heads}

    def own_heads(self, model: ModelConfig) -> dict[str, int]:
        return {"mot_image_n_kv_heads": self.resolved_image_heads(model.n_heads, model.kv_heads)[1]}

    def shrunk(self, model: ModelConfig, *, head_dim: int, experts: int) -> Mapping[str, object]:
        return {
            "mot_image_n_heads": model.n_heads if self.mot_image_n_heads else 0,
            "mot_image_n_kv_heads": model.kv_heads if self.mot_image_n_kv_heads else 0,
        }

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from _modality_problems("mot_modalities", self.mot_modalities)
        if self.mot_warm_start_from_text and not self.mot_warm_start_path:
            yield "mot_warm_start_path = '': mot_warm_start_from_text needs the folder or file of the dense weights"

    def problems_with(self, model: ModelConfig) -> Iterator[str]:
        yield from super().problems_with(model)
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

    plain_fields: ClassVar[tuple[str, ...]] = ("norm_placement", "residual_scale", "mlp_bias")
    experts_choose: ClassVar[bool] = True
    uses_model_fields: ClassVar[tuple[str, ...]] = ("moe_expert_ffn_multiplier",)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.moma_modalities

    @property
    def routing_noise(self) -> bool:
        return self.moma_gumbel_noise

    def choosing_experts(self, modality: str) -> tuple[int, float] | None:
        return self.moma_experts_per_modality[modality], self.moma_capacity_factor

    def shrunk(self, model: ModelConfig, *, head_dim: int, experts: int) -> Mapping[str, object]:
        fewer = {name: min(number, experts) for name, number in self.moma_experts_per_modality.items()}
        return {"moma_experts_per_modality": FrozenDict(fewer)}

    def resolved(self) -> Mapping[str, object]:
        """Modalities are identified by name; 0 may be spelled as the number that it stands for."""
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
        yield from super().problems_with(model)
        if model.is_moe:
            yield f"model.num_experts = {model.num_experts}: must be 0 with vlm.arch 'moma' (it has its own experts)"


def _modality_problems(field: str, modalities: tuple[str, ...]) -> Iterator[str]:
    if sorted(modalities) != ["image", "text"]:
        yield f"{field} = {modalities}: must be 'image' and 'text', each once"
