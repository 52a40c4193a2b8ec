"""The model of a config: as built, and with weights for generation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from kempnerforge_jax.device import find_device
from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.model.int8 import hold_int8
from kempnerforge_jax.model.state import held_dtype, set_state
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.vlm import VLMWrapper, build_vlm_wrapper
from kempnerforge_jax.registry import registry
from shared_config.contract.decoding import check_dtype
from shared_config.contract.int8 import check_weights_dtype
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig


def build_model(config: JobConfig, *, rngs: nnx.Rngs | None) -> Transformer | VLMWrapper:
    """The model of a job: a transformer, or one with an encoder and an adapter around it."""
    if config.vlm is None or config.vision_encoder is None:
        return registry.get("model", config.model.model_type)(config.model, rngs=rngs)
    frames = config.video.max_frames if config.video is not None else 1
    return build_vlm_wrapper(config.model, config.vision_encoder, config.adapter, config.vlm, frames, rngs=rngs)


def load_model(
    config: ModelConfig | JobConfig,
    weights: Mapping[str, object] | None,
    device: Device | str | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    weights_dtype: str = "float32",
) -> Transformer | VLMWrapper:
    """A model with these weights for generation: of a job, one that sees images if the job's does.

    Args:
        weights: by name, copied one by one; None: the initial ones of ``seed``.
        dtype: what the model holds and computes in, of `shared_config.contract.decoding.DTYPES`;
            "float64" needs jax_enable_x64.
        weights_dtype: "int8" to hold those of layers as codes and scales (`hold_int8`), once they are there.

    Raises:
        ValueError: lists every missing, unknown and misshapen name; another ``dtype`` or ``weights_dtype``.
    """
    check_weights_dtype(weights_dtype)
    check_dtype(dtype)
    with jax.default_device(find_device(device)):
        model = nnx.eval_shape(lambda: _new_model(config)).to(held_dtype(dtype))
        if weights is None:
            model.init_weights_and_freqs(seed)
        else:
            model.init_freqs()
            set_state(model, weights)
        if weights_dtype == "int8":
            hold_int8(model)
    return model


def _new_model(config: ModelConfig | JobConfig) -> Transformer | VLMWrapper:
    if isinstance(config, ModelConfig):
        return Transformer(config, rngs=None)
    return build_model(config, rngs=None)
