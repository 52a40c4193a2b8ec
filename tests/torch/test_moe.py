"""What is torch's own in mixtures of experts: compilation, custom operators, copies, dtypes, checkpointing, the GPU."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge_torch.model import Transformer
from kempnerforge_torch.model.grouped import (
    GROUPED_MATMUL,
    _dense,
    grouped_matmul,
    grouped_outer,
    tiled_matmul,
    tiled_outer,
)
from kempnerforge_torch.model.moe import MoEMLP, build_moe
from kempnerforge_torch.model.router import SigmoidTopKRouter, TopKRouter, top_k_lowest_first
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.model.stats import BlockOutput
from kempnerforge_torch.registry import registry
from kempnerforge_torch.training.blocks import checkpoint_activations
from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from shared_config.registry import temporary
from shared_config.schema.model import ModelConfig
from tests.torch.waits import none_on_a_gpu

VOCAB, EXPERTS = 31, 4
CASES: dict[str, dict[str, Any]] = {
    "softmax": {"moe_packed_experts": True},
    "sigmoid": {
        "moe_router": "sigmoid_topk",
        "moe_sequence_aux_loss_weight": 0.3,
        "moe_capacity_factor": 0.8,
        "moe_gradient_scale": True,
        "moe_shared_experts": 1,
    },
}

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiles = pytest.mark.filterwarnings(  # torch's own, while it compiles
    "ignore:.*script_method:DeprecationWarning",
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",
)
NUMBERS: dict[str, Any] = {
    "norm_eps": 1e-3, "rope_theta": 50.0, "window_rope_theta": 90.0, "attention_scale": 0.4, "embedding_scale": 2.5,
    "residual_scale": 0.7, "logit_divisor": 3.0, "attention_softcap": 2.0, "logit_softcap": 1.5,
    "moe_capacity_factor": 0.8, "moe_routed_scaling": 1.5,
}  # fmt: skip
each_case = pytest.mark.parametrize("case", sorted(CASES))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    with warnings.catch_warnings(action="ignore"):  # what it imports is deprecated
        torch._dynamo.reset()


def config_of(case: str = "sigmoid", **fields: Any) -> ModelConfig:
    sizes = {"dim": 24, "n_layers": 4, "n_heads": 3, "vocab_size": VOCAB, "ffn_hidden_dim": 40, "max_seq_len": 32}
    experts = {"num_experts": EXPERTS, "moe_frequency": 2, **CASES[case]}
    return ModelConfig(**{**sizes, **experts, **fields})


def model_of(case: str = "sigmoid", **fields: Any) -> Any:
    config = config_of(case, **fields)
    model = Transformer(config).double()
    set_state(model, validation_weights(parameter_table(config), 1))
    return model


def tokens_of(seed: int = 0, shape: tuple[int, int] = (2, 9)) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, shape))


def objective(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).sin().sum() + 0.5 * model.get_moe_aux_loss() + 0.1 * model.get_moe_router_z_loss()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


def routers_of(model: nn.Module) -> list[SigmoidTopKRouter]:
    return [module for module in model.modules() if isinstance(module, SigmoidTopKRouter)]


# Compilation


@compiles
@each_case
def test_one_graph_without_breaks(case: str) -> None:
    model = model_of(case, n_layers=2)
    found = torch._dynamo.explain(model)(tokens_of())
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@compiles
@each_case
def test_compiled_model_is_the_same_function(case: str) -> None:
    model = model_of(case, n_layers=2)
    objective(model, tokens_of()).backward()
    expected, counts = gradients_of(model), model.get_expert_counts()
    model.compile(fullgraph=True, backend="aot_eager")
    objective(model, tokens_of()).backward()
    assert_close(gradients_of(model), expected)
    assert_close(model.get_expert_counts(), counts)
    assert set(counts) == {1}


@compiles
@pytest.mark.parametrize("as_a_whole", [True, False])
def test_models_that_differ_in_every_number_compile_after_each_other(as_a_whole: bool) -> None:
    """For the compiler a number that was another one before is a variable."""
    for factor in (1.0, 1.1, 1.3):
        numbers = {name: value * factor for name, value in NUMBERS.items()}
        model = model_of(n_layers=2, sliding_window=3, attention_pattern=("full", "window"), **numbers)
        expected = model(tokens_of())
        for module in [model] if as_a_whole else model.layers.values():
            module.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(tokens_of()), expected)


def test_nothing_on_the_way_depends_on_data() -> None:
    """Fake tensors have no data: whatever reads a value, as a host sync would, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = build_moe(8, 16, 4, 2, capacity_factor=1.0, gradient_scale=True, shared_experts=1)
        x_BSD = torch.randn(2, 5, 8, requires_grad=True)
        y_BSD, stats = layer(x_BSD, torch.ones(2, 5, dtype=torch.bool), return_stats=True)
        (y_BSD.sum() + stats.aux_loss + stats.z_loss).backward()
        assert x_BSD.grad is not None
        assert x_BSD.grad.shape == x_BSD.shape


def test_operators_keep_torchs_rules_and_have_second_derivatives() -> None:
    torch.manual_seed(0)
    x_RD, w_EDF, y_RF = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (3, 4, 5), (9, 5))
    )
    ends_E = torch.tensor([2, 2, 7], dtype=torch.int32)
    for operator, inputs in ((grouped_matmul, (x_RD, w_EDF)), (grouped_outer, (x_RD, y_RF))):
        function = lambda a, b, operator=operator: operator(a, b, ends_E)  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    torch.library.opcheck(grouped_outer, (x_RD, y_RF, ends_E))
    apart = [w_DF.detach().t().clone().t().requires_grad_() for w_DF in w_EDF]
    for matrices in ([w_EDF], apart):
        torch.library.opcheck(GROUPED_MATMUL, (x_RD, matrices, ends_E, False))
    product = lambda x, *matrices: grouped_matmul(x, matrices, ends_E)  # noqa: E731
    assert torch.autograd.gradcheck(product, (x_RD, *apart))
    assert torch.autograd.gradgradcheck(product, (x_RD, *apart))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_matrices_of_experts_are_not_copied_and_have_gradients_of_their_layout(packed: bool, turned: bool) -> None:
    """As stacks, or one by one; from rows, or the transposed ones of linear layers."""
    x_RD, ends_E = torch.randn(9, 3), torch.tensor([2, 5, 9], dtype=torch.int32)
    w_EDF = torch.randn(3, 5, 3).transpose(1, 2) if turned else torch.randn(3, 3, 5)
    assert _dense(w_EDF).data_ptr() == w_EDF.data_ptr()
    assert _dense(w_EDF[:, :, ::2]).is_contiguous()
    matrices = [w_EDF.requires_grad_()] if packed else [matrix.detach().requires_grad_() for matrix in w_EDF]
    gradients = torch.autograd.grad(grouped_matmul(x_RD, matrices[0] if packed else matrices, ends_E).sum(), matrices)
    assert [gradient.stride() for gradient in gradients] == [matrix.stride() for matrix in matrices]


# State


@each_case
def test_copies_after_a_forward(case: str) -> None:
    model = model_of(case)
    logits = model(tokens_of())
    assert model.get_moe_aux_loss().requires_grad
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(tokens_of()), logits, rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(tokens_of()), logits, rtol=0, atol=0)


def test_buffers_stay_in_at_least_float32() -> None:
    layer = build_moe(8, 16, 4, 2, router_type="sigmoid_topk")
    router = layer.router
    assert isinstance(router, SigmoidTopKRouter)
    router.update_bias(torch.tensor([8, 0, 0, 0]))
    before = router.expert_bias.clone()
    for change in (layer.bfloat16, layer.half, lambda: layer.to(torch.bfloat16)):
        change()
        assert layer(torch.randn(1, 3, 8).to(router.gate.weight.dtype)).dtype == router.gate.weight.dtype
        assert router.expert_bias.dtype == router.expert_ema.dtype == torch.float32
        assert torch.equal(router.expert_bias, before)
    layer.double()
    assert router.expert_bias.dtype == torch.float64
    layer.to("meta")
    layer.to_empty(device="cpu").bfloat16()
    assert router.expert_bias.dtype == torch.float32


def test_routes_are_chosen_in_float32() -> None:
    """Scores that bfloat16 can't tell apart."""
    layer = build_moe(2, 4, 3, 1)
    layer.router.gate.weight.data = torch.tensor([[1.0, 0.0], [1.001, 0.0], [1.0005, 0.0]])
    weights, indices = layer.router(torch.ones(5, 2, dtype=torch.bfloat16))
    assert (weights.dtype, indices.flatten().tolist()) == (torch.float32, [1] * 5)


# Statistics and balancing


def test_the_order_of_equal_scores_is_asked_for() -> None:
    """A sort that may swap equal scores does so on a GPU alone."""
    told: list[tuple[str, dict[str, Any]]] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            told.append((str(func), kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Noting():
        top_k_lowest_first(torch.zeros(2, 5), 2)
    (sort,) = [each for each in told if "sort" in each[0]]
    assert sort == ("aten.sort.stable", {"stable": True, "descending": True})


def test_getters_show_the_last_forward() -> None:
    model = model_of()
    assert (model.get_moe_aux_loss(), model.get_moe_router_z_loss(), model.get_expert_counts()) == (0, 0, {})
    pure = model.run(tokens_of())
    assert model.get_expert_counts() == {}
    model(tokens_of())
    layers: list[Any] = [model.layers[str(layer)].mlp for layer in pure.stats]
    assert model.get_moe_aux_loss() == sum(stats.aux_loss for stats in pure.stats.values()) > 0
    assert model.get_moe_router_z_loss() == sum(stats.z_loss for stats in pure.stats.values()) > 0
    for layer, (index, stats) in zip(layers, pure.stats.items(), strict=True):
        assert torch.equal(model.get_expert_counts()[index], stats.expert_counts)
        for holder in (layer, layer.router):
            assert torch.equal(holder.expert_counts, stats.expert_counts)
            assert (holder.aux_loss, holder.z_loss) == (stats.aux_loss, stats.z_loss)


def test_layers_in_nested_containers_count() -> None:
    """A block with one mixture for each modality, whose stats are a dict."""
    model = model_of()
    block: Any = model.layers["1"]
    other: Any = model.layers["3"].mlp
    block.mlp = nn.ModuleDict({"image": block.mlp, "text": copy.deepcopy(other)})

    def forward(x: Tensor, *_: Any, **__: Any) -> BlockOutput:
        outputs = {name: mlp(x, return_stats=True) for name, mlp in block.mlp.items()}
        stats = {name: stats for name, (_, stats) in outputs.items()}
        return BlockOutput(x + sum(out for out, _ in outputs.values()), stats)

    block.forward = forward
    model(tokens_of())
    counts = model.get_expert_counts()
    assert set(counts) == {1, 3}
    assert set(counts[1]) == {"image", "text"}
    inner = [module for module in model.modules() if isinstance(module, MoEMLP)]
    assert len(inner) == 3
    torch.testing.assert_close(model.get_moe_aux_loss(), torch.stack([layer.aux_loss for layer in inner]).sum())
    torch.testing.assert_close(model.get_moe_router_z_loss(), torch.stack([layer.z_loss for layer in inner]).sum())
    model.set_moe_step(3, 4)
    assert [router._progress for router in routers_of(model)] == [0.75] * 3
    before = [router.expert_bias.clone() for router in routers_of(model)]
    model.update_moe_bias()
    assert not any(torch.equal(r.expert_bias, old) for r, old in zip(routers_of(model), before, strict=True))


def test_bias_moves_once_by_the_counts_of_all_micro_batches() -> None:
    whole, parts, told = (model_of(moe_capacity_factor=0.0) for _ in range(3))
    tokens = tokens_of(shape=(4, 9))
    whole(tokens)
    whole.update_moe_bias()
    total: dict[int, Tensor] = {}
    for part in tokens.split(1):
        parts(part)
        counts = told.run(part).stats
        total = {layer: total.get(layer, 0) + stats.expert_counts for layer, stats in counts.items()}
    parts.eval()
    parts(tokens_of(9))
    parts.update_moe_bias()
    told.update_moe_bias(total)
    for other in (parts, told):
        for router, expected in zip(routers_of(other), routers_of(whole), strict=True):
            assert torch.equal(router.expert_bias, expected.expert_bias)
            assert torch.equal(router.expert_ema, expected.expert_ema)
    after = routers_of(parts)[0].expert_bias.clone()
    parts.update_moe_bias()
    assert torch.equal(routers_of(parts)[0].expert_bias, after)


@each_case
@pytest.mark.parametrize("mode", ["full", "narrow", "selective"])
def test_activation_checkpointing_changes_nothing(case: str, mode: str) -> None:
    plain, checkpointed = model_of(case), model_of(case)
    checkpoint_activations(checkpointed, mode)
    losses = []
    for model in (plain, checkpointed):
        losses.append(objective(model, tokens_of()))
        losses[-1].backward()
        model.update_moe_bias()
    assert torch.equal(*losses)
    assert_close(gradients_of(checkpointed), gradients_of(plain))
    assert_close(dict(checkpointed.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize(("mode", "products"), [("none", 6), ("full", 9), ("narrow", 8), ("selective", 6)])
def test_selective_checkpointing_keeps_grouped_products(mode: str, products: int) -> None:
    """Three forward, three for the gradients of their inputs, and those again that are not kept."""
    model = model_of(n_layers=2)
    checkpoint_activations(model, mode)
    with Counting(GROUPED_MATMUL) as seen:
        objective(model, tokens_of()).backward()
    assert seen.calls == products


class Counting(TorchDispatchMode):
    """Counts how often an operator is carried out."""

    def __init__(self, operator: Any):
        super().__init__()
        self.operator = operator
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is self.operator
        return function(*args, **(kwargs or {}))


def test_a_router_of_its_own_is_found_by_name() -> None:
    class FirstK(TopKRouter):
        def _score(self, logits_TE: Tensor) -> Tensor:
            return torch.ones_like(logits_TE)

        def _balance(self, shares_BSE: Tensor, chosen_BSE: Tensor, valid_BS: Tensor | None) -> Tensor:
            return shares_BSE.new_ones(())

    with temporary():
        registry.register("router", "test_first_k_of_torch")(FirstK)
        model: Any = Transformer(config_of("softmax", moe_router="test_first_k_of_torch"))
    model(tokens_of())
    assert model.get_moe_aux_loss() == 2
    assert model.get_expert_counts()[1].tolist() == [18, 18, 0, 0]


# The GPU


@cuda
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 64), ("bfloat16", 60), ("float32", 64), ("float64", 60)])
def test_grouped_products_on_the_gpu(dtype: str, width: int) -> None:
    """Aligned bfloat16 has a kernel, the rest is tiled; groups without rows, and rows of no group that are NaN."""
    torch.manual_seed(0)
    ends_E = torch.tensor([0, 100, 100, 421, 600], dtype=torch.int32)
    x_RD, w_EDF, y_RF = (torch.randn(s, dtype=torch.float64) for s in ((640, 72), (5, 72, width), (640, width)))
    x_RD, w_EDF, y_RF = (value.to(torch.bfloat16).double() for value in (x_RD, w_EDF, y_RF))
    x_RD[600:] = y_RF[600:] = torch.nan
    product, outer = grouped_matmul(x_RD, w_EDF, ends_E), grouped_outer(x_RD, y_RF, ends_E)
    x, w, y, ends = (value.to("cuda") for value in (x_RD, w_EDF, y_RF, ends_E))
    x, w, y = (value.to(getattr(torch, dtype)) for value in (x, w, y))
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    roundoff = {"bfloat16": 2.0**-8, "float32": 2.0**-22, "float64": 2.0**-50}[dtype]
    with none_on_a_gpu():
        products = [grouped_matmul(x, w, ends), grouped_matmul(x, transposed, ends), tiled_matmul(x, w, ends)]
        outers = [grouped_outer(x, y, ends), tiled_outer(x, y, ends)]
    for found, truth in [*((p, product) for p in products), *((o, outer) for o in outers)]:
        assert (found.double().cpu() - truth).norm() <= 2 * roundoff * truth.norm()


@cuda
@each_case
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_host_sync_forward_and_backward(case: str, dtype: str) -> None:
    model = Transformer(config_of(case, dim=64, n_heads=4, ffn_hidden_dim=128)).to("cuda", getattr(torch, dtype))
    tokens = tokens_of().to("cuda")
    model(tokens).float().sum().backward()
    with none_on_a_gpu():
        loss = model(tokens).float().sum() + model.get_moe_aux_loss() + model.get_moe_router_z_loss()
        loss.backward()
        model.update_moe_bias()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_layers_of_several_modalities_compile_into_one_graph() -> None:
    """Two layers that count their own tokens, whose number is known on the device alone."""
    layers = [build_moe(8, 16, 4, 2, capacity_factor=0.5) for _ in range(2)]
    x, mine = torch.randn(2, 6, 8), torch.arange(12).reshape(2, 6) % 3 == 0

    def both(x: Tensor) -> Tensor:
        return layers[0](x, members=mine) + layers[1](x, members=~mine)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), both(x))
