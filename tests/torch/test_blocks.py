"""What a block keeps for its backward pass, read off the memory that outlives the forward; what it computes again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kempnerforge_torch.model.attention import attend
from kempnerforge_torch.model.grouped import GROUPED_MATMUL
from kempnerforge_torch.model.mask import Dense, Mask
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.training.blocks import checkpoint_activations, compile_blocks
from shared_config.schema.model import ModelConfig

WIDTHS = {"q": 40, "k": 10, "v": 10, "o": 40, "gate": 56, "up": 56, "down": 40}
CONFIG = ModelConfig(
    dim=40, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=10, ffn_hidden_dim=56, vocab_size=9, max_seq_len=32
)
KEPT = {
    "none": ["v", "gate", "up"],
    "full": [],
    "narrow": ["q", "k", "v", "o", "down"],
    "selective": list(WIDTHS),
}
"""Products with weights. (Where nothing is recomputed, what is made of the others stands for them.)"""
AGAIN = {"none": [], "full": ["q", "k", "v", "o", "gate", "up"], "narrow": ["gate", "up"], "selective": []}


class Products(TorchDispatchMode):
    """The results of products of a block's weights, and of attention, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []
        self.storages: list[StorageWeakRef] = []
        self.attention: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.widths.append(out.shape[-1])
            self.storages.append(StorageWeakRef(out.untyped_storage()))
        elif "scaled_dot_product" in str(func):
            self.attention.append(StorageWeakRef(out[0].untyped_storage()))
        return out


def block_of(mode: str, config: ModelConfig = CONFIG) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = Transformer(config)
    checkpoint_activations(model, mode)
    cos, sin = model.rope(torch.arange(32), torch.float32)
    return model.layers["0"], {"rope_cos": cos, "rope_sin": sin}


def run(mode: str) -> tuple[Products, Products, list[Tensor]]:
    """What its forward did and left, what its backward pass did, and the gradients."""
    block, inputs = block_of(mode)
    x = torch.randn(2, 32, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with Products() as forward:
        out = block(x, **inputs)
    gone = [storage.expired() for storage in forward.storages]
    forward.widths = [width for width, lost in zip(forward.widths, gone, strict=True) if not lost]
    forward.attention = [storage for storage in forward.attention if not storage.expired()]
    with Products() as backward:
        out.square().sum().backward()
    gradients = [x.grad, *(weight.grad for weight in block.parameters())]
    return forward, backward, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("mode", KEPT)
def test_a_mode_keeps_what_it_says(mode: str) -> None:
    forward, _, _ = run(mode)
    assert sorted(forward.widths) == sorted(WIDTHS[name] for name in KEPT[mode])
    assert len(forward.attention) == (mode != "full")


@pytest.mark.parametrize("mode", KEPT)
def test_a_mode_computes_the_rest_again_and_nothing_else(mode: str) -> None:
    """Each product has two in the backward pass, one for each factor; "down" is no factor of any."""
    _, backward, gradients = run(mode)
    _, plain, expected = run("none")
    again = sorted([*plain.widths, *(WIDTHS[name] for name in AGAIN[mode])])
    assert sorted(backward.widths) == again
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


class Calls(TorchDispatchMode):
    """The widths of what an operation gives, in their order."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.widths = operation, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is self.operation:
            self.widths.append(out.shape[-1])
        return out


@pytest.mark.parametrize(("mode", "times"), [("narrow", 2), ("selective", 0)])
def test_products_of_experts_are_kept_as_others_are(mode: str, times: int) -> None:
    config = CONFIG.replace(num_experts=3, moe_packed_experts=True)
    width = config.computed_expert_ffn_hidden_dim
    assert width > config.dim
    assert computed_again(config, mode, GROUPED_MATMUL) == Counter({width: times})


@pytest.mark.parametrize(("mode", "times"), [("narrow", 1), ("selective", 0)])
def test_products_with_biases_are_kept_as_others_are(mode: str, times: int) -> None:
    config = CONFIG.replace(head_dim=20, attention_bias=True)
    assert computed_again(config, mode, torch.ops.aten.addmm.default) == Counter({80: times})


def computed_again(config: ModelConfig, mode: str, operation: Any) -> Counter[int]:
    """The widths of what an operation gives in the backward pass beyond what it gives there without recomputation."""
    found = []
    for each in (mode, "none"):
        block, inputs = block_of(each, config)
        out = block(torch.randn(2, 32, 40, requires_grad=True), **inputs)
        with Calls(operation) as calls:
            out.square().sum().backward()
        found.append(Counter(calls.widths))
    found[0].subtract(found[1])
    return found[0]


@pytest.mark.parametrize("mask", [Mask(causal=True), Mask(dense=Dense(torch.ones(7, 7).tril(2).bool(), None))])
def test_one_program_computes_attention_again_for_any_number_of_heads(mask: Mask) -> None:
    """As compilers make it of an encoder and a decoder: the numbers are symbols of the program."""
    compiled = torch.compile(recomputed, backend="eager", fullgraph=True, dynamic=True)
    for heads, kv_heads in ((2, 2), (4, 2), (6, 3), (5, 5)):
        torch.manual_seed(heads)
        q, k, v = (torch.randn(2, number, 7, 4) for number in (heads, kv_heads, kv_heads))
        found = []
        for program in (recomputed, compiled):
            given = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
            out = program(given[0], given[1], given[2], mask)
            out.square().sum().backward()
            found.append([out, *(tensor.grad for tensor in given)])
        torch.testing.assert_close(*found)


def recomputed(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention that keeps its arguments alone."""
    return checkpoint(attend, q, k, v, mask, use_reentrant=False)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts": 3},
        {"num_experts": 3, "moe_packed_experts": True, "moe_router": "sigmoid_topk"},
        {"num_experts": 3, "moe_frequency": 2},
        {"sliding_window": 4, "attention_pattern": ("window", "full_nope")},
    ],
)
def test_layers_share_their_programs(fields: dict[str, Any]) -> None:
    """However many there are: compiling each takes as long as those of every kind."""
    programs = []
    for n_layers in (4, 8):
        torch._dynamo.reset()
        model, counter = Transformer(CONFIG.replace(n_layers=n_layers, **fields)), CompileCounter()
        compile_blocks(model, torch.device("cpu"), backend=counter)  # type: ignore[arg-type]
        model(torch.zeros((2, 7), dtype=torch.int64)).square().sum().backward()
        programs.append(counter.frame_count)
    assert 0 < programs[0] == programs[1]
