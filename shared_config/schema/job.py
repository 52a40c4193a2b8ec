"""`JobConfig`: all sections of a run, and the checks that span them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from shared_config.errors import ConfigError
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.architecture import AnyVLMConfig
from shared_config.schema.base import EXECUTION, KEEPS_FUNCTION, NESTED, Section, section
from shared_config.schema.checkpoint import CheckpointConfig
from shared_config.schema.data import DataConfig, EvalConfig
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.lora import LoraConfig
from shared_config.schema.metrics import MetricsConfig, ProfilingConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.schema.scheduler import SchedulerConfig
from shared_config.schema.training import FP8_FEWEST_LAYERS, FP8_MULTIPLE, TrainConfig
from shared_config.schema.video import VideoConfig
from shared_config.schema.vision import VisionEncoderConfig

NO_ADAPTERS = {"tp": "an adapter's matrices are not split by heads or widths", "pp": "a stage may hold no adapter"}
"""Mesh axes over which adapters are not trained, and why."""


@section
class JobConfig(Section):
    """Everything that defines a run. Text models leave vision_encoder, adapter, vlm and video None.

    Sections without an annotation say what the model computes, or what it is shown.
    """

    model: Annotated[ModelConfig, NESTED] = Field(default_factory=ModelConfig)
    train: Annotated[TrainConfig, NESTED, KEEPS_FUNCTION] = Field(default_factory=TrainConfig)
    optimizer: Annotated[OptimizerConfig, NESTED, KEEPS_FUNCTION] = Field(default_factory=OptimizerConfig)
    scheduler: Annotated[SchedulerConfig, NESTED, KEEPS_FUNCTION] = Field(default_factory=SchedulerConfig)
    data: Annotated[DataConfig, NESTED, KEEPS_FUNCTION] = Field(default_factory=DataConfig)
    eval: Annotated[EvalConfig, NESTED, EXECUTION] = Field(default_factory=EvalConfig)
    distributed: Annotated[DistributedConfig, NESTED, EXECUTION] = Field(default_factory=DistributedConfig)
    checkpoint: Annotated[CheckpointConfig, NESTED, EXECUTION] = Field(default_factory=CheckpointConfig)
    metrics: Annotated[MetricsConfig, NESTED, EXECUTION] = Field(default_factory=MetricsConfig)
    profiling: Annotated[ProfilingConfig, NESTED, EXECUTION] = Field(default_factory=ProfilingConfig)
    vision_encoder: Annotated[VisionEncoderConfig, NESTED] | None = None
    adapter: Annotated[AdapterConfig, NESTED] | None = None
    vlm: AnyVLMConfig | None = None
    video: Annotated[VideoConfig, NESTED] | None = None
    lora: Annotated[Annotated[LoraConfig, NESTED] | None, KEEPS_FUNCTION] = None

    @property
    def experts_choose(self) -> bool:
        """Whether experts choose their tokens, rather than tokens their experts."""
        return self.vlm is not None and self.vlm.experts_choose

    @property
    def frames_per_row(self) -> int:
        """The most pictures of a row: frames of its clip, or images."""
        return self.data.max_images if self.video is None else self.video.max_frames

    @property
    def has_routers(self) -> bool:
        """Whether there are experts of either kind."""
        return self.model.is_moe or self.experts_choose

    def problems(self) -> Iterator[str]:
        if self.train.seq_len > self.model.max_seq_len:
            yield (
                f"train.seq_len = {self.train.seq_len}: must be at most model.max_seq_len = {self.model.max_seq_len}"
            )
        if self.scheduler.decay_steps is not None and self.scheduler.decay_steps < self.scheduler.warmup_steps:
            yield (
                f"scheduler.decay_steps = {self.scheduler.decay_steps}: must be at least "
                f"scheduler.warmup_steps = {self.scheduler.warmup_steps}"
            )
        if self.optimizer.averages and self.scheduler.name not in ("constant", "none"):
            yield (
                f"scheduler.name = {self.scheduler.name!r}: must be 'constant' or 'none' with optimizer.name = "
                f"{self.optimizer.name!r}, whose average takes the place of a decay"
            )
        if self.eval.average and not (self.optimizer.averages or self.optimizer.ema_decay):
            yield "eval.average = True: no average of the weights is kept, see optimizer.ema_decay"
        if self.eval.sample_prompt and self.vlm is not None:
            yield f"eval.sample_prompt = {self.eval.sample_prompt!r}: must be empty with a [vlm] section"
        if self.train.mixed_precision == "fp8":
            yield from self._fp8_problems()
        if self.lora is not None:
            yield from self._lora_problems()
        yield from self._vision_problems()

    def _lora_problems(self) -> Iterator[str]:
        """Where there are no adapters."""
        if self.vlm is not None and self.vlm.modalities:
            why = f"vlm.arch {self.vlm.arch!r}, each of whose modalities has matrices of its own"
            yield f"lora = {self.lora}: must be absent with {why}"
        if self.train.mixed_precision == "fp8":
            yield "train.mixed_precision = 'fp8': must be 'fp32' or 'bf16' with a [lora] section"

    def _fp8_problems(self) -> Iterator[str]:
        """Where nothing would be computed in FP8."""
        model = self.model
        if model.n_layers < FP8_FEWEST_LAYERS or model.dim % FP8_MULTIPLE != 0:
            yield (
                f"train.mixed_precision = 'fp8': needs model.n_layers of {FP8_FEWEST_LAYERS} or more, as the first and "
                f"the last stay in bfloat16, and a model.dim that {FP8_MULTIPLE} divides; they are {model.n_layers} "
                f"and {model.dim}"
            )

    def _vision_problems(self) -> Iterator[str]:
        if self.data.max_images > 1 and (self.vlm is None or not self.vlm.takes_several):
            several = "vlm.image_token_id, which says where each of several stands, or vlm.prefix_lm"
            yield f"data.max_images = {self.data.max_images}: must be 1 without {several}"
        elif self.data.max_images > 1 and self.video is not None:
            yield f"data.max_images = {self.data.max_images}: must be 1 with a [video] section, as a row has one clip"
        if self.vlm is None:
            for name in ("vision_encoder", "adapter", "video"):
                if getattr(self, name) is not None:
                    yield f"{name} = {getattr(self, name)}: has no effect without a [vlm] section with an arch"
            return
        if self.vision_encoder is None:
            yield "vision_encoder = None: a [vlm] section needs a [vision_encoder] section"
            return
        if self.data.sources:
            yield f"data.sources = {len(self.data.sources)} sources: must be empty with a [vlm] section"
        yield from self.vlm.problems_with(self.model)
        encoder = self.vision_encoder
        if encoder.known_num_tokens:
            yield from self.image_problems(encoder.known_num_tokens, encoder.feature_dim)
        size = encoder.image_size
        if self.video is not None and size not in (0, self.video.frame_size):
            yield f"video.frame_size = {self.video.frame_size}: must be vision_encoder.image_size = {size}"

    def image_problems(self, num_tokens: int, feature_dim: int = 0) -> Iterator[str]:
        """What does not fit an encoder that gives ``num_tokens`` tokens of width ``feature_dim`` (0: not known) per
        image; checked again once it is loaded.
        """
        if self.vlm is not None:
            adapter = self.adapter or AdapterConfig()
            yield from self.vlm.image_problems(self.model, adapter, num_tokens, feature_dim, self.frames_per_row)

    def validate(self, world_size: int = 1) -> None:
        """Check the parallel layout against the number of devices.

        Raises:
            ConfigError: listing every problem.
        """
        found = [f"distributed.{line}" for line in self.distributed.problems_on(world_size)]
        found += self.layout_problems()
        if found:
            raise ConfigError(found)

    def layout_problems(self) -> Iterator[str]:
        """What of the parallel layout does not fit the model, on any number of devices."""
        model, layout = self.model, self.distributed
        if model.n_heads % layout.tp != 0 or model.kv_heads % layout.tp != 0:
            yield (
                f"distributed.tp = {layout.tp}: must divide model.n_heads = {model.n_heads} and "
                f"model.n_kv_heads = {model.kv_heads}"
            )
        for axis, reason in NO_ADAPTERS.items() if self.lora is not None else ():
            if (size := getattr(layout, axis)) > 1:
                yield f"distributed.{axis} = {size}: must be 1 with a [lora] section, as {reason}"
        if layout.pp > model.n_layers:
            yield f"distributed.pp = {layout.pp}: must be at most model.n_layers = {model.n_layers}"
        if layout.ep > 1 and (not model.is_moe or model.num_experts % layout.ep != 0):
            yield f"distributed.ep = {layout.ep}: must divide model.num_experts = {model.num_experts}"
        for axis in ("tp", "cp"):
            if self.train.mixed_precision == "fp8" and (size := getattr(layout, axis)) > 1:
                yield (
                    f"distributed.{axis} = {size}: must be 1 with train.mixed_precision = 'fp8', whose scales are made "
                    "of whole rows and columns"
                )
