"""The model of a config: as built, and with weights for generation."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kempnerforge_torch.device import find_device
from kempnerforge_torch.model.int8 import hold_int8
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import VLMWrapper, build_vlm_wrapper
from kempnerforge_torch.registry import registry
from shared_config.contract.decoding import check_dtype
from shared_config.contract.int8 import check_weights_dtype
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig


def build_model(config: JobConfig) -> Transformer | VLMWrapper:
    """The model of a job: a transformer, or one with an encoder and an adapter around it."""
    if config.vlm is None or config.vision_encoder is None:
        return registry.get("model", config.model.model_type)(config.model)
    frames = config.video.max_frames if config.video is not None else 1
    return build_vlm_wrapper(config.model, config.vision_encoder, config.adapter, config.vlm, frames)


def load_model(
    config: ModelConfig | JobConfig,
    weights: Mapping[str, object] | None,
    device: torch.device | str | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    weights_dtype: str = "float32",
) -> Transformer | VLMWrapper:
    """A model with these weights for generation: of a job, one that sees images if the job's does.

    Args:
        weights: by name, copied one by one; None: the initial ones of ``seed``.
        dtype: what the model holds and computes in, of `shared_config.contract.decoding.DTYPES`.
        weights_dtype: "int8" to hold those of layers as codes and scales (`hold_int8`), once they are there.

    Raises:
        ValueError: lists every missing, unknown and misshapen name; another ``dtype`` or ``weights_dtype``.
    """
    check_weights_dtype(weights_dtype)
    check_dtype(dtype)
    device = find_device(device)
    with torch.device("meta"):
        model = _new_model(config)
    model.to(getattr(torch, dtype)).to_empty(device=device)
    if weights is None:
        model.init_weights_and_freqs(seed)
    else:
        model.init_freqs()
        set_state(model, weights)
    if weights_dtype == "int8":
        hold_int8(model)
    return model.eval()


def _new_model(config: ModelConfig | JobConfig) -> Transformer | VLMWrapper:
    if isinstance(config, ModelConfig):
        return Transformer(config)
    return build_model(config)
