"""Whatever a model makes on its way is on the device of its weights: run where there are no values, nor any CPU. What
is done on devices that tests may not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module

from kempnerforge_torch.model import grouped
from kempnerforge_torch.model.init import init_from_table
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.modality import ModalityContext
from kempnerforge_torch.model.sampling import sample
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import build_vlm_wrapper
from kempnerforge_torch.training.loss import cross_entropy, router_losses
from kempnerforge_torch.training.train import Trainer
from shared_config.contract.specs import Normal, ParameterSpec
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


class OnGPU:
    """As much of a tensor as the choice of a kernel asks for."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, rows: int = 4, kind: str = "cuda"):
        self.dtype, self.rows, self.device = dtype, rows, torch.device(kind)

    def __len__(self) -> int:
        return self.rows

    def element_size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize


def test_the_grouped_kernel_is_used_for_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_kernel(x: Any, sizes: tuple[int, ...] = (16, 8), capability: int = 9, hip: str | None = None) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(torch.version, "hip", hip)
        return grouped._has_kernel(x, sizes)

    assert has_kernel(OnGPU())
    assert not any(
        has_kernel(x) for x in (OnGPU(torch.float32), OnGPU(torch.float16), OnGPU(rows=0), OnGPU(kind="cpu"))
    )
    assert not has_kernel(OnGPU(), (16, 12))
    assert not has_kernel(OnGPU(), capability=8)
    assert not has_kernel(OnGPU(), hip="6")


def test_a_trainer_waits_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for kind in ("cpu", "cuda:1"):
        trainer = object.__new__(Trainer)
        trainer.device = torch.device(kind)
        trainer._wait()
    assert waited == [torch.device("cuda:1")]


def test_sharded_weights_are_drawn_by_the_first_process(tmp_path: Path) -> None:
    """In a group of one; that all get the same is for those of several."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = torch.nn.Linear(50, 40, bias=False)
        distribute_module(layer, mesh)
        init_from_table(layer, {"weight": ParameterSpec((40, 50), Normal(0.5), (None, None))})
        assert isinstance(layer.weight, DTensor)
        assert layer.weight.full_tensor().std().item() == pytest.approx(0.5, rel=0.1)
    finally:
        torch.distributed.destroy_process_group()


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
