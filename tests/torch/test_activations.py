"""What a layer keeps for its backward pass, as the model of costs says and as PyTorch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from kempnerforge_torch.model.build import build_model
from kempnerforge_torch.training import blocks
from kempnerforge_torch.training.loss import CHUNK_ELEMENTS
from shared_config.contract.activations import WIDENED, kept_bytes, tokens_of_device
from shared_config.contract.sharding import Layout
from shared_config.schema.job import JobConfig
from tests.distributed.layouts import DENSE, SIGMOID, SOFTMAX, UNGATED
from tests.jobs import draw_batch, tiny_job

MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": {**DENSE, "n_kv_heads": 2, "qk_norm": False, "norm_placement": "before"},
    "norms of heads": {**DENSE, "norm_placement": "before"},
    "not gated": {**DENSE, "activation": "gelu"},
    "norms after": {**DENSE, "norm_placement": "after", "qk_norm_over": "width", "residual_scale": 0.5},
    "norms on both sides": DENSE,
    "experts": SIGMOID,
    "none shared": {**SOFTMAX, "num_experts": 8, "moe_top_k": 3, "moe_shared_experts": 0, **UNGATED},
}
MOST = 1.02
"""Times what the model says: PyTorch also keeps some numbers whose count does not grow with that of tokens."""


class Products(TorchDispatchMode):
    """Adds up, by mode, the bytes of what the products give that recomputation keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(blocks._POLICIES, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in (result if isinstance(result, tuple) else [result]) if each is not None]
        for mode, policy in blocks._POLICIES.items():
            if policy(None, func, *args) == CheckpointPolicy.MUST_SAVE:
                self.bytes[mode] += sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
        return result


def job_of(model: str, layers: int, precision: str) -> JobConfig:
    sizes = {"n_layers": layers, "dim": 32, "ffn_hidden_dim": 48}
    train = {"seq_len": 32, "batch_size": 2, "mixed_precision": precision}
    return tiny_job({**MODELS[model], **sizes}, train=train)


def forward(job: JobConfig) -> tuple[int, dict[str, int]]:
    """Bytes that autograd keeps in a forward, parameters and buffers aside, and of what matrix products give."""
    model = build_model(job)
    model.init_weights_and_freqs(0)
    if job.train.mixed_precision == "bf16":
        model.to(torch.bfloat16)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    tokens = torch.from_numpy(draw_batch(job, 0)["tokens"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Products() as products:
        model(tokens, return_stats=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), products.bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_keeps_what_the_model_of_costs_says(model: str, precision: str) -> None:
    one, two = (forward(job_of(model, layers, precision)) for layers in (1, 2))
    kept = two[0] - one[0]
    job = job_of(model, 2, precision)
    said = kept_bytes(job, Layout(), is_moe=job.model.is_moe, mode="none")
    assert said <= kept <= MOST * said
    full = kept_bytes(job, Layout(), is_moe=job.model.is_moe, mode="full")
    assert full == tokens_of_device(job, Layout()) * job.model.dim * (2 if precision == "bf16" else 4)
    for mode in blocks._POLICIES:
        said, products = (
            kept_bytes(job, Layout(), is_moe=job.model.is_moe, mode=mode) - full,
            two[1][mode] - one[1][mode],
        )
        assert said <= products <= MOST * said


def test_the_loss_widens_as_many_logits_at_a_time_as_the_contract_says() -> None:
    assert CHUNK_ELEMENTS == WIDENED
