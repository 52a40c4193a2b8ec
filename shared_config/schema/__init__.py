"""One file per config section; `JobConfig` joins them."""

from shared_config.schema.adapter import AdapterConfig, pooled_token_count
from shared_config.schema.checkpoint import CheckpointConfig
from shared_config.schema.data import DataConfig, EvalConfig, PhaseConfig, SourceConfig
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.freeze import FreezeSpec, FreezeStage
from shared_config.schema.job import JobConfig
from shared_config.schema.lora import LoraConfig
from shared_config.schema.metrics import MetricsConfig, ProfilingConfig
from shared_config.schema.model import ModelConfig, RopeScaling
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.schema.scheduler import SchedulerConfig
from shared_config.schema.training import TrainConfig
from shared_config.schema.video import VideoConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import (
    CrossAttentionConfig,
    JointDecoderConfig,
    MoMaConfig,
    MoTConfig,
    VLMConfig,
)

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "FreezeSpec",
    "FreezeStage",
    "JobConfig",
    "JointDecoderConfig",
    "LoraConfig",
    "MetricsConfig",
    "MoMaConfig",
    "MoTConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "ProfilingConfig",
    "RopeScaling",
    "SchedulerConfig",
    "SourceConfig",
    "TrainConfig",
    "VLMConfig",
    "VideoConfig",
    "VisionEncoderConfig",
    "pooled_token_count",
]
