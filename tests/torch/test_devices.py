"""Whatever a model makes on its way is on the device of its weights: run where there are no values, nor any CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kempnerforge_torch.model.generate import sample
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import build_vlm_wrapper
from kempnerforge_torch.training.loss import cross_entropy, router_losses
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig, MoMaConfig, MoTConfig

META = torch.device("meta")
DENSE = ModelConfig(
    dim=20, head_dim=6, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=37, max_seq_len=32, qk_norm=True
)
EXPERTS = {"num_experts": 3, "moe_top_k": 2, "moe_shared_experts": 1}
TEXT = {
    "dense": DENSE.replace(sliding_window=3),
    "softmax": DENSE.replace(**EXPERTS, moe_capacity_factor=0.7),
    "sigmoid": DENSE.replace(
        **EXPERTS,
        moe_router="sigmoid_topk",
        moe_sequence_aux_loss_weight=0.1,
        moe_packed_experts=True,
        moe_gradient_scale=True,
    ),
}  # fmt: skip
IMAGES = {
    "joint_decoder": JointDecoderConfig(max_text_len=8),
    "cross_attention": CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1),
    "mot": MoTConfig(max_text_len=8),
    "moma": MoMaConfig(max_text_len=8),
}
VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
IDS = torch.zeros(2, 5, dtype=torch.long, device=META)
REAL = torch.ones(2, 5, dtype=torch.bool, device=META)


def on_meta(build: Any, *arguments: Any, **options: Any) -> Any:
    """Only the building is done under a default device."""
    with META:
        return build(*arguments, **options)


def loss_of(logits: Tensor, stats: Any) -> Tensor:
    total, count = cross_entropy(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=META))
    aux_loss, z_loss = router_losses(stats)
    return total / count + aux_loss + z_loss


@pytest.mark.parametrize("name", TEXT)
def test_text_models_make_everything_on_their_device(name: str) -> None:
    model = on_meta(Transformer, TEXT[name])
    out = model.run(IDS, doc_ids=IDS, modality=ModalityContext(key_padding_mask=REAL))
    loss_of(out.logits, out.stats).backward()
    assert all(parameter.grad is not None and parameter.grad.device == META for parameter in model.parameters())
    model.update_moe_bias({layer: stats.expert_counts for layer, stats in out.stats.items()} if out.stats else {})
    assert sample(out.logits, top_p=0.9).device == META


@pytest.mark.parametrize("arch", IMAGES)
def test_vision_language_models_make_everything_on_their_device(arch: str) -> None:
    adapter = AdapterConfig(type="avgpool" if arch == "mot" else "attentional_pool", pool_window=2, pool_heads=3)
    model = on_meta(build_vlm_wrapper, DENSE, VISION, adapter, IMAGES[arch], frames_per_clip=2)
    clips = torch.zeros(2, 2, 3, 8, 8, device=META)
    seed = torch.zeros((), dtype=torch.long, device=META) if arch == "moma" else None
    out = model.run(clips, IDS, REAL[:, :2], text_mask=REAL, noise_seed=seed)
    loss_of(out.logits, out.stats).backward()
    assert out.logits.device == META


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_caches_make_everything_on_their_device(window: int | None, static: bool) -> None:
    model = on_meta(Transformer, DENSE.replace(sliding_window=window))
    caches = [KVCache(2, 16, 2, 6, device=META, sliding_window=window, spare=1, static=static) for _ in range(2)]
    for _ in range(3):
        logits = model(
            IDS[:, :2], kv_caches=caches, doc_ids=IDS[:, :2], modality=ModalityContext(key_padding_mask=REAL[:, :2])
        )
        assert logits.device == META
    for cache in caches:
        cache.without_padding()
        cache.reorder(IDS[0, :2])
        held = [getattr(cache, name) for name in ("k", "v", "lengths", "doc_ids", "oldest")]
        assert all(array.device == META for array in held if array is not None)
