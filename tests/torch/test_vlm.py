"""What is torch's own in vision-language models: compilation, the meta device, copies, gradients of what is absent."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kempnerforge_torch.model.expert_choice import ExpertChoiceSigmoidRouter
from kempnerforge_torch.model.hooks import capture
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.model.vlm import VLMWrapper, build_vlm_wrapper, inner_transformer
from kempnerforge_torch.training.blocks import compile_blocks
from shared_config.contract.vision import vit_tower, wrapper_table
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    JointDecoderConfig,
    ModelConfig,
    MoMaConfig,
    MoTConfig,
    VisionEncoderConfig,
    VLMConfig,
)
from tests.oracle.weights import draw

MODEL = ModelConfig(
    dim=20, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, vocab_size=37, ffn_hidden_dim=26, max_seq_len=32
)
VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
CASES: dict[str, tuple[ModelConfig, VLMConfig, AdapterConfig]] = {
    "joint_decoder": (MODEL, JointDecoderConfig(max_text_len=8), AdapterConfig(type="avgpool")),
    "cross_attention": (
        MODEL,
        CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=2),
        AdapterConfig(type="attentional_pool", pool_heads=4),
    ),
    "mot": (MODEL, MoTConfig(max_text_len=8, mot_image_n_kv_heads=2), AdapterConfig(type="linear")),
    "mot_experts": (MODEL.replace(num_experts=3), MoTConfig(max_text_len=8), AdapterConfig()),
    "moma": (MODEL, MoMaConfig(max_text_len=8, moma_capacity_factor=0.3), AdapterConfig()),
}
GENERATOR = torch.Generator().manual_seed(0)
CLIPS = torch.randn(2, 2, 3, 8, 8, generator=GENERATOR)
TEXT = torch.randint(0, 37, (2, 8), generator=GENERATOR)
FRAMES = torch.tensor([[True, False], [True, True]])
TEXT_MASK = torch.arange(8) < torch.tensor([[8], [5]])

compiles = pytest.mark.filterwarnings(  # torch's own, while it compiles
    "ignore:.*script_method:DeprecationWarning",
    "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def model_of(name: str, n_layers: int = MODEL.n_layers) -> VLMWrapper:
    model, vlm, adapter = CASES[name]
    model = model.replace(n_layers=n_layers)
    built = build_vlm_wrapper(model, VISION, adapter, vlm, frames_per_clip=2)
    tower = vit_tower(VISION)
    table = wrapper_table(model, vlm, adapter, tower, tower.dim)
    set_state(built, draw({key: spec.shape for key, spec in table.items()}, 3))
    return built


@compiles
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_graph_breaks(name: str) -> None:
    """With one block of every kind that the architecture has: each is compiled by itself."""
    model = model_of(name, n_layers=getattr(CASES[name][1], "cross_attention_every_n_layers", 1)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    options: dict[str, Any] = {"text_mask": TEXT_MASK, "noise_seed": torch.tensor(3)}
    given = TEXT.flip(1)
    got, labels = compiled(CLIPS, TEXT, given, FRAMES, **options)
    expected, _ = model(CLIPS, TEXT, given, FRAMES, **options)
    assert labels is given
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(CLIPS.flip(0), TEXT.flip(0), given, FRAMES.flip(0), **{**options, "noise_seed": torch.tensor(4)})


@compiles
@pytest.mark.parametrize("name", ["mot", "moma"])
def test_compiles_block_by_block(name: str) -> None:
    model = model_of(name)
    twin = copy.deepcopy(model)
    for block in twin.transformer.layers.values():
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    for each in (model, twin):
        each.run(CLIPS, TEXT, FRAMES, noise_seed=torch.tensor(1)).logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(twin.get_parameter(key).grad, parameter.grad, msg=key)


@compiles
@pytest.mark.parametrize("name", CASES)
def test_layers_share_their_programs(name: str) -> None:
    """However many there are: compiling each takes as long as the first."""
    programs = []
    for n_layers in (4, 8):
        torch._dynamo.reset()
        model, counter = model_of(name, n_layers), CompileCounter()
        compile_blocks(model, torch.device("cpu"), backend=counter)  # type: ignore[arg-type]
        model.run(CLIPS, TEXT, FRAMES, noise_seed=torch.tensor(1)).logits.square().sum().backward()
        programs.append(counter.frame_count)
    assert 0 < programs[0] == programs[1]


@pytest.mark.parametrize("name", CASES)
def test_meta_device_model_is_initialised_throughout(name: str) -> None:
    model_config, vlm, adapter = CASES[name]
    with torch.device("meta"):
        model = build_vlm_wrapper(model_config, VISION, adapter, vlm, frames_per_clip=2)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
    model.init_weights_and_freqs(seed=2)
    expected = build_vlm_wrapper(model_config, VISION, adapter, vlm, frames_per_clip=2)
    expected.init_weights_and_freqs(seed=2)
    for (key, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, msg=key)
    for (key, tensor), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0, msg=key)
    assert torch.isfinite(model(CLIPS, TEXT)[0]).all()


@pytest.mark.parametrize("name", ["mot", "mot_experts", "moma"])
def test_an_absent_modality_still_gets_gradients(name: str) -> None:
    model = model_of(name)
    model.transformer(TEXT).square().sum().backward()
    for key, parameter in model.transformer.named_parameters():
        assert parameter.grad is not None, key
        assert (".image." in key) <= (not parameter.grad.any()), key


def test_training_draws_noise_and_evaluation_does_not() -> None:
    model = model_of("moma")
    first, second = model(CLIPS, TEXT)[0], model(CLIPS, TEXT)[0]
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(model(CLIPS, TEXT)[0], model(CLIPS, TEXT)[0], rtol=0, atol=0)
    seeded = model.run(CLIPS, TEXT, noise_seed=torch.tensor(5)).logits
    model.train()
    torch.testing.assert_close(model.run(CLIPS, TEXT, noise_seed=torch.tensor(5)).logits, seeded, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_copies_after_a_forward(name: str) -> None:
    model = model_of(name).eval()
    truth, _ = model(CLIPS, TEXT)
    torch.testing.assert_close(copy.deepcopy(model)(CLIPS, TEXT)[0], truth, rtol=0, atol=0)


def test_counts_of_the_last_forward() -> None:
    model = model_of("moma")
    model(CLIPS, TEXT, frame_mask=FRAMES, text_mask=TEXT_MASK)
    counts = inner_transformer(model).get_moma_expert_counts()
    assert {layer: {name: number.tolist() for name, number in by.items()} for layer, by in counts.items()} == {
        layer: {"image": [-(-12 * 3 // 10)] * 4, "text": [-(-13 * 3 // 10)] * 4} for layer in range(2)
    }
    assert model.transformer.get_moe_aux_loss().detach().item() == 0.0
    experts = model_of("mot_experts")
    experts(CLIPS, TEXT, frame_mask=FRAMES)
    counted = experts.transformer.get_moma_expert_counts()
    assert {name: int(number.sum()) for name, number in counted[1].items()} == {"image": 2 * 12, "text": 2 * 16}
    assert experts.transformer.get_moe_aux_loss().detach().item() > 3.5
    assert experts.transformer.get_expert_counts() == counted


def test_activations_of_every_part_have_names() -> None:
    model = model_of("mot")
    with capture(model, detach=True) as activations:
        logits, _ = model(CLIPS, TEXT)
    for name in (
        "vision_encoder.layers.0",
        "adapter",
        "transformer.layers.1.attn.q_proj.image",
        "transformer.layers.0",
    ):
        assert torch.isfinite(activations[name]).all()
    torch.testing.assert_close(activations["transformer.output_head"], logits.detach(), rtol=0, atol=0)


def test_experts_choose_by_rank_and_skip_what_is_not_valid() -> None:
    router = ExpertChoiceSigmoidRouter(2, 2, capacity_factor=0.5, gumbel_noise=False)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [3.0, 1.0], [3.0, 2.0], [9.0, 9.0]])
    valid = torch.tensor([True, True, True, False])
    weights, tokens, scores = router(x, valid, return_scores=True)
    assert tokens.tolist() == [[1, 2], [2, 1]]
    torch.testing.assert_close(weights, scores.gather(0, tokens))
    fewer = router.run(x, valid & (x[:, 1] > 0))
    assert fewer.weights[1].tolist() == [0, 0]
    torch.testing.assert_close(router.rerouted(fewer, fewer.tokens).weights, fewer.weights)


def test_bfloat16_models_keep_their_routers_wide() -> None:
    model = model_of("moma").to(torch.bfloat16)
    with capture(model, ["transformer.layers.0.mlp.experts.text.router.gate"]) as activations:
        logits, _ = model(CLIPS.bfloat16(), TEXT)
    assert logits.dtype == torch.bfloat16
    assert activations["transformer.layers.0.mlp.experts.text.router.gate"].dtype == torch.float32
    assert np.isfinite(logits.detach().float().numpy()).all()


def test_noise_that_a_router_draws_for_itself_has_all_digits() -> None:
    router = ExpertChoiceSigmoidRouter(4, 3, capacity_factor=0.5).bfloat16().train()
    noise = router._noise(torch.zeros(64, 4, dtype=torch.bfloat16), None)
    assert noise is not None
    assert noise.dtype == torch.float32
    assert (noise != noise.bfloat16()).float().mean() > 0.9
