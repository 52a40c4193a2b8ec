"""Models of one config hold the same layers with the same numbers in both backends, whatever the config asks for.

No field has its default here, so that one which a builder drops, or hands to the wrong layer, makes the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from flax import nnx

from kempnerforge_jax.model import transformer as of_jax
from kempnerforge_jax.model import vlm as images_of_jax
from kempnerforge_torch.model import transformer as of_torch
from kempnerforge_torch.model import vlm as images_of_torch
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.architecture import VLMConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.rope import RopeScaling
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig, MoMaConfig, MoTConfig

LIBRARY = {"training", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", "embedding_dim"}
"""What a module of torch holds by itself."""
DENSE = ModelConfig(
    dim=20, head_dim=6, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=28, max_seq_len=34,
    norm_eps=3e-4, rope_theta=500.0, activation="gelu", mlp_bias=True, attention_bias=True, qk_norm=True,
    sliding_window=5, sdpa_backend="math", attention_scale=0.7, attention_softcap=9.0, logit_softcap=8.0,
    residual_scale=0.6, embedding_scale=1.5, logit_divisor=2.5,
)  # fmt: skip
PLAIN = ModelConfig(
    dim=20, head_dim=6, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=28, max_seq_len=34,
    norm_type="layernorm", norm_eps=3e-4, rope_theta=500.0, activation="gelu", qk_norm=True, sdpa_backend="math",
)  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 5, "moe_top_k": 3, "moe_frequency": 2, "moe_shared_experts": 2, "moe_capacity_factor": 1.25,
    "moe_expert_ffn_multiplier": 0.5, "moe_gradient_scale": True,
    "moe_norm_topk_prob": False, "moe_routed_scaling": 1.5, "mlp_bias": False,
}  # fmt: skip
TEXT = {
    "dense": DENSE,
    "plain": PLAIN,
    "norms": DENSE.replace(
        norm_type="rmsnorm_1p", norm_placement="both", qk_norm_over="width", attention_output_bias=False,
        tie_embeddings=True,
    ),
    "positions": DENSE.replace(
        attention_pattern=("window", "full_nope", "window_nope"), window_rope_theta=70.0, window_rope_scaled=False,
        rope_scaling=RopeScaling(type="yarn", factor=3.0, original_max_seq_len=16), norm_placement="after",
    ),
    "softmax": DENSE.replace(**EXPERTS, moe_shared_expert_gate=True),
    "sigmoid": DENSE.replace(
        **EXPERTS, moe_router="sigmoid_topk", moe_bias_schedule="cosine_decay", moe_packed_experts=True,
        moe_sequence_aux_loss_weight=0.3,
    ),
}  # fmt: skip
TOWER = VisionEncoderConfig(type="vit", image_size=12, patch_size=4, feature_dim=10, n_layers=2, n_heads=2)
NOISE = VisionEncoderConfig(type="random", feature_dim=7, num_tokens=9)
IMAGES: dict[str, tuple[ModelConfig, VisionEncoderConfig, AdapterConfig, VLMConfig]] = {
    "joint_decoder": (
        DENSE, TOWER, AdapterConfig(type="mlp_2layer", hidden_dim=11, activation="silu"),
        JointDecoderConfig(max_text_len=13, prefix_lm=True),
    ),
    "cross_attention": (
        PLAIN, TOWER, AdapterConfig(type="attentional_pool", pool_window=3, pool_heads=5),
        CrossAttentionConfig(
            max_text_len=13, cross_attention_every_n_layers=2, cross_attention_n_heads=4, cross_attention_n_kv_heads=2,
            cross_attention_head_dim=8,
        ),
    ),
    "mot": (
        PLAIN.replace(**EXPERTS | {"moe_frequency": 3, "norm_type": "rmsnorm_1p"}), NOISE,
        AdapterConfig(type="avgpool", pool_window=3),
        MoTConfig(max_text_len=13, mot_modalities=("text", "image"), mot_image_n_heads=6, mot_image_n_kv_heads=3),
    ),
    "moma": (
        PLAIN.replace(moe_expert_ffn_multiplier=0.5), NOISE, AdapterConfig(type="linear"),
        MoMaConfig(
            max_text_len=13, moma_experts_per_modality={"image": 3, "text": 2}, moma_capacity_factor=0.75,
            moma_gumbel_noise=False,
        ),
    ),
}  # fmt: skip
CONTAINERS = ("ModuleDict", "ModuleList", "Dict", "List", "Numbered")
ONE_SIDE = {"layer_idx", "kv_heads"}
"""What layers of torch note, and those of JAX are told, or see of their weights."""
Held = dict[str, tuple[str, dict[str, object]]]


def is_plain(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return bool(value) and all(map(is_plain, value.values()))
    return isinstance(value, bool | int | float | str)


def held(modules: Iterable[tuple[str, Any]]) -> Held:
    """Path -> class of each module, but for the matrix of the head, and the numbers, names and switches it holds."""
    found = {}
    for path, module in modules:
        kind = type(module).__name__
        own = {name: dict(value) if isinstance(value, nnx.Dict) else value for name, value in vars(module).items()}
        own = {name: value for name, value in own.items() if is_plain(value) and name not in LIBRARY | ONE_SIDE}
        if kind not in CONTAINERS:
            public = {name: value for name, value in own.items() if not name.startswith("_")}
            found[path] = ("" if path.endswith("output_head.proj") else kind, public)
    return found


def in_torch(build: Any, *configs: Any, **options: Any) -> Held:
    with torch.device("meta"):
        return held(build(*configs, **options).named_modules())


def in_jax(build: Any, *configs: Any, **options: Any) -> Held:
    model = nnx.eval_shape(lambda: build(*configs, rngs=nnx.Rngs(0), **options))
    return held((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model))


@pytest.mark.parametrize("name", TEXT)
def test_text_models(name: str) -> None:
    ours = in_torch(of_torch.Transformer, TEXT[name])
    assert ours == in_jax(of_jax.Transformer, TEXT[name])


@pytest.mark.parametrize("name", IMAGES)
def test_models_of_images_and_text(name: str) -> None:
    ours = in_torch(images_of_torch.build_vlm_wrapper, *IMAGES[name], frames_per_clip=2)
    assert ours == in_jax(images_of_jax.build_vlm_wrapper, *IMAGES[name], frames_per_clip=2)
