"""A model of the same architecture at sizes that two CPU cores validate in seconds."""

from __future__ import annotations

from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.data import DataConfig
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.pattern import LayerKind
from shared_config.schema.rope import RopeScaling
from shared_config.schema.training import FP8_FEWEST_LAYERS, TrainConfig
from shared_config.schema.video import VideoConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import VLMConfig

HEAD_DIM, HEADS, KV_HEADS, QUERIES_A_KV_HEAD = 16, 4, 2, 4
VOCABULARY = 260
SEQUENCE, WINDOW, TEXT, IMAGE_TOKENS, FEATURES, FRAMES = 256, 12, 64, 16, 48, 2
EXPERTS, BATCH, TRAINED_SEQUENCE = 8, 8, 64
IMAGE, PATCH, TOWER_LAYERS = 32, 8, 2


def shrink(config: JobConfig) -> JobConfig:
    """The same kinds of layers, with fewer and narrower ones.

    Kept: multi-head, grouped or multi-query attention, its own head width, which layers have experts, gated or
    plain FFNs, ties, biases, norms, scalings, windows, routers, the architecture of images. Cut: every size. The data
    is the embedded text and the layout a single device.
    """
    model = _model(config)
    return config.replace(
        model=model,
        train=_train(config.train),
        data=DataConfig(),
        distributed=DistributedConfig(),
        vision_encoder=None if config.vision_encoder is None else _vision_encoder(config.vision_encoder),
        adapter=None if config.adapter is None else _adapter(config.adapter),
        vlm=None if config.vlm is None else _vlm(config.vlm, model),
        video=None if config.video is None else _video(config.video),
    )


def _model(config: JobConfig) -> ModelConfig:
    model, pattern = config.model, _distinct_kinds(config.model)
    n_layers = min(model.n_layers, _layers_of_a_period(config))
    n_heads, n_kv_heads = _heads(model)
    dim, head_dim = _widths(model, n_heads)
    max_seq_len = min(model.max_seq_len, SEQUENCE)
    num_experts = min(model.num_experts, EXPERTS)
    return model.replace(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=min(model.vocab_size, VOCABULARY),
        ffn_hidden_dim=_rounded(model.computed_ffn_hidden_dim / model.dim * dim),
        max_seq_len=max_seq_len,
        rope_scaling=_rope_scaling(model.rope_scaling, max_seq_len / model.max_seq_len),
        sliding_window=None if model.sliding_window is None else min(model.sliding_window, WINDOW),
        attention_pattern=pattern if "attention_pattern" in model.given() else None,
        num_experts=num_experts,
        moe_top_k=min(model.moe_top_k, max(1, num_experts // 2)) if model.is_moe else model.moe_top_k,
    )


def _layers_of_a_period(config: JobConfig) -> int:
    """Layers that show every kind of layer at least once, and one after it; with FP8, also what computes in it."""
    fewest = FP8_FEWEST_LAYERS if config.train.mixed_precision == "fp8" else 1
    period = config.model.moe_frequency if config.model.is_moe else 1
    between = 1 if config.vlm is None else config.vlm.layer_period(config.model)
    return max(period + 1, between + 1, len(_distinct_kinds(config.model)) + 1, fewest)


def _distinct_kinds(model: ModelConfig) -> tuple[LayerKind, ...]:
    """The kinds of attention of its layers, each once."""
    return tuple(dict.fromkeys(model.pattern))


def _heads(model: ModelConfig) -> tuple[int, int]:
    """Query and key/value heads, multi-head, grouped or multi-query as before."""
    group = model.n_heads // model.kv_heads
    n_kv_heads = min(model.kv_heads, HEADS if group == 1 else KV_HEADS)
    return n_kv_heads * min(group, QUERIES_A_KV_HEAD), n_kv_heads


def _widths(model: ModelConfig, n_heads: int) -> tuple[int, int | None]:
    """Residual width and head width, the latter None where it follows from the former."""
    inner = model.n_heads * model.head_size
    if "head_dim" not in model.given() or inner == model.dim:
        return min(model.dim, n_heads * HEAD_DIM), None
    head_dim = min(model.head_size, HEAD_DIM)
    return _rounded(n_heads * head_dim * model.dim / inner), head_dim


def _rounded(width: float) -> int:
    return max(1, round(width / 8)) * 8


def _rope_scaling(scaling: RopeScaling, ratio: float) -> RopeScaling:
    if scaling.original_max_seq_len is None:
        return scaling
    return scaling.replace(original_max_seq_len=max(1, round(scaling.original_max_seq_len * ratio)))


def _train(train: TrainConfig) -> TrainConfig:
    return train.replace(batch_size=min(train.batch_size, BATCH), seq_len=min(train.seq_len, TRAINED_SEQUENCE))


def _vision_encoder(encoder: VisionEncoderConfig) -> VisionEncoderConfig:
    """A small tower in place of any other; noise stays noise."""
    if encoder.type == "random":
        return encoder.replace(feature_dim=FEATURES, num_tokens=IMAGE_TOKENS)
    return VisionEncoderConfig(
        type="vit", image_size=IMAGE, patch_size=PATCH, feature_dim=FEATURES, n_heads=HEADS, n_layers=TOWER_LAYERS
    )


def _adapter(adapter: AdapterConfig) -> AdapterConfig:
    return adapter.replace(
        hidden_dim=min(adapter.hidden_dim, TEXT), pool_window=2, pool_heads=min(adapter.pool_heads, 2)
    )


def _video(video: VideoConfig) -> VideoConfig:
    return video.replace(max_frames=min(video.max_frames, FRAMES), min_frames=min(video.min_frames, FRAMES))


def _vlm(vlm: VLMConfig, model: ModelConfig) -> VLMConfig:
    own = vlm.shrunk(model, head_dim=HEAD_DIM, experts=EXPERTS)
    return vlm.replace(max_text_len=min(vlm.max_text_len, TEXT), **own)
